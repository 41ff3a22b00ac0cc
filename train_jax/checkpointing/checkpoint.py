"""Checkpoints: Orbax on disk, with checksums of our own, and the newest good one when some are bad.

A step directory holds the items

    state          the TrainState without its averages
    ema_<name>     one exponential moving average: sampling restores `ema_sample` and nothing else
    meta           JSON: config, metadata of the data, data position, a checksum for every array and
                   one for itself

Orbax writes a step to a temporary directory and renames it, so a killed save leaves no step. A
flipped bit in a stored array would restore silently; the checksums find it.
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
  """The steps stored under `workdir/checkpoints`.

  Args:
    workdir: the run's directory.
    keep: how many of the newest steps are kept.
    keep_every: steps that it divides are kept as well; 0: none.
  """

  def __init__(self, workdir: str | Path, keep: int = 2, keep_every: int = 0):
    self.directory = (Path(workdir) / "checkpoints").absolute()
    self._saver = Saver(self.directory, keep, keep_every)

  def steps(self) -> list[int]:
    """Stored steps, newest first, good or not."""
    return stored_steps(self.directory)

  def save(self, state: TrainState, meta: dict) -> None:
    """Saves in the background; returns once the arrays are copied and may be donated.

    What goes wrong is logged: training goes on.
    """
    self._saver.save(int(state.step), _items(state), meta)

  def wait(self) -> None:
    """Returns when the last save is on disk; all processes must call it.

    Raises:
      SaveError: it is not.
    """
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
    """The items named in `abstract` and the meta of one step, verified, on all processes or none.

    Raises:
      DamagedError: on all of them, where one cannot read it.
    """
    problem, found, meta = "", {}, {}
    try:
      meta = stored.read_meta(self.directory / str(step))
      handler = ocp.StandardCheckpointHandler()  # a checkpointer would wait for other processes
      for name, tree in abstract.items():
        path = self.directory / str(step) / name
        found[name] = handler.restore(path, args=ocp.args.StandardRestore(tree))
    except DamagedError as err:
      problem = str(err)
    except Exception as err:  # Orbax and its stores raise many kinds; each means "not readable"
      problem = f"it cannot be read ({stored.reason(err)})"
    if not all_agree(not problem):
      raise DamagedError(problem or "another process cannot read it")
    for name in abstract:
      stored.compare(name, checksum.checksums(found[name]), meta["checksums"][name])
    return found, meta

  def require_meta(self, step: int | None = None) -> dict:
    """`newest_meta`, or that of `step`; or a UserError that says what was looked for."""
    if step is not None and self.steps():
      return self._asked(step, {})[1]
    meta = self.newest_meta()
    if meta is None and self.steps():
      raise self._none_good()
    if meta is None:
      raise UserError(
        f"no checkpoint found: looked for {self.directory}/<step>; train first, or give the "
        "--workdir of a run."
      )
    return meta

  def require_run(self, method: str, step: int | None = None) -> tuple[dict, dict, int]:
    """(config, metadata, step) of the run of `method` that is stored here.

    Raises:
      UserError: as `require_meta`, or the run is of another method.
    """
    meta = self.require_meta(step)
    if (found := meta["config"]["method"]) != method:
      raise UserError(
        f"{self.directory.parent} holds a run of method {found!r}, where one of {method!r} is "
        "expected; give another."
      )
    return meta["config"], meta["metadata"], meta["step"]

  def _known(self) -> list[int]:
    """`steps` as process 0 sees them: a disk that is shared may lag behind."""
    if jax.process_count() == 1:
      return self.steps()
    mine = np.zeros(64, np.int32)
    steps = self.steps()[: len(mine)]
    mine[: len(steps)] = np.array(steps, np.int32) + 1
    return [int(n) - 1 for n in multihost_utils.broadcast_one_to_all(mine) if n]

  def newest_meta(self) -> dict | None:
    """What was saved beside the arrays of the newest step that can be read; None if none can."""
    for step in self._known():
      try:
        return self._restore(step, {})[1]
      except DamagedError:
        continue
    return None

  def _newest(
    self, abstract: dict[str, PyTree]
  ) -> tuple[dict[str, PyTree], dict, list[int]] | None:
    """Items and meta of the newest good step, and the damaged steps that are newer than it."""
    steps = self._known()
    for i, step in enumerate(steps):
      try:
        return *self._restore(step, abstract), steps[:i]
      except DamagedError as err:
        logging.error("checkpoint %s is damaged and skipped: %s", self.directory / str(step), err)
    if steps:
      raise self._none_good()
    return None

  def _asked(self, step: int, abstract: dict[str, PyTree]) -> tuple[dict[str, PyTree], dict]:
    """Items and meta of `step`; UserError, on all processes, where one of them has it not whole."""
    try:
      return self._restore(step, abstract)
    except DamagedError as err:
      found = self.steps()
      problem = f"is damaged: {err}" if step in found else "is not stored"
      raise UserError(
        f"--step={step} {problem}; choose one of {found} in {self.directory}, or leave it out for "
        "the newest good one."
      ) from err

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
      set_aside(self.directory, step)
    self._saver.good = meta["step"]
    return _state(items), meta

  def restore_ema(
    self, name: str, abstract: PyTree, mesh: Mesh, step: int | None = None
  ) -> tuple[PyTree, int]:
    """One average of `step` or the newest good one, laid out on `mesh` by the rule; its number.

    Reads nothing else.

    Raises:
      UserError: nothing is stored here, or nothing good; or not `step`.
    """
    self.require_meta(step)
    wanted = {f"ema_{name}": mesh_lib.abstract_state(abstract, mesh)}
    items, meta = self._newest(wanted)[:2] if step is None else self._asked(step, wanted)
    return items[f"ema_{name}"], meta["step"]
