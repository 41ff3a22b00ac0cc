"""Saving: one good step stays on disk, whatever happens."""

import dataclasses
import errno
import os
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from tests.train.stored_steps import empty_file, flip_bit, make_state, meta_of, remove_item
from train_jax.checkpointing import saver, stored
from train_jax.checkpointing.checkpoint import Checkpoints
from train_jax.checkpointing.saver import SaveError

# Where one array cannot be read, Orbax leaves the reads of the others hanging.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.mark.parametrize("killed", [False, True])
def test_only_the_newest_are_kept(tmp_path, states, restore, differences, monkeypatch, killed):
  if killed:  # before a file of the older one was deleted: it is none any more, all the same
    monkeypatch.setattr(saver, "shutil", SimpleNamespace(rmtree=lambda *args, **kwargs: None))
  checkpoints = Checkpoints(tmp_path, keep=1)
  for step, state in states.items():
    checkpoints.save(state, meta_of(step))
  checkpoints.wait()
  checkpoints.close()
  assert checkpoints.steps() == [2]
  assert differences(restore(tmp_path)[0], states[2]) == []


def test_steps_that_keep_every_divides_stay_beside_the_newest(tmp_path, states):
  """And take no place of theirs; nor are they deleted where the number of those is lowered."""

  def save(*steps, **kwargs):
    checkpoints = Checkpoints(tmp_path, **kwargs)
    for step in steps:
      checkpoints.save(dataclasses.replace(states[1], step=jnp.int32(step)), meta_of(step))
      checkpoints.wait()
    checkpoints.close()
    return checkpoints.steps()

  assert save(1, 3, 4, 5, 6, 7, keep=2, keep_every=3) == [7, 6, 3]
  assert save(8, 9, 10, keep=1, keep_every=3) == [10, 9, 6, 3]
  # The save of step 12 waited for a step that was not skipped.
  assert save(13, 14, 15, keep=1, keep_every=3) == [15, 13, 9, 6, 3]
  assert save(16, keep=2) == [16, 15]  # for good is until the run is told otherwise


def test_damaged_steps_push_no_good_one_out(tmp_path, states, restore):
  """Nor does a step that is found damaged when it is read back, right after its save."""
  checkpoints = Checkpoints(tmp_path, keep=2)
  (tmp_path / "checkpoints" / "9").mkdir(parents=True)
  for step in (1, 2, 3, 4, 5):
    checkpoints.save(dataclasses.replace(states[1], step=jnp.int32(step)), meta_of(step))
    checkpoints.wait()
    if damage := {3: empty_file, 4: remove_item}.get(step):
      damage(tmp_path / "checkpoints" / str(step))
  assert checkpoints.steps() == [9, 5, 4, 3, 2]
  # What lies in the way of a save is replaced by it.
  checkpoints.save(dataclasses.replace(states[1], step=jnp.int32(9)), meta_of(9))
  checkpoints.wait()
  checkpoints.close()
  assert int(restore(tmp_path)[0].step) == 9


def test_step_that_reads_back_wrong_is_reported_and_deletes_nothing(
  workdir, states, monkeypatch, log
):
  def spoil(step, *args):
    files = sorted(step.rglob("state/**/d/*"), key=lambda path: path.stat().st_size)
    flip_bit(files[-1], 4 * files[-1].stat().st_size)
    read_back(step, *args)

  read_back = stored.read_back
  monkeypatch.setattr(stored, "read_back", spoil)
  checkpoints = Checkpoints(workdir, keep=1)
  checkpoints.save(dataclasses.replace(states[1], step=jnp.int32(3)), meta_of(3))
  with pytest.raises(SaveError, match="step 3 could not be saved"):
    checkpoints.wait()
  checkpoints.close()
  assert checkpoints.steps() == [2, 1] and (workdir / "damaged" / "3").is_dir()
  assert len(log) == 1


def test_save_that_fails_at_once_is_an_error_until_one_succeeds(workdir, states, monkeypatch, log):
  """Before it goes on in the background."""

  def fail(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  checkpoints = Checkpoints(workdir)
  with monkeypatch.context() as patch:
    patch.setattr(ocp.AsyncCheckpointer, "save", fail)
    checkpoints.save(dataclasses.replace(states[1], step=jnp.int32(3)), meta_of(3))
  for _ in range(2):
    with pytest.raises(SaveError, match=r"step 3 could not be saved \(No space left on device\)"):
      checkpoints.wait()
  late = workdir / "checkpoints" / "3.orbax-checkpoint-tmp" / "state"  # a write that was under way
  late.mkdir(parents=True)
  checkpoints.save(dataclasses.replace(states[1], step=jnp.int32(4)), meta_of(4))
  for _ in range(2):
    checkpoints.wait()
  checkpoints.close()
  assert checkpoints.steps() == [4, 2] and len(log) == 1
  assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["2", "4"]


def test_what_a_killed_save_or_deletion_left_is_removed(workdir, states):
  for name in ("7.orbax-checkpoint-tmp", "1.deleted"):
    shutil.copytree(workdir / "checkpoints" / "1", workdir / "checkpoints" / name)
  checkpoints = Checkpoints(workdir)
  assert checkpoints.steps() == [2, 1]
  checkpoints.save(dataclasses.replace(states[1], step=jnp.int32(7)), meta_of(7))
  checkpoints.wait()
  checkpoints.close()
  assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2", "7"]


def test_save_has_copied_what_is_donated_after_it(tmp_path, restore, differences):
  state = jax.tree.map(jnp.copy, make_state(1))
  wanted = jax.device_get(state)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(state, meta_of(1))
  spoil = jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)
  jax.block_until_ready(spoil(state))
  checkpoints.close()
  assert differences(restore(tmp_path)[0], wanted) == []
