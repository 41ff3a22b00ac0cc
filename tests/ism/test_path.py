"""The straight path, the grids of t and d, and noise that has a number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ism_jax import path
from train_jax.errors import UserError

KEY = jax.random.key(0)
draw_noise = jax.jit(path.draw_noise, static_argnums=2)
sample_guidance = jax.jit(path.sample_guidance, static_argnames=("n", "w_max", "w_step"))
sample_steps = jax.jit(path.sample_steps, static_argnums=1)


@pytest.fixture(scope="module")
def pair():
  x0, x1 = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 1)).astype(np.float32)
  return x0, x1


def assert_uniform(values, choices):
  """values take each of `choices`, nothing else, and about equally often."""
  found, counts = np.unique(values, return_counts=True)
  np.testing.assert_array_equal(found, np.sort(choices))
  assert stats.chisquare(counts).pvalue > 1e-3


def test_the_path_begins_at_noise_and_ends_at_data(pair):
  x0, x1 = pair
  np.testing.assert_array_equal(path.interpolate(x0, x1, jnp.zeros(3)), x0)
  np.testing.assert_array_equal(path.interpolate(x0, x1, jnp.ones(3)), x1)


def test_each_row_has_its_own_time(pair):
  x0, x1 = pair
  x = path.interpolate(x0, x1, jnp.array([0.0, 0.25, 1.0]))
  np.testing.assert_allclose(x[1], 0.75 * x0[1] + 0.25 * x1[1], rtol=1e-6)
  np.testing.assert_array_equal(x[2], x1[2])


def test_velocity_is_the_derivative_of_the_path(pair):
  x0, x1 = pair
  for t in (0.0, 0.5, 1.0):
    position = lambda t: path.interpolate(x0, x1, jnp.full(3, t))  # noqa: E731
    _, derivative = jax.jvp(position, (t,), (1.0,))
    np.testing.assert_allclose(path.velocity(x0, x1), derivative, atol=1e-6)
  # One step of size 1 from noise is the image, one of size -1 from the image is the noise.
  np.testing.assert_allclose(x0 + path.velocity(x0, x1), x1, atol=1e-6)


def test_the_network_sees_the_finest_step_as_zero():
  d = jnp.array([0.0, 1 / 128, 1 / 64, 1 / 2, 1.0])
  np.testing.assert_array_equal(path.min_step_is_zero(d), [0.0, 0.0, 1 / 64, 1 / 2, 1.0])


def test_times_are_uniform_on_the_finest_grid():
  assert_uniform(np.asarray(path.sample_times(KEY, 20_000)), np.arange(128) / 128)


@pytest.fixture(scope="module")
def steps():
  return tuple(np.asarray(a, np.float64) for a in sample_steps(KEY, 40_000))


def test_step_sizes_are_uniform_over_the_levels(steps):
  _, step = steps
  assert_uniform(step, [2.0**-k for k in range(7)])


def test_a_step_starts_at_a_multiple_of_itself_and_ends_by_one(steps):
  t, step = steps
  np.testing.assert_array_equal(t % step, 0)
  assert t.min() >= 0
  assert np.all(t + step <= 1)


def test_starts_are_uniform_at_each_level(steps):
  t, step = steps
  for level in (1, 3, 6):
    assert_uniform(t[step == 2.0**-level], np.arange(2**level) / 2**level)


def test_half_a_step_is_a_size_that_the_network_knows(steps):
  _, step = steps
  seen = np.asarray(path.min_step_is_zero(jnp.asarray(step / 2, jnp.float32)))
  assert set(seen) == {0.0, *(2.0**-k for k in range(1, 7))}


def test_guidance_strengths_and_the_share_of_zero():
  w = np.asarray(sample_guidance(KEY, 20_000, w_max=3.5, w_step=0.25, zero_prob=0.25))
  assert abs(np.mean(w == 0) - 0.25) < 0.01
  assert_uniform(w[w > 0], 0.25 * np.arange(1, 15))


@pytest.mark.parametrize(("zero", "expected"), [(0.0, {0.5, 1.0}), (1.0, {0.0})])
def test_guidance_is_never_or_always_zero(zero, expected):
  assert set(np.asarray(sample_guidance(KEY, 500, 1.0, 0.5, zero)).tolist()) == expected


def test_the_largest_strength_is_drawn_whatever_the_rounding():
  assert 0.3 / 0.1 < 3
  w = np.asarray(sample_guidance(KEY, 500, 0.3, 0.1, zero_prob=0.0))
  np.testing.assert_allclose(np.unique(w), [0.1, 0.2, 0.3], rtol=1e-6)


def test_settings_that_were_trained_pass():
  path.check_settings(range(1, 129), (0.0, 0.6, 3.5), 3.5)
  path.check_settings((1,), (0,), 0.0)


@pytest.mark.parametrize(
  ("nfe", "guidance", "message"),
  [
    ((1, 2.5), (0.0,), r"nfe=2.5 must be a whole number from 1 to 128\."),
    ((129,), (0.0,), r"nfe=129 must be"),
    ((0,), (0.0,), r"nfe=0 must be"),
    ((), (0.0,), r"nfe has no value; choose from 1 to 128"),
    ((1,), (0.5, 4.0), r"guidance=4 is outside the trained range 0 to 3.5"),
    ((1,), (-0.5,), r"guidance=-0.5 is outside the trained range"),
    ((1,), (float("nan"),), r"guidance=nan is outside the trained range"),
    ((1,), (0.0, "x"), r"guidance='x' must be a number"),
  ],
)
def test_settings_that_were_not_are_refused_with_the_range(nfe, guidance, message):
  with pytest.raises(UserError, match=message):
    path.check_settings(nfe, guidance, 3.5)


def test_noise_depends_on_its_number_only():
  index = jnp.array([5, 9, 5, 2**31 - 1], jnp.int32)
  noise = draw_noise(KEY, index, (4, 4, 2))
  np.testing.assert_array_equal(noise[0], noise[2])
  assert not np.any(noise[0] == noise[1])
  order = jnp.array([3, 1, 0, 2])
  np.testing.assert_array_equal(draw_noise(KEY, index[order], (4, 4, 2)), noise[order])
  np.testing.assert_array_equal(draw_noise(KEY, index[1:2], (4, 4, 2)), noise[1:2])
  assert not np.any(draw_noise(jax.random.key(1), index, (4, 4, 2)) == noise)


def test_noise_is_standard_normal_and_independent():
  noise = np.asarray(draw_noise(KEY, jnp.arange(4096), (4, 2, 2)), np.float64)
  assert stats.kstest(noise.ravel(), "norm").pvalue > 0.01
  flat = noise.reshape(4096, -1)
  between_pixels = np.corrcoef(flat.T) - np.eye(16)
  neighbours = np.mean(flat[1:] * flat[:-1])  # consecutive numbers
  assert np.abs(between_pixels).max() < 0.08
  assert abs(neighbours) < 0.02


@pytest.mark.parametrize("nfe", range(1, 129))
def test_any_number_of_steps_consists_of_trained_ones(nfe):
  times = np.asarray(jax.vmap(lambda i: path.step_start(i, nfe))(jnp.arange(nfe + 1)))
  sizes = np.diff(times)
  assert times[0] == 0 and times[-1] == 1 and len(sizes) == nfe
  assert {*sizes} <= {2.0**-k for k in range(8)} and sizes.max() <= 2 * sizes.min()
  assert np.all(times[:-1] % sizes == 0) and np.all(np.diff(sizes) <= 0)


def test_intervals_are_whole_or_log_uniform_and_end_by_one():
  t, d = (np.asarray(a, np.float64) for a in path.sample_intervals(KEY, 40_000))
  assert abs(np.mean(d == 1) - 1 / 8) < 0.01 and d.min() >= 1 / 128
  level = -np.log2(d[d < 1])
  np.testing.assert_allclose(np.quantile(level, [0.25, 0.5, 0.75]), [1.75, 3.5, 5.25], atol=0.1)
  place = t[d < 1] / (1 - d[d < 1])
  np.testing.assert_allclose(np.quantile(place, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.02)
  assert np.all(t + d <= 1 + 1e-6) and not t[d == 1].any()
