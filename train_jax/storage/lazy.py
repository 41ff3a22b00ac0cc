"""Tensors that are read piece by piece: each device of a mesh reads its own share.

One parameter here is often several tensors of a file, stacked, concatenated, transposed or with
rows in another order. `Lazy` composes such views. Only one slice of one tensor is read at a time,
and only one device's share of one parameter is held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from train_jax.storage.weights import Weights

Index = tuple[slice, ...]


@dataclass(frozen=True)
class Lazy:
  """A tensor whose parts are read when they are indexed, by slices of step 1.

  Attributes:
    shape: of the whole tensor.
    fill: (array, index) -> None; writes the part at `index` (a slice with start and stop for each
      axis) into the array.
    dtype: of the parts.
  """

  shape: tuple[int, ...]
  fill: Callable[[np.ndarray, Index], None]
  dtype: Any = np.float32

  def __getitem__(self, index: Index) -> np.ndarray:
    index = tuple(slice(*s.indices(n)[:2]) for s, n in zip(index, self.shape, strict=True))
    out = np.empty([s.stop - s.start for s in index], self.dtype)
    self.fill(out, index)
    return out


def stored(weights: Weights, name: str, shape: tuple[int, ...]) -> Lazy:
  """The tensor `name` of a file; raises as `Weights.check` does."""
  weights.check(name, shape)

  def fill(out, index):
    out[...] = weights.part(name, index)

  return Lazy(tuple(shape), fill)


def transposed(inner: Lazy) -> Lazy:
  """The transpose of a matrix."""
  return Lazy(inner.shape[::-1], lambda out, index: inner.fill(out.T, index[::-1]))


def concatenated(parts: Sequence[Lazy]) -> Lazy:
  """Tensors side by side along the last axis."""
  ends = np.cumsum([part.shape[-1] for part in parts]).tolist()

  def fill(out, index):
    start, stop = index[-1].start, index[-1].stop
    for part, end in zip(parts, ends, strict=True):
      first = end - part.shape[-1]
      low, high = max(start, first), min(stop, end)
      if low < high:
        columns = slice(low - first, high - first)
        part.fill(out[..., low - start : high - start], (*index[:-1], columns))

  return Lazy((*parts[0].shape[:-1], ends[-1]), fill)


def stacked(layers: Sequence[Lazy]) -> Lazy:
  """Tensors of one shape along a new first axis."""

  def fill(out, index):
    for row, layer in zip(out, layers[index[0]], strict=True):
      layer.fill(row, index[1:])

  return Lazy((len(layers), *layers[0].shape), fill)


def rows(inner: Lazy, numbers: np.ndarray) -> Lazy:
  """The rows `numbers` of a tensor, in that order; zeros where a number is negative."""

  def fill(out, index):
    part, start = numbers[index[0]], 0
    out[...] = 0
    ends = (np.diff(part) != 1) | (part[:-1] < 0)  # of runs of consecutive rows
    for run in np.split(part, np.flatnonzero(ends) + 1):
      if len(run) and run[0] >= 0:
        source = slice(int(run[0]), int(run[-1]) + 1)
        inner.fill(out[start : start + len(run)], (source, *index[1:]))
      start += len(run)

  return Lazy((len(numbers), *inner.shape[1:]), fill)
