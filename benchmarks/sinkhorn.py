"""Pairing of a pool: time and cost against SciPy and POT, and what it adds to training.

    python benchmarks/sinkhorn.py [--pools=512x64,8192x64,2048x4096] [--exact=4096] [--overlap=4]

A pool of n x d is drawn from 10 Gaussian classes in d dimensions; "blind" is one problem of size n,
"class-wise" ten of size n / 10. Cost and seconds (`ratio`) are relative to SciPy's assignment for
the same problem, which is the optimum; POT's is no permutation (`distinct`), and may cost less.
Blind, SciPy and POT are left out above --exact. The last table trains the digits config with random
pairs, with sOT solved ahead on its thread, and with sOT solved in between, turn by turn in the same
run.
"""

import argparse
import itertools
import time
from functools import partial

import jax
import numpy as np
import ot
import train_step
from scipy.optimize import linear_sum_assignment
from timing import in_turn, show

from configs import ism_digits
from ism_jax import method as ism
from ism_jax import pairing
from ism_jax.data.from_config import make_source
from ism_jax.path import draw_noise
from train_jax import mesh as mesh_lib

RNG = jax.random.key(0)
POOLS = "512x64,1024x64,2048x64,4096x64,8192x64,512x4096,2048x768,2048x4096"


def timed(job, repeats: int = 3, patience: float = 2.0) -> tuple[float, object]:
  """(median seconds, last result) of three calls, fewer once they took `patience` seconds."""
  seconds = []
  while len(seconds) < repeats and sum(seconds) < patience:
    start = time.perf_counter()
    result = job()
    seconds.append(time.perf_counter() - start)
  return float(np.median(seconds)), result


def solvers(n: int, d: int, exact: int) -> dict[str, float]:
  """Rows of the table of one pool: "seconds/name", "ratio/name", "cost/name", "distinct/name"."""
  rng = np.random.default_rng(0)
  label = rng.integers(0, 10, n).astype(np.int32)
  pixels = rng.normal(size=(10, d))[label] + 0.3 * rng.normal(size=(n, d))
  pixels = pixels.reshape(n, d, 1, 1).astype(np.float32)
  noise = np.arange(n, dtype=np.int32)
  z = np.asarray(draw_noise(RNG, noise, (d, 1, 1))).reshape(n, d)
  cost = np.asarray(pairing.squared_distances(pixels.reshape(n, d), z), np.float64)

  def optimum(groups):
    chosen = noise.copy()
    for rows in groups:
      chosen[rows] = rows[linear_sum_assignment(cost[np.ix_(rows, rows)])[1]]
    return chosen

  def sinkhorn_pot():
    shifted = cost - cost.min()  # the same plan, and in high dimensions no kernel of zeros
    plan = ot.sinkhorn(np.full(n, 1 / n), np.full(n, 1 / n), shifted, 0.05 * cost.std())
    return np.argmax(plan, axis=1)  # the usual rounding, which is not a permutation

  def sot(condition):
    config = pairing.PairingConfig(pool=1, condition=condition)
    return partial(pairing.pair, config, RNG, pixels, label, noise, 10)

  by_class = [np.flatnonzero(label == c) for c in range(10)]
  jobs = {
    "blind": {"SciPy": partial(optimum, [noise]), "sOT": sot("none"), "POT": sinkhorn_pot},
    "class-wise": {"SciPy": partial(optimum, by_class), "sOT": sot("class")},
  }
  rows = {}
  for kind, solve in jobs.items():
    if kind == "blind" and n > exact:
      solve = {"sOT": solve["sOT"]}
    solve["sOT"]()  # compiles
    found = {name: timed(job) for name, job in solve.items()}
    for name, (seconds, chosen) in found.items():
      rows[f"seconds/{name}, {kind}"] = seconds
      rows[f"distinct/{name}, {kind}"] = len(np.unique(chosen)) / n
      if "SciPy" in found:
        first, best = found["SciPy"]
        rows[f"ratio/{name}, {kind}"] = seconds / first
        rows[f"cost/{name}, {kind}"] = cost[noise, chosen].sum() / cost[noise, best].sum()
  return rows


def overlap(pools: int) -> dict[str, float]:
  """Milliseconds a step of the digits config by how its pairs are made, over `pools` pools."""
  full, random = ism_digits.get_config(), ism_digits.get_config()
  random.pairing.pool = 0
  step = train_step.Step(full)
  mesh = mesh_lib.make_mesh(1)
  steps, size = full.pairing.pool, full.pairing.pool * full.batch
  streams = {
    name: ism.make_method(config, mesh)[0].stream(0, 0)
    for name, config in (("random pairs", random), ("sOT, ahead", full))
  }
  (source, _), config = make_source(full), pairing.PairingConfig(**full.pairing)

  def between():
    rows = np.arange(size) % len(source.labels)
    images, labels = source.images(rows), source.labels[rows]
    pairing.pair(config, RNG, images, labels, np.arange(size, dtype=np.int32), 10)

  def train(stream):
    for batch in itertools.islice(stream, steps):
      step.state, _ = step.step(step.state, mesh_lib.to_global(batch, mesh))
    jax.block_until_ready(step.state)

  jobs = {name: lambda stream=stream: train(stream) for name, stream in streams.items()}
  jobs["sOT, in between"] = lambda: (between(), train(streams["random pairs"]))
  medians = {name: 1e3 * t / steps for name, t in in_turn(jobs, pools).items()}
  first = medians["random pairs"]
  return {f"ms a step/{name}": value for name, value in medians.items()} | {
    f"ratio/{name}": value / first for name, value in medians.items()
  }


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--pools", default=POOLS, help="NxD, ...")
  parser.add_argument("--exact", type=int, default=4096, help="largest n of SciPy and POT, blind")
  parser.add_argument("--overlap", type=int, default=4, help="pools to train on; 0: none")
  args = parser.parse_args()
  tables = {}
  for pool in args.pools.split(","):
    n, d = map(int, pool.split("x"))
    tables[f"{n} x {d}"] = solvers(n, d, args.exact)
  if args.overlap:
    tables["training"] = overlap(args.overlap)
  show("sinkhorn", tables)
