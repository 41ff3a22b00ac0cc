"""MAUVE: the closeness of generated texts to real ones, from their features.

Pillutla et al., arXiv 2102.01454: the features of both sets are quantised together, and the two
histograms p (real) and q (generated) are compared with their mixtures r = w p + (1 - w) q. Along
w the points exp(-c KL(q, r)), exp(-c KL(p, r)) draw a curve from (1, 0) to (0, 1), and MAUVE is the
area below it: 1 for equal histograms, (c!)^2 / (2c)! for disjoint ones. The paper leaves some
settings open. They are those of the authors' mauve-text package, which makes numbers comparable:
unit features, PCA to 90% of the variance, a tenth as many buckets as texts, c = 5, 25 mixtures.

The k-means is not that package's, and its seed moves the result: the result is a mean and a spread
over seeds. MAUVE also depends on the number of texts, on their length and on the network of the
features: compare at equal ones only. All of it is float64 NumPy on the host.

Dimensions: n real texts, m generated ones, f features, r features after PCA, k buckets, s seeds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import rel_entr
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits

from train_jax.errors import UserError, check_at_least

SCALE = 5.0  # c
MIXTURES = 25
VARIANCE = 0.9  # the share that PCA keeps
TEXTS_A_BUCKET = 10
RESTARTS, ITERATIONS = 5, 500  # of one k-means

# Texts of either set. With fewer, the buckets are too few to tell sets apart, and any two look
# alike: sets whose MAUVE is 0.30 from 200 texts on get 0.38 of 100 texts, 0.8 of 50, 0.9 of 20.
LEAST = 100


class Mauve(NamedTuple):
  """Mean over k-means seeds and sample standard deviation.

  Attributes:
    mean, spread: of MAUVE.
    smoothed: the mean with half a text added to every bucket (MAUVE* of Pillutla et al., JMLR
      2023, arXiv 2212.14578), which is less biased where buckets hold few texts.
    buckets: k.
  """

  mean: float
  spread: float
  smoothed: float
  buckets: int


def mauve(real: ArrayLike, generated: ArrayLike, buckets: int = 0, seeds: int = 5) -> Mauve:
  """MAUVE of generated texts against real ones.

  Args:
    real: features [n, f].
    generated: features [m, f].
    buckets: k; 0 for a tenth of the smaller set, which then needs LEAST texts.
    seeds: number of quantisations.
  """
  real, generated = _matrix("real", real), _matrix("generated", generated)
  if real.shape[1] != generated.shape[1]:
    raise UserError(
      f"real has {real.shape[1]} features and generated {generated.shape[1]}: both must come from "
      "the same network; recompute one of them."
    )
  check_at_least("seeds", seeds, 1)
  fewest = min(len(real), len(generated))
  if not buckets and fewest < LEAST:
    raise UserError(
      f"MAUVE of {fewest} texts means nothing: below {LEAST} it is near 1 for any two sets; give "
      "more texts."
    )
  k = buckets or round(fewest / TEXTS_A_BUCKET)
  if not 2 <= k <= fewest:
    raise UserError(
      f"buckets={k} must lie from 2 to the {fewest} texts of the smaller set; give more texts or "
      "other buckets."
    )
  # On shared cores the threads of the BLAS wait for each other.
  with threadpool_limits(1):
    points = reduce(np.concatenate([real, generated]))
    counts = [_counts(quantise(points, k, seed), len(real), k) for seed in range(seeds)]
  values = [area(divergence_curve(*pair)) for pair in counts]
  smoothed = [area(divergence_curve(p + 0.5, q + 0.5)) for p, q in counts]
  spread = float(np.std(values, ddof=1)) if seeds > 1 else 0.0
  return Mauve(float(np.mean(values)), spread, float(np.mean(smoothed)), k)


def reduce(features: np.ndarray, variance: float = VARIANCE) -> np.ndarray:
  """Features [n, f] scaled to unit length, then as few principal components as hold `variance`.

  Returns:
    [n, r].
  """
  length = np.linalg.norm(features, axis=1, keepdims=True)
  unit = features / np.where(length > 0, length, 1.0)
  if np.all(unit == unit[0]):  # no variance to divide by
    return np.zeros((len(unit), 1))
  return PCA(variance, svd_solver="covariance_eigh").fit_transform(unit)


def quantise(points: np.ndarray, buckets: int, seed: int) -> np.ndarray:
  """The bucket of each point [n, r]: int [n], the best of `RESTARTS` k-means."""
  fit = KMeans(buckets, n_init=RESTARTS, max_iter=ITERATIONS, init="random", random_state=seed)
  return fit.fit_predict(points)


def _counts(bucket: np.ndarray, n: int, buckets: int) -> tuple[np.ndarray, np.ndarray]:
  """Texts in each bucket [k], of the first n and of the others."""
  return tuple(np.bincount(part, minlength=buckets) for part in (bucket[:n], bucket[n:]))


def divergence_curve(
  p: ArrayLike, q: ArrayLike, scale: float = SCALE, mixtures: int = MIXTURES
) -> np.ndarray:
  """The points (exp(-c KL(q, r)), exp(-c KL(p, r))) [mixtures + 2, 2] in order of w.

  Args:
    p, q: histograms [k], of any sum; buckets may be empty.
    scale: c.
    mixtures: number of w, without the two ends (1, 0) and (0, 1).
  """
  p, q = (np.asarray(x, np.float64) / np.sum(x) for x in (p, q))
  # At 0 and 1 the mixture would lack buckets of p or q.
  w = np.linspace(1e-6, 1 - 1e-6, mixtures)[:, None]
  mixture = w * p + (1 - w) * q
  divergences = [rel_entr(x, mixture).sum(axis=1) for x in (q, p)]
  inside = np.exp(-scale * np.stack(divergences, axis=1))
  return np.concatenate([[[1.0, 0.0]], inside, [[0.0, 1.0]]])


def area(curve: np.ndarray) -> float:
  """The area below a curve [points, 2] from (1, 0) to (0, 1), by trapezia.

  The ends lie on the axes, so integrating over either coordinate gives the same.
  """
  x, y = curve.T
  return float(np.trapezoid(y[::-1], x[::-1]))


def _matrix(name: str, x: ArrayLike) -> np.ndarray:
  """x as finite float64 [n, f], f >= 1."""
  x = np.asarray(x, np.float64)
  if x.ndim != 2 or not x.shape[1]:
    raise UserError(
      f"{name} has shape {x.shape}, and must be a matrix with one row of features for each text; "
      "stack the texts' features."
    )
  bad = np.count_nonzero(~np.isfinite(x).all(axis=1))
  if bad:
    raise UserError(
      f"{name} has {bad} of {len(x)} rows with NaN or infinite values, and MAUVE needs finite "
      "ones; look at the texts and the network first."
    )
  return x
