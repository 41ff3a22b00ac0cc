"""MAUVE against closed forms, loops, and numbers of the authors' package."""

import itertools
import math
import statistics

import numpy as np
import pytest

from seqmatch_jax.evaluation import mauve as lib
from train_jax.errors import UserError

close = np.testing.assert_allclose


def naive_area(p, q, scale, mixtures):
  """The curve point by point, bucket by bucket; the area by trapezia over the other axis."""
  p, q = ([x / sum(h) for x in h] for h in (p, q))
  points = [(1.0, 0.0)]
  for i in range(mixtures):
    w = 1e-6 + (1 - 2e-6) * i / (mixtures - 1)
    kl = [
      sum(x * math.log(x / (w * a + (1 - w) * b)) for x, a, b in zip(h, p, q, strict=True) if x)
      for h in (q, p)
    ]
    points.append((math.exp(-scale * kl[0]), math.exp(-scale * kl[1])))
  points.append((0.0, 1.0))
  return sum((x1 + x2) / 2 * (y2 - y1) for (x1, y1), (x2, y2) in itertools.pairwise(points))


@pytest.mark.parametrize("scale, mixtures", [(5.0, 25), (2.0, 7)])
def test_curve_equals_a_loop(scale, mixtures):
  rng = np.random.default_rng(0)
  for p, q in ((rng.integers(0, 6, 12), rng.integers(0, 6, 12)), ([0, 3, 1], [2, 0, 2])):
    got = lib.area(lib.divergence_curve(p, q, scale, mixtures))
    close(got, naive_area(list(p), list(q), scale, mixtures), rtol=1e-10)


def test_equal_histograms_are_one_and_disjoint_ones_the_limit():
  p = [1, 0, 4, 2]
  close(lib.area(lib.divergence_curve(p, p)), 1, rtol=1e-12)
  close(lib.area(lib.divergence_curve(p, [10 * x for x in p])), 1, rtol=1e-12)
  for c in (1, 2, 5):
    curve = lib.divergence_curve([1, 2, 0, 0], [0, 0, 5, 1], scale=c, mixtures=4001)
    close(lib.area(curve), math.factorial(c) ** 2 / math.factorial(2 * c), rtol=1e-5)


def test_mean_and_spread_are_those_of_the_seeds_histograms(monkeypatch):
  buckets = np.random.default_rng(0).integers(0, 4, size=(3, 12))
  monkeypatch.setattr(lib, "quantise", lambda points, buckets_, seed: buckets[seed])
  features = np.random.default_rng(0).normal(size=(12, 3))
  got = lib.mauve(features[:5], features[5:], buckets=4, seeds=3)
  pairs = [[[list(x).count(k) for k in range(4)] for x in (b[:5], b[5:])] for b in buckets]
  values = [naive_area(p, q, 5.0, 25) for p, q in pairs]
  close(got.mean, statistics.mean(values), rtol=1e-10)
  close(got.spread, statistics.stdev(values), rtol=1e-10)
  smoothed = [naive_area([x + 0.5 for x in p], [x + 0.5 for x in q], 5.0, 25) for p, q in pairs]
  close(got.smoothed, statistics.mean(smoothed), rtol=1e-10)
  assert got.buckets == 4


def test_reduce_keeps_the_variance_that_was_asked_for():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(200, 8)) * [5, 4, 3, 2, 1, 0.5, 0.1, 0.1] + 3
  unit = x / np.linalg.norm(x, axis=1, keepdims=True)
  values, vectors = np.linalg.eigh(np.cov(unit.T))
  share = np.cumsum(values[::-1]) / values.sum()
  r = int(np.argmax(share >= 0.9)) + 1
  got = lib.reduce(x)
  assert got.shape == (200, r) and 1 < r < 8
  want = (unit - unit.mean(0)) @ vectors[:, ::-1][:, :r]
  close(np.abs(got), np.abs(want), atol=1e-10)
  close(lib.reduce(7 * x), got, atol=1e-12)  # lengths do not count
  assert lib.reduce(np.zeros((4, 3))).shape == (4, 1)


def sets(name):
  """Features of 300 real and 300 generated texts, of twelve kinds each."""
  rng = np.random.default_rng(1)
  centres = 3 * rng.normal(size=(12, 8))
  one, two = rng.dirichlet(np.ones(12), size=2)
  shares = {"equal": (one, one), "near": (one, 0.7 * one + 0.3 * two), "far": (one, two)}[name]
  kinds = (centres[rng.choice(12, 300, p=p)] for p in shares)
  return [x + 0.5 * rng.normal(size=(300, 8)) for x in kinds]


# What mauve-text 0.4.0 gives for `sets`: the mean over its seeds 0 to 39.
PACKAGE = {"equal": 0.93037, "near": 0.84362, "far": 0.29732}


@pytest.mark.parametrize("name", PACKAGE)
def test_agrees_with_the_authors_package(name):
  got = lib.mauve(*sets(name), seeds=20)
  assert got.buckets == 30
  close(got.mean, PACKAGE[name], atol=0.01)


def test_spread_is_over_seeds_and_buckets_are_a_tenth_of_the_smaller_set():
  one, two = sets("near")
  first, both = (lib.mauve(one, two, buckets=10, seeds=s) for s in (1, 2))
  assert first.spread == 0 < both.spread and lib.mauve(one, two, buckets=10, seeds=2) == both
  assert [lib.mauve(*x, seeds=1).buckets for x in ((one, two[:140]), (one[:140], two))] == [14, 14]


@pytest.mark.parametrize(
  "change, words",
  [
    ({"real": np.zeros(9)}, ["real has shape (9,)", "one row"]),
    ({"generated": np.zeros((9, 4))}, ["3 features and generated 4", "same network"]),
    ({"generated": np.full((9, 3), np.nan)}, ["generated has 9 of 9 rows"]),
    ({"buckets": 10}, ["buckets=10", "the 9 texts"]),
    ({"buckets": 1}, ["buckets=1", "from 2"]),
    ({"seeds": 0}, ["seeds=0"]),
    ({"real": np.zeros((1, 3)), "buckets": 2}, ["buckets=2", "the 1 texts"]),
    ({"buckets": 0}, ["MAUVE of 9 texts means nothing: below 100 it is near 1"]),
    ({"real": np.ones((99, 3)), "generated": np.ones((400, 3)), "buckets": 0}, ["MAUVE of 99"]),
  ],
)
def test_bad_input(change, words):
  good = {"real": np.ones((9, 3)), "generated": np.ones((9, 3)), "buckets": 2}
  with pytest.raises(UserError) as error:
    lib.mauve(**{**good, **change})
  assert all(word in str(error.value) for word in words)
