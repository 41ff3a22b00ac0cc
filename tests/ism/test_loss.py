"""The objective: who gets which rows, one call with a gradient, and a naive loop that agrees."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pywt

from ism_jax import loss
from ism_jax.loss import LossConfig
from train_jax.errors import UserError

CLASSES = 3
ISM = LossConfig(
  split=(2, 1, 1),
  weights=(1.0, 1.0, 1.0),
  classes=CLASSES,
  class_dropout=0.5,
  w_max=2.0,
  w_step=0.5,
  zero_w_prob=0.25,
  interval_start=0.3,
  bootstrap_guidance=0.0,
  levels=2,
  level_decay=0.5,
  norm="l2",
)
FLOW = replace(ISM, split=(1, 0, 0), w_max=0.0, levels=0)
SHORTCUT = replace(FLOW, split=(7, 0, 1), weights=(7 / 8, 0.0, 1 / 8), bootstrap_guidance=0.5)
B = 32
KEY = jax.random.key(0)


def network(params, x, t, d, label, w):
  """A small network without layers: nonlinear, and every input matters."""
  shift = params["class"][label] * (1 + w) + params["t"] * t + params["d"] * d
  return jnp.tanh(params["a"] * x + shift[:, None, None, None])


def network64(params, x, t, d, label, w):
  """`network` for one row in float64."""
  shift = params["class"][label] * (1 + w) + params["t"] * t + params["d"] * d
  return np.tanh(params["a"] * np.asarray(x, np.float64) + shift)


def make_params(scale):
  values = {"a": 0.7, "t": -0.5, "d": 0.9, "class": np.array([0.5, -1.0, 1.5, 0.2])}
  return jax.tree.map(lambda v: jnp.asarray(scale * v, jnp.float32), values)


PARAMS, TARGET_PARAMS = make_params(1.0), make_params(0.6)


@pytest.fixture(scope="module")
def batch():
  x0, x1 = np.random.default_rng(0).normal(size=(2, B, 4, 4, 1)).astype(np.float32)
  return x0, x1, jnp.arange(B) % CLASSES


compiled_loss = jax.jit(loss.loss, static_argnames=("config", "apply"))
compiled_rows = jax.jit(loss.make_rows, static_argnames=("config", "apply"))


def run(config, batch, params=PARAMS, target_params=TARGET_PARAMS, apply=network):
  return compiled_loss(config, apply, params, target_params, *batch, KEY)


def make_rows(config, batch, params=PARAMS, key=KEY):
  return compiled_rows(config, network, params, TARGET_PARAMS, *batch, key)


def roles_of_rows(split):
  """The role of each of B rows, counted off one by one."""
  wheel = [role for role, share in zip(loss.ROLES, split, strict=True) for _ in range(share)]
  return [wheel[i % len(wheel)] for i in range(B)]


def test_rows_are_dealt_in_turn():
  rows = jnp.arange(B)
  dealt = [part for (part,) in loss.split_rows((5, 2, 1), rows)]
  for role, part in zip(loss.ROLES, dealt, strict=True):
    expected = [i for i, name in enumerate(roles_of_rows((5, 2, 1))) if name == role]
    np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("split", [(1,), (2, 1, 1), (5, 2, 1), (7, 1)])
def test_merging_undoes_splitting(split):
  x = jnp.arange(B * 6).reshape(B, 2, 3)
  label = jnp.arange(B)
  dealt = loss.split_rows(split, x, label)
  assert [len(part) for part, _ in dealt] == [B // sum(split) * share for share in split]
  np.testing.assert_array_equal(loss.merge_rows(split, [part for part, _ in dealt]), x)
  np.testing.assert_array_equal(loss.merge_rows(split, [part for _, part in dealt]), label)


def test_each_device_keeps_its_rows():
  # Rows [0, 8) are one device's: after dealing and merging, what it computes is still about them.
  parts = loss.split_rows((6, 1, 1), jnp.arange(B))
  merged = loss.merge_rows((6, 1, 1), [part for (part,) in parts])
  np.testing.assert_array_equal(merged.reshape(4, 8) // 8, np.arange(4)[:, None] + np.zeros(8))


def test_rows_of_each_role(batch):
  x0, x1, label = batch
  rows = make_rows(ISM, batch)
  assert rows.keys() == set(loss.ROLES)
  for role, part in rows.items():
    mine = [i for i, name in enumerate(roles_of_rows(ISM.split)) if name == role]
    t = np.asarray(part.t)[:, None, None, None]
    np.testing.assert_allclose(part.x, (1 - t) * x0[mine] + t * x1[mine], atol=1e-6)
    kept = np.asarray(part.label) == np.asarray(label)[mine]
    assert np.all(kept | (np.asarray(part.label) == CLASSES))
    assert (0 < np.mean(~kept) < 1) if role == "velocity" else np.all(kept)
  velocity, guidance, consistency = (rows[role] for role in loss.ROLES)
  assert not np.any(velocity.w) and not np.any(velocity.d) and not np.any(guidance.d)
  assert np.all(guidance.w > 0) and np.all(guidance.w <= 2)
  assert np.all(consistency.d >= 1 / 64) and np.all(consistency.t + consistency.d <= 1)
  assert set(np.asarray(consistency.w).tolist()) <= {0.0, 0.5, 1.0, 1.5, 2.0}


def test_all_roles_draw_independently(batch):
  rows = make_rows(ISM, batch)
  velocity, guidance = (np.asarray(rows[role].t) for role in ("velocity", "guidance"))
  assert np.mean(velocity[: len(guidance)] == guidance) < 0.5
  again = make_rows(ISM, batch, key=jax.random.key(1))
  assert np.mean(np.asarray(again["velocity"].t) == velocity) < 0.5


def test_class_dropout_is_a_probability():
  x = jnp.zeros((4000, 1, 1, 1))
  rows = make_rows(replace(FLOW, class_dropout=0.1), (x, x, jnp.zeros(4000, int)))
  assert abs(np.mean(np.asarray(rows["velocity"].label) == CLASSES) - 0.1) < 0.02


def test_zero_w_is_a_probability_and_without_strengths_all_are_zero():
  x = jnp.zeros((8000, 1, 1, 1))
  many = (x, x, jnp.zeros(8000, int))
  assert abs(np.mean(np.asarray(make_rows(ISM, many)["consistency"].w) == 0) - 0.25) < 0.04
  assert not np.any(make_rows(SHORTCUT, many)["consistency"].w)


def haar_distance(error, levels, decay):
  """Weighted energy of the bands of error [h, w], by PyWavelets."""
  low, *details = pywt.wavedec2(error, "haar", level=levels) if levels else [error]
  energies = [sum(np.sum(band**2) for band in bands) for bands in reversed(details)]
  energies.append(np.sum(low**2))
  raw = [decay**level for level in range(levels + 1)]
  sizes = [3 * error.size / 4**level for level in range(1, levels + 1)] + [low.size]
  scale = error.size / np.dot(raw, sizes)
  return scale * np.dot(raw, energies) / error.size


def naive_loss(config, batch):
  """The loss row by row in float64; only the random t, d, w and labels are taken from make_rows."""
  params, target_params = (
    jax.tree.map(lambda v: np.asarray(v, np.float64), p) for p in (PARAMS, TARGET_PARAMS)
  )
  x0s, x1s, _ = (np.asarray(a, np.float64) for a in batch)
  rows = make_rows(config, batch)
  taken = dict.fromkeys(loss.ROLES, 0)
  costs = {role: [] for role in rows}
  for x0, x1, role in zip(x0s, x1s, roles_of_rows(config.split), strict=True):
    i = taken[role]
    taken[role] += 1
    t, d, label, w = (np.asarray(getattr(rows[role], f))[i] for f in ("t", "d", "label", "w"))
    t, d, w = float(t), float(d), float(w)
    x = (1 - t) * x0 + t * x1
    null = config.classes
    if role == "velocity":
      target = x1 - x0
    elif role == "guidance":
      gap = network64(params, x, t, 0, label, 0) - network64(params, x, t, 0, null, 0)
      target = x1 - x0 + (w if t >= config.interval_start else 0) * gap
    else:
      half, steps = d / 2, []
      for start in (t, t + half):
        told = 0 if half == 1 / 128 else half
        s = network64(target_params, x, start, told, label, w)
        if told == 0:
          at = (target_params, x, start, 0)
          s = s + config.bootstrap_guidance * (network64(*at, label, 0) - network64(*at, null, 0))
        steps.append(s)
        x = x + half * s
      target = (steps[0] + steps[1]) / 2
      x = (1 - t) * x0 + t * x1
    error = (network64(params, x, t, d, label, w) - target)[:, :, 0]
    costs[role].append(haar_distance(error, config.levels, config.level_decay))
  means = {role: np.mean(values) for role, values in costs.items()}
  weights = dict(zip(loss.ROLES, config.weights, strict=True))
  return sum(weights[role] * mean for role, mean in means.items()), means


@pytest.mark.parametrize(
  "config",
  [ISM, replace(ISM, levels=0, weights=(0.5, 2.0, 3.0)), replace(SHORTCUT, levels=1), FLOW],
  ids=["ism", "other weights", "shortcut", "flow"],
)
def test_loss_is_that_of_a_naive_loop(config, batch):
  expected, means = naive_loss(config, batch)
  value, metrics = run(config, batch)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert metrics.keys() == {*means, "curvature"}
  for role, mean in means.items():
    np.testing.assert_allclose(metrics[role], mean, rtol=1e-5)


def test_roles_weigh_equally_whatever_their_rows(batch):
  value, metrics = run(replace(ISM, split=(6, 1, 1)), batch)
  np.testing.assert_allclose(value, sum(metrics[role] for role in loss.ROLES), rtol=1e-6)


def test_curvature_is_the_share_of_the_velocity_that_is_not_predicted(batch):
  silent = lambda params, x, *rest: 0 * x  # noqa: E731
  knowing = lambda params, x, *rest: jnp.asarray(batch[1] - batch[0])  # noqa: E731
  config = replace(FLOW, levels=2)
  for apply, expected in ((silent, 1), (knowing, 0)):
    _, metrics = run(config, batch, apply=apply)
    np.testing.assert_allclose(metrics["curvature"], expected, atol=1e-6)


def test_flow_is_plain_flow_matching(batch):
  x0, x1, _ = batch
  config = replace(FLOW, class_dropout=0.0)
  rows = make_rows(config, batch)["velocity"]
  t = np.asarray(rows.t)[:, None, None, None]
  zero = jnp.zeros(B)
  output = network(PARAMS, (1 - t) * x0 + t * x1, rows.t, zero, batch[2], zero)
  value, _ = run(config, batch)
  np.testing.assert_allclose(value, np.mean((output - (x1 - x0)) ** 2), rtol=1e-5)


@pytest.mark.parametrize(
  ("config", "calls"),
  [(ISM, [2 * B // 4, B // 4, B // 4, B]), (FLOW, [B])],
  ids=["ism", "flow"],
)
def test_rows_per_network_call(config, calls, batch):
  # Conditional and null in one call, two half-steps in turn, and all rows with a gradient in one.
  sizes = []

  def counted(params, x, *rest):
    sizes.append(len(x))
    return network(params, x, *rest)

  jax.eval_shape(jax.grad(lambda p: run(config, batch, p, apply=counted)[0]), PARAMS)
  assert sizes == calls


def test_gradient_comes_through_the_last_call_only(batch):
  rows = make_rows(ISM, batch)

  def frozen(params):
    total = 0.0
    for role in rows.values():
      output = network(params, role.x, role.t, role.d, role.label, role.w)
      total += jnp.mean(loss.distance(ISM, output - role.target))
    return total

  expected = jax.jit(jax.grad(frozen))(PARAMS)
  both = jax.jit(jax.grad(lambda p, q: run(ISM, batch, p, q)[0], argnums=(0, 1)))
  gradient, of_target = both(PARAMS, TARGET_PARAMS)
  for name in PARAMS:
    np.testing.assert_allclose(gradient[name], expected[name], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(of_target[name], 0)
  assert all(np.any(g) for g in gradient.values())


def test_only_consistency_reads_the_target_network(batch):
  broken = jax.tree.map(lambda p: p * jnp.nan, TARGET_PARAMS)
  _, metrics = run(ISM, batch, target_params=broken)
  assert np.isfinite(metrics["velocity"]) and np.isfinite(metrics["guidance"])
  assert np.isnan(metrics["consistency"])
  # And its targets do not read the parameters that are trained.
  rows = make_rows(ISM, batch, params=jax.tree.map(lambda p: p * jnp.nan, PARAMS))
  assert np.all(np.isfinite(rows["consistency"].target))


def test_charbonnier_is_another_loss(batch):
  value, _ = run(replace(FLOW, norm="charbonnier"), batch)
  l2, _ = run(FLOW, batch)
  assert np.isfinite(value) and not np.isclose(value, l2, rtol=0.05)
  # A flat error is one coefficient of the low band, 4, whose weight is 16/55 at a decay of 1/2.
  flat = loss.distance(replace(ISM, norm="charbonnier"), jnp.ones((1, 4, 4, 1)))
  np.testing.assert_allclose(flat, (4 - 1e-3) / 55, rtol=1e-5)


def test_a_multiple_is_one_up_to_rounding():
  assert 3 * 0.1 != 0.3
  replace(ISM, w_max=0.3, w_step=0.1)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"norm": "l1"}, "loss.norm='l1'.*'l2' or 'charbonnier'"),
    ({"split": (1, 1)}, "loss.split=.*three counts"),
    ({"split": (0, 1, 1)}, "the first at least 1"),
    ({"split": (2, -1, 1)}, "loss.split"),
    ({"split": (2.5, 2.5, 1)}, "loss.split=.*three counts"),
    ({"w_max": float("inf")}, "loss.w_max=inf must be a multiple"),
    ({"w_max": float("nan")}, "loss.w_max=nan must be a multiple"),
    ({"weights": (1.0, 1.0)}, "loss.weights=.*three numbers"),
    ({"w_max": 0.0}, "1 guidance rows but loss.w_max=0"),
    ({"split": (6, 0, 2)}, "0 guidance rows but loss.w_max=2"),
    ({"w_step": 0.3}, "loss.w_max=2 must be a multiple of loss.w_step=0.3"),
    ({"w_step": 0.0}, "loss.w_step=0, which must be above 0"),
  ],
)
def test_bad_settings_are_refused_in_a_sentence(changes, message):
  with pytest.raises(UserError, match=message):
    replace(ISM, **changes)
