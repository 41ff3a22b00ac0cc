"""Two processes on loopback as one run: the same numbers, one end, no orphan."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SMALL = ("--config.eval.nfe=(1,)", "--config.eval.samples=16", "--config.eval_every=0")
RUN = ("--config=configs/ism_digits.py:debug", *SMALL)
ENDLESS = (*RUN, "--config.steps=100000", "--config.save_every=100000")


@pytest.fixture
def start():
  """(n, *arguments) -> n processes of `python main.py arguments`; none outlives the test."""
  started = []

  def run(n: int, *args: str) -> list[subprocess.Popen]:
    with socket.create_server(("127.0.0.1", 0)) as server:
      address = f"127.0.0.1:{server.getsockname()[1]}"
    for i in range(n):
      place = {"JAX_NUM_PROCESSES": str(n), "JAX_PROCESS_ID": str(i)}
      # Of two such flags the last counts.
      flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=1"
      env = {**os.environ, "XLA_FLAGS": flags, **place}
      env["JAX_COORDINATOR_ADDRESS"] = address
      command, pipe = [sys.executable, "main.py", *map(str, args)], subprocess.PIPE
      started.append(
        subprocess.Popen(command, cwd=ROOT, env=env, text=True, stdout=pipe, stderr=pipe)
      )
    return started[-n:]

  yield run
  for process in started:
    process.kill()
    process.communicate()


def finish(processes) -> list[tuple[int, str]]:
  """(exit code, output) of each, in at most five minutes."""
  outputs = ["".join(process.communicate(timeout=300)) for process in processes]
  return [(process.returncode, text) for process, text in zip(processes, outputs, strict=True)]


def history(workdir: Path) -> list[dict]:
  file = workdir / "metrics.jsonl"
  return [json.loads(row) for row in file.read_text().splitlines()] if file.exists() else []


def wait_for_steps(workdir: Path, count: int, processes) -> None:
  deadline = time.monotonic() + 300
  while len(history(workdir)) < count:
    assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
    time.sleep(0.1)


@pytest.mark.slow
def test_two_processes_start_again_where_programs_are_kept(start, tmp_path, monkeypatch):
  """From the cache, SequenceMatch's collectives would come in another order than the peer's."""
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
  for name in ("first", "second"):
    workdir = f"--workdir={tmp_path / name}"
    for code, text in finish(start(2, "--config=configs/seqmatch_text.py:debug", workdir)):
      assert code == 0, text


@pytest.mark.slow
def test_two_processes_train_as_one_does(start, tmp_path):
  found = []
  for n in (1, 2):
    workdir = tmp_path / str(n)
    (first, *others) = finish(start(n, *RUN, "--config.steps=4", f"--workdir={workdir}"))
    assert [code for code, _ in (first, *others)] == [0] * n, first
    assert f"{n} device(s)" in first[1] and "checkpoint:" in first[1]
    assert all("checkpoint:" not in text for _, text in others)
    found.append({row["step"]: row for row in history(workdir) if "loss" in row})
  assert sorted(found[0]) == sorted(found[1]) == [1, 2, 3, 4]
  for step, row in found[0].items():
    for name in ("loss", "grad_norm", "velocity", "consistency"):
      np.testing.assert_allclose(found[1][step][name], row[name], rtol=1e-5, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, evaluate, use, result",
  [
    ("seqmatch_llama7b", (), ("sample", "--num=3"), "generations.json"),
    ("ism_digits", ("--nfe=1",), ("export",), "model.safetensors"),
  ],
)
def test_a_run_split_over_processes_is_used_by_any_number(
  start, tmp_path, name, evaluate, use, result
):
  split = ("--config.mesh.fsdp=2", "--config.model.width=128", "--config.steps=2")
  run = f"--workdir={tmp_path / 'run'}"
  commands = [(2, f"--config=configs/{name}.py:debug", *split)]
  for n in (1, 2):
    for mode, *options in (("evaluate", *evaluate), use):
      commands.append((n, f"--mode={mode}", *options, f"--out={tmp_path / str(n)}"))
  for n, *options in commands:
    for code, text in finish(start(n, *options, run)):
      assert code == 0, text
  assert (tmp_path / "1" / result).read_bytes() == (tmp_path / "2" / result).read_bytes()
  one, two = (json.loads((tmp_path / n / "evaluation.json").read_text()) for n in "12")
  assert one.keys() == two.keys()
  np.testing.assert_allclose([*two.values()], [*one.values()], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
  "more",
  [(), ("--config.eval_every=2", "--config.eval.samples=1000000")],
  ids=["training", "evaluating"],
)
def test_sigterm_to_one_makes_both_save_the_same_step_and_one_goes_on(
  start, tmp_path, monkeypatch, more
):
  monkeypatch.setenv("STOPPED_FAILS", "1")  # in the first run: a cluster would start it again
  processes = start(2, *ENDLESS, *more, f"--workdir={tmp_path}")
  wait_for_steps(tmp_path, 2, processes)
  processes[1].send_signal(signal.SIGTERM)
  told = time.monotonic()
  (one, first), (two, second) = finish(processes)
  assert (one, two) == (75, 75) and time.monotonic() - told < 60
  monkeypatch.delenv("STOPPED_FAILS")
  (step,) = (path.name for path in (tmp_path / "checkpoints").iterdir())
  assert f"another process was told to stop: saved step {step};" in first
  assert f"SIGTERM: saved step {step};" in second
  # Fewer processes go on from what more of them have saved.
  known, (alone,) = len(history(tmp_path)), start(1, *ENDLESS, f"--workdir={tmp_path}")
  wait_for_steps(tmp_path, known + 1, [alone])
  alone.send_signal(signal.SIGTERM)
  ((code, text),) = finish([alone])
  assert code == 0 and f"resumed at step {step} of" in text


@pytest.mark.slow
def test_a_killed_process_is_named_and_ends_the_other(start, tmp_path):
  processes = start(2, *ENDLESS, f"--workdir={tmp_path}")
  wait_for_steps(tmp_path, 2, processes)
  processes[1].kill()
  died = time.monotonic()
  (code, text), _ = finish(processes)
  assert code == 1 and time.monotonic() - died < 60
  assert f"stopped: process 1 ({socket.gethostname()}) died." in text


@pytest.mark.slow
def test_two_processes_that_diverge_go_back_once_and_stop_together(start, tmp_path):
  huge = ("--config.optim.lr=1e30", "--config.optim.warmup=4", "--config.max_skipped=2")
  run = (*ENDLESS, *huge, "--config.save_every=1", f"--workdir={tmp_path}")
  for code, text in finish(start(2, *run)):
    assert code == 1 and text.count("Going back, once") == 1, text
    assert "stopped: loss or gradient was not finite for 2 steps in a row" in text


def test_a_process_that_never_comes_is_named(start, tmp_path, monkeypatch):
  monkeypatch.setenv("START_LIMIT", "3")
  monkeypatch.setenv("PROCESS_HOSTS", "here,elsewhere")
  present, absent = start(2, *RUN, f"--workdir={tmp_path / 'w'}")
  absent.kill()
  ((code, text),) = finish([present])
  assert code == 2 and "Traceback" not in text
  assert "error: of 2 processes, these did not come within 3 s: 1 (elsewhere)" in text
  assert not (tmp_path / "w").exists()
