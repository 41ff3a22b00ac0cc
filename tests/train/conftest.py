"""A run of the loop, and what it leaves; stored steps; a metadata server."""

import http.server
import itertools
import json
import shutil
import threading
from types import SimpleNamespace

import jax
import optax
import pytest
from absl import logging as absl_logging

from tests.train.stored_steps import make_state as state_of
from tests.train.stored_steps import meta_of
from train_jax import loop
from train_jax import mesh as mesh_lib
from train_jax.checkpointing.checkpoint import Checkpoints

RATE = optax.linear_schedule(0.05, 0.01, 8)
DECAYS = {"target": 0.05, "sample": 0.99}  # apart from the first step on
RECORD = {"config": {"name": "tiny"}, "metadata": {"classes": 3}}


@pytest.fixture(scope="module")
def tx():
  return optax.adamw(RATE)


@pytest.fixture
def train(method, tx, one_device, settings):
  """(workdir, method, mesh, init_params, **settings) -> what loop.train returns."""

  def run(workdir, method=method, mesh=one_device, init_params=dict, **kwargs):
    return loop.train(
      method, tx, RATE, DECAYS, settings(**kwargs), mesh, workdir, RECORD, init_params
    )

  return run


@pytest.fixture
def load(method, tx, make_state, one_device):
  """workdir -> (state, meta) of its newest checkpoint."""
  abstract = jax.eval_shape(lambda: make_state(method, tx, one_device, DECAYS))

  def run(workdir):
    checkpoints = Checkpoints(workdir)
    state, meta = checkpoints.restore(abstract)
    checkpoints.close()
    return state, meta

  return run


@pytest.fixture
def lines():
  """workdir -> the records of its metrics."""
  return lambda workdir: [
    json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()
  ]


@pytest.fixture
def losses(lines):
  """workdir -> [(step, loss)]."""
  return lambda workdir: [(line["step"], line["loss"]) for line in lines(workdir) if "loss" in line]


@pytest.fixture
def stream_that():
  """(act, method) -> the method, calling `act(position)` before each batch is handed out."""

  def change(act, method):
    def stream(seed, position):
      for i in itertools.count(position):
        act(i)
        yield next(method.stream(seed, i))

    return method._replace(stream=stream)

  return change


@pytest.fixture(scope="session")
def states():
  """The states of steps 1 and 2."""
  return {step: state_of(step) for step in (1, 2)}


@pytest.fixture(scope="session")
def saved(states, tmp_path_factory):
  """A run's directory with steps 1 and 2; not to be written to."""
  workdir = tmp_path_factory.mktemp("saved")
  checkpoints = Checkpoints(workdir)
  for step, state in states.items():
    checkpoints.save(state, meta_of(step))
  checkpoints.close()
  return workdir


@pytest.fixture
def workdir(saved, tmp_path):
  """A copy of `saved`, to be damaged."""
  return shutil.copytree(saved, tmp_path / "run")


@pytest.fixture(scope="session")
def abstract(states, one_device):
  """With shardings, as the loop has it: Orbax would take those that are stored in the step."""
  return mesh_lib.abstract_state(jax.eval_shape(lambda: states[1]), one_device)


@pytest.fixture
def restore(abstract):
  """workdir -> (state, meta), by a manager of its own."""

  def run(workdir):
    checkpoints = Checkpoints(workdir)
    try:
      return checkpoints.restore(abstract)
    finally:
      checkpoints.close()

  return run


@pytest.fixture
def log(monkeypatch):
  """What was logged as an error."""
  lines = []
  monkeypatch.setattr(absl_logging, "error", lambda text, *args: lines.append(text % args))
  return lines


@pytest.fixture
def metadata_server():
  """Answers as a Google VM's does, from `answers`: key -> value. `host` is where it is."""
  answers = {}

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      found = answers.get(self.path.removeprefix("/computeMetadata/v1/instance/"))
      self.send_response(200 if found and self.headers["Metadata-Flavor"] == "Google" else 404)
      self.end_headers()
      self.wfile.write((found or "").encode())

    def log_message(self, *args):
      pass

  with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield SimpleNamespace(host=f"127.0.0.1:{server.server_port}", answers=answers)
    server.shutdown()
