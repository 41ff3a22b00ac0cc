"""What endurance.py does to a run's files, data and numbers; each in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

import main
from configs import ism_digits, seqmatch_arithmetic
from ism_jax import method as ism
from seqmatch_jax import method as seqmatch
from train_jax import mesh as mesh_lib
from train_jax import state as state_lib
from train_jax.checkpointing import checksum, saver, stored
from train_jax.checkpointing.checkpoint import Checkpoints
from train_jax.step import make_train_step


def _debug_run():
  """(method, optimiser, decays) of a run of iSM's debug config."""
  config = ism_digits.get_config("debug")
  method = ism.make_method(config, mesh_lib.make_mesh())[0]
  return method, main.make_optimizer(config), dict(config.ema)


def _ways(step: Path, draw: random.Random, flips: int) -> Iterator:
  """(what, function that does it to the step)."""

  def flip(path):
    content = bytearray(path.read_bytes())
    bit = draw.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)

  def pick():  # a byte anywhere in the step, so large files more often
    files = sorted(p for p in step.rglob("*") if p.is_file() and p.stat().st_size)
    return draw.choices(files, [p.stat().st_size for p in files])[0]

  def gut():
    shutil.rmtree(step)
    step.mkdir()

  for _ in range(flips):
    yield "flip", lambda: flip(pick())
  largest = max(step.rglob("d/*"), key=lambda path: path.stat().st_size).relative_to(step)
  content = (step / largest).read_bytes()
  yield "truncation", lambda: (step / largest).write_bytes(content[: len(content) // 2])
  yield "truncation", lambda: (step / "meta" / "metadata").write_text("{")
  yield "deletion", lambda: (step / largest).unlink()
  for item in ("state", "ema_sample", "ema_target", "meta"):
    yield "deletion", lambda: shutil.rmtree(step / item)  # noqa: B023
  yield "empty", gut


def damage(workdir: Path, result: Path, flips: int, seed: int) -> None:
  """Damages step 2 of a run, again and again; what is restored must be whole, and said so."""
  said, directory = [], workdir / "checkpoints"
  logging.error = lambda text, *args: said.append(text % args)
  shapes, copy = jax.eval_shape(state_lib.create(*_debug_run(), seed=0)), workdir / "copy"
  abstract = mesh_lib.abstract_state(shapes, mesh_lib.make_mesh())
  shutil.copytree(directory / "2", copy)
  wanted = {n: stored.read_meta(directory / str(n))["checksums"] for n in (1, 2)}
  good, found, harmless = Counter(), Counter(), 0
  for what, do in _ways(directory / "2", random.Random(seed), flips):
    said.clear()
    do()
    state, meta = Checkpoints(workdir).restore(abstract)
    step = meta["step"]
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state) if f.name != "ema"}
    whole = checksum.checksums(fields) == wanted[step]["state"]
    detected = step == 1 and len(said) == 1 and f"{directory / '2'} is damaged" in said[0]
    harmless += step == 2
    found[what] += 1
    # A flip in a file that Orbax does not read leaves the step as it was.
    good[what] += whole and (detected or (what == "flip" and step == 2 and not said))
    shutil.rmtree(directory / "2", ignore_errors=True)
    shutil.copytree(copy, directory / "2")
  note = ", ".join(f"{what} {good[what]}/{n}" for what, n in found.items())
  note += f"; {harmless} flips in bytes that hold no state"
  result.write_text(json.dumps({"good": good.total(), "all": found.total(), "note": note}))


def hide_newest() -> None:
  """This process cannot read step 8 the first two times: for its config, and for its state."""
  read_meta, left = stored.read_meta, [1, 2]

  def blind(step: Path) -> dict:
    if step.name == "8" and left:
      left.pop()
      raise OSError("this disk does not answer")
    return read_meta(step)

  stored.read_meta = blind


def epochs(method: str, result: Path) -> None:
  """Two epochs, as 1, 2 and 4 processes read them: every example once in each."""
  module, good, wanted = {"ism": ism, "seqmatch": seqmatch}[method], 0, []
  if method == "ism":
    config, size, name = ism_digits.get_config(), 1797, "image"
    config.pairing.pool = 0
  else:
    config, size, name = seqmatch_arithmetic.get_config("two_sum"), 320, "prompt"
    config.data.examples, config.data.tests = size, 8
  for processes in (1, 2, 4):
    split = np.split(np.arange(config.batch), processes)
    parts = []
    for share in split:  # the rows that this process would have, of as many
      mesh_lib.process_rows = lambda batch, mesh: share  # noqa: B023
      stream = module.make_method(config, mesh_lib.make_mesh())[0].stream(0, 0)
      parts.append([next(stream)[name] for _ in range(-(-2 * size // config.batch))])
      stream.close()
    seen = [row.tobytes() for batch in zip(*parts, strict=True) for part in batch for row in part]
    counts = [Counter(seen[:size]), Counter(seen[size : 2 * size])]
    wanted.append(counts[0])
    good += counts == [wanted[0]] * 2
  note = f"{size} examples once in each of 2 epochs of 1, 2 and 4 processes"
  result.write_text(json.dumps({"good": good, "all": 3, "note": note}))


def not_finite(result: Path) -> None:
  """A step of iSM with a NaN in one place: what it changes."""
  method, tx, decays = _debug_run()

  def loss(params, ema, batch, key):
    value, metrics = method.loss(params, ema, batch, key)
    # Adds 0; where `trap` is 0, with a gradient that is NaN.
    first = jax.tree.leaves(params)[0].reshape(-1)[0]
    return value + 0 * jnp.sqrt(batch["trap"][0] * (1 + first**2)), metrics

  state = jax.jit(state_lib.create(method, tx, decays, 0))()
  step = jax.jit(make_train_step(method._replace(loss=loss), tx, decays, 1.0))
  batch = {**next(method.stream(0, 0)), "trap": np.ones(64, np.float32)}
  image = batch["image"].copy()
  image[3, 1, 1] = np.nan
  spoiled = jax.tree.map(lambda a: a.at[(0,) * a.ndim].set(np.nan), state.ema["target"])
  target = dataclasses.replace(state, ema={**state.ema, "target": spoiled})
  cases = {
    "batch": (state, {**batch, "image": image}),
    "gradient": (state, {**batch, "trap": np.zeros(64, np.float32)}),
    "target network": (target, batch),
  }
  moved = step(state, batch)[0]
  assert checksum.checksums(moved.params) != checksum.checksums(state.params)
  found = {}
  for name, (before, rows) in cases.items():
    after, metrics = step(before, rows)
    wanted = dataclasses.replace(before, step=after.step, skipped=after.skipped)
    same = [
      np.array_equal(a, b, equal_nan=True)
      for a, b in zip(*map(jax.tree.leaves, (after, wanted)), strict=True)
    ]
    found[name] = bool(all(same) and metrics["skipped"] == 1 and after.step == 1)
  result.write_text(json.dumps(found))


@dataclass
class Disk:
  """A file system of a few megabytes."""

  path: Path

  def fill(self) -> None:
    """Leaves no room."""
    with (self.path / "filler").open("wb", buffering=0) as file:
      try:
        while True:
          file.write(bytes(2**16))
      except OSError:
        pass

  def lock(self) -> None:
    """Nothing can be written to it any more."""
    subprocess.run(["mount", "-o", "remount,ro", self.path], check=True)

  def free(self) -> None:
    """As it was before."""
    subprocess.run(["mount", "-o", "remount,rw", self.path], check=True)
    (self.path / "filler").unlink()


@contextmanager
def small_disk(path: Path) -> Iterator[Disk]:
  """A Disk at `path`; only root may mount it."""
  path.mkdir()
  subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", path], check=True)
  try:
    yield Disk(path)
  finally:
    subprocess.run(["umount", "-l", path], check=True)


def save_times(directory: Path, result: Path, rounds: int = 8) -> None:
  """Saves of 400 MB, with and without checksums in turn: the best of `rounds`, as others use the
  machine, and the processor time, which does not depend on them."""
  draw = lambda i: jax.random.normal(jax.random.key(i), (1024, 4096))  # noqa: E731
  items = {"state": {f"w{i}": draw(i) for i in range(25)}}
  jax.block_until_ready(items)
  start, read_back = checksum.start, stored.read_back
  known = jax.device_get(start(items["state"]))  # the state never changes: nor do its checksums
  each, found = saver.Saver(directory, 1), {True: [], False: []}
  spent = [0.0, 0.0]  # on the last reading back: wall and processor time

  def timed_read_back(*args):
    since, busy = time.perf_counter(), time.process_time()
    read_back(*args)
    spent[:] = time.perf_counter() - since, time.process_time() - busy

  stored.read_back = timed_read_back
  for step in range(1, 2 * rounds + 3):
    summed = step % 2 == 1
    checksum.start = start if summed else lambda tree: known  # all else is alike
    since, busy = time.perf_counter(), time.process_time()
    each.save(step, items, {"step": step})
    blocked = time.perf_counter() - since
    each._saving[1].result()
    took, work = time.perf_counter() - since - spent[0], time.process_time() - busy - spent[1]
    found[summed].append((blocked, took, work, *spent))
    each.finish()
  each.close()
  summed, bare = (np.array(found[key][1:]) for key in (True, False))  # the first one compiles
  blocked, took, _, back, _ = summed.min(0)
  added, added_work = took / bare.min(0)[1] - 1, np.median(summed[:, 2]) / np.median(bare[:, 2]) - 1
  note = (
    f"best of {rounds}: blocked for {1e3 * blocked:.0f} ms (median "
    f"{1e3 * np.median(summed[:, 0]):.0f}), on disk after {took:.2f} s, without checksums "
    f"{bare.min(0)[1]:.2f} s ({added:+.0%}; processor time {added_work:+.0%}); then read back in "
    f"{back:.2f} s, in the background; load average {os.getloadavg()[0]:.0f} on "
    f"{os.cpu_count()} cores"
  )
  good = int(blocked <= 0.05) + int(added <= 0.05)
  result.write_text(json.dumps({"good": good, "note": note}))
