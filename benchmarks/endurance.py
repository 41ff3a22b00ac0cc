"""The fault table: every fault is really caused, many times, and what comes after it is checked.

    python benchmarks/endurance.py           # all of it: minutes; the table of docs/ENDURANCE.md
    python benchmarks/endurance.py --short   # a part of it: a test of the suite

Runs are the real program with its debug configs, in processes forked from this one, which has
imported everything and never starts JAX: a life costs seconds. Exit code 0: every row is at its
mark.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import fault_cases
from benchmarks.runs import (
  CONFIGS,
  ENDLESS,
  alive,
  fork,
  history,
  inode,
  kill,
  meta,
  resumed,
  together,
  train,
  until,
  wait,
  whole,
)


def kills(
  root: Path, draw: random.Random, method: str, count: int, longest: float = 4
) -> tuple[int, int, str]:
  """SIGKILL at random moments; in the end, the same bits as a run that was left alone.

  Args:
    longest: seconds between a life's first step and its end.
  """
  workdir, every, good, lost, seconds = root / f"kills_{method}", 5, 0, [], []
  args = (f"--config.steps={ENDLESS}", f"--config.save_every={every}")
  expected = logged = 0
  for life in range(count + 1):
    log, start = root / f"kills_{method}.{life}.log", time.monotonic()
    before = inode(workdir)
    pid = train(method, workdir, log, *args)
    # A run begins with a file of its own, without the steps that were lost.
    until(lambda: inode(workdir) != before)  # noqa: B023
    until(lambda: max(history(workdir), default=0) > (resumed(log) or 0))  # noqa: B023
    if life:
      seconds.append(time.monotonic() - start)
      # Of the saves that had begun, at most the one that was being written is lost.
      good += (resumed(log) or 0) == expected >= (logged - 1) // every * every - every
      lost.append(logged - (resumed(log) or 0))
    if life < count:
      time.sleep(draw.uniform(0, longest))
      kill(pid)
      logged, expected = max(history(workdir), default=0), whole(workdir)
  until(lambda: whole(workdir) >= 2 * every)
  last = whole(workdir)
  kill(pid)
  alone = root / f"alone_{method}"
  pid = train(method, alone, root / f"alone_{method}.log", *args, f"--config.keep={ENDLESS}")
  until(lambda: whole(alone) >= last, 600)
  kill(pid)
  same = meta(workdir, last) == meta(alone, last)
  note = (
    f"{method}: lost {sorted(lost)[len(lost) // 2]} steps (median), at most {max(lost)}, of a save "
    f"every {every}; back in {sorted(seconds)[len(seconds) // 2]:.0f} s; after step {last}, "
    f"{'0 bits differ from' if same else 'NOT the bits of'} a run that was left alone"
  )
  return good if same else 0, count, note


def flips(root: Path, draw: random.Random, count: int) -> tuple[int, int, str]:
  """Damage to a step: see fault_cases.damage."""
  workdir, log = root / "flips", root / "flips.log"
  assert wait(train("ism", workdir, log, "--config.steps=2")) == 0
  result, seed = root / "flips.json", draw.randrange(2**31)
  pid = fork(lambda: fault_cases.damage(workdir, result, count, seed), root / "damage.log")
  assert wait(pid, 600) == 0, (root / "damage.log").read_text()
  found = json.loads(result.read_text())
  return found["good"], found["all"], found["note"]


def twice(root: Path, draw: random.Random, method: str) -> tuple[int, int, str]:
  """2 N steps at once, and with a kill in the middle: all that is saved, and every loss."""
  args, runs = ("--config.steps=24", "--config.save_every=3", "--config.keep=9"), []
  for name in ("once", "twice"):
    workdir, log = root / f"{name}_{method}", root / f"{name}_{method}.log"
    pid = train(method, workdir, log, *args)
    if name == "twice":
      until(lambda: whole(workdir) >= 9)  # noqa: B023
      time.sleep(draw.uniform(0, 0.2))
      kill(pid)
      pid = train(method, workdir, log, *args)
    runs.append((wait(pid), meta(workdir, 24), history(workdir)))
    arrays = sum(len(sums) for sums in runs[-1][1]["checksums"].values())
  good = runs[0] == runs[1] and runs[0][0] == 0 and 9 <= resumed(log) < 24
  return int(good), 1, f"{method}: {arrays} arrays, position and 24 losses, after {resumed(log)}"


def counts(root: Path, method: str, shapes) -> tuple[int, int, str]:
  """(processes, devices of each): the same losses; and every example once in an epoch."""
  args, runs = ("--config.steps=4",), []
  for n, devices in shapes:
    workdir = root / f"counts_{method}_{n}x{devices}"
    codes = [wait(pid) for pid in together(n, method, workdir, *args, devices=devices)]
    runs.append([*history(workdir).values()] if codes == [0] * n else [])
  far = max(abs(a - b) / abs(b) for run in runs for a, b in zip(run, runs[0], strict=True))
  good = sum(len(run) == 4 and far <= 1e-5 for run in runs)
  result = root / f"epochs_{method}.json"
  assert wait(fork(lambda: fault_cases.epochs(method, result), root / "epochs.log")) == 0
  found = json.loads(result.read_text())
  note = f"{method}: losses differ by {far:.0e}; {found['note']}"
  return good + found["good"], len(shapes) + found["all"], note


def not_finite(root: Path) -> tuple[int, int, str]:
  """NaN in the batch, the gradient, the target network."""
  result = root / "nan.json"
  assert wait(fork(lambda: fault_cases.not_finite(result), root / "nan.log")) == 0
  found = json.loads(result.read_text())
  return sum(found.values()), len(found), "nothing but the counters changed: " + ", ".join(found)


def stop_one(root: Path, number: signal.Signals, n: int) -> tuple[int, int, str]:
  """A signal to the last of `n` processes."""
  workdir = root / f"stop_{number.name}_{n}"
  pids = together(n, "ism", workdir, f"--config.steps={ENDLESS}", "--config.save_every=100000")
  until(lambda: len(history(workdir)) > 2)
  os.kill(pids[-1], number)
  told = time.monotonic()
  codes = [wait(pid, 60) for pid in pids]
  took = time.monotonic() - told
  texts = [workdir.with_suffix(f".{i}.log").read_text() for i in range(n)]
  steps = [re.findall(r"saved step (\d+); the same command goes on", text) for text in texts]
  good = codes == [0] * n and steps == [[str(whole(workdir))]] * n and took < 30
  return int(good), 1, f"{number.name} to 1 of {n}: step {whole(workdir)} saved in {took:.1f} s"


def second_signal(root: Path) -> tuple[int, int, str]:
  """Ctrl-C twice."""
  workdir = root / "second"
  (pid,) = together(1, "ism", workdir, f"--config.steps={ENDLESS}", "--config.save_every=1")
  until(lambda: len(history(workdir)) > 2)
  told = time.monotonic()
  os.kill(pid, signal.SIGINT)
  time.sleep(0.01)
  os.kill(pid, signal.SIGINT)
  code, took = wait(pid, 60), time.monotonic() - told
  return int(code in (-signal.SIGINT, 0) and took < 5), 1, f"SIGINT twice: ended in {took:.1f} s"


def absent(root: Path, dies: bool) -> tuple[int, int, str]:
  """A peer that dies, or never comes."""
  workdir, args = root / f"absent_{dies}", (f"--config.steps={ENDLESS}",)
  pids = together(2, "ism", workdir, *args, present=2 if dies else 1, START_LIMIT="10")
  if dies:
    until(lambda: len(history(workdir)) > 2)
    kill(pids[1])
  start = time.monotonic()
  code, took = wait(pids[0], 60), time.monotonic() - start
  text = workdir.with_suffix(".0.log").read_text()
  wanted = r"process 1 \(.*\) died" if dies else r"did not come within 10 s: 1"
  good = code == (1 if dies else 2) and re.search(wanted, text) and took < 60
  what = "dies" if dies else "never comes"
  return int(bool(good)), 1, f"a peer {what}: named, and the other ended, in {took:.1f} s"


def blind(root: Path) -> tuple[int, int, str]:
  """A step that one of two processes cannot read: both must take the one before it."""
  workdir = root / "blind"
  assert wait(train("ism", workdir, root / "seeing.log", "--config.steps=8")) == 0
  pids = together(2, "ism", workdir, "--config.steps=8", before=fault_cases.hide_newest)
  codes = [wait(pid, 120) for pid in pids]
  logs = [workdir.with_suffix(f".{i}.log") for i in range(2)]
  said = "another process cannot read it" in logs[0].read_text()
  good = codes == [0, 0] and said and resumed(logs[0]) == 7 and whole(workdir) == 8
  return int(good), 1, f"one of two cannot read step 8: both went on at step {resumed(logs[0])}"


def full_disk(root: Path) -> tuple[int, int, str]:
  """A file system that fills up during the run, and one that cannot be written to at its start."""
  with fault_cases.small_disk(root / "disk") as disk:
    workdir, log = disk.path / "run", root / "disk.log"
    args = ("--config.steps=60", "--config.save_every=5")
    pid = train("ism", workdir, log, *args)
    until(lambda: whole(workdir) >= 5)
    disk.fill()
    code, text = wait(pid), log.read_text()
    reported = re.search(r"step \d+ could not be saved \(.*\); .*checkpoints/(\d+) is whole", text)
    ended = code == 1 and reported and "stopped: step 60 could not be saved" in text
    disk.lock()
    refused = wait(train("ism", workdir, root / "locked.log", *args), 60)
    sentence = "cannot be written to" in (root / "locked.log").read_text()
    disk.free()
    code = wait(train("ism", workdir, root / "freed.log", *args))
    back = code == 0 and resumed(root / "freed.log") == int(reported[1]) if reported else False
  good = [bool(ended), refused == 2 and sentence, back]
  at = reported and reported[1]
  note = f"full: said so, exit 1; read-only: refused, exit 2; free again: went on at step {at}"
  return sum(good), len(good), note


def targets(root: Path) -> tuple[int, int, str]:
  """Saving 400 MB: how long training waits, and what the checksums add."""
  result = root / "targets.json"
  pid = fork(lambda: fault_cases.save_times(root / "save", result), root / "targets.log", flags="")
  assert wait(pid, 600) == 0, (root / "targets.log").read_text()
  found = json.loads(result.read_text())
  return found["good"], 2, found["note"]


def rows(root: Path, draw: random.Random, short: bool):
  """(fault, its mark, what runs it) of each row."""
  if short:
    yield "SIGKILL at a random moment", "all resume", lambda: kills(root, draw, "ism", 2, 1.5)
    yield "a flipped bit, truncation, deletion, empty", "all found", lambda: flips(root, draw, 8)
    yield "SIGTERM", "exit 0 in 30 s", lambda: stop_one(root, signal.SIGTERM, 1)
    return
  fault = "a flipped bit, truncation, deletion, empty step"
  yield fault, "all found or harmless, the step before restored", lambda: flips(root, draw, 50)
  for method in CONFIGS:
    fault, mark = f"2N against N + kill + N, {method}", "0 bits differ"
    yield fault, mark, lambda: twice(root, draw, method)  # noqa: B023
  shapes = ((1, 1), (1, 4), (1, 8), (2, 1), (4, 1))
  for method in CONFIGS:
    fault, mark = f"processes and devices, {method}", "each example once, losses within 1e-5"
    yield fault, mark, lambda: counts(root, method, shapes)  # noqa: B023
  yield "NaN in batch, gradient, target network", "nothing changes", lambda: not_finite(root)
  yield "SIGTERM to one of two", "both save, exit 0", lambda: stop_one(root, signal.SIGTERM, 2)
  yield "SIGINT", "exit 0 in 30 s", lambda: stop_one(root, signal.SIGINT, 1)
  yield "a second signal", "at once", lambda: second_signal(root)
  yield "a peer that dies", "named in 60 s", lambda: absent(root, True)
  yield "a peer that never comes", "named in 60 s", lambda: absent(root, False)
  yield "a step that one of two cannot read", "both take another", lambda: blind(root)
  yield "disk full, read-only workdir", "clear error, step before whole", lambda: full_disk(root)
  yield "saving 400 MB", "blocks 50 ms, checksums add 5%", lambda: targets(root)
  for method in CONFIGS:
    fault = f"SIGKILL at a random moment, {method}"
    yield fault, "all resume, one save lost at most", lambda: kills(root, draw, method, 25)  # noqa: B023


def run(short: bool, only: str, seed: int) -> bool:
  """Prints the table; whether every row is at its mark."""
  root, complete = Path(tempfile.mkdtemp(prefix="endurance_")), True
  print(
    f"| fault | pass mark | passed | s | seen (seed {seed}) |\n|---|---|---|---|---|", flush=True
  )
  for fault, mark, row in rows(root, random.Random(seed), short):
    if only not in fault:
      continue
    start = time.monotonic()
    try:
      good, of, note = row()
    except Exception as err:
      good, of, note = 0, 1, f"{type(err).__name__}: {str(err)[-300:]}; see {root}"
    for pid in list(alive):
      kill(pid)
    complete = complete and good == of
    took = time.monotonic() - start
    print(f"| {fault} | {mark} | {good}/{of} | {took:.0f} | {note} |", flush=True)
  if complete:
    shutil.rmtree(root)
  return complete


if __name__ == "__main__":
  parser = argparse.ArgumentParser()
  parser.add_argument("--short", action="store_true")
  parser.add_argument("--only", default="", help="rows with this text in their name")
  parser.add_argument("--seed", type=int, default=0)
  options = parser.parse_args()
  sys.exit(0 if run(options.short, options.only, options.seed) else 1)
