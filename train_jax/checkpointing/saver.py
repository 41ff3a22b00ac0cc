"""Saving steps in the background; one good step is always on disk.

A failed save is logged and stops nothing: the step before it is whole, and the next save is tried.
Older steps are deleted only after a newer one was read back and compared.
"""

from __future__ import annotations

import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from train_jax.checkpointing import checksum, stored
from train_jax.errors import UserError
from train_jax.files import check_writable
from train_jax.multihost.distributed import all_agree

PyTree = Any

PATIENCE = 5.0  # seconds that training may wait for the previous save before that is logged
HALF, GONE = ".orbax-checkpoint-tmp", ".deleted"  # suffixes of steps being written, and deleted


class SaveError(RuntimeError):
  """The state could not be saved; the message names the last good step and the way out."""


def _not_orbax(record) -> bool:
  """A filter of the log: Orbax reports a failed save by a page of traceback, we by a sentence."""
  return record.levelno < logging.converter.STANDARD_ERROR or "/orbax/" not in record.pathname


def _fetch(sums: dict[str, dict[str, jax.Array]]) -> dict[str, dict[str, int]]:
  return jax.tree.map(int, jax.device_get(sums))


def stored_steps(directory: Path) -> list[int]:
  """Steps in `directory`, newest first, good or damaged."""
  if not directory.is_dir():
    return []
  return sorted((int(p.name) for p in directory.iterdir() if p.name.isdigit()), reverse=True)


def set_aside(directory: Path, step: int) -> None:
  """Moves a damaged step, if it exists, to `damaged`; all processes must call it."""
  source, target = directory / str(step), directory.parent / "damaged" / str(step)
  if jax.process_index() == 0 and source.exists():
    try:
      target.parent.mkdir(exist_ok=True)
      if target.exists():
        shutil.rmtree(target)
      shutil.move(source, target)
    except OSError as err:
      logging.warning("%s cannot be moved to %s: %s", source, target.parent, err.strerror)
  multihost_utils.sync_global_devices(f"step {step} is out of the way")


class Saver:
  """Writes steps into `directory`; deletes all but the newest `keep` and those of `keep_every`.

  Attributes:
    good: the newest step that is known to be whole, as it was restored or read back.
  """

  def __init__(self, directory: Path, keep: int, keep_every: int = 0):
    self.directory, self.good = directory, None
    self._keep, self._keep_every = keep, keep_every
    self._orbax: ocp.AsyncCheckpointer | None = None
    self._background: ThreadPoolExecutor | None = None
    self._saving: tuple[int, Future] | None = None
    self._failure = ""

  def _leftovers(self, *kinds: str) -> list[Path]:
    """Directories of interrupted saves (HALF) and deletions (GONE)."""
    return [p for p in self.directory.iterdir() if p.suffix in kinds]

  def _open(self) -> str:
    """Prepares the directory; returns why a process cannot write to it, "" if all can."""
    problem = ""
    try:
      self.directory.mkdir(parents=True, exist_ok=True)
      check_writable(self.directory)
    except (OSError, UserError) as err:
      problem = stored.reason(err.__cause__ or err)
    if not all_agree(not problem):
      return problem or "another process cannot write to it"
    if self._orbax is None:
      self._background = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
      self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
      logging.get_absl_logger().addFilter(_not_orbax)
      self._remove(self._leftovers(HALF, GONE))
    return ""

  def save(self, step: int, items: dict[str, PyTree], meta: dict) -> None:
    """Saves in the background; returns once the arrays are copied and may be donated.

    An error is logged, and `finish` returns it.
    """
    start = time.monotonic()
    self.finish()
    if (seconds := time.monotonic() - start) > PATIENCE:
      logging.warning(
        "training waited %.0f s for the save before to end: the disk is slow; raise save_every.",
        seconds,
      )
    if problem := self._open():
      self._failure = self._sentence(step, problem)
      return self._report(self._failure)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), items)
    sums: Future[dict[str, dict[str, jax.Array]]] = Future()

    def make_meta() -> dict:
      record = {**meta, "checksums": _fetch(sums.result())}
      return {**record, "checksum": checksum.of_json(record)}

    args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
    args = ocp.args.Composite(**args, meta=stored.LateJsonSave(make_meta))
    try:
      self._orbax.save(self.directory / str(step), args=args, force=True)
    except Exception as err:  # of many kinds
      sums.set_exception(err)
      self._failure = self._sentence(step, stored.reason(err))
      if jax.process_count() > 1:  # the others wait for this process inside Orbax
        raise SaveError(self._failure) from err
      return self._report(self._failure)
    # Sums start after the copies, which would queue up behind them. Nothing waits for sums here.
    try:
      sums.set_result({name: checksum.start(tree) for name, tree in items.items()})
    except Exception as err:  # without a result the save would wait for ever
      sums.set_exception(err)
    self._saving = step, self._background.submit(self._complete, step, abstract, sums)

  def _complete(self, step: int, abstract: dict[str, PyTree], sums: Future) -> str:
    """Ends the save of `step` in the background; returns a sentence if it failed, "" if not."""
    try:
      self._orbax.wait_until_finished()
      stored.read_back(self.directory / str(step), abstract, _fetch(sums.result()))
    except Exception as err:  # of many kinds
      failure = self._sentence(step, stored.reason(err))
      self._report(failure)
      return failure
    return ""

  def finish(self) -> str:
    """Waits for the save in progress; returns a sentence if it failed, "" if not.

    It deletes old steps. All processes must call it.
    """
    if self._saving is None:
      return self._failure
    (step, job), self._saving = self._saving, None
    failure = job.result()
    if all_agree(not failure):
      self.good, self._failure = step, ""
      self._prune()
      return ""
    self._failure = failure or self._sentence(step, "another process could not write its part")
    set_aside(self.directory, step)
    self._remove(self._leftovers(HALF))
    return self._failure

  def _sentence(self, step: int, why: str) -> str:
    safe = "no step was saved before it"
    if self.good is not None:
      safe = f"{self.directory / str(self.good)} is whole"
    return f"step {step} could not be saved ({why}); {safe}"

  def _report(self, failure: str) -> None:
    logging.error("%s. Make room: the next save is tried as if nothing had happened.", failure)

  def _prune(self) -> None:
    """Deletes all but the newest `keep` steps, after one of them was read back.

    Of each interval of `keep_every` the first step stays as well. It may come after the multiple,
    as saves wait for a step that is not skipped. Steps that do not look whole do not count. A
    failed save may have written after its cleaning up, so that is done again.
    """
    if jax.process_index() == 0:
      self._remove(self._leftovers(HALF))
      paths = [self.directory / str(step) for step in stored_steps(self.directory)]
      whole = [path for path in paths if stored.looks_whole(path)]  # newest first
      keep = set(whole[: self._keep])
      if every := self._keep_every:
        first = {int(path.name) // every: path for path in whole}  # the oldest comes last
        keep |= {path for multiple, path in first.items() if multiple}
      self._remove([path for path in whole if path not in keep])

  def _remove(self, paths: list[Path]) -> None:
    """Renames directories and deletes them in the background: half a step must not look whole."""
    for path in paths if jax.process_index() == 0 else ():
      target = path if path.suffix == GONE else path.with_name(path.name + GONE)
      try:
        path.rename(target)
      except OSError as err:
        logging.warning("%s cannot be deleted: %s", path, err.strerror)
      else:
        self._background.submit(shutil.rmtree, target, ignore_errors=True)

  def close(self) -> None:
    """Ends the last save, and logs it if it fails; waits for no other process."""
    if self._orbax is None:
      return
    self._background.shutdown()  # waits for the save, which logs its own errors
    self._orbax.close()
    self._orbax = self._saving = None
