"""The Haar pyramid and its distance, against PyWavelets and against explicit sums over bands.

The MSE trap (three wavelet losses that are the pixel MSE) is proved here, one test for each.
"""

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


@jax.jit
def synthesise(low, details):
  """The image [b, h, w, c] of a pyramid: the exact inverse of `analyse`."""
  for horizontal, vertical, diagonal in reversed(details):
    a = low + horizontal + vertical + diagonal
    b = low - horizontal + vertical - diagonal
    c = low + horizontal - vertical - diagonal
    d = low - horizontal - vertical + diagonal
    top = jnp.stack([a, b], axis=3)  # [b, h/2, w/2, 2, c]
    bottom = jnp.stack([c, d], axis=3)
    n, h, w, _, channels = top.shape
    low = jnp.stack([top, bottom], axis=2).reshape(n, 2 * h, 2 * w, channels) / 2
  return low


def random_image(image_size=16, channels=2, batch=3, seed=0):
  return (
    np.random.default_rng(seed)
    .normal(size=(batch, image_size, image_size, channels))
    .astype(np.float32)
  )


def naive_level(x, scale):
  """One Haar level of x [h, w], block by block -> low and three details, each [h/2, w/2]."""
  low, *details = (np.zeros((x.shape[0] // 2, x.shape[1] // 2)) for _ in range(4))
  for i, j in np.ndindex(low.shape):
    (a, b), (c, d) = x[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].astype(float)
    low[i, j] = scale * (a + b + c + d)
    for band, value in zip(details, (a - b + c - d, a + b - c - d, a - b - c + d), strict=True):
      band[i, j] = scale * value
  return low, details


def naive_bands(x, levels, scale=1 / 2):
  """x [h, w] -> [(level, band), ...]; level L + 1 is the low band; scale 1/2 is orthonormal."""
  bands = []
  for level in range(1, levels + 1):
    x, details = naive_level(x, scale)
    bands += [(level, band) for band in details]
  return [*bands, (levels + 1, x)]


def naive_packets(x, levels, scale=1 / 2):
  """Wavelet packets: every band is split again, the details too -> 4^levels bands."""
  if not levels:
    return [x]
  low, details = naive_level(x, scale)
  return [leaf for band in (low, *details) for leaf in naive_packets(band, levels - 1, scale)]


def haar_matrix(image_size, levels):
  """The pyramid of a side x side image as a matrix, and the level of each of its rows."""
  units = np.eye(image_size * image_size).reshape(-1, image_size, image_size)
  columns = [[band.ravel() for _, band in naive_bands(unit, levels)] for unit in units]
  level = [np.full(band.size, level) for level, band in naive_bands(units[0], levels)]
  return np.stack([np.concatenate(c) for c in columns], axis=1), np.concatenate(level)


@pytest.mark.parametrize("levels", [0, 1, 3, 4])
def test_haar_reconstructs_perfectly(levels):
  x = random_image()
  low, details = analyse(x, levels)
  assert low.shape == (3, 16 >> levels, 16 >> levels, 2)
  assert [band.shape[2] for band in details] == [16 >> level for level in range(1, levels + 1)]
  np.testing.assert_allclose(synthesise(low, details), x, atol=1e-5)


def test_analysis_inverts_synthesis():
  low, details = analyse(random_image(), 2)
  low = low + 1.0
  details = [band * (2.0 + i) for i, band in enumerate(details)]
  low_again, details_again = analyse(synthesise(low, details), 2)
  np.testing.assert_allclose(low_again, low, atol=1e-5)
  for band, again in zip(details, details_again, strict=True):
    np.testing.assert_allclose(again, band, atol=1e-5)


def test_rectangles_reconstruct():
  x = np.random.default_rng(0).normal(size=(2, 8, 24, 3)).astype(np.float32)
  np.testing.assert_allclose(synthesise(*analyse(x, 3)), x, atol=1e-5)


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_parseval(levels):
  x = random_image()
  low, details = analyse(x, levels)
  energy = sum(np.sum(np.square(band, dtype=np.float64)) for band in (low, *details))
  np.testing.assert_allclose(energy, np.sum(np.square(x, dtype=np.float64)), rtol=1e-6)


def test_bands_are_those_of_pywavelets():
  # PyWavelets names a band by the edges that it finds, we by the direction of the difference: our
  # `horizontal` (left minus right) is its cV, our `vertical` (above minus below) is its cH.
  x = random_image()
  low, details = analyse(x, 3)
  theirs = pywt.wavedec2(x, "haar", level=3, axes=(1, 2))
  np.testing.assert_allclose(low, theirs[0], atol=1e-5)
  for (horizontal, vertical, diagonal), (ch, cv, cd) in zip(details, theirs[:0:-1], strict=True):
    np.testing.assert_allclose(horizontal, cv, atol=1e-5)
    np.testing.assert_allclose(vertical, ch, atol=1e-5)
    np.testing.assert_allclose(diagonal, cd, atol=1e-5)


def test_mse_trap_plain_l2_over_all_bands_is_the_mse():
  error = random_image()
  mse = np.mean(error**2, axis=(1, 2, 3))
  for levels in (0, 1, 4):
    weights = wavelet.level_weights(levels, decay=1.0)
    assert weights == [1.0] * (levels + 1)
    # Equal weights cancel in the energies, so not even the rounding differs.
    np.testing.assert_allclose(l2_distance(error, weights), mse, rtol=1e-6)


def test_mse_trap_band_means_of_the_average_haar_are_the_mse():
  x = random_image(image_size=8)[0, :, :, 0]
  for levels in (1, 2, 3):
    means = sum(np.mean(band**2) for _, band in naive_bands(x, levels, scale=1 / 4))
    np.testing.assert_allclose(means, np.mean(x**2), rtol=1e-6)


def test_mse_trap_packets_are_the_mse():
  x = random_image(image_size=8)[0, :, :, 0]
  for levels in (1, 2, 3):
    packets = naive_packets(x, levels)
    assert len(packets) == 4**levels
    np.testing.assert_allclose(np.mean([np.mean(p**2) for p in packets]), np.mean(x**2), rtol=1e-6)
    average = sum(np.mean(p**2) for p in naive_packets(x, levels, scale=1 / 4))
    np.testing.assert_allclose(average, np.mean(x**2), rtol=1e-6)


@pytest.mark.parametrize(("levels", "decay"), [(0, 0.5), (1, 0.5), (3, 0.5), (3, 4.0), (2, 0.1)])
def test_l2_distance_is_the_sum_over_explicit_bands(levels, decay):
  error = random_image(image_size=8)
  weights = wavelet.level_weights(levels, decay)
  expected = [
    sum(
      weights[level - 1] * np.sum(band**2)
      for channel in range(2)
      for level, band in naive_bands(image[:, :, channel], levels)
    )
    / image.size
    for image in error
  ]
  np.testing.assert_allclose(l2_distance(error, weights), expected, rtol=1e-5)


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


def test_weights_halve_from_level_to_level():
  weights = np.array(wavelet.level_weights(5, 0.5))
  np.testing.assert_allclose(weights[1:] / weights[:-1], 0.5)


@pytest.mark.parametrize("decay", [0.5, 2.0, 4.0])
def test_white_noise_costs_as_under_mse(decay):
  matrix, level = haar_matrix(8, 3)
  np.testing.assert_allclose(matrix @ matrix.T, np.eye(64), atol=1e-12)
  weights = np.array(wavelet.level_weights(3, decay))
  np.testing.assert_allclose(np.mean(weights[level - 1]), 1)  # exactly: E|noise|^2 = 1 in each row
  noise = np.random.default_rng(0).normal(size=(4096, 8, 8, 1)).astype(np.float32)
  np.testing.assert_allclose(np.mean(l2_distance(noise, list(weights))), 1, rtol=0.05)


def test_gradient_of_l2_distance():
  error = random_image(image_size=8, channels=1, batch=2)
  weights = wavelet.level_weights(3, 0.5)
  matrix, level = haar_matrix(8, 3)
  quadratic = matrix.T @ np.diag(np.array(weights)[level - 1]) @ matrix
  expected = 2 * error.reshape(2, 64) @ quadratic / 64
  gradient = jax.jit(jax.grad(lambda e: jnp.sum(l2_distance(e, weights))))(error)
  np.testing.assert_allclose(gradient.reshape(2, 64), expected, atol=1e-6)


def test_charbonnier_is_the_sum_over_explicit_bands():
  error, eps = random_image(image_size=8), 0.1
  weights = wavelet.level_weights(2, 0.5)
  expected = [
    sum(
      weights[level - 1] * np.sum(np.sqrt(band**2 + eps**2) - eps)
      for channel in range(2)
      for level, band in naive_bands(image[:, :, channel], 2)
    )
    / image.size
    for image in error
  ]
  distance = charbonnier_distance(error, weights, eps)
  np.testing.assert_allclose(distance, expected, rtol=1e-5)


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


def test_sides_that_do_not_fit_are_refused_in_a_sentence():
  wavelet.check_levels(12, 20, 2)
  message = (
    r"loss.wavelet_levels=3 does not fit images of 12x20.*2\^levels; choose .* from 0 to 2\."
  )
  for function in (
    lambda: wavelet.check_levels(12, 20, 3),
    lambda: analyse(jnp.zeros((1, 12, 20, 1)), 3),
    lambda: l2_distance(jnp.zeros((1, 12, 20, 1)), [1.0] * 4),
  ):
    with pytest.raises(UserError, match=message):
      function()
  with pytest.raises(UserError, match="from 0 to 0"):
    wavelet.check_levels(7, 8, 1)
  with pytest.raises(UserError, match="from 0 to 2"):  # its height alone would fit
    wavelet.check_levels(16, 12, 3)
  with pytest.raises(UserError, match="levels=-1"):
    wavelet.check_levels(8, 8, -1)
