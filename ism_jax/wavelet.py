"""The multi-level wavelet loss (arXiv 2510.21250, section 4), on a Haar pyramid.

The orthonormal Haar transform of each 2x2 block (a b; c d) is

    low = (a + b + c + d) / 2,    horizontal = (a - b + c - d) / 2,
    vertical = (a + b - c - d) / 2,    diagonal = (a - b - c + d) / 2,

and it recurses on `low`. Level 1 is the finest. The transform preserves the squared norm
(Parseval), so a plain L2 over all bands is the pixel MSE. A wavelet loss differs from it by the
weights of the levels, or by another norm. Any fixed positive weights of an L2 keep the minimiser,
the conditional mean; the Charbonnier norm moves it.

Dimensions: b batch, h w image, c channel, L levels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from train_jax.errors import UserError


def check_levels(height: int, width: int, levels: int) -> None:
  """Raises UserError unless both sides are divisible by 2^levels."""
  if levels < 0 or height % 2**levels or width % 2**levels:
    fit = 0
    while height % 2 ** (fit + 1) == 0 and width % 2 ** (fit + 1) == 0:
      fit += 1
    raise UserError(
      f"loss.wavelet_levels={levels} does not fit images of {height}x{width}: both sides must be "
      f"divisible by 2^levels; choose a number from 0 to {fit}."
    )


def analyse(x: jax.Array, levels: int) -> tuple[jax.Array, list[jax.Array]]:
  """Haar pyramid of x [b, h, w, c].

  Returns:
    The low band [b, h/2^L, w/2^L, c], and the detail bands, finest first: horizontal, vertical and
    diagonal of level l as [3, b, h/2^l, w/2^l, c].
  """
  check_levels(x.shape[1], x.shape[2], levels)
  details = []
  for _ in range(levels):
    a, b, c, d = x[:, ::2, ::2], x[:, ::2, 1::2], x[:, 1::2, ::2], x[:, 1::2, 1::2]
    details.append(jnp.stack([a - b + c - d, a + b - c - d, a - b - c + d]) / 2)
    x = (a + b + c + d) / 2
  return x, details


def level_weights(levels: int, decay: float) -> list[float]:
  """Weight of a squared orthonormal coefficient at levels 1..L and, last, in the low band.

  The weights are decay^(l - 1), normalised such that white noise has the same loss as under the
  MSE. decay = 1 is the MSE; 0.5 stresses high frequencies mildly; 4 gives all levels the same sum
  of weights, and the low band four times that of a mean per band.
  """
  raw = [decay**level for level in range(levels + 1)]
  share = [3 / 4 ** (level + 1) for level in range(levels)] + [1 / 4**levels]  # of the coefficients
  mean = sum(w * s for w, s in zip(raw, share, strict=True))
  return [w / mean for w in raw]


def l2_distance(error: jax.Array, weights: list[float]) -> jax.Array:
  """Weighted squared norm of error [b, h, w, c] per element -> [b].

  By Parseval the details of level l have the energy E_{l-1} - E_l, where E_l is the energy of the
  low band after l levels. So sum_l w_l (E_{l-1} - E_l) + w_low E_L needs no detail bands, only the
  low bands: a third of one pass over the image.
  """
  check_levels(error.shape[1], error.shape[2], len(weights) - 1)
  size = error[0].size
  # At least float32: differences of energies, in bfloat16, would be rounding.
  low = error.astype(jnp.promote_types(error.dtype, jnp.float32))
  total, previous = 0.0, 0.0
  for level, weight in enumerate(weights):
    if level:
      # Sums over reshaped blocks have one broadcast as their gradient; strided corners have four
      # padded images.
      b, h, w, c = low.shape
      low = low.reshape(b, h // 2, 2, w // 2, 2, c).sum(axis=(2, 4)) / 2
    total += (weight - previous) * jnp.sum(low**2, axis=(1, 2, 3))
    previous = weight
  return total / size


def charbonnier_distance(error: jax.Array, weights: list[float], eps: float = 1e-3) -> jax.Array:
  """Weighted smooth L1: w_l (sqrt(z^2 + eps^2) - eps) over coefficients z, per element -> [b]."""
  low, details = analyse(error, len(weights) - 1)
  bands = [jnp.moveaxis(band, 0, -1) for band in details] + [low[..., None]]  # [b, h, w, c, 3 | 1]
  smooth = [
    weight * jnp.sum(jnp.sqrt(band**2 + eps**2) - eps, axis=(1, 2, 3, 4))
    for band, weight in zip(bands, weights, strict=True)
  ]
  return sum(smooth) / error[0].size
