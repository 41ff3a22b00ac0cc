"""What the network regresses on, on fields whose answers are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax import loss
from ism_jax.path import interpolate

NULL = 3
B = 6


def field(params, x, t, d, label, w):
  """A network in which every input matters, and w and d do not cancel in s(c) - s(null)."""
  per_row = params["class"][label] * (1 + w) * (1 + 3 * d) * (1 + t)
  return params["a"] * x + per_row[:, None, None, None]


@pytest.fixture(scope="module")
def batch():
  rng = np.random.default_rng(0)
  x0, x1 = rng.normal(size=(2, B, 2, 2, 1)).astype(np.float32)
  return x0, x1, jnp.array([0, 1, 2, NULL, 1, 0])


@pytest.fixture(scope="module")
def params():
  return {"a": jnp.float32(0.7), "class": jnp.array([0.5, -1.0, 2.0, 0.25])}


def column(values):
  return np.asarray(values, np.float32)[:, None, None, None]


def consistency(apply, batch, t, step, w, params=None, baked=0.0):
  x0, x1, label = batch
  t, step, w = (jnp.broadcast_to(jnp.float32(a), (B,)) for a in (t, step, w))
  rows = loss.consistency_rows(apply, params, x0, x1, t, step, label, w, baked, NULL)
  return rows, np.asarray(interpolate(x0, x1, t))


def test_velocity_rows(batch):
  x0, x1, label = batch
  t = jnp.linspace(0, 1, B)
  rows = loss.velocity_rows(x0, x1, t, label)
  np.testing.assert_array_equal(rows.target, x1 - x0)
  np.testing.assert_array_equal(rows.x[0], x0[0])
  np.testing.assert_array_equal(rows.x[-1], x1[-1])
  np.testing.assert_array_equal(rows.t, t)
  np.testing.assert_array_equal(rows.label, label)
  assert not np.any(rows.d) and not np.any(rows.w)


@pytest.mark.parametrize("step", [1.0, 0.5, 1 / 16])
def test_two_euler_half_steps_compose_on_a_linear_field(batch, step):
  # dx/dt = a x: two Euler steps of d = step/2 multiply x by (1 + a d)^2.
  a, d = -1.3, step / 2
  rows, x = consistency(lambda p, x, *_: a * x, batch, 0.0, step, 0.0)
  np.testing.assert_allclose(rows.target, x * ((1 + a * d) ** 2 - 1) / step, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("step", [1.0, 0.5, 1 / 16])
def test_the_exact_flow_of_a_linear_field_is_self_consistent(batch, step):
  # s(x, d) = x (e^{a d} - 1) / d is the exact step of every size: the target is s at 2d.
  a = -1.3
  exact = lambda d: (np.exp(a * d) - 1) / d  # noqa: E731
  rows, x = consistency(
    lambda p, x, t, d, *_: x * ((jnp.exp(a * d) - 1) / d)[:, None, None, None], batch, 0.0, step, 0
  )
  np.testing.assert_allclose(rows.target, x * exact(step), rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(rows.d, step)


def test_the_second_half_step_starts_d_later(batch):
  t, step = np.array([0, 0.25, 0.5, 0.5, 0.75, 0]), np.array([1, 0.25, 0.5, 0.25, 0.25, 0.5])
  rows, _ = consistency(
    lambda p, x, t, *_: 0 * x + (t**2)[:, None, None, None], batch, t, step, 0.0
  )
  expected = (t**2 + (t + step / 2) ** 2) / 2
  np.testing.assert_allclose(rows.target[:, 0, 0, 0], expected, rtol=1e-6)


def test_half_steps_are_taken_with_half_the_step_size_and_the_same_w(batch):
  step = np.array([1, 0.5, 1 / 4, 1 / 32, 1 / 64, 1 / 64])
  told = np.array([0.5, 0.25, 1 / 8, 1 / 64, 0, 0])  # the finest step is told as 0
  w = np.arange(B) / 4
  see_d, _ = consistency(lambda p, x, t, d, *_: 0 * x + d[:, None, None, None], batch, 0.0, step, w)
  see_w, _ = consistency(
    lambda p, x, t, d, label, w: 0 * x + w[:, None, None, None], batch, 0.0, step, w
  )
  np.testing.assert_array_equal(see_d.target[:, 0, 0, 0], told)
  np.testing.assert_array_equal(see_w.target[:, 0, 0, 0], w)
  np.testing.assert_array_equal(see_w.w, w)
  np.testing.assert_array_equal(see_w.d, step)


def test_consistency_targets_add_no_guidance(batch, params):
  # Guidance is an input only: with w = 2 the class effect is (1 + w), once, whatever the step.
  frozen = {**params, "a": jnp.float32(0)}
  rows, _ = consistency(field, batch, 0.0, 1 / 64, 2.0, frozen)
  mean_time = 1 + (1 / 128) / 2
  expected = np.asarray(params["class"])[batch[2]] * 3 * mean_time
  np.testing.assert_allclose(rows.target[:, 0, 0, 0], expected, rtol=1e-5)


def test_baked_guidance_is_in_the_finest_step_only(batch, params):
  classes = np.asarray(params["class"])
  own = classes[batch[2]]
  step = np.array([1 / 64, 1 / 64, 1 / 32, 1 / 64, 1.0, 0.5])
  flat = lambda p, x, t, d, label, w: 0 * x + p["class"][label][:, None, None, None]  # noqa: E731
  rows, _ = consistency(flat, batch, 0.0, step, 0.0, params, baked=1.5)
  expected = own + np.where(step == 1 / 64, 1.5, 0) * (own - classes[NULL])
  np.testing.assert_allclose(rows.target[:, 0, 0, 0], expected, rtol=1e-6)
  assert rows.target[3, 0, 0, 0] == classes[NULL]  # null rows have nothing to be guided by


def test_baked_guidance_moves_the_point_of_the_second_half_step(batch, params):
  frozen = {**params, "class": 0 * params["class"] + jnp.array([1.0, 1.0, 1.0, 0.0])}
  d, a, baked = 1 / 128, float(params["a"]), 1.5
  plain = lambda p, x, t, d, label, w: (  # noqa: E731
    p["a"] * x + p["class"][label][:, None, None, None]
  )
  rows, x = consistency(plain, batch, 0.0, 2 * d, 0.0, frozen, baked)
  guided = column([1, 1, 1, 0, 1, 1]) * (1 + baked)
  first = a * x + guided
  second = a * (x + d * first) + guided
  np.testing.assert_allclose(rows.target, (first + second) / 2, rtol=1e-5)


def test_guidance_target_with_interval(batch, params):
  x0, x1, label = batch
  t = jnp.array([0.0, 0.29, 0.3, 0.5, 0.9, 127 / 128])
  w = jnp.array([3.5, 1.0, 1.0, 2.0, 0.25, 0.0])
  rows = loss.guidance_rows(field, params, x0, x1, t, label, w, start=0.3, null=NULL)
  classes = np.asarray(params["class"])
  direction = (classes[label] - classes[NULL]) * (1 + np.asarray(t))
  w_eff = np.array([0, 0, 1.0, 2.0, 0.25, 0.0])  # below 0.3 none, at 0.3 and above w
  np.testing.assert_allclose(rows.target, x1 - x0 + column(w_eff * direction), rtol=1e-5, atol=1e-6)
  assert np.abs(w_eff * direction)[[2, 4]].min() > 0.1  # the rows that show it are not trivial


def test_the_interval_is_not_in_the_input(batch, params):
  x0, x1, label = batch
  w = jnp.full(B, 2.0)
  rows = loss.guidance_rows(field, params, x0, x1, jnp.zeros(B), label, w, start=0.3, null=NULL)
  np.testing.assert_array_equal(rows.w, w)
  np.testing.assert_array_equal(rows.label, label)
  assert not np.any(rows.d)


def test_null_rows_get_the_plain_velocity(batch, params):
  x0, x1, _ = batch
  label = jnp.full(B, NULL)
  rows = loss.guidance_rows(
    field, params, x0, x1, jnp.full(B, 0.8), label, jnp.full(B, 3.0), start=0.3, null=NULL
  )
  np.testing.assert_array_equal(rows.target, x1 - x0)


def test_guidance_direction_is_one_call(batch, params):
  sizes = []

  def counted(params, x, *rest):
    sizes.append(len(x))
    return field(params, x, *rest)

  x0, _, label = batch
  loss.guidance_direction(counted, params, x0, jnp.zeros(B), label, NULL)
  assert sizes == [2 * B]


# Gaussian data: given its class an image is N(MEANS[c], SPREAD^2), and all is known in closed form.
# The last mean is the null class's, a Gaussian too.
MEANS, SPREAD = jnp.array([0.5, -1.0, 2.0, 0.25]), 0.4


def deviation(t):
  """Standard deviation of x_t given the class."""
  return jnp.sqrt((1 - t) ** 2 + (SPREAD * t) ** 2)


def gaussian_flow(params, x, t, d, label, w):
  """E[x1 - x0 | x_t] at d = 0, else the exact flow map's mean speed from t to t + d."""
  mean = MEANS[label][:, None, None, None]
  t, d = (a[:, None, None, None] for a in (t, d))
  centred = x - t * mean
  data = mean + SPREAD**2 * t / deviation(t) ** 2 * centred  # E[x1 | x_t]
  noise = (1 - t) / deviation(t) ** 2 * centred  # E[x0 | x_t]
  # The flow keeps an image's place in units of the deviation.
  landed = (t + d) * mean + deviation(t + d) / deviation(t) * centred
  return jnp.where(d == 0, data - noise, (landed - x) / jnp.where(d == 0, 1, d))


def test_gaussian_field_is_the_mean_of_the_velocity():
  """The field above against samples: linear regression of x1 - x0 on x_t."""
  rng, t, label = np.random.default_rng(0), 0.3, 2
  x0, z = rng.normal(size=(2, 400_000))
  x1 = float(MEANS[label]) + SPREAD * z
  slope, offset = np.polyfit((1 - t) * x0 + t * x1, x1 - x0, 1)
  at = lambda x: float(gaussian_flow(None, *map(jnp.asarray, args(x)))[0, 0, 0, 0])  # noqa: E731
  args = lambda x: (np.full((1, 1, 1, 1), x), np.array([t]), np.zeros(1), np.array([label]), 0)  # noqa: E731
  for x in (-1.0, 0.5, 2.0):
    assert at(x) == pytest.approx(slope * x + offset, abs=0.02)


def test_guidance_direction_of_gaussians(batch):
  """s(c) - s(null) shifts by the means' difference, the same for every image."""
  x0, x1, label = batch
  t = jnp.linspace(0.05, 0.95, B)
  w = jnp.full(B, 1.5)
  rows = loss.guidance_rows(gaussian_flow, None, x0, x1, t, label, w, start=0.0, null=NULL)
  slope = (SPREAD**2 * t - (1 - t)) / deviation(t) ** 2
  shift = (MEANS[label] - MEANS[NULL]) * (1 - t * slope)
  expected = x1 - x0 + 1.5 * column(shift)
  np.testing.assert_allclose(rows.target, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("step", [1.0, 0.25, 1 / 32])
def test_consistency_target_of_gaussians_is_their_flow_map(batch, step):
  label = batch[2]
  rows, _ = consistency(gaussian_flow, batch, 0.0 if step == 1 else 0.5, step, 0.0)
  exact = gaussian_flow(None, rows.x, rows.t, rows.d, label, rows.w)
  np.testing.assert_allclose(rows.target, exact, rtol=2e-4, atol=2e-5)


def test_targets_carry_no_gradient(batch, params):
  x0, x1, label = batch
  t, w = jnp.full(B, 0.5), jnp.ones(B)

  def guided(params):
    rows = loss.guidance_rows(field, params, x0, x1, t, label, w, start=0.3, null=NULL)
    return jnp.sum(rows.target**2)

  def consistent(params):
    return jnp.sum(consistency(field, batch, 0.5, 0.5, 1.0, params)[0].target ** 2)

  def baked(params):
    return jnp.sum(consistency(field, batch, 0.5, 1 / 64, 0.0, params, baked=0.5)[0].target ** 2)

  for target in (guided, consistent, baked):
    assert float(target(params)) != float(target(jax.tree.map(lambda p: 2 * p, params)))
    for gradient in jax.tree.leaves(jax.grad(target)(params)):
      np.testing.assert_array_equal(gradient, 0)
