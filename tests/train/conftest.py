"""A run of the loop, and what it leaves; a metadata server."""

import http.server
import itertools
import json
import threading
from types import SimpleNamespace

import jax
import optax
import pytest

from train_jax import loop
from train_jax.checkpoint import Checkpoints

DECAYS = {"target": 0.5, "sample": 0.99}
RECORD = {"config": {"name": "tiny"}, "facts": {"classes": 3}}


@pytest.fixture(scope="module")
def tx():
  return optax.adamw(optax.linear_schedule(0.05, 0.01, 8))


@pytest.fixture
def train(method, tx, one_device, settings):
  """(workdir, method, mesh, given, **settings) -> what loop.train returns."""

  def run(workdir, method=method, mesh=one_device, given=None, **kwargs):
    return loop.train(method, tx, DECAYS, settings(**kwargs), mesh, workdir, RECORD, given)

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
