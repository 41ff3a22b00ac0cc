"""Entropy, distinct and repeated n-grams against loops over Python tuples."""

import math
from collections import Counter

import numpy as np
import pytest

from seqmatch_jax.evaluation import diversity
from train_jax.errors import UserError


def rows(*texts):
  """Texts as (tokens [m, l], length [m]); the padding looks like tokens."""
  width = max(map(len, texts))
  tokens = np.array([[*t, *[7] * (width - len(t))] for t in texts], np.int32)
  return tokens, np.array([len(t) for t in texts])


def grams(text, n):
  return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_equal_loops(n):
  rng = np.random.default_rng(n)
  texts = [rng.integers(5, 9, size).tolist() for size in (40, 1, 0, 17, 3, 25, 40)]
  made = rows(*texts)
  counts = Counter(g for text in texts for g in grams(text, n))
  total = counts.total()
  shares = [c / total for c in counts.values()]
  np.testing.assert_allclose(diversity.entropy(*made, n), -sum(s * math.log(s) for s in shares))
  np.testing.assert_allclose(diversity.distinct(*made, n), len(counts) / total)
  each = [1 - len(set(grams(t, n))) / len(grams(t, n)) for t in texts if len(t) >= n]
  np.testing.assert_allclose(diversity.repetition(*made, n), np.mean(each))


def test_large_ids_do_not_collide():
  """Long n-grams of a large vocabulary: as many numbers as n-grams, none of which is repeated."""
  tokens = np.random.default_rng(0).permutation(400)[None] * 300 + 2**20
  assert diversity.distinct(tokens, [400], 8) == 1
  np.testing.assert_allclose(diversity.entropy(tokens, [400], 8), math.log(393))


def test_no_ngram_is_no_number():
  made = rows([1, 2], [5])
  for metric in (diversity.entropy, diversity.distinct, diversity.repetition):
    assert math.isnan(metric(*made, 3))
  with pytest.raises(UserError, match="n=0 must be at least 1"):
    diversity.entropy(*made, 0)
