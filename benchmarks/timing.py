"""What the benchmarks share: settings, jobs timed in turn, a device's peak, tables kept."""

import ast
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_jax.metrics import table

ROOT = Path(__file__).resolve().parents[1]
KEPT = Path(os.environ.get("BENCHMARKS", ROOT / "runs" / "benchmarks"))  # what was measured here


def change(config, row: str) -> None:
  """Sets the keys of a row: "optim.name=muon ema.sample=0.99"."""
  for setting in row.split():
    key, _, value = setting.partition("=")
    *sections, name = key.split(".")
    section = config
    for each in sections:
      section = section[each]
    old = section[name]
    section[name] = value if isinstance(old, str) else type(old)(ast.literal_eval(value))


def in_turn(jobs: dict[str, Callable], rounds: int = 5) -> dict[str, float]:
  """name -> seconds, the median over rounds in each of which every job has its turn.

  So whatever else the machine does falls on all of them alike. A first round, which compiles, is
  not counted. What a job returns is waited for.
  """
  times: dict[str, list[float]] = {name: [] for name in jobs}
  for turn in range(rounds + 1):
    for name, job in jobs.items():
      start = time.perf_counter()
      jax.block_until_ready(job())
      if turn:
        times[name].append(time.perf_counter() - start)
  return {name: float(np.median(t)) for name, t in times.items()}


def matmul_peak(dtype: str = "float32", n: int = 0) -> float:
  """FLOP/s of the best of ten products of two n x n matrices, 2 n^3 each, on one device."""
  n = n or (2048 if jax.default_backend() == "cpu" else 8192)
  a = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype))
  product = jax.jit(lambda a: a @ a)
  jax.block_until_ready(product(a))
  seconds = []
  for _ in range(10):
    start = time.perf_counter()
    jax.block_until_ready(product(a))
    seconds.append(time.perf_counter() - start)
  return 2 * n**3 / min(seconds)


def keep(name: str, tables: dict[str, dict[str, float]]) -> Path:
  """Keeps tables of {"column/row": number} by title, with the device's name; returns the file.

  It is `runs/benchmarks/<name>.json`, or lies in the directory that the environment's BENCHMARKS
  names; from there `report.py` takes it.
  """
  path = KEPT / f"{name}.json"
  path.parent.mkdir(parents=True, exist_ok=True)
  device = jax.devices()[0].device_kind
  record = {"command": f"python benchmarks/{' '.join([f'{name}.py', *sys.argv[1:]])}"}
  record |= {"device": device, "jax": jax.__version__, "tables": tables}
  path.write_text(json.dumps(record, indent=1))
  return path


def show(name: str, tables: dict[str, dict[str, float]]) -> None:
  """Prints tables under their titles, and keeps them; see `keep`."""
  for title, numbers in tables.items():
    print(f"\n{title}\n{table(numbers)}", flush=True)
  print(f"\nnumbers: {keep(name, tables)}")
