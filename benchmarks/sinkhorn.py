"""Pairing of a pool: time and cost against SciPy and POT, and what it adds to training.

    python benchmarks/sinkhorn.py [--n=512,1024,2048] [--d=64] [--overlap=4]

The pool is drawn from 10 Gaussian classes in d dimensions; "blind" is one problem of size n,
"class-wise" ten of size n / 10. Costs are relative to SciPy's optimum of the same problem. The last
table trains the digits config with random pairs, with sOT solved ahead on its thread, and with sOT
solved in between, turn by turn in the same run.
"""

import argparse
import itertools
import time

import jax
import numpy as np
import ot
import train_step
from scipy.optimize import linear_sum_assignment
from timing import in_turn, show

from configs import ism_digits
from ism_jax import method as ism
from ism_jax import pairing
from ism_jax.path import draw_noise
from train_jax import mesh as mesh_lib

RNG = jax.random.key(0)


def timed(job, repeats: int = 3) -> tuple[float, object]:
  """(median seconds, last result) after one call that compiles."""
  job()
  seconds = []
  for _ in range(repeats):
    start = time.perf_counter()
    result = job()
    seconds.append(time.perf_counter() - start)
  return float(np.median(seconds)), result


def solvers(n: int, d: int) -> dict[str, float]:
  """Rows of the first table for one pool: "seconds/name", "cost/name", "permutation/name"."""
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
    plan = ot.sinkhorn(np.full(n, 1 / n), np.full(n, 1 / n), cost, 0.05 * cost.std())
    return np.argmax(plan, axis=1)  # the usual rounding, which is not a permutation

  blind, by_class = [noise], [np.flatnonzero(label == c) for c in range(10)]
  jobs = {"POT sinkhorn, argmax": (sinkhorn_pot, blind)}
  for condition, groups in (("none", blind), ("class", by_class)):
    name = {"none": "blind", "class": "class-wise"}[condition]
    config = pairing.PairingConfig(pool=1, condition=condition)
    job = lambda config=config: pairing.pair(config, RNG, pixels, label, noise, 10)  # noqa: E731
    jobs[f"sOT, {name}"] = job, groups
    jobs[f"SciPy, {name}"] = (lambda groups=groups: optimum(groups)), groups
  rows = {}
  for name, (job, groups) in jobs.items():
    seconds, chosen = timed(job)
    best = cost[noise, optimum(groups)].mean()
    rows[f"seconds/{name}"] = seconds
    rows[f"cost/{name}"] = cost[noise, chosen].mean() / best
    rows[f"distinct/{name}"] = len(np.unique(chosen)) / n
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
  source, config = ism.make_source(full), pairing.PairingConfig(**full.pairing)

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
  parser.add_argument("--n", default="512,1024,2048")
  parser.add_argument("--d", default="64")
  parser.add_argument("--overlap", type=int, default=4, help="pools to train on; 0: none")
  args = parser.parse_args()
  tables = {}
  for n, d in itertools.product(args.n.split(","), args.d.split(",")):
    tables[f"a pool of {n} in {d} dimensions"] = solvers(int(n), int(d))
  if args.overlap:
    tables["training"] = overlap(args.overlap)
  show("sinkhorn", tables)
