"""fid.py against SciPy, naive loops and closed forms.

Dimensions: n samples (m in a second set), f features, c classes.
"""

import tracemalloc

import numpy as np
import pytest
import scipy.linalg

from ism_jax.evaluation import fid
from tests.ism.stand_ins import inception_score
from train_jax.errors import UserError


def gaussian(seed, n, f, offset=0.0):
  """Correlated features [n, f]."""
  rng = np.random.default_rng(seed)
  return rng.standard_normal((n, f)) @ rng.standard_normal((f, f)) + offset


def moments_of(x):
  return fid.update(fid.no_moments(x.shape[1]), x)


def distance(x, y):
  a, b = moments_of(x), moments_of(y)
  return fid.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def sqrtm_distance(x, y):
  """The usual formula, by the matrix square root of the non-symmetric product."""
  c1, c2 = np.cov(x.T), np.cov(y.T)
  root = scipy.linalg.sqrtm(c1 @ c2)
  return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(c1) + np.trace(c2) - 2 * np.trace(root)


def sample_distance(x, y):
  """From the samples, with no covariance: tr sqrt(C1 C2) is the nuclear norm of their products."""
  n, m = len(x) - 1, len(y) - 1
  a, b = x - x.mean(0), y - y.mean(0)
  overlap = np.linalg.norm(a @ b.T, "nuc") / np.sqrt(n * m)
  return np.sum((x.mean(0) - y.mean(0)) ** 2) + (a**2).sum() / n + (b**2).sum() / m - 2 * overlap


# Moments


@pytest.mark.parametrize("sizes", [[200], [1] * 200, [0, 3, 100, 0, 97], [199, 1]])
def test_streamed_moments_are_those_of_all_samples(sizes):
  x = gaussian(0, 200, 5, offset=3.0)
  moments = fid.no_moments(5)
  for part in np.split(x, np.cumsum(sizes)[:-1]):
    moments = fid.update(moments, part)
  assert moments.count == 200
  np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-13)
  np.testing.assert_allclose(moments.covariance, np.cov(x.T), rtol=1e-12, atol=1e-12)


def test_merge_is_the_moments_of_the_union_in_any_grouping():
  parts = [gaussian(seed, n, 4, offset=seed) for seed, n in enumerate([7, 1, 30])]
  a, b, c = map(moments_of, parts)
  whole = np.concatenate(parts)
  for merged in (fid.merge(fid.merge(a, b), c), fid.merge(c, fid.merge(a, b))):
    assert merged.count == 38
    np.testing.assert_allclose(merged.mean, whole.mean(0), rtol=1e-13)
    np.testing.assert_allclose(merged.covariance, np.cov(whole.T), rtol=1e-12, atol=1e-12)
  none = fid.no_moments(4)
  for merged in (fid.merge(none, c), fid.merge(c, none)):
    np.testing.assert_array_equal(merged.scatter, c.scatter)
  assert fid.merge(none, none).count == 0


def test_update_leaves_its_inputs_alone():
  x = gaussian(0, 10, 3)
  moments = moments_of(x)
  kept, x_kept = [np.copy(part) for part in moments], x.copy()
  fid.update(moments, x)
  for part, before in zip(moments, kept, strict=True):
    np.testing.assert_array_equal(part, before)
  np.testing.assert_array_equal(x, x_kept)


def test_a_large_mean_costs_no_digits():
  """At an offset of 1e8, sums of x and x^2 would leave nothing of a variance of 1."""
  x = np.random.default_rng(0).integers(-2, 3, (3000, 3)).astype(np.float64)
  moments = fid.no_moments(3)
  for part in np.split(x + 1e8, 30):
    moments = fid.update(moments, part)
  np.testing.assert_allclose(moments.covariance, np.cov(x.T), rtol=1e-6, atol=1e-6)


def test_low_precision_features_are_summed_in_float64():
  x = (gaussian(0, 5000, 2) + 100).astype(np.float16)
  moments = moments_of(x)
  assert moments.mean.dtype == moments.scatter.dtype == np.float64
  np.testing.assert_allclose(moments.mean, x.astype(np.float64).mean(0), rtol=1e-13)


# Fréchet distance


@pytest.mark.parametrize("f", [2, 16, 64])
def test_frechet_is_scipys_sqrtm_formula_on_well_conditioned_data(f):
  x, y = gaussian(0, 20 * f, f), gaussian(1, 30 * f, f, offset=0.3)
  assert distance(x, y) == pytest.approx(sqrtm_distance(x, y), rel=1e-6)
  assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-9)


def test_frechet_of_isotropic_gaussians():
  """|mu1 - mu2|^2 + f (s1 - s2)^2."""
  mu1, mu2, eye = np.array([1.0, 2, 3, 4, 5]), np.zeros(5), np.eye(5)
  assert fid.frechet_distance(mu1, 4 * eye, mu2, 9 * eye) == pytest.approx(55 + 5 * 1)
  assert fid.frechet_distance([0.5], [[4.0]], [0.0], [[0.25]]) == pytest.approx(0.25 + 1.5**2)


def test_frechet_of_commuting_covariances():
  """sum_i (sqrt(a_i) - sqrt(b_i))^2 in the common eigenbasis, zero eigenvalues included."""
  q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))
  a, b = np.array([0, 0, 1e-6, 1, 4, 1e4]), np.array([0, 9, 4e-6, 0, 1, 4e4])
  result = fid.frechet_distance(np.zeros(6), (q * a) @ q.T, np.zeros(6), (q * b) @ q.T)
  assert result == pytest.approx(np.sum((np.sqrt(a) - np.sqrt(b)) ** 2), rel=1e-9)


def test_frechet_of_equal_gaussians_is_zero_and_never_negative():
  for seed in range(5):
    x = gaussian(seed, 100, 30)
    assert 0 <= distance(x, x) < 1e-10 * np.trace(np.cov(x.T))
  assert fid.frechet_distance([1.0, 2.0], np.zeros((2, 2)), [1.0, 4.0], np.zeros((2, 2))) == 4


@pytest.mark.parametrize("n, m, f", [(20, 20, 100), (10, 300, 200), (300, 10, 200), (2, 2, 50)])
def test_frechet_is_stable_below_as_many_samples_as_dimensions(n, m, f):
  """SciPy's sqrtm warns here and returns a complex matrix, off by 1e-8 or more."""
  rng = np.random.default_rng(0)
  x, y = rng.standard_normal((n, f)), 1.3 * rng.standard_normal((m, f)) + 0.1
  assert distance(x, y) == pytest.approx(sample_distance(x, y), rel=1e-12)


def test_frechet_reads_both_halves_of_a_nearly_symmetric_covariance():
  x, y = (np.cov(gaussian(seed, 50, 3).T) for seed in (0, 1))
  x[0, 1] += 1e-4 * x.max()
  results = [fid.frechet_distance(np.zeros(3), c, np.zeros(3), y) for c in (x, x.T)]
  assert results[0] == pytest.approx(results[1], rel=1e-12)


# Precision and recall


def naive_precision_recall(real, fake, k):
  def radius(points, i):
    return sorted(np.linalg.norm(points[i] - p) for j, p in enumerate(points) if j != i)[k - 1]

  def share(queries, points):
    radii = [radius(points, i) for i in range(len(points))]
    hits = [
      any(np.linalg.norm(q - p) <= r for p, r in zip(points, radii, strict=True)) for q in queries
    ]
    return np.mean(hits)

  return share(fake, real), share(real, fake)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_precision_recall_is_the_naive_loop_for_any_block(k, block):
  rng = np.random.default_rng(k)
  real, fake = rng.standard_normal((60, 3)), 0.8 * rng.standard_normal((45, 3)) + 1
  real, fake = real + 1e7, fake + 1e7  # squares of 1e14: a naive |a|^2 + |b|^2 - 2ab has no digits
  expected = naive_precision_recall(real, fake, k)
  assert 0.1 < expected[1] < expected[0] < 0.95  # or there is nothing to get wrong
  assert fid.precision_recall(real, fake, k, block) == pytest.approx(expected, abs=1e-12)


def test_precision_recall_by_hand():
  """k = 1 on a line."""
  real = np.array([[0.0], [1], [3], [7]])  # balls [-1, 1], [0, 2], [1, 5], [3, 11]
  fake = np.array([[-1.0], [-2], [2.5], [2.25]])  # [-2, 0], [-3, -1], [2.25, 2.75], [2, 2.5]
  # -1 and 0 lie on the edges of their balls: inside.
  assert fid.precision_recall(real, fake, k=1) == (0.75, 0.25)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_a_copy_is_perfect_and_a_collapsed_copy_has_no_recall(offset):
  x = np.random.default_rng(0).standard_normal((50, 20)) + offset
  x[:8] = x[0]  # duplicates: balls of radius zero
  for block in (1, 16, 512):
    assert fid.precision_recall(x, x, block=block) == (1, 1)
    assert fid.precision_recall(x, np.tile(x[10], (30, 1)), block=block) == (1, 1 / 50)
  alike = np.full((5, 2), offset)  # every ball a point, and no digits to round
  assert fid.precision_recall(alike, alike) == (1, 1)


def test_a_sample_on_the_edge_of_a_ball_lies_in_it_whatever_the_rounding():
  """Each fake sample is a real one's nearest neighbour, mirrored at it."""
  real = np.random.default_rng(0).standard_normal((200, 5))
  gaps = np.linalg.norm(real[:, None] - real, axis=2) + np.diag(np.full(200, np.inf))
  mirrored = 2 * real - real[gaps.argmin(axis=1)]
  assert fid.precision_recall(real, mirrored, k=1)[0] == 1


def test_outliers_widen_no_other_ball():
  real = np.random.default_rng(0).standard_normal((50, 2))
  fake = np.concatenate([real + 100, np.tile([[1e9, 0]], (5, 1))])  # their own radius is zero
  assert fid.precision_recall(real, fake) == (0, 0)


def test_precision_recall_holds_blocks_only():
  x = np.random.default_rng(0).standard_normal((2000, 4))
  tracemalloc.start()
  fid.precision_recall(x, x + 0.1, block=50)
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 20 * 50 * 2000 + 10 * x.nbytes < 2000 * 2000  # bytes; bools [n, n] are the latter


# Inception score


@pytest.mark.parametrize("c", [2, 10])
def test_inception_score_is_one_without_information_and_c_with_all_of_it(c):
  assert inception_score(np.full((100, c), 7.0)) == pytest.approx((1, 0))
  certain = 3000.0 * np.tile(np.eye(c), (10 * 10, 1))
  assert inception_score(certain) == pytest.approx((c, 0))
  unused = np.concatenate([certain, np.full((len(certain), 1), -3000.0)], axis=1)
  assert inception_score(unused) == pytest.approx((c, 0))  # no NaN from an empty class


def test_inception_score_of_two_sure_classes():
  """p(y|x) is (q, 1-q) or (1-q, q), equally often: log IS = log 2 - H(q)."""
  q = 0.9
  p = np.tile([[q, 1 - q], [1 - q, q]], (50, 1))
  shift = np.random.default_rng(0).normal(size=(100, 1))  # logits are defined up to a constant
  entropy = -q * np.log(q) - (1 - q) * np.log(1 - q)
  assert inception_score(np.log(p) + shift) == pytest.approx((2 * np.exp(-entropy), 0))


def test_inception_score_is_taken_within_consecutive_splits():
  certain = 1000 * np.eye(2)
  logits = np.concatenate([np.tile(certain[:1], (6, 1)), np.tile(certain, (3, 1))])
  assert inception_score(logits, splits=2) == pytest.approx((1.5, 0.5))  # scores 1 and 2
  share = np.array([9, 3]) / 12
  expected = np.exp(-np.sum(share * np.log(share)))
  assert inception_score(logits, splits=1) == pytest.approx((expected, 0))
  assert inception_score(logits, splits=12) == pytest.approx((1, 0))  # one sample each
  sizes = [(i + 1) * 11 // 4 - i * 11 // 4 for i in range(4)]  # the original code's
  np.testing.assert_array_equal(fid.parts(11, 4), np.repeat(np.arange(4), sizes))
  uneven = np.concatenate([certain[:1], certain])  # 3 in 2 splits: 1 and 2
  assert inception_score(uneven, splits=2) == pytest.approx((1.5, 0.5))


# Errors

Z, I = np.zeros(2), np.eye(2)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: fid.update(fid.no_moments(2), [[1, np.nan]]), "features has 1 of 2 values NaN"),
    (lambda: fid.frechet_distance(Z, I, Z, [[1, 2], [0, 1]]), "cov2 differs from its transpose"),
    (lambda: fid.frechet_distance(Z, I, Z, [[1, 2], [2, 1]]), "cov2 has the eigenvalue -1 "),
    (lambda: fid.frechet_distance(Z, I, Z, I + np.inf), "cov2 has 4 of 4 values NaN or infinite"),
    (lambda: fid.precision_recall(np.ones((5, 2)), np.ones((3, 2))), "fake has 3 samples, and k=3"),
    (lambda: inception_score([[np.inf, 0]], splits=1), "logits has 1 of 2 values"),
  ],
)
def test_bad_input_is_named(call, message):
  with pytest.raises(UserError, match=message) as error:
    call()
  assert str(error.value).count(". ") == 0 and str(error.value).endswith(".")  # one sentence
