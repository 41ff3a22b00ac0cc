"""What a train step costs: time, FLOPs and memory, by objective, model and batch.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --configs="ism_digits:flow;ism_digits" --batch=64,256
    python benchmarks/train_step.py --configs="seqmatch_arithmetic:mle;seqmatch_arithmetic"
    python benchmarks/train_step.py --configs="ism_imagenet256:S/2" --batch=8

A config is a file of configs/ with its options; the pairing is left out. All steps are compiled
first and then timed in turn, round after round.

  ratio     to the first config at the same batch
  counted   what their FLOPs predict for it
  engine    against the same work as a bare jitted gradient step: no averages, clipping, guard
  GFLOP     of the matrix products in the loss and its gradient, 2 a multiply-add; not of rollouts,
            nor of what remat computes again
  MFU       of what this device does in one plain matrix product of the same type
  MiB       what the compiler allots: state, batch and temporary arrays
  call ms   until the call returns: what Python and the dispatch take
  input ms  until the next batch is on the device, with nothing else going on

The row `network` is the first config's network, forward and backward over a whole batch, alone.
"""

import argparse
import importlib
import time
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import in_turn, matmul_peak, show

from main import make_optimizer, method_module
from train_jax import cost
from train_jax import mesh as mesh_lib
from train_jax import state as state_lib
from train_jax.step import make_train_step

DEFAULT = (
  "ism_digits:flow;ism_digits:shortcut;ism_digits;seqmatch_arithmetic:mle;seqmatch_arithmetic"
)


def get_config(text: str, batch: int = 0):
  """`name:options` -> its config, on data that is here, without pairing."""
  name, _, options = text.partition(":")
  config = importlib.import_module(f"configs.{name}").get_config(options)
  config, _ = method_module(config).without_data(config)
  config.batch = batch or config.batch
  return config


class Step:
  """One objective: `run(n)` takes n steps; `bare(n)` the same without the engine."""

  def __init__(self, config):
    self.mesh = mesh_lib.make_mesh(1, devices=jax.devices()[:1])
    self.method, facts = method_module(config).make_method(config, self.mesh)
    self.network = method_module(config).make_network(config, facts)
    tx, decays = make_optimizer(config), dict(config.ema)
    # SequenceMatch with all of its terms.
    position = config.loss.warmup + config.loss.anneal if config.method == "seqmatch" else 0
    state = jax.jit(state_lib.create(self.method, tx, decays, 0))()
    self.state = replace(state, step=state.step + position)
    self.stream = self.method.stream(0, position)
    self.batch = mesh_lib.to_global(next(self.stream), self.mesh)
    bare_state = jax.tree.map(jnp.copy, (self.state.params, self.state.opt_state))
    rest = jax.tree.map(jnp.copy, self.state)
    step = jax.jit(make_train_step(self.method, tx, decays, config.optim.clip), donate_argnums=0)
    self.step = step.lower(self.state, self.batch).compile()

    def bare(params, opt_state, state, batch):
      state = replace(state, params=params)
      extra, batch = self.method.augment(state, batch, jax.random.key(0))
      grads, _ = jax.grad(self.method.loss, has_aux=True)(
        params, state.ema, batch, jax.random.key(1)
      )
      updates, opt_state = tx.update(grads, opt_state, params)
      return optax.apply_updates(params, updates), opt_state, extra

    bare_step = jax.jit(bare, donate_argnums=(0, 1))

    def run_bare(n: int):
      nonlocal bare_state, rest
      for _ in range(n):
        *bare_state, extra = bare_step(*bare_state, rest, self.batch)
        rest = replace(rest, step=rest.step + 1, extra=extra)
      return bare_state

    self.bare = run_bare

  def run(self, n: int):
    for _ in range(n):
      self.state, _ = self.step(self.state, self.batch)
    return self.state

  def mebibytes(self) -> float:
    found = self.step.memory_analysis()
    return (found.argument_size_in_bytes + found.temp_size_in_bytes) / 2**20

  def call(self, repeats: int = 20) -> float:
    """Seconds until a call of the step returns; the device is idle before each."""
    seconds = []
    for _ in range(repeats):
      start = time.perf_counter()
      self.state, _ = self.step(self.state, self.batch)
      seconds.append(time.perf_counter() - start)
      jax.block_until_ready(self.state)
    return float(np.median(seconds))

  def input(self, repeats: int = 50) -> float:
    """Seconds until the next batch is on the device."""
    start = time.perf_counter()
    for _ in range(repeats):
      jax.block_until_ready(mesh_lib.to_global(next(self.stream), self.mesh))
    return (time.perf_counter() - start) / repeats


def model_flops(config) -> float:
  """Of the loss and its gradient, counted as they are traced, without remat's recomputation."""
  config = config.copy_and_resolve_references()
  config.model.remat = False
  method, _ = method_module(config).make_method(config, mesh_lib.make_mesh(1))
  tx, decays, key = make_optimizer(config), dict(config.ema), jax.random.key(0)
  state = jax.eval_shape(state_lib.create(method, tx, decays, 0))
  stream = method.stream(0, config.loss.get("warmup", 0))  # SequenceMatch's rows with noise
  _, batch = jax.eval_shape(method.augment, state, next(stream), key)
  stream.close()
  gradient = jax.grad(method.loss, has_aux=True)
  return cost.flops(jax.make_jaxpr(gradient)(state.params, state.ema, batch, key).jaxpr)


def network_alone(config, step: Step):
  """A job: the network forward and backward over a whole batch of noise; iSM's only."""
  apply, images = step.network[1], jnp.ones_like(step.batch["image"])
  flat = jnp.zeros(config.batch)

  def value(params):
    return jnp.mean(apply(params, images, flat, flat, step.batch["label"], flat) ** 2)

  gradient = jax.jit(jax.grad(value))
  params = jax.tree.map(jnp.copy, step.state.params)
  return lambda: gradient(params)


def measure(configs: dict, rounds: int = 10, steps: int = 20) -> dict[str, float]:
  """{"ms/name": ...} of configs by name, in the columns of the table; ratios are to the first."""
  made = {name: Step(config) for name, config in configs.items()}
  jobs = {name: lambda step=step: step.run(steps) for name, step in made.items()}
  jobs |= {f"{name} bare": lambda step=step: step.bare(steps) for name, step in made.items()}
  first, config = next(iter(configs.items()))
  if config.method == "ism":
    jobs["network"] = network_alone(config, made[first])
  seconds = in_turn(jobs, rounds)
  flops = {name: model_flops(config) for name, config in configs.items()}
  peaks = {config.model.dtype: matmul_peak(config.model.dtype) for config in configs.values()}
  rows = {}
  for name, step in made.items():
    each = seconds[name] / steps
    rows[f"ms/{name}"] = each * 1e3
    rows[f"ratio/{name}"] = seconds[name] / seconds[first]
    rows[f"counted/{name}"] = flops[name] / flops[first]
    rows[f"engine/{name}"] = seconds[name] / seconds[f"{name} bare"]
    rows[f"GFLOP/{name}"] = flops[name] / 1e9
    rows[f"MFU/{name}"] = flops[name] / each / peaks[configs[name].model.dtype]
    rows[f"MiB/{name}"] = step.mebibytes()
    rows[f"call ms/{name}"] = step.call() * 1e3
    rows[f"input ms/{name}"] = step.input() * 1e3
  if "network" in seconds:
    rows["ms/network"] = seconds["network"] * 1e3
    rows["ratio/network"] = seconds["network"] * steps / seconds[first]
  return rows


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--configs", default=DEFAULT, help="NAME[:OPTIONS], separated by ;")
  parser.add_argument("--batch", default="0", help="sizes; 0: that of the config")
  parser.add_argument("--rounds", type=int, default=10)
  args = parser.parse_args()
  tables = {}
  for batch in map(int, args.batch.split(",")):
    chosen = {text: get_config(text, batch) for text in args.configs.split(";")}
    tables[f"batch {batch or 'of the config'}"] = measure(chosen, args.rounds)
  show("train_step", tables)
