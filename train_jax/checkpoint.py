"""Checkpoints: Orbax on disk, with checksums of our own, and the newest good one when some are bad.

A step directory holds the items

    state          the TrainState without its averages
    ema_<name>     one exponential moving average: sampling restores `ema_sample` and nothing else
    meta           JSON: config, facts about the data, data position, a checksum for every array and
                   one for itself

Orbax writes a step to a temporary directory and renames it, so a killed save leaves no step. A
flipped bit in a stored array would restore silently; the checksums find it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.state import TrainState

PyTree = Any


class DamagedError(Exception):
  """A stored step that can't be trusted."""


def _checksum(a: jax.Array) -> jax.Array:
  """uint32: the sum, modulo 2^32, of a hash of every word and its place.

  The hash (MurmurHash3's finaliser) is a bijection of the word, so damage inside one word always
  changes the sum; wider damage escapes with probability 2^-32, zeroed blocks of constant arrays
  included. Integer sums wrap and so do not depend on order, hence not on the layout: the same
  number for any mesh.
  """
  if a.dtype == jnp.bool_:
    a = a.astype(jnp.uint8)
  word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[a.dtype.itemsize]
  bits = jax.lax.bitcast_convert_type(a, word).astype(jnp.uint32)
  place = jnp.zeros(a.shape, jnp.uint32)
  for axis, size in enumerate(a.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, a.shape, axis)
  h = bits ^ (place * jnp.uint32(0x9E3779B1))
  h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
  h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
  return jnp.sum(h ^ (h >> 16), dtype=jnp.uint32)


_checksums = jax.jit(lambda tree: jax.tree.map(_checksum, tree))


def checksums(tree: PyTree) -> dict[str, int]:
  """One number for each array of `tree`, by the array's path."""
  leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(_checksums(tree)))
  return {jax.tree_util.keystr(path): int(value) for path, value in leaves}


def _meta_checksum(meta: dict) -> int:
  """Of the JSON text, which a position or a config value that changed on disk does not match."""
  return zlib.crc32(json.dumps(json.loads(json.dumps(meta)), sort_keys=True).encode())


def _items(state: TrainState) -> dict[str, PyTree]:
  fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
  averages = {f"ema_{name}": value for name, value in fields.pop("ema").items()}
  return {"state": fields, **averages}


def _state(items: dict[str, PyTree]) -> TrainState:
  averages = {name.removeprefix("ema_"): v for name, v in items.items() if name != "state"}
  return TrainState(**items["state"], ema=averages)


class Checkpoints:
  """The steps stored under `workdir/checkpoints`.

  Args:
    workdir: the run's directory.
    keep: how many of the newest steps are kept.
  """

  def __init__(self, workdir: str | Path, keep: int = 2):
    self.directory = (Path(workdir) / "checkpoints").absolute()
    self._options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=False)
    self._manager: ocp.CheckpointManager | None = None

  def steps(self) -> list[int]:
    """Stored steps, newest first, good or not."""
    if not self.directory.is_dir():
      return []
    return sorted((int(p.name) for p in self.directory.iterdir() if p.name.isdigit()), reverse=True)

  def _open(self) -> ocp.CheckpointManager:
    if self._manager is None:
      self.directory.mkdir(parents=True, exist_ok=True)
      self._manager = ocp.CheckpointManager(self.directory, options=self._options)
    return self._manager

  def save(self, state: TrainState, meta: dict) -> None:
    """Saves in the background; returns once the arrays are copied and may be donated."""
    items = _items(state)
    meta = {**meta, "checksums": {name: checksums(tree) for name, tree in items.items()}}
    meta["checksum"] = _meta_checksum(meta)
    args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    step = int(state.step)
    self._open().save(step, args=ocp.args.Composite(**args, meta=ocp.args.JsonSave(meta)))

  def _restore(self, step: int, abstract: dict[str, PyTree]) -> tuple[dict[str, PyTree], dict]:
    """The items named in `abstract` and the meta of one step, verified."""
    try:
      meta = self._open().restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
      stored = meta["checksums"]
      args = {name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()}
      found = self._open().restore(step, args=ocp.args.Composite(**args)) if args else {}
    except Exception as err:  # Orbax and its stores raise many kinds; each means "not readable"
      raise DamagedError(f"it cannot be read ({type(err).__name__}: {str(err)[:200]})") from err
    if meta.pop("checksum", None) != _meta_checksum(meta):
      raise DamagedError("the checksum of meta does not match what was saved")
    for name in abstract:
      actual = checksums(found[name])
      wrong = [path for path, value in stored[name].items() if actual.get(path) != value]
      if wrong or len(actual) != len(stored[name]):
        where = wrong[0] if wrong else "its structure"
        raise DamagedError(f"the checksum of {name}{where} does not match what was saved")
    return {name: found[name] for name in abstract}, meta

  def require_meta(self) -> dict:
    """`newest_meta`, or a UserError that says what was looked for."""
    meta = self.newest_meta()
    if meta is None and self.steps():
      raise self._none_good()
    if meta is None:
      raise UserError(
        f"no checkpoint found: looked for {self.directory}/<step>; train first, or give the "
        "--workdir of a run."
      )
    return meta

  def newest_meta(self) -> dict | None:
    """What was saved beside the arrays of the newest step that can be read; None if none can."""
    for step in self.steps():
      try:
        return self._restore(step, {})[1]
      except DamagedError:
        continue
    return None

  def _newest(
    self, abstract: dict[str, PyTree]
  ) -> tuple[dict[str, PyTree], dict, list[int]] | None:
    """Items and meta of the newest good step, and the damaged steps that are newer than it."""
    steps = self.steps()
    for i, step in enumerate(steps):
      try:
        return *self._restore(step, abstract), steps[:i]
      except DamagedError as err:
        logging.error("checkpoint %s is damaged and skipped: %s", self.directory / str(step), err)
    if steps:
      raise self._none_good()
    return None

  def _none_good(self) -> UserError:
    return UserError(
      f"none of the checkpoints {self.steps()} in {self.directory} can be restored; "
      "restore a backup, or start again in another --workdir."
    )

  def restore(self, abstract: TrainState) -> tuple[TrainState, dict] | None:
    """The newest good step as (state, meta), laid out as `abstract` says; None if none is stored.

    Damaged steps are reported by name. Those newer than the good one are moved to
    `workdir/damaged`, out of the way of later saves.

    Raises:
      UserError: steps are stored but none is good. They stay where they are, so that the next call
        does not take the directory for an empty one and start again.
    """
    found = self._newest(_items(abstract))
    if found is None:
      return None
    items, meta, damaged = found
    for step in damaged:
      self._set_aside(step)
    return _state(items), meta

  def restore_ema(self, name: str, abstract: PyTree) -> tuple[PyTree, int]:
    """One average of the newest good step, whole on every device, and that step's number.

    Reads nothing else.

    Raises:
      UserError: nothing is stored here, or nothing good.
    """
    self.require_meta()
    # Without a layout Orbax takes the stored one, which needs as many devices as the run had.
    everywhere = NamedSharding(mesh_lib.make_mesh(), PartitionSpec())
    abstract = jax.tree.map(
      lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), abstract
    )
    items, meta, _ = self._newest({f"ema_{name}": abstract})
    return items[f"ema_{name}"], meta["step"]

  def _set_aside(self, step: int) -> None:
    self.close()
    if jax.process_index() == 0:  # all of them have read it, and one moves it
      aside = self.directory.parent / "damaged"
      aside.mkdir(exist_ok=True)
      target = aside / str(step)
      if target.exists():
        shutil.rmtree(target)
      shutil.move(self.directory / str(step), target)
    multihost_utils.sync_global_devices(f"step {step} is out of the way")

  def wait(self) -> None:
    """Returns when the last save is on disk; raises what it raised."""
    if self._manager is not None:
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Finishes the last save and frees the manager."""
    if self._manager is not None:
      self._manager.close()
      self._manager = None
