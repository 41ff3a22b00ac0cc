"""What a train step costs, by objective: iSM and its controls side by side.

    python benchmarks/train_step.py [--configs=flow,shortcut,shortcut_fast_ema,ism] [--rounds=10]

All steps are compiled first and then timed in turn, round after round, so that whatever else the
machine does falls on all of them alike; the time is the median round. "expected" is what the
network's forward passes (counted as the loss is traced; a backward pass is two) predict for the
ratio to the first row; "bare" times the same work written as a bare jitted gradient step, with no
averages, clipping, guard or metrics.
"""

import argparse
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configs import ism_digits
from ism_jax import method as ism
from train_jax import mesh as mesh_lib
from train_jax import optim
from train_jax import state as state_lib
from train_jax.metrics import table
from train_jax.step import make_train_step


def network_rows(config, batch: int) -> int:
  """Rows through the network in one step, in forward passes: those of the loss + 2 a gradient."""
  rows = []
  make_network = ism.make_network

  def counted(config, facts):
    init, apply = make_network(config, facts)

    def count(params, x, *args):
      rows.append(len(x))
      return apply(params, x, *args)

    return init, count

  ism.make_network = counted
  try:
    method, _ = ism.make_method(config, mesh_lib.make_mesh(1))
  finally:
    ism.make_network = make_network
  params, _ = jax.eval_shape(method.init, jax.random.key(0))
  data = next(method.stream(0, 0))
  ema = dict.fromkeys(config.ema, params)
  jax.eval_shape(method.loss, params, ema, data, jax.random.key(0))
  return sum(rows) + 2 * batch


class Step:
  """One objective, compiled: `run(n)` takes n steps; `bare(n)` the same without the engine."""

  def __init__(self, config):
    mesh = mesh_lib.make_mesh(1)
    method, _ = ism.make_method(config, mesh)
    hyper = config.optim
    tx = optim.adamw(hyper.lr, hyper.b1, hyper.b2, hyper.weight_decay)
    decays = dict(config.ema)
    self.state = jax.jit(state_lib.create(method, tx, decays, 0))()
    self.batch = mesh_lib.to_global(next(method.stream(0, 0)), mesh)
    self.step = jax.jit(make_train_step(method, tx, decays, hyper.clip), donate_argnums=0)

    def bare(params, opt_state, ema, batch, key):
      grads, _ = jax.grad(method.loss, has_aux=True)(params, ema, batch, key)
      updates, opt_state = tx.update(grads, opt_state, params)
      return optax.apply_updates(params, updates), opt_state

    self.bare_step = jax.jit(bare, donate_argnums=(0, 1))
    copy = jax.tree.map(np.array, (self.state.params, self.state.ema))
    self.bare_state = (*jax.device_put((copy[0], tx.init(copy[0]))), jax.device_put(copy[1]))

  def run(self, n: int) -> None:
    for _ in range(n):
      self.state, _ = self.step(self.state, self.batch)
    jax.block_until_ready(self.state)

  def bare(self, n: int) -> None:
    params, opt_state, ema = self.bare_state
    for _ in range(n):
      params, opt_state = self.bare_step(params, opt_state, ema, self.batch, jax.random.key(0))
    self.bare_state = jax.block_until_ready((params, opt_state, ema))


def interleaved(jobs: dict, rounds: int, steps: int) -> dict[str, float]:
  """name -> milliseconds a step, the median over rounds in which every job has its turn."""
  times: dict[str, list[float]] = {name: [] for name in jobs}
  for job in jobs.values():
    job(2)  # compiles
  for _ in range(rounds):
    for name, job in jobs.items():
      start = time.perf_counter()
      job(steps)
      times[name].append((time.perf_counter() - start) / steps * 1e3)
  return {name: float(np.median(t)) for name, t in times.items()}


def measure(configs: dict, rounds: int = 10, steps: int = 20) -> dict[str, dict[str, float]]:
  """name -> its milliseconds a step, the ratio to the first, the expected ratio, and bare's."""
  made = {name: Step(config) for name, config in configs.items()}
  jobs = {name: step.run for name, step in made.items()}
  jobs |= {f"{name} bare": step.bare for name, step in made.items()}
  times = interleaved(jobs, rounds, steps)
  rows = {name: network_rows(config, config.batch) for name, config in configs.items()}
  first = next(iter(configs))
  return {
    name: {
      "ms": times[name],
      "ratio": times[name] / times[first],
      "expected": rows[name] / rows[first],
      "ms bare": times[f"{name} bare"],
      "engine": times[name] / times[f"{name} bare"],
    }
    for name in configs
  }


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--configs", default="flow,shortcut,shortcut_fast_ema,ism")
  parser.add_argument("--rounds", type=int, default=10)
  args = parser.parse_args()
  names = args.configs.split(",")
  chosen = {name: ism_digits.get_config("" if name == "ism" else name) for name in names}
  found = measure(chosen, args.rounds)
  print(table({f"{k}/{name}": v for name, row in found.items() for k, v in row.items()}))
