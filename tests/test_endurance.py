"""The short form of the fault table: kills, damage to the disk and a stop, on the real program."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_short_fault_table_is_at_full_marks():
  command = [sys.executable, "benchmarks/endurance.py", "--short"]
  done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=600)
  rows = [line.split(" | ") for line in done.stdout.splitlines()[2:]]
  assert len(rows) == 3 and done.returncode == 0, done.stdout + done.stderr
  assert all(len(set(row[2].split("/"))) == 1 for row in rows), done.stdout
