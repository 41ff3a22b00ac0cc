"""Images a second by number of steps, and what guidance costs.

    python benchmarks/sampling.py [--config=ism_digits] [--nfe=1,2,4,8,32] [--batch=256]

Guidance is an input of this network: a step is one forward pass. Classifier-free guidance, the
baseline, is two, here as one pass over twice the rows, with the class and without. The network is
untrained; its time does not depend on what it has learned.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from timing import in_turn, show
from train_step import get_config

from ism_jax import method as ism
from ism_jax.sample import classifier_free, integrate
from train_jax import mesh as mesh_lib


def main(args) -> None:
  config = get_config(args.config)
  _, metadata = ism.make_method(config, mesh_lib.make_mesh())
  init, apply = ism.make_network(config, metadata)
  params = jax.jit(init)(jax.random.key(0))
  x0 = jax.random.normal(jax.random.key(1), (args.batch, *metadata["shape"]))
  label = jnp.asarray(np.arange(args.batch) % len(metadata["names"]))
  w = jnp.ones(args.batch)
  networks = {
    "guidance as input": apply,
    "classifier-free": classifier_free(apply, len(metadata["names"])),
  }
  runs = {
    name: jax.jit(lambda p, n, fn=fn: integrate(fn, p, x0, label, w, n))
    for name, fn in networks.items()
  }
  steps = [int(n) for n in args.nfe.split(",")]
  jobs = {
    f"{name}, {n} steps": lambda run=run, n=n: run(params, n)
    for n in steps
    for name, run in runs.items()
  }
  seconds = in_turn(jobs, args.rounds)
  rows = {}
  for n in steps:
    for name in networks:
      key = f"{name}, {n} steps"
      rows[f"images a second/{key}"] = args.batch / seconds[key]
      rows[f"ratio/{key}"] = seconds[key] / seconds[f"guidance as input, {n} steps"]
  show("sampling", {f"{args.config}, batch {args.batch}": rows})


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", default="ism_digits")
  parser.add_argument("--nfe", default="1,2,4,8,32")
  parser.add_argument("--batch", type=int, default=256)
  parser.add_argument("--rounds", type=int, default=5)
  main(parser.parse_args())
