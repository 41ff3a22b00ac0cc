"""SequenceMatch assembled: phases, rollouts in the step, resume with the buffer, bad configs."""

import itertools

import jax
import numpy as np
import optax
import pytest

from configs import seqmatch_arithmetic
from seqmatch_jax import method as seqmatch
from seqmatch_jax.actions import replay
from seqmatch_jax.tokens import BACKSPACE, EOS, PAD
from train_jax import loop
from train_jax import mesh as mesh_lib
from train_jax import state as state_lib
from train_jax.checkpointing.checkpoint import Checkpoints
from train_jax.errors import UserError
from train_jax.step import make_train_step

DECAYS = {"sample": 0.9}


def get_config(options="two_sum", **changes):
  """The debug config; `section__key=value` changes a value."""
  config = seqmatch_arithmetic.get_config(f"{options},debug")
  config.update_from_flattened_dict(
    {name.replace("__", "."): value for name, value in changes.items()}
  )
  return config


def build(config, mesh=None):
  return seqmatch.make_method(config, mesh or mesh_lib.make_mesh())[0]


def steps(config, count):
  """The states and metrics of the first steps, the state before them first."""
  method, tx = build(config), optax.adam(1e-2)
  state = jax.jit(state_lib.create(method, tx, DECAYS, 0))()
  step = jax.jit(make_train_step(method, tx, DECAYS, clip=1.0))
  yield state, None
  for batch in itertools.islice(method.stream(0, 0), count):
    state, metrics = step(state, batch)
    yield state, metrics


def test_phases_and_rollouts_come_when_the_config_says():
  """Clean data and alpha = 0 first; then noise, alpha annealed in, rollouts every `refresh`."""
  config = get_config(loss__warmup=3, loss__anneal=4, noise__rate=0.9, buffer__refresh=2)
  batches = list(itertools.islice(build(config).stream(0, 0), 8))
  assert [np.any(batch["action"] == BACKSPACE) for batch in batches] == [False] * 3 + [True] * 5
  filled, penalties = [], []
  for state, metrics in steps(config, 8):
    filled.append(int(state.aux_state["filled"]))
    penalties.append(float(metrics["penalty"]) if metrics else 0)
  # Steps 0 to 2 warm up; steps 3, 5 and 7 write 8 rollouts each into 16 rows.
  assert filled == [0, 0, 0, 0, 8, 8, 16, 16, 16]
  assert penalties[:5] == [0] * 5 and min(penalties[5:]) > 0

  # What was written are legal trajectories that go on from the prompts of those batches.
  memory = jax.device_get(state.aux_state)
  for row, actions in enumerate(memory["actions"]):
    batch = batches[7 if row < 8 else 5]
    length = memory["length"][row]
    assert length == batch["prompt_length"][row % 8]
    prompt = memory["prompt"][row]
    np.testing.assert_array_equal(prompt, batch["prompt"][row % 8])
    replay(prompt[:length], actions)  # raises where a <backspace> meets the prompt
    ends = np.flatnonzero(actions == EOS)
    assert len(ends) <= 1 and (len(ends) == 0 or np.all(actions[ends[0] + 1 :] == PAD))


def test_the_devices_share_out_what_is_replayed_in_every_part_of_a_batch():
  config = get_config(buffer__draw=3, optim__grad_accum_steps=2, data__sequences_per_row=1)
  method, mesh = build(config), mesh_lib.make_mesh()
  state = jax.eval_shape(state_lib.create(method, optax.adam(1e-2), DECAYS, 0))
  made = jax.eval_shape(method.augment, state, next(method.stream(0, 0)), jax.random.key(0))[1]
  assert len(made["model"]["token"].shape) == 2 and len(made["token"]) == 16
  assert made["model"]["token"].shape[0] == 2 * mesh.size


@pytest.mark.parametrize("options", ["two_sum,mle", "two_sum,bc"])
def test_baselines_keep_no_buffer(options):
  (state, _), (_, metrics) = steps(get_config(options), 1)
  assert state.aux_state == ()
  assert "penalty_model" not in metrics and float(metrics["penalty"]) == 0
  np.testing.assert_allclose(metrics["loss"], metrics["nll"], rtol=1e-6)


def test_the_loss_does_not_depend_on_how_many_share_a_row(one_device):
  rows, losses = [], []
  for n in (1, 2):
    config = get_config("two_sum,bc", data__sequences_per_row=n, noise__rate=0.5, loss__warmup=0)
    method = build(config, one_device)
    state = jax.jit(state_lib.create(method, optax.adam(1e-2), DECAYS, 0))()
    _, batch = method.augment(state, next(method.stream(0, 0)), jax.random.key(0))
    rows.append(len(batch["token"]))
    losses.append(jax.jit(method.loss)(state.params, {}, batch, jax.random.key(0))[1])
  assert rows == [16, 8]
  for name, value in losses[0].items():
    np.testing.assert_allclose(losses[1][name], value, rtol=1e-5, err_msg=name)


def test_learns():
  config = get_config(loss__warmup=20, loss__anneal=10, buffer__size=8)
  losses = [float(metrics["nll"]) for _, metrics in steps(config, 20) if metrics]
  assert np.mean(losses[15:]) < 0.9 * losses[0]


@pytest.fixture
def train(settings, one_device):
  """(workdir, steps) trains the debug config, or goes on with it; evaluates nothing."""

  def run(workdir, steps):
    method, metadata = seqmatch.make_method(get_config(), one_device)
    method = method._replace(evaluate=lambda params, step, final: iter(()))
    tx = optax.adam(1e-3)
    record = {"config": {}, "metadata": metadata}
    engine = tx, optax.constant_schedule(1e-3), DECAYS, settings(steps=steps), one_device
    return loop.train(method, *engine, workdir, record)

  return run


def test_resume_is_exact_with_its_buffer(tmp_path, train, one_device, make_state, differences):
  method = build(get_config(), one_device)
  abstract = jax.eval_shape(lambda: make_state(method, optax.adam(1e-3), one_device, DECAYS))
  states = []
  for name, parts in (("whole", (8,)), ("parts", (4, 8))):
    for count in parts:
      assert train(tmp_path / name, count)
    checkpoints = Checkpoints(tmp_path / name)
    states.append(checkpoints.restore(abstract)[0])
    checkpoints.close()
  assert int(states[0].aux_state["filled"]) == 16
  assert differences(*states) == []


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"loss__gamma": 0.0}, r"loss.gamma=0.0 must lie in \(0, 1\]"),
    ({"loss__backspace": False}, r"types errors that loss.backspace=False cannot erase"),
    ({"noise__rate": 1.5}, r"noise.rate=1.5 must be between 0 and 1"),
    ({"data__source": "poems"}, r"data.source='poems' is unknown; choose from files, add_or"),
    (
      {"data__source": "files", "data__train": "nowhere"},
      r"data.train='nowhere' and data.test='': give both, or neither",
    ),
    (
      {"data__source": "files", "data__train": "nowhere", "data__test": "nowhere"},
      r"the data file 'nowhere' cannot be read",
    ),
    ({"data__train": "here"}, r"data.train='here' and data.test='' are not read where data.source"),
    ({"data__examples": 0}, r"data.examples=0 must be at least 1"),
    ({"data__context": 5}, r"the context of 5 tokens"),
    ({"data__sequences_per_row": 3}, r"batch=16 does not divide into rows of 3 examples"),
    (
      {"data__sequences_per_row": 2, "optim__grad_accum_steps": 2},
      r"batch=16 .* 16 parts \(devices times optim.grad_accum_steps\)",
    ),
    ({"buffer__refresh": 0}, r"buffer.refresh=0 must be at least 1"),
    ({"buffer__rollouts": 17, "buffer__size": 20}, r"rollouts=17 must be at most batch=16"),
    ({"eval__max_backspaces": -1}, r"eval.max_backspaces=-1 must be at least 0"),
    ({"model__heads": 3}, r"model.width=16 must be a multiple of 2 x model.heads=3"),
  ],
)
def test_bad_configs_are_refused_in_a_sentence(changes, message):
  with pytest.raises(UserError, match=message):
    build(get_config(**changes))
