"""A workdir belongs to one run at a time, until the run's process ends in whatever way."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from train_jax.errors import UserError
from train_jax.multihost import lock

HOLD = "import sys; from pathlib import Path; from train_jax.multihost import lock\n"
HOLD += "with lock.held(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def holder(tmp_path):
  """Another process, which holds `tmp_path`."""
  process = subprocess.Popen(
    [sys.executable, "-c", HOLD, tmp_path],
    cwd=Path(__file__).parents[3],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
  )
  assert process.stdout.readline() == b"held\n"
  yield process
  process.kill()
  process.communicate()


def test_second_run_is_refused_and_changes_nothing_until_the_first_is_dead(
  tmp_path, train, holder, monkeypatch
):
  metrics = tmp_path / "metrics.jsonl"
  metrics.write_text('{"step": 900}\n')
  words = rf"--workdir={tmp_path} is in use by process {holder.pid} on .*; wait"
  for start in (lambda: lock.check_free(tmp_path), lambda: train(tmp_path, steps=1)):
    with pytest.raises(UserError, match=words):
      start()
  assert metrics.read_text() == '{"step": 900}\n' and not (tmp_path / "checkpoints").exists()
  with monkeypatch.context() as patch:  # the other processes of the run that holds it
    patch.setattr(jax, "process_index", lambda: 1)
    with lock.held(tmp_path):
      pass
  holder.kill()
  holder.wait()
  lock.check_free(tmp_path)
  assert train(tmp_path, steps=1) and train(tmp_path, steps=2)
  assert f"process {os.getpid()} on " in (tmp_path / lock.NAME).read_text()


def test_a_free_directory_is_not_made_and_a_disk_without_locks_is_told(
  tmp_path, monkeypatch, caplog
):
  lock.check_free(tmp_path / "new")
  assert not (tmp_path / "new").exists()

  def none(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(fcntl, "flock", none)
  with lock.held(tmp_path / "new"):
    assert "no lock (No locks available)" in caplog.text
