"""Checkpoints: what comes back is what was saved, or the step before it, or a clear refusal."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging as absl_logging

from ism_jax import dit
from train_jax import checksum, stored
from train_jax import mesh as mesh_lib
from train_jax.checkpoint import Checkpoints
from train_jax.errors import UserError
from train_jax.saver import SaveError, check_writable
from train_jax.state import TrainState
from train_jax.step import make_train_step

# Where one array cannot be read, Orbax leaves the reads of the others hanging.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

DECAYS = {"target": 0.5, "sample": 0.99}


def make_state(step: int) -> TrainState:
  """Every dtype that a state may hold, in containers of every kind, different at each step."""
  keys = iter(jax.random.split(jax.random.key(step), 8))
  params = {
    "layer": {"kernel": jax.random.normal(next(keys), (64, 32)), "bias": jnp.zeros(32)},
    "half": jax.random.normal(next(keys), (16, 3)).astype(jnp.bfloat16),
  }
  tx = optax.adamw(lambda count: 0.1 * count, mu_dtype=jnp.float32)
  _, opt_state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
  return TrainState(
    step=jnp.int32(step),
    skipped=jnp.int32(1),
    params=params,
    opt_state=opt_state,
    ema={name: jax.tree.map(lambda p: p.astype(jnp.float32) / 2, params) for name in DECAYS},
    extra={
      "full": jax.random.bernoulli(next(keys), 0.5, (37,)),
      "tokens": jax.random.randint(next(keys), (5, 7), -(2**31), 2**31 - 1),
      "bytes": jnp.arange(9, dtype=jnp.uint8),
      "pair": (jnp.float16(1.5), jnp.float32(jnp.nan)),
      "nothing": (),
    },
    rng=jax.random.key_data(next(keys)),
  )


make_state = jax.jit(make_state, static_argnums=0)


def meta_of(step: int) -> dict:
  return {"step": step, "position": 10 * step, "config": {"shares": (1, 2), "lr": 0.1}, "facts": {}}


@pytest.fixture(scope="module")
def states():
  """The states of steps 1 and 2."""
  return {step: make_state(step) for step in (1, 2)}


@pytest.fixture(scope="module")
def saved(states, tmp_path_factory):
  """A run's directory with steps 1 and 2; not to be written to."""
  workdir = tmp_path_factory.mktemp("saved")
  checkpoints = Checkpoints(workdir)
  for step, state in states.items():
    checkpoints.save(state, meta_of(step))
  checkpoints.close()
  return workdir


@pytest.fixture
def workdir(saved, tmp_path):
  """A copy of `saved`, to be damaged."""
  return shutil.copytree(saved, tmp_path / "run")


@pytest.fixture(scope="module")
def abstract(states):
  return jax.eval_shape(lambda: states[1])


@pytest.fixture
def restore(abstract):
  """workdir -> (state, meta), by a manager of its own."""

  def run(workdir):
    checkpoints = Checkpoints(workdir)
    try:
      return checkpoints.restore(abstract)
    finally:
      checkpoints.close()

  return run


@pytest.fixture
def log(monkeypatch):
  """What was logged as an error."""
  lines = []
  monkeypatch.setattr(absl_logging, "error", lambda text, *args: lines.append(text % args))
  return lines


def flip_bit(path: Path, bit: int) -> None:
  data = bytearray(path.read_bytes())
  data[bit // 8] ^= 1 << (bit % 8)
  path.write_bytes(data)


def files_of(step: Path) -> list[Path]:
  """The files of a step that matter: Orbax's marks of success are not read once it is renamed."""
  files = [p for p in step.rglob("*") if p.is_file() and p.stat().st_size]
  return sorted(p for p in files if p.name not in ("commit_success.txt", "_CHECKPOINT_METADATA"))


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


def test_only_the_newest_are_kept(tmp_path, states, restore, differences):
  checkpoints = Checkpoints(tmp_path, keep=1)
  for step, state in states.items():
    checkpoints.save(state, meta_of(step))
  checkpoints.wait()
  checkpoints.close()
  assert checkpoints.steps() == [2]
  assert differences(restore(tmp_path)[0], states[2]) == []


def test_damaged_steps_push_no_good_one_out(tmp_path, states, restore, differences, log):
  """Nor does a step that is found damaged when it is read back, right after its save."""
  checkpoints = Checkpoints(tmp_path, keep=2)
  for step in (1, 2, 3):
    checkpoints.save(dataclasses.replace(states[1], step=jnp.int32(step)), meta_of(step))
    checkpoints.wait()
  for step in (2, 3):
    remove_item(tmp_path / "checkpoints" / str(step))
  (tmp_path / "checkpoints" / "9").mkdir()
  checkpoints.save(dataclasses.replace(states[1], step=jnp.int32(4)), meta_of(4))
  checkpoints.wait()
  checkpoints.close()
  assert checkpoints.steps() == [9, 4, 3, 2]
  assert [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name == "1"] == []


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


def test_what_a_killed_save_or_deletion_left_is_removed(workdir, states):
  for name in ("7.orbax-checkpoint-tmp", "1.deleted"):
    shutil.copytree(workdir / "checkpoints" / "1", workdir / "checkpoints" / name)
  checkpoints = Checkpoints(workdir)
  assert checkpoints.steps() == [2, 1]
  checkpoints.save(dataclasses.replace(states[1], step=jnp.int32(7)), meta_of(7))
  checkpoints.wait()
  checkpoints.close()
  assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2", "7"]


def test_directory_that_cannot_be_written_to_is_refused(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match=r"file/run cannot be written to .Not a directory"):
    check_writable(tmp_path / "file" / "run")
  check_writable(tmp_path / "a" / "b")
  assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_save_has_copied_what_is_donated_after_it(tmp_path, restore, differences):
  state = jax.tree.map(jnp.copy, make_state(1))
  wanted = jax.device_get(state)
  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(state, meta_of(1))
  spoil = jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)
  jax.block_until_ready(spoil(state))
  checkpoints.close()
  assert differences(restore(tmp_path)[0], wanted) == []


def test_one_flipped_bit_never_restores(workdir, saved, restore, states, differences, log):
  """Flips in every file of the step; in a file that Orbax does not read one is harmless."""
  draw = random.Random(0)
  step = workdir / "checkpoints" / "2"
  detected = {}
  for path in files_of(step):
    for _ in range(2):
      log.clear()
      flip_bit(path, draw.randrange(8 * path.stat().st_size))
      state, meta = restore(workdir)
      found = int(state.step)
      assert differences(state, states[found]) == [], path
      assert meta["position"] == 10 * found and meta["config"]["lr"] == 0.1, path
      assert bool(log) == (found == 1)
      detected.setdefault(path.relative_to(step), []).append(found == 1)
      if found == 1:
        assert str(step) in log[0]
        assert (workdir / "damaged" / "2").is_dir() and not step.exists()
      shutil.rmtree(step, ignore_errors=True)
      shutil.copytree(saved / "checkpoints" / "2", step)
  for item in ("state", "ema_target", "ema_sample"):
    data = [hits for path, hits in detected.items() if path.parts[:2] == (item, "d")]
    assert data and all(all(hits) for hits in data), detected
  assert sum(map(sum, detected.values())) >= 20


def test_every_flip_in_an_array_changes_its_checksum():
  draw = random.Random(0)
  dtypes = (np.float32, jnp.bfloat16, np.int8, np.uint16)
  arrays = [np.random.default_rng(0).normal(size=(3, 5)).astype(d) for d in dtypes]
  before = checksum.checksums(arrays)
  for _ in range(50):
    flipped = [np.array(a) for a in arrays]
    for a in flipped:
      bit = draw.randrange(8 * a.nbytes)
      a.view(np.uint8).reshape(-1)[bit // 8] ^= 1 << (bit % 8)
    after = checksum.checksums(flipped)
    assert all(after[path] != before[path] for path in before)


@pytest.mark.parametrize("value", [1.0, 2.0, -0.5])
@pytest.mark.parametrize("size", [1, 64, 4096])
def test_checksum_tells_constant_arrays_apart(value, size):
  """A zeroed block is the commonest damage, and constants the likeliest to collide with it."""
  zeros, constant = checksum.checksums([jnp.zeros(size), jnp.full(size, value)]).values()
  assert zeros != constant


def test_checksum_sees_order_and_shape():
  a = jnp.arange(12.0)
  sums = checksum.checksums([a, a[::-1], a.at[:2].set(a[:2][::-1]), a > 3, a <= 3])
  assert len(set(sums.values())) == 5


@pytest.mark.parametrize("size", [0, 1, 7, 2**18 - 1, 2**18 + 5])
def test_host_and_device_count_the_same(size):
  draw = np.random.default_rng(size)
  arrays = [draw.normal(size=size).astype(d) for d in (np.float32, jnp.bfloat16, np.int8)]
  arrays += [arrays[0] > 0, np.float32(3), draw.normal(size=(3, 5, size % 11)).astype(np.float16)]
  found = [checksum.of_host(np.asarray(a)) for a in arrays]
  assert found == list(checksum.checksums(arrays).values())
  assert len(set(found)) == (6 if size > 1 else len(set(found)))


def test_checksum_does_not_depend_on_the_layout(make_mesh, monkeypatch):
  monkeypatch.setattr(mesh_lib, "SMALL", 1)
  tree = {"a": jax.random.normal(jax.random.key(0), (16, 24)), "b": jnp.arange(8)}
  sums = []
  for shape in ((1, 1), (8, 1), (2, 4), (1, 8)):
    mesh = make_mesh(*shape)
    placed = jax.device_put(tree, mesh_lib.state_sharding(tree, mesh))
    assert placed["a"].is_fully_replicated == (shape[1] == 1)
    sums.append(checksum.checksums(placed))
  assert all(s == sums[0] for s in sums)
  assert sums[0] == checksum.checksums(jax.device_get(tree))


def truncate(step: Path) -> None:
  path = max((step / "state" / "ocdbt.process_0" / "d").iterdir(), key=lambda p: p.stat().st_size)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty_file(step: Path) -> None:
  (step / "ema_sample" / "manifest.ocdbt").write_bytes(b"")


def remove_item(step: Path) -> None:
  shutil.rmtree(step / "ema_target")


def remove_meta(step: Path) -> None:
  shutil.rmtree(step / "meta")


def gut(step: Path) -> None:
  shutil.rmtree(step)
  step.mkdir()


def change_position(step: Path) -> None:
  path = step / "meta" / "metadata"
  assert '"position": 20' in path.read_text()
  path.write_text(path.read_text().replace('"position": 20', '"position": 21'))


@pytest.mark.parametrize(
  "damage", [truncate, empty_file, remove_item, remove_meta, gut, change_position]
)
def test_damaged_step_is_named_and_the_one_before_restored(
  workdir, restore, states, differences, log, damage
):
  step = workdir / "checkpoints" / "2"
  damage(step)
  state, meta = restore(workdir)
  assert differences(state, states[1]) == []
  assert meta["position"] == 10
  assert len(log) == 1 and f"{step} is damaged" in log[0]


def test_foreign_empty_directory_is_skipped(workdir, restore, states, differences, log):
  (workdir / "checkpoints" / "9").mkdir()
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
      Checkpoints(workdir).restore_ema("sample", abstract.ema["sample"])
    with pytest.raises(UserError, match="none of the checkpoints"):
      Checkpoints(workdir).require_meta()


def test_missing_checkpoint_says_what_was_looked_for(tmp_path, abstract):
  wanted = rf"no checkpoint found: looked for {tmp_path}/run/checkpoints/<step>"
  with pytest.raises(UserError, match=wanted):
    Checkpoints(tmp_path / "run").require_meta()
  with pytest.raises(UserError, match=wanted):
    Checkpoints(tmp_path / "run").restore_ema("sample", abstract.ema["sample"])
  assert not (tmp_path / "run").exists()


def test_average_is_restored_without_the_rest(workdir, abstract, states, differences):
  for step in (workdir / "checkpoints").iterdir():
    shutil.rmtree(step / "state")
    shutil.rmtree(step / "ema_target")
  checkpoints = Checkpoints(workdir)
  average, step = checkpoints.restore_ema("sample", abstract.ema["sample"])
  checkpoints.close()
  assert step == 2
  assert differences(average, states[2].ema["sample"]) == []


def test_damaged_average_falls_back_and_moves_nothing(workdir, abstract, states, differences, log):
  shutil.rmtree(workdir / "checkpoints" / "2" / "ema_sample")
  checkpoints = Checkpoints(workdir)
  average, step = checkpoints.restore_ema("sample", abstract.ema["sample"])
  checkpoints.close()
  assert step == 1 and len(log) == 1
  assert differences(average, states[1].ema["sample"]) == []
  assert checkpoints.steps() == [2, 1]


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
  average, _ = checkpoints.restore_ema("sample", abstract)
  checkpoints.close()
  assert not state.ema["sample"]["layer"]["kernel"].is_fully_replicated
  assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(average))
  assert differences(average, states[1].ema["sample"]) == []


def test_dtype_that_changed_is_not_cast_silently(saved, abstract, log):
  """Orbax would."""
  average = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), abstract.ema["sample"]
  )
  with pytest.raises(UserError, match="none of the checkpoints"):
    Checkpoints(saved).restore_ema("sample", average)


def test_twelve_blocks_come_back_in_order(tmp_path, method, perturb):
  """Restored by name: with 11 or more, '10' would sort before '2'."""
  config = dit.DiTConfig(side=4, channels=1, classes=2, patch=2, width=16, depth=12, heads=2)
  init, apply = dit.make_network(config)
  x, half = jnp.ones((2, 4, 4, 1)), jnp.full(2, 0.5)
  inputs = (x, half, half, jnp.array([0, 1]), half)

  def loss(params, ema, batch, key):
    return jnp.mean((apply(params, *inputs) - 1) ** 2), {}

  def start():
    params = perturb(init(jax.random.key(0)))
    return TrainState(
      step=jnp.int32(0),
      skipped=jnp.int32(0),
      params=params,
      opt_state=tx.init(params),
      ema={"sample": jax.tree.map(jnp.copy, params)},
      extra=(),
      rng=jax.random.key_data(jax.random.key(1)),
    )

  tx = optax.adam(0.01)
  method = method._replace(loss=loss, augment=lambda state, batch, key: (state.extra, batch))
  step = make_train_step(method, tx, {"sample": 0.5}, 1.0)
  state, _ = jax.jit(lambda: step(start(), {}))()
  blocks = jax.tree.leaves(state.params["blocks"])
  assert all(len(a) == 12 for a in blocks)
  assert all(len(np.unique(np.asarray(a).reshape(12, -1)[:, 0])) == 12 for a in blocks)

  checkpoints = Checkpoints(tmp_path)
  checkpoints.save(state, meta_of(1))
  checkpoints.wait()
  restored, _ = checkpoints.restore(jax.eval_shape(start))
  average, _ = checkpoints.restore_ema("sample", jax.eval_shape(init, jax.random.key(0)))
  checkpoints.close()
  output = jax.jit(apply)
  np.testing.assert_array_equal(output(restored.params, *inputs), output(state.params, *inputs))
  np.testing.assert_array_equal(output(average, *inputs), output(state.ema["sample"], *inputs))
