"""Damage of a stored step: any bit, any file; it is seen, and the step before it restored."""

import random
import re
import shutil
from pathlib import Path

import jax
import pytest

from tests.train.stored_steps import (
  change_position,
  empty_file,
  flip_bit,
  gut,
  remove_item,
  remove_meta,
  truncate,
)
from train_jax.checkpointing import checksum, stored

# Where one array cannot be read, Orbax leaves the reads of the others hanging.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def files_of(step: Path) -> list[Path]:
  """The files of a step that matter: Orbax's marks of success are not read once it is renamed."""
  files = [p for p in step.rglob("*") if p.is_file() and p.stat().st_size]
  return sorted(p for p in files if p.name not in ("commit_success.txt", "_CHECKPOINT_METADATA"))


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


@pytest.mark.parametrize("group", [1, stored.GROUP], ids=["one by one", "together"])
def test_every_array_is_read_back(saved, states, monkeypatch, group):
  monkeypatch.setattr(stored, "GROUP", group)
  step = saved / "checkpoints" / "2"
  items = {f"ema_{name}": average for name, average in states[2].ema.items()}
  abstract = jax.eval_shape(lambda: items)
  sums = {name: checksum.checksums(tree) for name, tree in items.items()}
  stored.read_back(step, abstract, sums)
  for name, wanted in sums.items():
    for path, value in wanted.items():
      others = {**sums, name: {**wanted, path: value ^ 1}}
      with pytest.raises(stored.DamagedError, match=re.escape(f"checksum of {name}{path} ")):
        stored.read_back(step, abstract, others)


def test_processes_share_the_arrays_out(states, monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  read = []
  for process in range(3):
    monkeypatch.setattr(jax, "process_index", lambda process=process: process)
    read += [leaf for group in stored._groups(states[2]) for leaf in group]
  assert sorted(read) == list(range(len(jax.tree.leaves(states[2]))))
