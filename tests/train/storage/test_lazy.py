"""Views on stored tensors, of which any part is read: against numpy on the whole."""

import itertools

import numpy as np
import pytest

from train_jax.storage import lazy
from train_jax.storage.weights import Weights, save

A, B = (np.random.default_rng(i).normal(size=(6, 4)).astype(np.float32) for i in (0, 1))


@pytest.fixture
def stored(tmp_path):
  """name of a tensor -> Lazy."""
  save(tmp_path / "w.safetensors", {"a": A, "b": B}, {})
  weights = Weights(tmp_path / "w.safetensors")
  return lambda name: lazy.stored(weights, name, (6, 4))


def parts(shape):
  """All slices of a small array."""
  axes = [[slice(i, j) for j in range(n + 1) for i in range(j)] for n in shape]
  return itertools.product(*axes)


def agrees(view, whole):
  assert view.shape == whole.shape
  for index in parts(whole.shape):
    np.testing.assert_array_equal(view[index], whole[index])
  np.testing.assert_array_equal(view[(slice(None),) * whole.ndim], whole)


def test_stacks_of_transposed_matrices_side_by_side(stored):
  a, b = lazy.transposed(stored("a")), lazy.transposed(stored("b"))
  agrees(lazy.concatenated([a, b]), np.concatenate([A.T, B.T], 1))
  agrees(lazy.stacked([b, a]), np.stack([B.T, A.T]))


def test_rows_in_another_order(stored):
  numbers = np.array([-1, 5, 2, -1, 0, 2])
  expected = np.where(numbers[:, None] >= 0, A[numbers], 0)
  agrees(lazy.rows(stored("a"), numbers), expected)
  agrees(lazy.transposed(lazy.rows(stored("a"), numbers)), expected.T)
