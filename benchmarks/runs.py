"""Runs of the real program in processes forked from this one, which never starts JAX itself."""

import atexit
import json
import os
import re
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import jax

import main
from train_jax.multihost import distributed

ROOT = Path(__file__).resolve().parents[1]
# Compiling is most of the work.
FLAGS = os.environ.get("XLA_FLAGS", "--xla_backend_optimization_level=0")
ENDLESS = 1_000_000
CONFIGS = {
  "ism": (
    "--config=configs/ism_digits.py:debug",
    "--config.pairing.pool=4",
    "--config.eval.samples=16",
    "--config.eval.nfe=(1,)",
  ),
  "seqmatch": ("--config=configs/seqmatch_arithmetic.py:two_sum,debug", "--config.data.tests=8"),
}
alive: set[int] = set()  # processes that were started here and have not ended
COMMON = ("--config.log_every=1", "--config.eval_every=0")


def fork(work, log: Path, devices: int = 1, flags: str = FLAGS, **env: str) -> int:
  """Runs `work() -> exit code` in a process of its own; returns its number."""
  if pid := os.fork():
    alive.add(pid)
    return pid
  code = 1
  try:
    # Fake devices on few cores wait for each other for ever without NPROC.
    os.environ.update({"NPROC": "32", **os.environ, **env})
    jax.config.update("jax_platforms", "cpu")
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
      jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    code = work() or 0
    atexit._run_exitfuncs()  # JAX's processes take leave of each other
  except BaseException:
    traceback.print_exc()
  finally:
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def train(method: str, workdir: Path, log: Path, *args: str, before=None, **how) -> int:
  """Forks a training run of `method`, which calls `before` first; returns its number."""

  def work() -> int:
    os.chdir(ROOT)
    if before:
      before()
    sys.argv = ["main.py", *CONFIGS[method], *COMMON, f"--workdir={workdir}", *args]
    return distributed.leave(main.run(sys.argv))

  return fork(work, log, **how)


def together(n: int, method: str, workdir: Path, *args: str, present: int | None = None, **how):
  """`n` training processes as one run, of which the first `present` come; their numbers."""
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = f"127.0.0.1:{server.getsockname()[1]}"
  places = {"JAX_NUM_PROCESSES": str(n), "JAX_COORDINATOR_ADDRESS": address}
  logs = [workdir.with_suffix(f".{i}.log") for i in range(n)]
  # What is done `before` is done in the last one only.
  hows = [how if i == n - 1 else {**how, "before": None} for i in range(n)]
  return [
    train(method, workdir, logs[i], *args, JAX_PROCESS_ID=str(i), **places, **hows[i])
    for i in range(present or n)
  ]


def wait(pid: int, limit: float = 300) -> int | None:
  """Its exit code (negative: the signal), None if it had to be killed after `limit` seconds."""
  end = time.monotonic() + limit
  while time.monotonic() < end:
    found, status = os.waitpid(pid, os.WNOHANG)
    if found:
      alive.discard(pid)
      return os.waitstatus_to_exitcode(status)
    time.sleep(0.02)
  kill(pid)
  return None


def kill(pid: int) -> None:
  os.kill(pid, signal.SIGKILL)
  os.waitpid(pid, 0)
  alive.discard(pid)


def until(what, limit: float = 300):
  """Waits for `what()` to be true; returns it."""
  end = time.monotonic() + limit
  while not (value := what()):
    if time.monotonic() > end:
      raise TimeoutError("a run did not come so far")
    time.sleep(0.02)
  return value


def history(workdir: Path) -> dict[int, float]:
  """Step -> loss, of metrics.jsonl."""
  file, rows = workdir / "metrics.jsonl", {}
  for line in file.read_text().splitlines() if file.exists() else ():
    try:
      row = json.loads(line)
    except json.JSONDecodeError:  # being written
      continue
    if "loss" in row:
      rows[row["step"]] = row["loss"]
  return rows


def inode(workdir: Path) -> int:
  file = workdir / "metrics.jsonl"
  return file.stat().st_ino if file.exists() else 0


def whole(workdir: Path) -> int:
  """The newest step on disk; 0 if there is none."""
  return max([int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()] or [0])


def meta(workdir: Path, step: int) -> dict:
  found = json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())
  return {name: found[name] for name in ("step", "position", "rollbacks", "checksums")}


def resumed(log: Path) -> int | None:
  """The step that a run went on from; None as long as it has not said so."""
  text = log.read_text(errors="replace") if log.exists() else ""
  found = re.search(r"resumed at step (\d+)", text)
  return int(found[1]) if found else None
