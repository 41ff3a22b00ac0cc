"""Records that cannot be read: they are logged by name, counted and limited."""

from __future__ import annotations

from absl import logging

from train_jax.errors import UserError

LIMIT = 100  # the default of config.data.max_faults


class Faults:
  """Counts the records of `source` that were skipped, each once; at most `limit` may be."""

  def __init__(self, limit: int, source: str):
    self._limit, self._source = limit, source
    self._names: set[str] = set()

  def add(self, name: str, why: str) -> None:
    """Logs a record that is skipped; raises UserError if there are more than `limit`."""
    if name in self._names:
      return
    self._names.add(name)
    logging.warning("skipped: cannot read %s (%s); %d so far", name, why, len(self._names))
    if len(self._names) > self._limit:
      raise UserError(
        f"more than data.max_faults={self._limit} records of {self._source} cannot be read, the "
        f"last of them {name} ({why}); mend the data, or raise data.max_faults."
      )
