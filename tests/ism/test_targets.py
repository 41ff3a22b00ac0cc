"""What the network regresses on, on fields whose answers are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax import loss
from ism_jax.path import interpolate

NULL = 3
B = 6


def column(values):
  return jnp.asarray(values, jnp.float32)[:, None, None, None]


def field(params, x, t, d, label, w):
  """A network in which every input matters, and w and d do not cancel in s(c) - s(null)."""
  return params["a"] * x + column(params["class"][label] * (1 + w) * (1 + 3 * d) * (1 + t))


@pytest.fixture(scope="module")
def batch():
  x0, x1 = np.random.default_rng(0).normal(size=(2, B, 2, 2, 1)).astype(np.float32)
  return x0, x1, jnp.array([0, 1, 2, NULL, 1, 0])


@pytest.fixture(scope="module")
def params():
  return {"a": jnp.float32(0.7), "class": jnp.array([0.5, -1.0, 2.0, 0.25])}


def guided(apply, batch, t, w, params=None, interval_start=0.3):
  x0, x1, label = batch
  interval = {"interval_start": interval_start, "null": NULL}
  return loss.guidance_examples(apply, params, x0, x1, t, label, w, **interval)


def consistency(apply, batch, t, step, w, params=None, bootstrap=0.0):
  x0, x1, label = batch
  t, step, w = (jnp.broadcast_to(jnp.float32(a), (B,)) for a in (t, step, w))
  target = (step, label, w, bootstrap, NULL)
  examples = loss.consistency_examples(apply, params, x0, x1, t, *target)
  return examples, np.asarray(interpolate(x0, x1, t))


def test_velocity_is_what_leads_from_noise_to_image(batch):
  x0, x1, label = batch
  t = jnp.linspace(0, 1, B)
  examples = loss.velocity_examples(x0, x1, t, label)
  np.testing.assert_array_equal(examples.target, x1 - x0)
  np.testing.assert_array_equal(examples.x[0], x0[0])
  np.testing.assert_array_equal(examples.x[-1], x1[-1])
  np.testing.assert_array_equal(examples.t, t)
  np.testing.assert_array_equal(examples.label, label)
  assert not np.any(examples.d) and not np.any(examples.w)


@pytest.mark.parametrize("step", [1.0, 1 / 16])
def test_two_euler_half_steps_compose_on_a_linear_field(batch, step):
  # dx/dt = a x: two Euler steps of d = step/2 multiply x by (1 + a d)^2.
  a, d = -1.3, step / 2
  examples, x = consistency(lambda p, x, *_: a * x, batch, 0.0, step, 0.0)
  np.testing.assert_allclose(examples.target, x * ((1 + a * d) ** 2 - 1) / step, 1e-4, 1e-6)


def test_half_steps_are_told_their_time_half_the_size_and_the_same_w(batch):
  t = np.array([0, 0.25, 0.5, 0.5, 0.75, 0])
  step = np.array([1, 0.5, 1 / 4, 1 / 32, 1 / 64, 1 / 64])
  told = np.array([0.5, 0.25, 1 / 8, 1 / 64, 0, 0])  # the finest step is told as 0
  w = np.arange(B) / 4

  def target(seen):
    """The mean of what two half-steps see, where the field is that."""
    field = lambda p, x, t, d, label, w: 0 * x + column(seen(t, d, w))  # noqa: E731
    examples, _ = consistency(field, batch, t, step, w)
    np.testing.assert_array_equal(examples.w, w)
    np.testing.assert_array_equal(examples.d, step)
    return examples.target[:, 0, 0, 0]

  np.testing.assert_allclose(target(lambda t, d, w: t**2), (t**2 + (t + step / 2) ** 2) / 2, 1e-6)
  np.testing.assert_array_equal(target(lambda t, d, w: d), told)
  np.testing.assert_array_equal(target(lambda t, d, w: w), w)


def test_consistency_targets_add_no_guidance(batch, params):
  # Guidance is an input only: with w = 2 the class effect is (1 + w), once, whatever the step.
  flat = {**params, "a": jnp.float32(0)}
  examples, _ = consistency(field, batch, 0.0, 1 / 64, 2.0, flat)
  mean_time = 1 + (1 / 128) / 2
  expected = np.asarray(params["class"])[batch[2]] * 3 * mean_time
  np.testing.assert_allclose(examples.target[:, 0, 0, 0], expected, rtol=1e-5)


def test_bootstrap_guidance_is_in_both_finest_steps_and_no_other(batch, params):
  plain = lambda p, x, t, d, label, w: p["a"] * x + column(p["class"][label])  # noqa: E731
  step = np.array([1 / 64, 1 / 64, 1 / 32, 1 / 64, 1.0, 0.5])
  examples, x = consistency(plain, batch, 0.0, step, 0.0, params, bootstrap=1.5)
  classes = np.asarray(params["class"])
  own = classes[batch[2]]
  speed = column(own + np.where(step == 1 / 64, 1.5, 0) * (own - classes[NULL]))
  assert speed[3] == classes[NULL]  # an example without class has nothing to be guided by
  first = params["a"] * x + speed
  second = params["a"] * (x + column(step / 2) * first) + speed
  np.testing.assert_allclose(examples.target, (first + second) / 2, rtol=1e-5)


def test_guidance_acts_from_the_interval_s_start_and_the_input_keeps_its_w(batch, params):
  x0, x1, label = batch
  t = jnp.array([0.0, 0.29, 0.3, 0.5, 0.9, 127 / 128])
  w = jnp.array([3.5, 1.0, 1.0, 2.0, 0.25, 0.0])
  examples = guided(field, batch, t, w, params)
  classes = np.asarray(params["class"])
  direction = (classes[label] - classes[NULL]) * (1 + np.asarray(t))
  w_eff = np.array([0, 0, 1.0, 2.0, 0.25, 0.0])  # below 0.3 none, at 0.3 and above w
  np.testing.assert_allclose(examples.target, x1 - x0 + column(w_eff * direction), 1e-5, 1e-6)
  assert np.abs(w_eff * direction)[[2, 4]].min() > 0.1  # the examples that show it
  np.testing.assert_array_equal(examples.target[3], (x1 - x0)[3])  # null: the plain velocity
  np.testing.assert_array_equal(examples.w, w)
  np.testing.assert_array_equal(examples.label, label)
  assert not np.any(examples.d)


# Gaussian data: given its class an image is N(MEANS[c], SPREAD^2), and all is known in closed form.
# The last mean is the null class's, a Gaussian too.
MEANS, SPREAD = jnp.array([0.5, -1.0, 2.0, 0.25]), 0.4


def deviation(t):
  """Standard deviation of x_t given the class."""
  return jnp.sqrt((1 - t) ** 2 + (SPREAD * t) ** 2)


def gaussian_flow(params, x, t, d, label, w):
  """E[x1 - x0 | x_t] at d = 0, else the exact flow map's mean speed from t to t + d."""
  mean = column(MEANS[label])
  t, d = column(t), column(d)
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
  x = np.array([-1.0, 0.5, 2.0])
  found = gaussian_flow(None, column(x), np.full(3, t), np.zeros(3), np.full(3, label), 0)
  np.testing.assert_allclose(found.ravel(), slope * x + offset, atol=0.02)


def test_guidance_of_gaussians_shifts_all_images_of_a_class_alike(batch):
  x0, x1, label = batch
  t = jnp.linspace(0.05, 0.95, B)
  examples = guided(gaussian_flow, batch, t, jnp.full(B, 1.5), interval_start=0.0)
  slope = (SPREAD**2 * t - (1 - t)) / deviation(t) ** 2
  shift = (MEANS[label] - MEANS[NULL]) * (1 - t * slope)
  np.testing.assert_allclose(examples.target, x1 - x0 + 1.5 * column(shift), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("step", [1.0, 0.25, 1 / 32])
def test_consistency_target_of_gaussians_is_their_flow_map(batch, step):
  """Two exact half-steps are the exact step of twice the size."""
  examples, _ = consistency(gaussian_flow, batch, 0.0 if step == 1 else 0.5, step, 0.0)
  exact = gaussian_flow(None, *examples[:5])
  np.testing.assert_allclose(examples.target, exact, rtol=2e-4, atol=2e-5)


def derivative(apply, batch, t, d, w, params=None, own_tangent=True, interval_start=0.3):
  x0, x1, label = batch
  t, d, w = (jnp.broadcast_to(jnp.float32(a), (len(x0),)) for a in (t, d, w))
  kind = {"own_tangent": own_tangent, "interval_start": interval_start, "null": NULL}
  return loss.derivative_examples(apply, params, x0, x1, t, d, label, w, **kind)


@pytest.mark.parametrize("t, d", [(0.0, 1.0), (0.5, 0.3), (0.2, 0.05)])
def test_the_derivative_s_target_of_gaussians_is_their_flow_map(batch, t, d):
  """With the exact field the identity s = v + d D s holds for each example, once v is its mean."""
  examples = derivative(gaussian_flow, batch, t, d, 0.0)
  x0, x1, label = batch
  mean = gaussian_flow(None, examples.x, examples.t, 0 * examples.d, label, 0)
  found = examples.target - (x1 - x0) + mean
  exact = gaussian_flow(None, *examples[:5])
  np.testing.assert_allclose(found, exact, rtol=2e-3, atol=2e-4)
  np.testing.assert_array_equal(examples.d, np.float32(d))


def test_meanflow_s_target_has_the_flow_map_as_its_mean_over_pairs():
  """Over all pairs that cross one point: noise and image given x_t are Gaussian."""
  t, d, label, x, n = 0.4, 0.5, 2, 0.7, 200_000
  rng = np.random.default_rng(0)
  mean, gain = float(MEANS[label]), float(SPREAD**2 * t / deviation(t) ** 2)
  spread = SPREAD * (1 - t) / float(deviation(t))  # of x1 given x_t
  x1 = mean + gain * (x - t * mean) + spread * rng.normal(size=n)
  pairs = column((x - t * x1) / (1 - t)), column(x1), jnp.full(n, label)
  examples = derivative(gaussian_flow, pairs, t, d, 0.0, own_tangent=False)
  exact = gaussian_flow(None, *(a[:1] for a in examples[:5]))
  error = np.std(examples.target) / np.sqrt(n)
  np.testing.assert_allclose(np.mean(examples.target), exact.item(), atol=4 * error + 1e-3)


def test_on_a_linear_field_the_derivative_is_the_finite_difference_of_the_steps(batch, params):
  """d/dh of s along its tangent with the end fixed, at the guided velocity from the interval on."""
  for own in (True, False):
    examples = derivative(field, batch, 0.5, 0.25, 1.0, params, own)
    x0, x1, label = batch
    classes = np.asarray(params["class"])
    g = x1 - x0 + column((classes[label] - classes[NULL]) * 1.5)
    u = field(params, examples.x, examples.t, 0 * examples.d, label, examples.w) if own else g
    h = 1e-2
    ahead, behind = (
      field(params, examples.x + k * u, examples.t + k, examples.d - k, label, examples.w)
      for k in (h, -h)
    )
    expected = g + 0.25 * (ahead - behind) / (2 * h)
    np.testing.assert_allclose(examples.target, expected, rtol=2e-3, atol=2e-3)
  before = derivative(field, batch, 0.1, 0.25, 1.0, params, own_tangent=False)  # no guidance yet
  plain = derivative(field, batch, 0.1, 0.25, 1.0, params, False, interval_start=0.0)
  assert np.abs(before.target - plain.target)[jnp.arange(B) != 3].min() > 0.05


def test_targets_carry_no_gradient(batch, params):
  t, w = jnp.full(B, 0.5), jnp.ones(B)
  for examples in (
    lambda p: guided(field, batch, t, w, p),
    lambda p: consistency(field, batch, 0.5, 0.5, 1.0, p)[0],
    lambda p: consistency(field, batch, 0.5, 1 / 64, 0.0, p, bootstrap=0.5)[0],
    lambda p: derivative(field, batch, 0.5, 0.25, 1.0, p),
  ):
    cost = lambda p: jnp.sum(examples(p).target ** 2)  # noqa: E731, B023
    assert float(cost(params)) != float(cost(jax.tree.map(lambda p: 2 * p, params)))
    for gradient in jax.tree.leaves(jax.grad(cost)(params)):
      np.testing.assert_array_equal(gradient, 0)
