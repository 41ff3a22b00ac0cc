"""The Haar pyramid against PyWavelets, and its distances against explicit sums over bands."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pywt

from ism_jax import wavelet
from train_jax.errors import UserError

analyse = jax.jit(wavelet.analyse, static_argnums=1)
l2_distance = jax.jit(wavelet.l2_distance)
charbonnier_distance = jax.jit(wavelet.charbonnier_distance)


def random_image(shape=(3, 16, 16, 2)):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def bands_of(x, levels):
  """x [h, w] -> [(level, band), ...] by PyWavelets; level L + 1 is the low band."""
  low, *details = pywt.wavedec2(x, "haar", level=levels) if levels else [x]
  found = [(level, band) for level, three in enumerate(details[::-1], 1) for band in three]
  return [*found, (levels + 1, low)]


def haar_matrix(image_size, levels):
  """The pyramid of an image as a matrix, and the level of each of its rows."""
  units = np.eye(image_size * image_size).reshape(-1, image_size, image_size)
  columns = [[band.ravel() for _, band in bands_of(unit, levels)] for unit in units]
  level = [np.full(band.size, level) for level, band in bands_of(units[0], levels)]
  return np.stack([np.concatenate(c) for c in columns], axis=1), np.concatenate(level)


@pytest.mark.parametrize("levels", [0, 1, 3])
def test_bands_are_those_of_pywavelets(levels):
  # PyWavelets names a band by the edges that it finds, we by the direction of the difference: our
  # `horizontal` (left minus right) is its cV, our `vertical` (above minus below) is its cH.
  x = random_image((2, 8, 24, 3))
  low, details = analyse(x, levels)
  first, *others = pywt.wavedec2(x, "haar", level=levels, axes=(1, 2)) if levels else [x]
  np.testing.assert_allclose(low, first, atol=1e-5)
  for (horizontal, vertical, diagonal), theirs in zip(details, others[::-1], strict=True):
    for band, other in zip((vertical, horizontal, diagonal), theirs, strict=True):
      np.testing.assert_allclose(band, other, atol=1e-5)


def test_equal_weights_are_the_mse():
  error = random_image()
  mse = np.mean(error**2, axis=(1, 2, 3))
  for levels in (0, 1, 4):
    weights = wavelet.level_weights(levels, decay=1.0)
    assert weights == [1.0] * (levels + 1)
    # Equal weights cancel in the energies, so not even the rounding differs.
    np.testing.assert_allclose(l2_distance(error, weights), mse, rtol=1e-6)


def squared(band, eps):
  return band**2


def charbonnier(band, eps):
  return np.sqrt(band**2 + eps**2) - eps


@pytest.mark.parametrize("cost", [squared, charbonnier])
@pytest.mark.parametrize(("levels", "decay"), [(0, 0.5), (1, 0.5), (3, 4.0), (2, 0.1)])
def test_a_distance_is_the_sum_over_explicit_bands(levels, decay, cost):
  error, eps = random_image((3, 8, 8, 2)), 0.1
  weights = wavelet.level_weights(levels, decay)
  np.testing.assert_allclose(np.divide(weights[1:], weights[:-1]), decay)
  expected = [
    sum(
      weights[level - 1] * np.sum(cost(band, eps))
      for channel in range(2)
      for level, band in bands_of(image[:, :, channel], levels)
    )
    / image.size
    for image in error
  ]
  found = l2_distance(error, weights)
  if cost is charbonnier:
    found = charbonnier_distance(error, weights, eps)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_l2_distance_of_bfloat16_is_computed_in_float32():
  error = jax.random.normal(jax.random.key(0), (2, 16, 16, 3), jnp.bfloat16)
  weights = wavelet.level_weights(4, 0.5)
  found = l2_distance(error, weights)
  np.testing.assert_array_equal(found, l2_distance(error.astype(jnp.float32), weights))
  assert found.dtype == jnp.float32


def test_l2_distance_of_a_flat_error_is_its_low_band():
  # All energy is in the low band: the telescoped sum must not lose it to cancellation.
  weights = wavelet.level_weights(3, 0.5)
  distance = l2_distance(jnp.full((1, 8, 8, 1), 3.0), weights)
  np.testing.assert_allclose(distance, [9 * weights[-1]], rtol=1e-5)


@pytest.mark.parametrize("decay", [0.5, 2.0, 4.0])
def test_white_noise_costs_as_under_mse(decay):
  matrix, level = haar_matrix(8, 3)
  np.testing.assert_allclose(matrix @ matrix.T, np.eye(64), atol=1e-12)
  weights = np.array(wavelet.level_weights(3, decay))
  np.testing.assert_allclose(np.mean(weights[level - 1]), 1)  # exactly: E|noise|^2 = 1 in each row
  noise = np.random.default_rng(0).normal(size=(4096, 8, 8, 1)).astype(np.float32)
  np.testing.assert_allclose(np.mean(l2_distance(noise, list(weights))), 1, rtol=0.05)


def test_gradient_of_l2_distance():
  error = random_image((2, 8, 8, 1))
  weights = wavelet.level_weights(3, 0.5)
  matrix, level = haar_matrix(8, 3)
  quadratic = matrix.T @ np.diag(np.array(weights)[level - 1]) @ matrix
  expected = 2 * error.reshape(2, 64) @ quadratic / 64
  gradient = jax.jit(jax.grad(lambda e: jnp.sum(l2_distance(e, weights))))(error)
  np.testing.assert_allclose(gradient.reshape(2, 64), expected, atol=1e-6)


def test_charbonnier_is_smooth_at_zero():
  zero = jnp.zeros((2, 4, 4, 1))
  weights = wavelet.level_weights(2, 0.5)
  np.testing.assert_array_equal(charbonnier_distance(zero, weights), 0)
  gradient = jax.jit(jax.grad(lambda e: jnp.sum(charbonnier_distance(e, weights))))(zero)
  np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize(("norm", "keeps"), [("l2", True), ("charbonnier", False)])
def test_weighted_l2_keeps_the_mean_as_minimiser_and_charbonnier_moves_it(norm, keeps):
  samples = np.random.default_rng(0).exponential(size=(64, 4, 4, 1)).astype(np.float32)
  distance = {"l2": l2_distance, "charbonnier": charbonnier_distance}[norm]
  weights = wavelet.level_weights(2, 0.5)
  mean_cost = jax.jit(jax.grad(lambda guess: jnp.mean(distance(guess - samples, weights))))
  gradient = mean_cost(jnp.mean(samples, axis=0))
  assert (float(jnp.abs(gradient).max()) < 1e-6) is keeps


@pytest.mark.parametrize(
  ("height", "width", "levels", "message"),
  [
    (12, 20, 3, r"loss.wavelet_levels=3 does not fit images of 12x20.*2\^levels; .* from 0 to 2\."),
    (7, 8, 1, "from 0 to 0"),
    (16, 12, 3, "from 0 to 2"),  # its height alone would fit
    (8, 8, -1, "levels=-1"),
  ],
)
def test_sides_that_do_not_fit_are_refused_in_a_sentence(height, width, levels, message):
  wavelet.check_levels(12, 20, 2)
  with pytest.raises(UserError, match=message):
    wavelet.check_levels(height, width, levels)
  if levels > 0:
    for call in (
      lambda image: analyse(image, levels),
      lambda image: l2_distance(image, [1.0] * (levels + 1)),
    ):
      with pytest.raises(UserError, match=message):
        call(jnp.zeros((1, height, width, 1)))
