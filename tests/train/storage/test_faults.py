"""Counting what cannot be read."""

import pytest

from train_jax.errors import UserError
from train_jax.storage import faults


def test_different_records_are_counted_up_to_the_limit(caplog):
  found = faults.Faults(2, "these data")
  for name in ("a", "b", "a", "b"):
    found.add(name, "why")
  assert caplog.messages == [f"skipped: cannot read {n} (why); {i} so far" for n, i in ("a1", "b2")]
  with pytest.raises(
    UserError, match=r"more than data.max_faults=2 records of these data.* c \(why"
  ):
    found.add("c", "why")
