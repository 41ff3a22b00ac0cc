"""Counting what cannot be read, and noticing that processes see different data."""

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from train_jax import faults
from train_jax.errors import UserError


def test_different_records_are_counted_up_to_the_limit(caplog):
  found = faults.Faults(2, "these data")
  for name in ("a", "b", "a", "b"):
    found.add(name, "why")
  assert caplog.messages == [f"skipped: cannot read {n} (why); {i} so far" for n, i in ("a1", "b2")]
  with pytest.raises(
    UserError, match=r"more than data.max_faults=2 records of these data.* c \(why"
  ):
    found.add("c", "why")


def test_processes_that_see_other_data_are_named(monkeypatch):
  faults.check_same_everywhere({"examples": 3})
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  gathered = []

  def gather(mine):  # what process 2 gets, the second time from others that differ
    gathered.append(mine)
    others = mine + np.uint32(len(gathered) - 1)
    return np.stack([others, others, mine])

  monkeypatch.setattr(multihost_utils, "process_allgather", gather)
  faults.check_same_everywhere({"examples": 3, "names": ["a"]})
  with pytest.raises(UserError, match="processes 2 read other data than process 0"):
    faults.check_same_everywhere({"names": ["a"], "examples": 3})
  assert gathered[0] == gathered[1]  # the order of the facts does not matter
