"""Checkpoints: what comes back is what was saved, or the step before it, or a clear refusal."""

import json
import shutil

import jax
import jax.numpy as jnp
import pytest

from tests.train.stored_steps import gut, meta_of, remove_meta
from train_jax import mesh as mesh_lib
from train_jax.checkpointing.checkpoint import Checkpoints
from train_jax.errors import UserError

MESH = mesh_lib.make_mesh()

# Where one array cannot be read, Orbax leaves the reads of the others hanging.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_round_trip_is_bit_exact(saved, restore, states, differences):
  state, meta = restore(saved)
  assert differences(state, states[2]) == []
  checksums = meta.pop("checksums")
  assert meta == json.loads(json.dumps(meta_of(2)))
  assert set(checksums) == {"state", "ema_target", "ema_sample"}


def test_nothing_saved_is_none(tmp_path, abstract):
  checkpoints = Checkpoints(tmp_path / "new")
  assert checkpoints.steps() == []
  assert checkpoints.restore(abstract) is None
  assert checkpoints.newest_meta() is None
  assert not (tmp_path / "new").exists()


def test_foreign_empty_directory_is_skipped(workdir, restore, states, differences, log):
  (workdir / "checkpoints" / "9").mkdir()
  assert Checkpoints(workdir).require_meta()["step"] == 2
  state, _ = restore(workdir)
  assert differences(state, states[2]) == []
  assert len(log) == 1 and str(workdir / "checkpoints" / "9") in log[0]


def test_damaged_step_makes_room_for_a_later_save(workdir, abstract, states, differences, log):
  for _ in range(2):  # the second time a damaged step of that number lies there already
    gut(workdir / "checkpoints" / "2")
    checkpoints = Checkpoints(workdir)
    assert int(checkpoints.restore(abstract)[0].step) == 1
    checkpoints.save(states[2], meta_of(2))
    checkpoints.wait()
    assert checkpoints.steps() == [2, 1]
    assert differences(checkpoints.restore(abstract)[0], states[2]) == []
    checkpoints.close()
  assert len(log) == 2


def test_no_good_step_is_refused_every_time(workdir, restore, abstract, log):
  """And nothing is moved: a second try must not find an empty directory and start from step 0."""
  gut(workdir / "checkpoints" / "1")
  remove_meta(workdir / "checkpoints" / "2")
  for _ in range(2):
    with pytest.raises(UserError, match=r"none of the checkpoints \[2, 1\] in .* can be restored"):
      restore(workdir)
    with pytest.raises(UserError, match="none of the checkpoints"):
      Checkpoints(workdir).restore_ema("sample", abstract.ema["sample"], MESH)
    with pytest.raises(UserError, match="none of the checkpoints"):
      Checkpoints(workdir).require_meta()


def test_missing_checkpoint_says_what_was_looked_for(tmp_path, abstract):
  wanted = rf"no checkpoint found: looked for {tmp_path}/run/checkpoints/<step>"
  with pytest.raises(UserError, match=wanted):
    Checkpoints(tmp_path / "run").require_meta()
  with pytest.raises(UserError, match=wanted):
    Checkpoints(tmp_path / "run").restore_ema("sample", abstract.ema["sample"], MESH)
  assert not (tmp_path / "run").exists()


def test_average_is_restored_without_the_rest(workdir, abstract, states, differences):
  for step in (workdir / "checkpoints").iterdir():
    shutil.rmtree(step / "state")
    shutil.rmtree(step / "ema_target")
  checkpoints = Checkpoints(workdir)
  average, step = checkpoints.restore_ema("sample", abstract.ema["sample"], MESH)
  checkpoints.close()
  assert step == 2
  assert differences(average, states[2].ema["sample"]) == []


def test_damaged_average_falls_back_and_moves_nothing(workdir, abstract, states, differences, log):
  shutil.rmtree(workdir / "checkpoints" / "2" / "ema_sample")
  checkpoints = Checkpoints(workdir)
  average, step = checkpoints.restore_ema("sample", abstract.ema["sample"], MESH)
  checkpoints.close()
  assert step == 1 and len(log) == 1
  assert differences(average, states[1].ema["sample"]) == []
  assert checkpoints.steps() == [2, 1]


def test_a_step_that_is_asked_for_is_used_or_refused(workdir, abstract, states, differences):
  average, checkpoints = abstract.ema["sample"], Checkpoints(workdir)
  assert checkpoints.require_meta(1)["position"] == 10
  found, step = checkpoints.restore_ema("sample", average, MESH, 1)
  assert step == 1 and differences(found, states[1].ema["sample"]) == []
  with pytest.raises(UserError, match=r"--step=7 is not stored; choose one of \[2, 1\] in"):
    checkpoints.require_meta(7)
  shutil.rmtree(workdir / "checkpoints" / "2" / "ema_sample")
  with pytest.raises(UserError, match=r"--step=2 is damaged: .*; choose one of \[2, 1\] in"):
    checkpoints.restore_ema("sample", average, MESH, 2)
  gut(workdir / "checkpoints" / "1")
  with pytest.raises(UserError, match="--step=1 is damaged"):
    checkpoints.require_meta(1)
  checkpoints.close()
  assert checkpoints.steps() == [2, 1]
  with pytest.raises(UserError, match="no checkpoint found"):
    Checkpoints(workdir / "none").require_meta(1)


def test_restores_on_another_mesh(saved, states, differences, make_mesh, monkeypatch):
  monkeypatch.setattr(mesh_lib, "SMALL", 64)
  mesh = make_mesh(2, 4)
  shardings = mesh_lib.state_sharding(states[2], mesh)
  abstract = jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), states[2], shardings
  )
  checkpoints = Checkpoints(saved)
  state, _ = checkpoints.restore(abstract)
  checkpoints.close()
  assert differences(state, states[2]) == []
  kernel = state.params["layer"]["kernel"]
  assert kernel.addressable_shards[0].data.shape == (16, 32)
  found = [a.sharding for a in jax.tree.leaves(state)]
  assert all(a == b for a, b in zip(found, jax.tree.leaves(shardings), strict=True))


def test_average_does_not_need_the_devices_of_the_run(
  tmp_path, states, make_mesh, monkeypatch, differences
):
  """Its stored layout would: a run of eight devices could not be sampled on one."""
  monkeypatch.setattr(mesh_lib, "SMALL", 64)
  state = jax.device_put(states[1], mesh_lib.state_sharding(states[1], make_mesh(2, 4)))
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(state, meta_of(1))
  checkpoints.wait()
  abstract = jax.eval_shape(lambda: states[1].ema["sample"])
  for shape, share in (((8, 1), (64, 32)), ((4, 2), (32, 32)), ((1, 1), (64, 32))):
    average, _ = checkpoints.restore_ema("sample", abstract, make_mesh(*shape))
    kernel = average["layer"]["kernel"]
    assert len(kernel.addressable_shards) == shape[0] * shape[1]
    assert kernel.addressable_shards[0].data.shape == share
    assert differences(average, states[1].ema["sample"]) == []
  checkpoints.close()
  assert state.ema["sample"]["layer"]["kernel"].addressable_shards[0].data.shape == (16, 32)


def test_dtype_that_changed_is_not_cast_silently(saved, abstract, log):
  """Orbax would."""
  average = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), abstract.ema["sample"]
  )
  with pytest.raises(UserError, match="none of the checkpoints"):
    Checkpoints(saved).restore_ema("sample", average, MESH)
