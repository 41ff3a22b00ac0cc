"""Checkpoints: Orbax on disk with our own checksums; the newest good one is found among bad ones.

A step directory holds the items

    state          the TrainState without its averages
    ema_<name>     one average: sampling restores `ema_sample` and nothing else
    meta           JSON: config, metadata of the data, position in the data, and checksums of every
                   array and of itself

Orbax writes a step to a temporary directory and renames it, so a killed save leaves no step. The
checksums find flipped bits of stored arrays, which Orbax restores silently.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from train_jax import mesh as mesh_lib
from train_jax.checkpointing import checksum, stored
from train_jax.checkpointing.saver import SaveError, Saver, set_aside, stored_steps
from train_jax.checkpointing.stored import DamagedError
from train_jax.errors import UserError
from train_jax.multihost.distributed import all_agree
from train_jax.state import TrainState

PyTree = Any


def _items(state: TrainState) -> dict[str, PyTree]:
  fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
  averages = {f"ema_{name}": value for name, value in fields.pop("ema").items()}
  return {"state": fields, **averages}


def _state(items: dict[str, PyTree]) -> TrainState:
  averages = {name.removeprefix("ema_"): v for name, v in items.items() if name != "state"}
  return TrainState(**items["state"], ema=averages)


class Checkpoints:
  """The steps stored under `workdir/checkpoints`; `keep` and `keep_every` as in LoopConfig."""

  def __init__(self, workdir: str | Path, keep: int = 2, keep_every: int = 0):
    self.directory = (Path(workdir) / "checkpoints").absolute()
    self._saver = Saver(self.directory, keep, keep_every)

  def steps(self) -> list[int]:
    """Stored steps, newest first, good or not."""
    return stored_steps(self.directory)

  def save(self, state: TrainState, meta: dict) -> None:
    """Saves in the background; returns once the arrays are copied and may be donated.

    Errors are logged, and training goes on.
    """
    self._saver.save(int(state.step), _items(state), meta)

  def wait(self) -> None:
    """Returns when the last save is on disk, or raises SaveError; all processes must call it."""
    if failure := self._saver.finish():
      raise SaveError(f"{failure}. Make room; the same command goes on from there.")

  def newest_good(self) -> Path | None:
    """The newest step that is known to be whole, after the save in progress."""
    self._saver.finish()
    good = self._saver.good
    return None if good is None else self.directory / str(good)

  def close(self) -> None:
    """Ends the last save, and logs it if it fails; waits for no other process."""
    self._saver.close()

  def _restore(self, step: int, abstract: dict[str, PyTree]) -> tuple[dict[str, PyTree], dict]:
    """The items of `abstract` and the meta of one step, verified.

    DamagedError on all processes if one of them cannot read the step.
    """
    problem, items, meta = "", {}, {}
    try:
      meta = stored.read_meta(self.directory / str(step))
      handler = ocp.StandardCheckpointHandler()  # a checkpointer would wait for other processes
      for name, tree in abstract.items():
        path = self.directory / str(step) / name
        items[name] = handler.restore(path, args=ocp.args.StandardRestore(tree))
    except DamagedError as err:
      problem = str(err)
    except Exception as err:  # Orbax and its storage raise many kinds
      problem = f"it cannot be read ({stored.reason(err)})"
    if not all_agree(not problem):
      raise DamagedError(problem or "another process cannot read it")
    for name in abstract:
      stored.compare(name, checksum.checksums(items[name]), meta["checksums"][name])
    return items, meta

  def require_meta(self, step: int | None = None) -> dict:
    """`newest_meta`, or that of `step`; UserError if there is none."""
    if step is not None and self.steps():
      return self._restore_step(step, {})[1]
    if (meta := self.newest_meta()) is not None:
      return meta
    if self.steps():
      raise self._none_good()
    raise UserError(
      f"no checkpoint found: looked for {self.directory}/<step>; train first, or give the "
      "--workdir of a run."
    )

  def require_run(self, method: str, step: int | None = None) -> tuple[dict, dict, int]:
    """(config, metadata, step) of the stored run; UserError if there is none of `method`."""
    meta = self.require_meta(step)
    if (other := meta["config"]["method"]) != method:
      raise UserError(
        f"{self.directory.parent} holds a run of method {other!r}, where one of {method!r} is "
        "expected; give a run of the same method."
      )
    return meta["config"], meta["metadata"], meta["step"]

  def _shared_steps(self) -> list[int]:
    """`steps` as process 0 sees them: a shared disk may show them later to others."""
    if jax.process_count() == 1:
      return self.steps()
    buffer = np.zeros(64, np.int32)
    steps = self.steps()[: len(buffer)]
    buffer[: len(steps)] = np.array(steps, np.int32) + 1
    return [int(n) - 1 for n in multihost_utils.broadcast_one_to_all(buffer) if n]

  def newest_meta(self) -> dict | None:
    """The meta of the newest step whose meta is good; None if there is none."""
    for step in self._shared_steps():
      try:
        return self._restore(step, {})[1]
      except DamagedError:
        continue
    return None

  def _restore_newest(
    self, abstract: dict[str, PyTree]
  ) -> tuple[dict[str, PyTree], dict, list[int]] | None:
    """Items and meta of the newest good step, and the damaged newer steps; None without steps."""
    steps = self._shared_steps()
    for i, step in enumerate(steps):
      try:
        return *self._restore(step, abstract), steps[:i]
      except DamagedError as err:
        logging.error("checkpoint %s is damaged and skipped: %s", self.directory / str(step), err)
    if steps:
      raise self._none_good()
    return None

  def _restore_step(self, step: int, abstract: dict[str, PyTree]) -> tuple[dict[str, PyTree], dict]:
    """`_restore`, for a step that the user chose: raises UserError instead of DamagedError."""
    try:
      return self._restore(step, abstract)
    except DamagedError as err:
      steps = self.steps()
      problem = f"is damaged: {err}" if step in steps else "is not stored"
      raise UserError(
        f"--step={step} {problem}; choose one of {steps} in {self.directory}, or leave it out for "
        "the newest good one."
      ) from err

  def _none_good(self) -> UserError:
    return UserError(
      f"none of the checkpoints {self.steps()} in {self.directory} can be restored; "
      "restore a backup, or start again in another --workdir."
    )

  def restore(self, abstract: TrainState) -> tuple[TrainState, dict] | None:
    """(state, meta) of the newest good step, laid out as `abstract`; None if none is stored.

    Damaged newer steps are logged, and moved to `workdir/damaged` to make room for later saves.

    Raises:
      UserError: steps are stored, but none is good. They stay, or the next call would find an empty
        directory and start again.
    """
    restored = self._restore_newest(_items(abstract))
    if restored is None:
      return None
    items, meta, damaged = restored
    for step in damaged:
      set_aside(self.directory, step)
    self._saver.good = meta["step"]
    return _state(items), meta

  def restore_ema(
    self, name: str, abstract: PyTree, mesh: Mesh, step: int | None = None
  ) -> tuple[PyTree, int]:
    """(average, step) of `step` or the newest good step, laid out on `mesh`; reads nothing else.

    UserError if no good step is stored, or not `step`.
    """
    self.require_meta(step)
    trees = {f"ema_{name}": mesh_lib.abstract_state(abstract, mesh)}
    restored = self._restore_newest(trees) if step is None else self._restore_step(step, trees)
    items, meta, *_ = restored
    return items[f"ema_{name}"], meta["step"]
