"""The benchmark for accelerators runs where there is none, at a small size."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_accelerator_benchmark_measures_a_small_step():
  command = [sys.executable, "benchmarks/gpu.py", "--config=ism_imagenet256:debug"]
  command += ["--attention=xla", "--batch=16", "--most=16", "--steps=1", "--pool=2"]
  done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=900)
  assert done.returncode == 0, done.stderr
  for objective in ("flow", "ism"):
    assert f"{objective}, attention by xla: batch 16 is the largest that fits" in done.stdout
  assert {"MFU", "pairing", "stopped"} <= set(done.stdout.split())
