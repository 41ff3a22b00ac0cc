"""The divergences of SequenceMatch (arXiv 2306.05426), each as one concave function phi.

    D(data, model) = max_x  E_data[phi(x)] - E_model[x],    phi(0) = 0,  phi'(0) = 1,

and at the maximum phi'(x) is the density ratio model / data. With x = alpha r for the
reward r of an action, phi(alpha r) / alpha is the reward less a penalty on large rewards. The loss
needs only the difference of the two, which is `penalty`.

    | divergence               | phi(x)           | domain     |
    | kl: KL(data, model)      | log(1 + x)       | x > -1     |
    | reverse_kl               | 1 - exp(-x)      | all        |
    | js: Jensen-Shannon, x 2  | log(2 - exp(-x)) | x > -log 2 |
    | chi2                     | x - x^2 / 4      | all        |
    | chi2_mixture             | x - x^2 / 4      | all        |

chi2_mixture compares the data with the mean of data and model; it is chi2 with the same penalty on
the model's own trajectories.

A reward may leave the domain of phi, and exp may overflow. So phi continues as its tangent where
phi' exceeds `STEEPEST`. It stays concave, once differentiable and finite, with a bounded gradient
that leads back. Nothing changes while model / data is below `STEEPEST`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

STEEPEST = 100.0
_SMALL = 0.05  # below it the Taylor series is more exact in float32 than the difference


class _Generator(NamedTuple):
  """phi in its domain, the edge where phi' = STEEPEST, and the Taylor series of phi(x) / x - 1.

  The series begins with the coefficient of x.
  """

  phi: Callable[[jax.Array], jax.Array]
  edge: float
  series: tuple[float, ...]


_CHI2 = _Generator(lambda x: x - x * x / 4, -math.inf, (-1 / 4,))
_GENERATORS = {
  "kl": _Generator(jnp.log1p, 1 / STEEPEST - 1, (-1 / 2, 1 / 3, -1 / 4, 1 / 5, -1 / 6)),
  "reverse_kl": _Generator(
    lambda x: -jnp.expm1(-x), -math.log(STEEPEST), (-1 / 2, 1 / 6, -1 / 24, 1 / 120, -1 / 720)
  ),
  "js": _Generator(
    lambda x: jnp.log1p(-jnp.expm1(-x)),
    math.log((1 + 1 / STEEPEST) / 2),
    (-1.0, 1.0, -13 / 12, 5 / 4, -541 / 360),
  ),
  "chi2": _CHI2,
  "chi2_mixture": _CHI2,
}
DIVERGENCES = tuple(_GENERATORS)


def phi(name: str, x: jax.Array) -> jax.Array:
  """phi(x), elementwise, with its tangent below the edge."""
  generator = _GENERATORS[name]
  inside = generator.phi(jnp.maximum(x, generator.edge))
  return inside + STEEPEST * jnp.minimum(x - generator.edge, 0.0)


def penalty(name: str, r: jax.Array, alpha) -> jax.Array:
  """phi(alpha r) / alpha - r, elementwise: at most 0, and exactly 0 at alpha = 0.

  It is computed as r (phi(x) / x - 1) with x = alpha r, which never divides by alpha. `alpha`
  broadcasts against r and may be traced.
  """
  x = alpha * r
  near, series = jnp.clip(x, -_SMALL, _SMALL), 0.0
  for coefficient in reversed(_GENERATORS[name].series):
    series = (series + coefficient) * near
  # Each branch stays finite where the other is taken, or its gradient would be 0 x inf.
  small = jnp.abs(x) < _SMALL
  away = jnp.where(small, 1.0, x)
  return r * jnp.where(small, series, phi(name, away) / away - 1)
