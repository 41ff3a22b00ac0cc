"""Statistics on features: Fréchet distance, precision and recall, inception score.

Sources: FID, Heusel et al., arXiv 1706.08500; improved precision and recall, Kynkäänniemi et al.,
arXiv 1904.06991; inception score, Salimans et al., arXiv 1606.03498; streaming moments, Chan, Golub
and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).

Everything is float64 NumPy on the host: the Fréchet distance is a small difference of large traces,
for which float32 is too coarse. Features come from `features.py` (small images) or `stream.py`.

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
  """Running count, mean and scatter of features, for the Fréchet distance.

  Start with `no_moments(f)`, add features with `update`, combine hosts or shards with `merge`.
  """

  count: int
  mean: np.ndarray  # [f]
  scatter: np.ndarray  # [f, f], the sum of (x - mean)(x - mean)^T

  @property
  def covariance(self) -> np.ndarray:
    """Unbiased covariance [f, f] of at least two samples."""
    assert self.count >= 2, self.count
    return self.scatter / (self.count - 1)


def no_moments(f: int) -> Moments:
  """The moments of no samples of f features, the identity of `merge`."""
  return Moments(0, np.zeros(f), np.zeros((f, f)))


def update(moments: Moments, features: ArrayLike) -> Moments:
  """Adds features [n, f] to moments; n may be 0.

  Raises:
    UserError: a feature is not finite.
  """
  x = _finite("features", features)
  if not len(x):
    return moments
  mean = x.mean(axis=0)
  centred = x - mean
  return merge(moments, Moments(len(x), mean, centred.T @ centred))


def merge(a: Moments, b: Moments) -> Moments:
  """Moments of the union of two sets of samples (Chan et al., 1979).

  Sums of x and x x^T would be shorter, but they lose all digits when the mean is large relative to
  the spread.
  """
  assert a.mean.shape == b.mean.shape, (a.mean.shape, b.mean.shape)
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
  factors come from `eigh`. The square root of the non-symmetric C1 C2 would turn complex or fail
  for a singular covariance, which any covariance of fewer than f + 1 samples is.

  Args:
    mu1, mu2: means [f].
    cov1, cov2: covariances [f, f], symmetric and positive semi-definite up to rounding.

  Raises:
    UserError: a value is not finite, or a matrix is not a covariance.
  """
  mu1, mu2 = _finite("mu1", mu1), _finite("mu2", mu2)
  assert mu1.ndim == 1 and mu1.shape == mu2.shape, (mu1.shape, mu2.shape)
  cov1, cov2 = _covariance("cov1", cov1, mu1.size), _covariance("cov2", cov2, mu1.size)
  # One thread: on shared cores LAPACK's threads wait for each other, which takes several times
  # longer.
  with threadpool_limits(1):
    product = _factor("cov1", cov1).T @ _factor("cov2", cov2)  # [rank 1, rank 2]
    overlap = np.linalg.svd(product, compute_uv=False).sum()
  distance = np.sum((mu1 - mu2) ** 2) + np.trace(cov1) + np.trace(cov2) - 2 * overlap
  return max(float(distance), 0.0)  # equal Gaussians may come out at -1e-13


def _factor(name: str, cov: np.ndarray) -> np.ndarray:
  """A [f, rank] with cov = A A^T, without the eigenvalues that are zero up to rounding.

  Each of those would add noise of sqrt(1e-16), and a covariance of few samples in many dimensions
  has thousands of them.
  """
  values, vectors = np.linalg.eigh(cov)
  largest = np.abs(values).max()
  if values[0] < -1e-3 * largest:
    raise UserError(
      f"{name} has the eigenvalue {values[0]:.3g} (the largest is {values[-1]:.3g}): a covariance "
      "has none below zero; pass the covariance of the features, not another matrix."
    )
  positive = values > largest * len(values) * np.finfo(np.float64).eps
  return vectors[:, positive] * np.sqrt(values[positive])


def precision_recall(
  real: ArrayLike, fake: ArrayLike, k: int = 3, block: int = 512
) -> tuple[float, float]:
  """Improved precision and recall (arXiv 1904.06991, equations 1 and 2).

  The manifold of a set is a union of balls around its samples. Each ball reaches to the k-th
  nearest other sample. Precision is the share of fake samples on the real manifold, recall the
  share of real samples on the fake manifold. Both depend on n and m: compare runs at equal numbers.

  Args:
    real: features [n, f] of real images.
    fake: features [m, f] of generated images.
    k: neighbours; 3 in the paper.
    block: rows of the distance matrix at a time; memory is about 20 block max(n, m) bytes besides
      the features.

  Raises:
    UserError: a feature is not finite, or a set has k samples or fewer.
  """
  real, fake = _finite("real", real), _finite("fake", fake)
  assert real.ndim == 2 and real.shape[1:] == fake.shape[1:], (real.shape, fake.shape)
  for name, x in (("real", real), ("fake", fake)):
    if len(x) <= k:
      raise UserError(
        f"{name} has {len(x)} samples, and k={k} neighbours need at least {k + 1}; "
        "give more samples or a smaller k."
      )
  centre = real.mean(axis=0)  # |a|^2 + |b|^2 - 2ab would lose its digits to a common offset
  real, fake = real - centre, fake - centre
  precision = _on_manifold(fake, real, _radii(real, k, block), block)
  recall = _on_manifold(real, fake, _radii(fake, k, block), block)
  return precision, recall


def _distances(x: np.ndarray, y: np.ndarray, block: int) -> Iterator[tuple[int, np.ndarray]]:
  """Yields (i, squared distances [<= block, m] of x[i : i + block] to y [m, f])."""
  y_square = np.sum(y**2, axis=1)
  for i in range(0, len(x), block):
    rows = x[i : i + block]
    d = rows @ y.T
    d *= -2  # in place: this matrix takes most of the memory
    d += np.sum(rows**2, axis=1)[:, None]
    d += y_square
    yield i, d


def _radii(x: np.ndarray, k: int, block: int) -> np.ndarray:
  """Squared distance [n] of each sample in x [n, f] to its k-th nearest other, rounded up."""
  radii = np.empty(len(x))
  for i, d in _distances(x, x, block):
    rows = np.arange(len(d))
    d[rows, i + rows] = np.inf  # not its own neighbour
    d.partition(k - 1, axis=1)
    radii[i : i + len(d)] = d[:, k - 1]
  # Rounding must not decide ties: a copy of a sample lies in its ball, even at radius zero. Each
  # sample has its own allowance: a common one would let one outlier widen all balls.
  return radii + 1e-12 * (radii + np.sum(x**2, axis=1))


def _on_manifold(x: np.ndarray, centres: np.ndarray, radii: np.ndarray, block: int) -> float:
  """Share of the samples x [m, f] inside any ball of squared radii [n] around centres [n, f]."""
  inside = sum(int((d <= radii).any(axis=1).sum()) for _, d in _distances(x, centres, block))
  return inside / len(x)


class Scores(NamedTuple):
  """Running sums over logits for the inception score, in each of s parts.

  The score is exp(E_x KL(p(y|x) || p(y))) (arXiv 1606.03498, section 4). As in the original code,
  it is computed within each of s consecutive parts. So samples that are sorted by class must be
  shuffled first: a part of a single class scores 1.

  Start with `no_scores(s, c)`, add logits with `update_scores`, add sums to combine hosts.
  """

  count: np.ndarray  # [s]
  classes: np.ndarray  # [s, c], the sum of p(y|x)
  negentropy: np.ndarray  # [s], the sum of p(y|x) log p(y|x)


def parts(n: int, splits: int) -> np.ndarray:
  """The part, of `splits` consecutive ones, of each of n samples: int [n]."""
  assert 1 <= splits <= n, (splits, n)
  starts = np.arange(splits) * n // splits
  return np.searchsorted(starts, np.arange(n), side="right") - 1


def no_scores(splits: int, c: int) -> Scores:
  """The sums of no samples."""
  return Scores(np.zeros(splits), np.zeros((splits, c)), np.zeros(splits))


def update_scores(scores: Scores, part: np.ndarray, logits: ArrayLike) -> Scores:
  """Adds the logits [n, c] of samples in the parts `part` [n] to sums; n may be 0."""
  log_p = log_softmax(_finite("logits", logits), axis=1)
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


def _finite(name: str, x: ArrayLike) -> np.ndarray:
  """x as float64; UserError if a value is NaN or infinite."""
  x = np.asarray(x, np.float64)
  bad = x.size - np.count_nonzero(np.isfinite(x))
  if bad:
    raise UserError(
      f"{name} has {bad} of {x.size} values NaN or infinite, and statistics need finite ones; "
      "look at the samples first, the model may have diverged."
    )
  return x


def _covariance(name: str, x: ArrayLike, f: int) -> np.ndarray:
  """x as finite, exactly symmetric float64 [f, f]."""
  x = _finite(name, x)
  assert x.shape == (f, f), (x.shape, f)
  skew = np.abs(x - x.T).max()
  if skew > 1e-3 * np.abs(x).max():
    raise UserError(
      f"{name} differs from its transpose by {skew:.3g}, and a covariance is symmetric; "
      "pass the covariance of the features, not another matrix."
    )
  return (x + x.T) / 2  # statistics that were stored in float32 are only nearly symmetric
