"""Statistics on features: Fréchet distance, precision and recall, inception score.

Sources: FID, Heusel et al., arXiv 1706.08500; improved precision and recall, Kynkäänniemi et al.,
arXiv 1904.06991; inception score, Salimans et al., arXiv 1606.03498; streaming moments, Chan, Golub
and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).

All of it is float64 NumPy on the host: the Fréchet distance is a small difference of large traces,
which float32 does not survive. Where the features come from is the business of `features.py`.

Dimensions: n samples (m in a second set), f features, c classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import entr, log_softmax
from threadpoolctl import threadpool_limits

from train_jax.errors import UserError


class Moments(NamedTuple):
  """Count, mean and scatter of the features seen so far: all that a Fréchet distance needs.

  Start from `no_moments(f)`, go on with `update`, combine hosts or shards with `merge`.
  """

  count: int
  mean: np.ndarray  # [f]
  scatter: np.ndarray  # [f, f], the sum of (x - mean)(x - mean)^T

  @property
  def covariance(self) -> np.ndarray:
    """Unbiased covariance [f, f]; raises UserError below two samples."""
    if self.count < 2:
      raise UserError(
        f"A covariance needs at least 2 samples and these moments hold {self.count}; "
        "evaluate more samples."
      )
    return self.scatter / (self.count - 1)


def no_moments(f: int) -> Moments:
  """The moments of no samples of f features, the identity of `merge`."""
  return Moments(0, np.zeros(f), np.zeros((f, f)))


def update(moments: Moments, features: ArrayLike) -> Moments:
  """Moments with the rows of features [n, f] added; n may be 0.

  Raises:
    UserError: features are not a finite [n, f] matrix with the f of `moments`.
  """
  x = _matrix("features", features)
  if not len(x):
    return moments
  mean = x.mean(axis=0)
  centred = x - mean
  return merge(moments, Moments(len(x), mean, centred.T @ centred))


def merge(a: Moments, b: Moments) -> Moments:
  """Moments of both sets of samples together (Chan et al., 1979).

  Sums of x and x x^T would be shorter and lose every digit once the mean is large against the
  spread; deviations from the running mean do not.

  Raises:
    UserError: the two have different numbers of features.
  """
  if a.mean.shape != b.mean.shape:
    raise UserError(
      f"Moments of {a.mean.size} and of {b.mean.size} features cannot be merged: both must come "
      "from the same feature extractor; use one extractor for all samples."
    )
  count = a.count + b.count
  if not count:
    return a
  delta = b.mean - a.mean
  return Moments(
    count,
    a.mean + delta * (b.count / count),
    a.scatter + b.scatter + np.outer(delta, delta) * (a.count * b.count / count),
  )


def frechet_distance(mu1: ArrayLike, cov1: ArrayLike, mu2: ArrayLike, cov2: ArrayLike) -> float:
  """Squared Fréchet distance between two Gaussians (arXiv 1706.08500, equation 6):

      |mu1 - mu2|^2 + tr C1 + tr C2 - 2 tr sqrt(C1 C2).

  With C1 = A A^T and C2 = B B^T, tr sqrt(C1 C2) is the sum of the singular values of A^T B. The
  factors come from `eigh`, so no square root of the non-symmetric C1 C2 is taken: that one turns
  complex or fails when a covariance is singular, which it is below f + 1 samples.

  Args:
    mu1, mu2: means [f].
    cov1, cov2: covariances [f, f], symmetric and positive semi-definite up to rounding.

  Raises:
    UserError: shapes disagree, a value is not finite, or a covariance is not one.
  """
  mu1, mu2 = _mean("mu1", mu1), _mean("mu2", mu2)
  if mu1.shape != mu2.shape:
    raise UserError(
      f"mu1 has {mu1.size} features and mu2 {mu2.size}: both must come from the same feature "
      "extractor; recompute one of them."
    )
  cov1, cov2 = _covariance("cov1", cov1, mu1.size), _covariance("cov2", cov2, mu1.size)
  # On shared cores LAPACK's threads wait for each other: several times slower than one thread.
  with threadpool_limits(1):
    product = _factor("cov1", cov1).T @ _factor("cov2", cov2)  # [rank 1, rank 2]
    overlap = np.linalg.svd(product, compute_uv=False).sum()
  distance = np.sum((mu1 - mu2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * overlap
  return max(float(distance), 0.0)  # equal Gaussians may come out at -1e-13


def _factor(name: str, cov: np.ndarray) -> np.ndarray:
  """A [f, rank] with cov = A A^T; eigenvalues that are zero up to rounding are left out.

  Kept, they would be noise of size sqrt(1e-16) each, and a covariance of few samples in many
  dimensions has thousands of them.
  """
  values, vectors = np.linalg.eigh(cov)
  largest = np.abs(values).max()
  if values[0] < -1e-3 * largest:
    raise UserError(
      f"{name} has the eigenvalue {values[0]:.3g} (the largest is {values[-1]:.3g}): a covariance "
      "has none below zero; pass the covariance of the features, not another matrix."
    )
  kept = values > largest * len(values) * np.finfo(np.float64).eps
  return vectors[:, kept] * np.sqrt(values[kept])


def precision_recall(
  real: ArrayLike, fake: ArrayLike, k: int = 3, block: int = 512
) -> tuple[float, float]:
  """Improved precision and recall (arXiv 1904.06991, equations 1 and 2).

  The manifold of a set is the union of balls around its samples, each reaching to the sample's k-th
  nearest other sample. Precision is the share of fake samples on the real manifold, recall the
  share of real samples on the fake manifold. Both depend on n and m: compare runs at equal numbers.

  Args:
    real: features [n, f] of real images.
    fake: features [m, f] of generated images.
    k: neighbours; 3 in the paper.
    block: rows of the distance matrix held at a time, so memory is about 20 block max(n, m) bytes
      besides the features; it does not change the result.

  Raises:
    UserError: a set is not a finite matrix or has k samples or fewer, the feature counts differ, or
      k or block is below 1.
  """
  real, fake = _matrix("real", real), _matrix("fake", fake)
  if real.shape[1] != fake.shape[1]:
    raise UserError(
      f"real has {real.shape[1]} features and fake {fake.shape[1]}: both must come from the same "
      "feature extractor; recompute one of them."
    )
  if k < 1 or block < 1:
    raise UserError(f"k={k} and block={block} must both be at least 1; choose k=3, block=512.")
  for name, x in (("real", real), ("fake", fake)):
    if len(x) <= k:
      raise UserError(
        f"{name} has {len(x)} samples, and k={k} neighbours need at least {k + 1}; "
        "give more samples or a smaller k."
      )
  centre = real.mean(axis=0)  # a common offset would cost |a|^2 + |b|^2 - 2ab its digits
  real, fake = real - centre, fake - centre
  precision = _on_manifold(fake, real, _radii(real, k, block), block)
  recall = _on_manifold(real, fake, _radii(fake, k, block), block)
  return precision, recall


def _distances(x: np.ndarray, y: np.ndarray, block: int) -> Iterator[tuple[int, np.ndarray]]:
  """(i, squared distances [<= block, m] of x[i : i + block] to y [m, f]) over the rows of x."""
  y_square = np.sum(y**2, axis=1)
  for i in range(0, len(x), block):
    rows = x[i : i + block]
    d = rows @ y.T
    d *= -2  # in place: the matrix is the memory that counts
    d += np.sum(rows**2, axis=1)[:, None]
    d += y_square
    yield i, d


def _radii(x: np.ndarray, k: int, block: int) -> np.ndarray:
  """Squared distance [n] of each row of x [n, f] to its k-th nearest other row, rounded up."""
  radii = np.empty(len(x))
  for i, d in _distances(x, x, block):
    rows = np.arange(len(d))
    d[rows, i + rows] = np.inf  # not its own neighbour
    d.partition(k - 1, axis=1)
    radii[i : i + len(d)] = d[:, k - 1]
  # Rounding must not decide ties: a copy of a sample lies in its ball, even one of radius zero. The
  # allowance is the sample's own, or one outlier would widen every ball.
  return radii + 1e-12 * (radii + np.sum(x**2, axis=1))


def _on_manifold(x: np.ndarray, centres: np.ndarray, radii: np.ndarray, block: int) -> float:
  """Share of the rows of x [m, f] inside any ball of squared radii [n] about centres [n, f]."""
  inside = sum(int((d <= radii).any(axis=1).sum()) for _, d in _distances(x, centres, block))
  return inside / len(x)


class Scores(NamedTuple):
  """All that an inception score needs of the logits seen so far, for each of s parts.

  The score is exp(E_x KL(p(y|x) || p(y))) (arXiv 1606.03498, section 4). As in the original code
  it is taken within each of s consecutive parts, so samples sorted by class must be shuffled
  first: a part of one class only scores 1.

  Start from `no_scores(s, c)`, go on with `update_scores`; the sum of two is that of both.
  """

  count: np.ndarray  # [s]
  classes: np.ndarray  # [s, c], the sum of p(y|x)
  negentropy: np.ndarray  # [s], the sum of p(y|x) log p(y|x)


def parts(n: int, splits: int) -> np.ndarray:
  """Which of `splits` consecutive parts each of n samples is in: int [n].

  Raises:
    UserError: splits is not between 1 and n.
  """
  if not 1 <= splits <= n:
    raise UserError(
      f"splits={splits} does not fit {n} samples: it must be from 1 to the number of samples; "
      "give fewer splits or more samples."
    )
  starts = np.arange(splits) * n // splits
  return np.searchsorted(starts, np.arange(n), image_size="right") - 1


def no_scores(splits: int, c: int) -> Scores:
  """The sums of no samples."""
  return Scores(np.zeros(splits), np.zeros((splits, c)), np.zeros(splits))


def update_scores(scores: Scores, part: np.ndarray, logits: ArrayLike) -> Scores:
  """Sums with the logits [n, c] of samples in the parts [n] added; n may be 0."""
  log_p = log_softmax(_matrix("logits", logits), axis=1)
  p = np.exp(log_p)
  member = part == np.arange(len(scores.count))[:, None]  # [s, n]
  return Scores(
    scores.count + member.sum(axis=1),
    scores.classes + member @ p,
    scores.negentropy + member @ np.sum(p * log_p, axis=1),
  )


def score(scores: Scores) -> tuple[float, float]:
  """Mean and standard deviation over the parts of exp(H(E p) - E H(p))."""
  marginal = scores.classes / scores.count[:, None]
  each = np.exp(scores.negentropy / scores.count + entr(marginal).sum(axis=1))
  return float(np.mean(each)), float(np.std(each))


def _finite(name: str, x: np.ndarray) -> np.ndarray:
  """x, or UserError if a value is NaN or infinite."""
  bad = x.size - np.count_nonzero(np.isfinite(x))
  if bad:
    raise UserError(
      f"{name} has {bad} of {x.size} values NaN or infinite, and statistics need finite ones; "
      "look at the samples first, the model may have diverged."
    )
  return x


def _matrix(name: str, x: ArrayLike) -> np.ndarray:
  """x as finite float64 [n, f], f >= 1."""
  x = np.asarray(x, np.float64)
  if x.ndim != 2 or not x.shape[1]:
    raise UserError(
      f"{name} has shape {x.shape}, and must be a matrix with one row for each sample; "
      "flatten each sample to a vector."
    )
  return _finite(name, x)


def _mean(name: str, x: ArrayLike) -> np.ndarray:
  """x as finite float64 [f], f >= 1."""
  x = np.asarray(x, np.float64)
  if x.ndim != 1 or not x.size:
    raise UserError(
      f"{name} has shape {x.shape}, and must be a vector; pass the mean over samples."
    )
  return _finite(name, x)


def _covariance(name: str, x: ArrayLike, f: int) -> np.ndarray:
  """x as finite, exactly symmetric float64 [f, f]."""
  x = np.asarray(x, np.float64)
  if x.shape != (f, f):
    raise UserError(
      f"{name} has shape {x.shape}, and must be ({f}, {f}) to go with its mean; "
      "pass mean and covariance of the same features."
    )
  _finite(name, x)
  skew = np.abs(x - x.T).max()
  if skew > 1e-3 * np.abs(x).max():
    raise UserError(
      f"{name} differs from its transpose by {skew:.3g}, and a covariance is symmetric; "
      "pass the covariance of the features, not another matrix."
    )
  return (x + x.T) / 2  # statistics stored in float32 are symmetric only nearly
