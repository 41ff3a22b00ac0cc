"""From the command to the first step: with nothing compiled before, and again.

    python benchmarks/start.py [--configs="ism_digits;seqmatch_arithmetic"]

Each is `main.py` as a new process, with an empty compilation cache and then with the one it left,
until the first step's line is in metrics.jsonl. `import s` is Python and the imports alone.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from timing import ROOT, show


def first_step(config: str, top: str) -> float:
  """Seconds until the first step is in metrics.jsonl; then the run is ended."""
  workdir = tempfile.mkdtemp(dir=top)
  command = [sys.executable, "main.py", f"--config=configs/{config.replace(':', '.py:', 1)}"]
  if ":" not in config:
    command[-1] += ".py"
  command += [f"--workdir={workdir}", "--config.log_every=1", "--config.eval_every=0"]
  environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{top}/cache"}
  metrics, start = Path(workdir) / "metrics.jsonl", time.perf_counter()
  with open(f"{workdir}/log", "w") as log:
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
  try:
    while not (metrics.exists() and metrics.read_text()):
      if process.poll() is not None:
        sys.exit(f"{' '.join(command)} ended before its first step:\n{log_text(workdir)}")
      time.sleep(0.02)
    return time.perf_counter() - start
  finally:
    process.kill()
    process.wait()


def log_text(workdir: str) -> str:
  return (Path(workdir) / "log").read_text()


def main(args) -> None:
  start = time.perf_counter()
  subprocess.run([sys.executable, "-c", "import main"], cwd=ROOT, check=True)
  rows = {"seconds/imports": time.perf_counter() - start}
  for config in args.configs.split(";"):
    with tempfile.TemporaryDirectory() as top:
      rows[f"seconds/{config}, cold"] = first_step(config, top)
      rows[f"seconds/{config}, compiled before"] = first_step(config, top)
  show("start", {"until the first step": rows})


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--configs", default="ism_digits;seqmatch_arithmetic")
  main(parser.parse_args())
