"""What a train step does with a batch: its phases, rollouts, replay, and the loss of its parts."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmatch_jax import algorithm, buffer
from seqmatch_jax import loss as loss_lib
from seqmatch_jax.actions import Noise, tree
from seqmatch_jax.algorithm import Learner
from seqmatch_jax.buffer import BufferConfig
from seqmatch_jax.loss import LossConfig
from seqmatch_jax.tokens import BACKSPACE, BOS, EOS, PAD
from seqmatch_jax.transformer import TransformerFunctions
from train_jax.step import mean_of_parts

X, V, ACTIONS = BACKSPACE, 9, 6
LOSS = LossConfig("chi2_mixture", 0.2, 0.95, True, unlikelihood=0.3, warmup=3, anneal=4)
MEMORY = BufferConfig(size=6, refresh=2, rollouts=2, draw=3)
# A policy that looks at the last token only; half of it is frozen.
PARAMS = {"table": 2 * np.random.default_rng(0).normal(size=(V, V)), "part": {"bias": np.ones(V)}}
FROZEN = {"part": {"scale": np.float64(0.5)}}
ROWS = [[[4, 5, X, EOS]], [[6, EOS], [7, 8, 4, EOS]], [[EOS]], [[5, X, 4, EOS], [8, EOS]]]
OWN = np.array([[4, 4, EOS, PAD, PAD, PAD], [5, X, 6, 7, 8, EOS]], np.int32)


def apply(params, token, position, end):
  return params["table"][token] * params["part"]["scale"] + params["part"]["bias"]


def make_learner(loss=LOSS, asked=None, multiple=1, apply=apply):
  """A learner whose rollouts are OWN; what they are asked for goes into `asked`."""

  def generate(params, prompt, length, key, row, temperature, erases, allow_retype):
    if asked is not None:
      asked.append((params, prompt, length, key, row, temperature, erases, allow_retype))
    return SimpleNamespace(actions=jnp.asarray(OWN[: len(prompt)]))

  network = TransformerFunctions(None, None, apply, None, None, None)
  return Learner(loss, MEMORY, network, generate, nodes=8, multiple=multiple)


def state_at(step, memory=()):
  zeros = jax.tree.map(np.zeros_like, PARAMS)
  return SimpleNamespace(step=jnp.int32(step), params=PARAMS, ema=zeros, aux_state=memory)


@pytest.fixture
def batch(make_batch):
  rows, _ = make_batch(ROWS)
  prompt, length = np.tile(np.int32([BOS, 6, 8]), (4, 1)), np.full(4, 3, np.int32)
  prompt[:, 1] = range(4, 8)  # told apart
  return rows | {"prompt": prompt, "prompt_length": length}


@pytest.mark.parametrize(
  ("warmup", "anneal", "expected"),
  [(3, 4, [0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1]), (2, 0, [0, 0, 0, 1]), (0, 2, [0, 0.5, 1, 1])],
)
def test_alpha_is_0_to_the_end_of_the_warm_up_and_grows_linearly(warmup, anneal, expected):
  config = LossConfig("chi2", 0.1, 1.0, True, warmup=warmup, anneal=anneal)
  found = [float(algorithm.alpha_scale(config, jnp.int32(i))) for i in range(len(expected))]
  assert found == expected


@pytest.mark.parametrize("position", [0, 2, 3, 7])
def test_noise_begins_after_the_warm_up_where_the_data_are(position):
  noise = Noise(rate=0.4, max_errors=2, run=0.1)

  def batches(noise, seed, position):
    return ((noise, seed, i) for i in itertools.count(position))

  found = list(itertools.islice(algorithm.stream(LOSS, noise, batches, 5, position), 6))
  quiet = Noise(rate=0.0, max_errors=2, run=0.1)  # of the same shapes
  assert found == [(quiet if i < 3 else noise, 5, i) for i in range(position, position + 6)]


@pytest.mark.parametrize("erases", [True, False])
def test_the_policy_of_now_is_rolled_out_exactly_when_due(erases, batch):
  asked, due, filled = [], [], []
  learner = make_learner(LossConfig("chi2_mixture", 0.2, 0.95, erases, warmup=3), asked)
  memory = buffer.create(6, 3, ACTIONS)
  with jax.disable_jit():
    for step in range(10):
      before = len(asked)
      memory, _ = algorithm.augment(
        learner, state_at(step, memory), batch, jax.random.key(step), FROZEN
      )
      due += [step] * (len(asked) - before)
      filled.append(int(memory["filled"]))
  assert due == [3, 5, 7, 9] and filled == [0, 0, 0, 2, 2, 4, 4, 6, 6, 6]
  for params, prompt, length, _, row, *how in asked:
    assert params["table"] is PARAMS["table"] and params["part"]["scale"] == 0.5  # no average's
    np.testing.assert_array_equal(prompt, batch["prompt"][:2])
    np.testing.assert_array_equal(length, [3, 3])
    np.testing.assert_array_equal(row, [0, 1])
    assert how == [1.0, erases, True]  # temperature 1, and it may retype: draws of the policy
  assert len({jax.random.key_data(each[3]).tobytes() for each in asked}) == 4
  np.testing.assert_array_equal(memory["actions"], np.tile(OWN, (3, 1)))
  np.testing.assert_array_equal(memory["prompt"], np.tile(batch["prompt"][:2], (3, 1)))


def test_replayed_rows_are_the_buffer_s_trees_and_an_empty_buffer_weighs_nothing():
  learner, key = make_learner(multiple=4), jax.random.key(1)
  empty = buffer.create(6, 3, ACTIONS)
  assert not algorithm.replay(learner, empty, key)["weight"].any()
  prompt, length = np.tile(np.int32([BOS, 6, 8]), (2, 1)), np.full(2, 3, np.int32)
  found = algorithm.replay(learner, buffer.insert(empty, prompt, length, OWN), key)
  wanted = tree(prompt, length, OWN, 8)
  rows = [OWN.tolist().index(row) for row in found["action"][:3].tolist()]
  assert set(rows) == {0, 1}
  for name, values in wanted.items():
    np.testing.assert_array_equal(found[name][:3], values[rows], err_msg=name)
  # Three rows are drawn; what fills them up, for all devices to share, carries nothing.
  assert len(found["weight"]) == 4 and not found["weight"][3].any()


def test_off_policy_nothing_is_rolled_out_or_replayed(batch):
  asked = []
  learner = make_learner(LossConfig("chi2", 0.2, 0.95, True), asked)
  memory, made = algorithm.augment(learner, state_at(4), batch, jax.random.key(0), FROZEN)
  assert memory == () and "model" not in made and not asked and made["alpha_scale"] == 1
  assert "penalty_model" not in algorithm.batch_loss(learner, PARAMS, {}, made, None, FROZEN)[1]


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_where_alpha_is_0_a_pass_is_saved_and_the_loss_is_the_same(scale, batch, float64):
  passes = []

  def counted(*args):
    jax.debug.callback(lambda: passes.append(1))
    return apply(*args)

  memory = buffer.insert(
    buffer.create(6, 3, ACTIONS), batch["prompt"][:2], batch["prompt_length"][:2], OWN
  )
  state = state_at(2, memory)  # of the warm-up: nothing is rolled out
  learner = make_learner(apply=counted)
  _, made = algorithm.augment(learner, state, batch, jax.random.key(0), FROZEN)
  made["alpha_scale"] = jnp.float64(scale)
  got = jax.jit(lambda params: algorithm.batch_loss(learner, params, {}, made, None, FROZEN))(
    PARAMS
  )
  jax.block_until_ready(got)
  jax.effects_barrier()
  assert len(passes) == (2 if scale else 1)
  params = {**PARAMS, "part": {**PARAMS["part"], **FROZEN["part"]}}
  both = [apply(params, rows["token"], None, None) for rows in (made, made["model"])]
  wanted = loss_lib.loss(LOSS, both[0], made, made["model"], both[1], scale)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), got, wanted)
  assert (float(got[1]["penalty_model"]) > 0) == (scale > 0)


@pytest.mark.parametrize("parts", [2, 4])
def test_equal_parts_of_the_rows_average_to_the_whole_in_value_and_gradient(parts, batch, float64):
  """Of rows with different numbers of actions and trajectories, the model's own likewise."""
  learner = make_learner(multiple=4)
  memory = buffer.create(6, 3, ACTIONS)
  _, made = algorithm.augment(learner, state_at(5, memory), batch, jax.random.key(0), FROZEN)
  assert len({*made["weight"].sum(1).tolist()}) > 2 and made["alpha_scale"] > 0
  key = jax.random.key(1)

  def grad(batch, key):
    def loss(params):
      return algorithm.batch_loss(learner, params, {}, batch, key, FROZEN)

    return jax.value_and_grad(loss, has_aux=True)(PARAMS)

  whole, mean = (
    jax.jit(lambda n=n: mean_of_parts(grad, n, PARAMS, made, key))() for n in (1, parts)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), mean, whole)
  apart = jax.jit(grad)(jax.tree.map(lambda a: a[:1] if a.ndim else a, made), key)[0][0]
  assert abs(apart - whole[0][0]) > 1e-3
