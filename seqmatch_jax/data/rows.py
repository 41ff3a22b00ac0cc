"""Several trees in one row of a batch, one behind the other (NumPy).

They do not see each other: the nodes of a tree see nothing behind its end.

Dimensions: b trees, g trees in a row, s nodes, a actions of a tree.
"""

from __future__ import annotations

import numpy as np

from seqmatch_jax.tokens import PAD


def group_into_rows(size: np.ndarray, sequences_per_row: int) -> np.ndarray:
  """Deals trees to rows of about equal size, the largest beside the smallest.

  Args:
    size: [b], nodes of each tree.
    sequences_per_row: g; divides b.

  Returns:
    [b / g, g], the trees of each row.
  """
  if sequences_per_row == 1:
    return np.arange(len(size))[:, None]
  order = np.argsort(-size, kind="stable").reshape(sequences_per_row, -1)
  order[1::2] = order[1::2, ::-1]  # there and back
  return order.T


def pack(trees: dict, sequences_per_row: int, nodes: int) -> dict:
  """Packs every g = `sequences_per_row` neighbours of a batch of trees into one row.

  Args:
    trees: a batch of `actions.tree`, [b, ...].

  Returns:
    The same with [b / g, nodes] and [b / g, g a]; ValueError if a row needs more nodes.
  """
  b, a = trees["action"].shape
  row = np.arange(b) // sequences_per_row
  return _put_rows(trees, row, np.full(b, a), nodes, sequences_per_row * a)


def pack_rows(trees: dict, row: np.ndarray, nodes: int, actions: int) -> dict:
  """As `pack`, with any number of trees in a row, and no PAD between their actions.

  Args:
    row: int [b], ascending, the row of each tree.
    actions: number of actions in a row of the result; PAD fills the rest.
  """
  return _put_rows(trees, row, np.sum(trees["action"] != PAD, axis=1), nodes, actions)


def _before(size: np.ndarray, row: np.ndarray) -> np.ndarray:
  """The summed `size` [b] of the trees before each in its `row` [b], ascending -> [b, 1]."""
  before = size.cumsum() - size
  return (before - before[np.searchsorted(row, row)])[:, None]


def _put_rows(trees: dict, row: np.ndarray, count: np.ndarray, nodes: int, actions: int) -> dict:
  """Trees in rows, each with its nodes and its first `count` [b] actions."""
  size = trees["end"][:, 0]  # the first node lives to the end of its tree
  before, rows = _before(size, row), row[-1] + 1
  if (fullest := int(np.bincount(row, size).max())) > nodes:
    raise ValueError(f"{fullest} nodes do not fit into {nodes}")

  def put(values, size, before, padding):
    used = np.arange(values.shape[1]) < size[:, None]
    out = np.broadcast_to(np.asarray(padding, values.dtype), (rows, np.shape(padding)[-1])).copy()
    place = (np.arange(values.shape[1]) + before)[used]
    out[np.broadcast_to(row[:, None], used.shape)[used], place] = values[used]
    return out

  empty, index = np.zeros(nodes, np.int32), np.arange(1, nodes + 1)
  by_node = {n: put(trees[n], size, before, empty) for n in ("token", "position", "erasable")}
  by_node["end"] = put(trees["end"] + before.astype(np.int32), size, before, index)
  real, empty = trees["action"] != PAD, np.zeros(actions, np.int32)
  by_action = {name: trees[name] for name in ("action", "time", "weight")}
  for name in ("read", "next"):
    by_action[name] = np.where(real, trees[name] + before, 0).astype(np.int32)
  earlier = _before(count, row)
  return by_node | {name: put(x, count, earlier, empty) for name, x in by_action.items()}
