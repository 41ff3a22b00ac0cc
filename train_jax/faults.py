"""Data that cannot be read: named, counted and limited; and whether all processes see the same."""

from __future__ import annotations

import json
import zlib

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from train_jax.errors import UserError

LIMIT = 100  # config.data.max_faults, where a config does not say


class Faults:
  """Counts different records that were skipped.

  Args:
    limit: the most that there may be.
    what: of what they are, in the message.
  """

  def __init__(self, limit: int, what: str):
    self._limit, self._what = limit, what
    self._names: set[str] = set()

  def add(self, name: str, why: str) -> None:
    """Logs a record that is skipped.

    Raises:
      UserError: there are more than `limit`.
    """
    if name in self._names:
      return
    self._names.add(name)
    logging.warning("skipped: cannot read %s (%s); %d so far", name, why, len(self._names))
    if len(self._names) > self._limit:
      raise UserError(
        f"more than data.max_faults={self._limit} records of {self._what} cannot be read, the last "
        f"of them {name} ({why}); mend the data, or raise data.max_faults."
      )


def check_same_everywhere(facts: dict) -> None:
  """Raises UserError, on all processes, unless all of them found the same data."""
  if jax.process_count() == 1:
    return
  mine = np.uint32(zlib.crc32(json.dumps(facts, sort_keys=True).encode()))
  found = multihost_utils.process_allgather(mine)
  if np.any(found != found[0]):
    others = ", ".join(map(str, np.flatnonzero(found != found[0])[:20]))
    raise UserError(
      f"processes {others} read other data than process 0; give all of them the same files, whole."
    )
