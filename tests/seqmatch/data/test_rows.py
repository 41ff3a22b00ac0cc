"""Trees that share a row: each is as it was alone, and sees no other."""

import numpy as np
import pytest

from seqmatch_jax.actions import visible
from seqmatch_jax.data.rows import group_into_rows, pack, pack_rows
from seqmatch_jax.tokens import BACKSPACE as X
from seqmatch_jax.tokens import EOS, PAD

ACTIONS = [[4, 5, X, EOS], [EOS], [6, 7, 8], [4, X, 5, 5, EOS], [7, EOS], [8, 8, X, X, EOS]]


@pytest.mark.parametrize("dense", [False, True])
def test_trees_that_share_a_row_are_as_they_were_alone(dense, make_batch):
  """As many in each row, or any number of them with no PAD between their actions."""
  alone, _ = make_batch([[actions] for actions in ACTIONS])
  row = np.array([0, 0, 0, 1, 1, 2]) if dense else np.arange(6) // 3
  size, width = alone["end"][:, 0], alone["action"].shape[1]
  nodes = int(np.bincount(row, size).max()) + 2
  together = pack_rows(alone, row, nodes, 3 * width) if dense else pack(alone, 3, nodes)
  assert {n: x.dtype for n, x in together.items()} == {n: x.dtype for n, x in alone.items()}
  expected = {name: np.zeros_like(x) for name, x in together.items()}
  expected["end"][:] = np.arange(1, nodes + 1)  # padding sees itself only
  before, first = np.zeros(3, int), np.zeros(3, int)
  for i, r in enumerate(row):
    n, k = size[i], np.sum(alone["action"][i] != PAD)
    place, time = slice(before[r], before[r] + n), slice(first[r], first[r] + k)
    for name in ("token", "position", "erasable"):
      expected[name][r, place] = alone[name][i, :n]
    expected["end"][r, place] = alone["end"][i, :n] + before[r]
    for name in ("action", "time", "weight"):
      expected[name][r, time] = alone[name][i, :k]
    for name in ("read", "next"):
      expected[name][r, time] = alone[name][i, :k] + before[r]
    before[r], first[r] = before[r] + n, first[r] + (k if dense else width)
  for name, value in expected.items():
    np.testing.assert_array_equal(together[name], value, err_msg=name)
  mask = visible(together["end"][0])
  assert not mask[size[0] :, : size[0]].any() and not mask[: size[0], size[0] :].any()
  with pytest.raises(ValueError, match="do not fit into 9"):
    pack(alone, 3, 9)


def test_the_longest_is_put_beside_the_shortest():
  np.testing.assert_array_equal(group_into_rows(np.array([3, 9, 1, 7]), 2), [[1, 2], [3, 0]])
  np.testing.assert_array_equal(group_into_rows(np.array([3, 9, 1]), 1), [[0], [1], [2]])
  size = np.random.default_rng(0).integers(1, 50, 24)
  table = group_into_rows(size, 4)
  assert table.shape == (6, 4) and sorted(table.ravel()) == list(range(24))
  assert size[table].sum(1).max() < np.sort(size)[::-1].reshape(6, 4).sum(1).max()
