"""A stored step, read on the host and compared with its checksums."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import future

from train_jax.checkpointing import checksum

PyTree = Any

GROUP = 2**28  # bytes that are read back at a time, or one array if it is larger
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EIO)


class DamagedError(Exception):
  """A stored step that is not what was saved."""


class LateJson(ocp.JsonCheckpointHandler):
  """JSON that is made in the background while the arrays are written."""

  async def async_save(self, directory, item=None, args=None):
    async def write():
      if jax.process_index() == 0:
        (directory / "metadata").write_text(json.dumps(args.make()))

    return [future.CommitFutureAwaitingContractedSignals(write(), name="late_json")]


@ocp.args.register_with_handler(LateJson, for_save=True, for_restore=True)
@dataclass
class LateJsonSave(ocp.args.CheckpointArgs):
  """The argument of LateJson, which saves the result of `make`."""

  make: Callable[[], dict]


def reason(err: Exception) -> str:
  """An error of Orbax or its storage in a few words."""
  if isinstance(err, DamagedError):
    return str(err)
  text = " ".join(str(err).split())
  disk_error = next((os.strerror(n) for n in DISK_ERRORS if os.strerror(n) in text), "")
  return disk_error or f"{type(err).__name__}: {text[:200]}"


def read_meta(step: Path) -> dict:
  """The JSON beside the arrays; raises DamagedError, or OSError if there is none."""
  meta = json.loads((step / "meta" / "metadata").read_text())
  if not isinstance(meta, dict) or meta.pop("checksum", None) != checksum.of_json(meta):
    raise DamagedError("the checksum of meta does not match what was saved")
  return meta


def looks_whole(step: Path) -> bool:
  """Whether meta is good and every item in it exists; the arrays are not read."""
  try:
    names = read_meta(step)["checksums"]
    return all((step / name / "manifest.ocdbt").stat().st_size for name in names)
  except (DamagedError, OSError, ValueError, KeyError):
    return False


def compare(name: str, sums: dict[str, int], expected: dict[str, int]) -> None:
  """Raises DamagedError, which names the array, unless the checksums of an item are equal."""
  wrong = [path for path, value in expected.items() if sums.get(path) != value]
  if wrong or len(sums) != len(expected):
    where = wrong[0] if wrong else "its structure"
    raise DamagedError(f"the checksum of {name}{where} does not match what was saved")


def _groups(tree: PyTree) -> Iterator[list[int]]:
  """Indices of the leaves that this process reads back, in groups of about GROUP bytes."""
  leaves, group, size = jax.tree.leaves(tree), [], 0
  for i in range(jax.process_index(), len(leaves), jax.process_count()):
    group.append(i)
    size += leaves[i].size * leaves[i].dtype.itemsize
    if size >= GROUP:
      yield group
      group, size = [], 0
  if group:
    yield group


def read_back(step: Path, abstract: dict[str, PyTree], expected: dict[str, dict[str, int]]) -> None:
  """Reads and compares this process's share of a step's arrays.

  It uses no device and waits for no other process.

  Args:
    abstract: shapes and dtypes, by item.
    expected: checksums, by item and path.

  Raises:
    DamagedError: an array is not what was saved.
  """
  if not looks_whole(step):
    raise DamagedError("read back, it is not whole")
  handler = ocp.PyTreeCheckpointHandler()
  for name, tree in abstract.items():
    leaves, structure = jax.tree.flatten(tree)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    for group in _groups(tree):
      targets = [a if i in group else ocp.PLACEHOLDER for i, a in enumerate(leaves)]
      args = ocp.args.PyTreeRestore(structure.unflatten(targets), restore_args=as_numpy)
      arrays = jax.tree.leaves(handler.restore(step / name, args=args))
      sums = {paths[i]: checksum.of_host(arrays[i]) for i in group}
      compare(name, sums, {paths[i]: expected[name][paths[i]] for i in group})
