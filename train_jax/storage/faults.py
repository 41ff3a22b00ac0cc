"""Data that cannot be read: named, counted and limited."""

from __future__ import annotations

from absl import logging

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
