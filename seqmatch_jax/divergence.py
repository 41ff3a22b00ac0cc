"""The divergences of SequenceMatch (arXiv 2306.05426), each as one concave function phi.

    D(data, model) = max_x  E_data[phi(x)] - E_model[x],    phi(0) = 0,  phi'(0) = 1,

and at the maximum phi'(x) is the density ratio model / data. With x = alpha r, r the reward of an
action, phi(alpha r) / alpha is the reward itself less a penalty on large rewards; `penalty` is that
difference, which is what the loss needs:

    | divergence               | phi(x)           | domain     |
    | kl: KL(data, model)      | log(1 + x)       | x > -1     |
    | reverse_kl               | 1 - exp(-x)      | all        |
    | js: Jensen-Shannon, x 2  | log(2 - exp(-x)) | x > -log 2 |
    | chi2                     | x - x^2 / 4      | all        |
    | chi2_mixture             | x - x^2 / 4      | all        |

chi2_mixture compares the data with the mean of data and model; it is chi2 with the same penalty on
the model's own trajectories.

Towards its edge a reward may run out of the domain of phi, or exp overflow: where phi' exceeds
`STEEPEST`, phi goes on as its tangent. It stays concave and once differentiable, finite with a
bounded gradient that leads back, and nothing changes while model / data is below `STEEPEST`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

STEEPEST = 100.0
_SMALL = 0.1  # below it the series is more exact in float32 than the difference
_ORDERS = range(1, 11)
_FUBINI = (1, 3, 13, 75, 541, 4683, 47293, 545835, 7087261, 102247563)


class _Generator(NamedTuple):
  """phi in its domain; the edge, where phi' = STEEPEST; |phi^(n+1)(0)|, whose signs alternate."""

  phi: Callable[[jax.Array], jax.Array]
  edge: float
  derivatives: tuple[float, ...]


_CHI2 = _Generator(lambda x: x - x * x / 4, -math.inf, (0.5,))
_GENERATORS = {
  "kl": _Generator(jnp.log1p, 1 / STEEPEST - 1, tuple(math.factorial(n) for n in _ORDERS)),
  "reverse_kl": _Generator(lambda x: -jnp.expm1(-x), -math.log(STEEPEST), (1,) * len(_ORDERS)),
  "js": _Generator(
    lambda x: jnp.log1p(-jnp.expm1(-x)),
    math.log((1 + 1 / STEEPEST) / 2),
    tuple(2 * fubini for fubini in _FUBINI),
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

  As r (phi(x) / x - 1) with x = alpha r it never divides by alpha; the bracket is a Taylor series
  where its terms would cancel. `alpha` broadcasts against r and may be traced.
  """
  x = alpha * r
  near = jnp.clip(x, -_SMALL, _SMALL)
  series = 0.0
  for n, derivative in reversed(list(enumerate(_GENERATORS[name].derivatives, 1))):
    series = (series + (-1) ** n * derivative / math.factorial(n + 1)) * near
  # Each branch stays finite where the other is taken, or its gradient would be 0 x inf.
  small = jnp.abs(x) < _SMALL
  away = jnp.where(small, 1.0, x)
  return r * jnp.where(small, series, phi(name, away) / away - 1)
