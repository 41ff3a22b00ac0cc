"""The train step against a hand-written loop, and what it does with numbers that are not finite."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train_jax.state import TrainState
from train_jax.step import make_train_step, no_augment

DECAYS = {"target": 0.05, "sample": 0.99}  # apart from the first step on


CLIP = 0.7


class Setup(NamedTuple):
  """A state of step 0, the jitted step, and the optimiser in it."""

  state: TrainState
  step: Callable
  tx: optax.GradientTransformation


@pytest.fixture(scope="module")
def setup(method, make_state, one_device):
  """(tx, clip, method, parts) -> Setup."""

  def make(tx, clip=CLIP, method=method, parts=1):
    step = jax.jit(make_train_step(method, tx, DECAYS, clip, parts))
    return Setup(make_state(method, tx, one_device, DECAYS), step, tx)

  return make


@pytest.fixture(scope="module")
def adamw(setup):
  return setup(optax.adamw(0.05, weight_decay=0.1))


def keys_of(state):
  """The keys that the step draws from, for (augment, loss)."""
  return jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step))


def test_step_equals_a_handwritten_loop(adamw, batch):
  state = adamw.state
  layer = jax.device_get(state.params["layer"])
  update, moments = jax.jit(adamw.tx.update), jax.jit(adamw.tx.init)({"layer": layer})
  average = dict.fromkeys(DECAYS, layer)
  for i in range(6):
    rows = batch(i)
    noise = 0.1 * np.asarray(jax.random.normal(keys_of(state)[1], rows["y"].shape))
    target = rows["x"] @ average["target"]["kernel"] + average["target"]["bias"]
    goal = rows["y"] + noise + 0.1 * target
    error = rows["x"] @ layer["kernel"] + layer["bias"] - goal
    grads = {"kernel": 2 * rows["x"].T @ error / error.size, "bias": 2 * error.sum(0) / error.size}
    norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
    clipped = {name: g * min(1, CLIP / norm) for name, g in grads.items()}
    updates, moments = update({"layer": clipped}, moments, {"layer": layer})
    layer = {name: layer[name] + np.asarray(updates["layer"][name]) for name in layer}
    for name, decay in DECAYS.items():
      d = min(decay, (1 + i) / (10 + i))
      average[name] = {k: d * e + (1 - d) * layer[k] for k, e in average[name].items()}

    state, metrics = adamw.step(state, rows)
    np.testing.assert_allclose(metrics["loss"], (error**2).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
  assert int(state.step) == 6
  pairs = [(state.params["layer"], layer)]
  pairs += [(state.ema[name]["layer"], average[name]) for name in DECAYS]
  for found, wanted in pairs:
    for name in layer:
      np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_gradient_in_parts_is_the_mean_of_theirs(setup, method, batch, parts):
  """Each of every n-th row, with a key of its own; what is no row is the same in all."""

  def augment(state, rows, key):
    return state.aux_state, {**rows, "scale": jnp.float32(3)}

  def loss(params, ema, rows, key):
    value, metrics = method.loss(params, ema, rows, key)
    first = rows["x"][0, 0]
    return rows["scale"] * value, {**metrics, "first": first, "first_max": first}

  changed = method._replace(augment=augment, loss=loss)
  state, step, _ = setup(optax.sgd(1.0), 1e6, changed, parts)
  rows = batch(0)
  new, metrics = step(state, rows)
  grad = jax.jit(jax.value_and_grad(lambda *args: method.loss(*args)[0]))
  found = []
  for i, key in enumerate(jax.random.split(keys_of(state)[1], parts)):
    part = {name: values[i::parts] for name, values in rows.items()}
    found.append(grad(state.params, state.ema, part, key))
  value, wanted = jax.tree.map(lambda *parts: 3 * np.mean(parts, axis=0), *found)
  np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
  np.testing.assert_allclose(metrics["first"], rows["x"][:parts, 0].mean(), rtol=1e-5)
  assert metrics["first_max"] == rows["x"][:parts, 0].max()
  moved = jax.tree.map(jnp.subtract, state.params, new.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), moved, wanted)


@pytest.mark.parametrize("clip, active", [(0.1, True), (1e6, False)])
def test_gradient_is_clipped_to_global_norm(setup, batch, clip, active):
  state, step, _ = setup(optax.sgd(1.0), clip)
  new, metrics = step(state, batch(0))
  moved = optax.tree.norm(optax.tree.sub(new.params, state.params))
  assert (metrics["grad_norm"] > clip) == active
  np.testing.assert_allclose(moved, clip if active else metrics["grad_norm"], rtol=1e-5)


def spoil_batch(value):
  def spoil(state, rows):
    rows["x"][3, 1] = value
    return state, rows

  return spoil


def spoil_gradient(state, rows):
  rows["poison"][0] = 1
  return state, rows


def spoil_gradient_norm(state, rows):
  rows["x"] *= 1e10  # loss and gradient are finite, the square of the gradient's norm is not
  return state, rows


def spoil_average(value):
  def spoil(state, rows):
    bias = state.ema["target"]["layer"]["bias"].at[0].set(value)
    layer = {**state.ema["target"]["layer"], "bias": bias}
    return dataclasses.replace(state, ema={**state.ema, "target": {"layer": layer}}), rows

  return spoil


SPOILERS = {  # and whether the loss is still finite
  "nan in the batch": (spoil_batch(np.nan), False),
  "inf in the batch": (spoil_batch(np.inf), False),
  "nan in the gradient": (spoil_gradient, True),
  "overflow of the gradient's norm": (spoil_gradient_norm, True),
  "nan in the target average": (spoil_average(np.nan), False),
  "inf in the target average": (spoil_average(np.inf), False),
}


@pytest.mark.parametrize("spoil, finite_loss", SPOILERS.values(), ids=SPOILERS.keys())
def test_nothing_that_is_not_finite_is_applied(adamw, batch, differences, spoil, finite_loss):
  good, metrics = adamw.step(adamw.state, batch(0))
  assert int(metrics["skipped"]) == 0
  state = good
  for count in (1, 2):
    before, rows = spoil(state, batch(count))
    state, metrics = adamw.step(before, rows)
    assert np.isfinite(metrics["loss"]) == finite_loss and not np.isfinite(metrics["grad_norm"])
    assert int(state.skipped) == int(metrics["skipped"]) == count
    assert int(state.step) == 1 + count
    untouched = dataclasses.replace(before, step=state.step, skipped=state.skipped)
    assert differences(state, untouched) == []
  state, metrics = adamw.step(dataclasses.replace(state, ema=good.ema), batch(3))
  assert int(state.skipped) == int(metrics["skipped"]) == 0
  moved = {path.partition("[")[0] for path in differences(state, good)}
  assert moved == {".step", ".params", ".opt_state", ".ema", ".aux_state"}


def test_auxiliary_state_of_augment_is_stored(adamw, batch):
  state = adamw.state
  for i in range(2):
    before = state
    state, _ = adamw.step(state, batch(i))
  assert int(state.aux_state["count"]) == 2
  np.testing.assert_array_equal(state.aux_state["kernel"], before.params["layer"]["kernel"])
  np.testing.assert_array_equal(
    state.aux_state["draw"], jax.random.normal(keys_of(before)[0], (2,))
  )
  np.testing.assert_array_equal(state.aux_state["rows"][:2], [batch(0)["x"][0], batch(1)["x"][0]])


def test_augment_passes_no_gradient(method, setup, batch):
  def predict(params, x):
    return x @ params["layer"]["kernel"] + params["layer"]["bias"]

  def augment(state, rows, key):
    return state.aux_state, {**rows, "y": predict(state.params, rows["x"]) + 1}

  def loss(params, ema, rows, key):
    return jnp.mean((predict(params, rows["x"]) - rows["y"]) ** 2), {}

  state, step, _ = setup(optax.sgd(1.0), 1e6, method._replace(augment=augment, loss=loss))
  new, metrics = step(state, batch(0))
  np.testing.assert_allclose(metrics["loss"], 1, rtol=1e-5)
  # -d/db mean((p - (p' + 1))^2) = 2 / 3 for each of 3 biases; 0 if y moved along.
  moved = new.params["layer"]["bias"] - state.params["layer"]["bias"]
  np.testing.assert_allclose(moved, 2 / 3, rtol=1e-5)


def test_no_augment_changes_nothing(adamw, batch):
  rows = batch(0)
  aux_state, same = no_augment(adamw.state, rows, jax.random.key(0))
  assert aux_state is adamw.state.aux_state and same is rows


def test_randomness_is_a_function_of_rng_and_step(adamw, batch):
  def draws(state, rows):
    new, metrics = adamw.step(state, rows)
    return np.append(new.aux_state["draw"], metrics["noise"] / 0.1)

  state = adamw.state
  first = draws(state, batch(0))
  halved = jax.tree.map(lambda p: p / 2, (state.params, state.ema))
  other = dataclasses.replace(state, params=halved[0], ema=halved[1], skipped=state.skipped + 2)
  np.testing.assert_array_equal(draws(other, batch(7)), first)
  later = draws(dataclasses.replace(state, step=state.step + 1), batch(0))
  reseeded = draws(dataclasses.replace(state, rng=state.rng + 1), batch(0))
  assert len(np.unique([*first, *later, *reseeded])) == 9  # no draw comes twice
