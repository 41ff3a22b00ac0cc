"""What a train step costs: time, FLOPs and memory, by objective, model and batch.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --configs="ism_digits:flow;ism_digits" --batch=64,256
    python benchmarks/train_step.py --configs="seqmatch_arithmetic:mle;seqmatch_arithmetic"
    python benchmarks/train_step.py --configs="ism_digits optim.name=adamw;ism_digits"
    python benchmarks/train_step.py --configs="ism_imagenet256:S/2" --batch=8

A config is a file of configs/ with its options and settings; the pairing is left out. All steps
are compiled first and then timed in turn, round after round, in turns of `--steps`.

  ratio     to the first config at the same batch
  counted   what their FLOPs predict for it
  loop      of the whole training loop, with its stream, metrics, bar and agreement (but no saving
            or evaluating), to the jitted step alone, called again and again on one batch
  engine    of the jitted step to a bare gradient step: no averages, clipping, guard
  GFLOP     of the matrix products in the loss and its gradient, 2 a multiply-add; not of rollouts,
            nor of what remat computes again
  MFU       of what this device does in one plain matrix product of the same type
  MiB       what the compiler allots: state, batch and temporary arrays
  call ms   until the call returns: what Python and the dispatch take
  input ms  until the next batch is on the device, with nothing else going on

The row `network` is the first config's network, forward and backward over a whole batch, alone.
"""

import argparse
import contextlib
import importlib
import itertools
import tempfile
import time
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import change, in_turn, matmul_peak, show

from main import make_optimizer, method_module
from tools.plan import cost
from train_jax import loop, optim
from train_jax import mesh as mesh_lib
from train_jax import state as state_lib
from train_jax.step import make_train_step

DEFAULT = (
  "ism_digits:flow;ism_digits:shortcut;ism_digits;seqmatch_arithmetic:mle;seqmatch_arithmetic"
)


def get_config(text: str, batch: int = 0):
  """`name:options KEY=VALUE ...` -> its config, on data that is here, without pairing."""
  text, _, row = text.partition(" ")
  name, _, options = text.partition(":")
  config = importlib.import_module(f"configs.{name}").get_config(options)
  change(config, row)
  config, _ = method_module(config).without_data(config)
  config.batch = batch or config.batch
  return config


class Step:
  """One objective: `run(n)` takes n steps; `run_bare(n)` the same without the engine.

  Attributes:
    lowered: the step as JAX hands it to XLA; `step` is compiled of it when first asked for.
    shapes: of the state.
    state: made when first asked for; each step replaces it.
    frozen: the method's, in a tuple; () if it has none.
    batch: lies on the device.
  """

  def __init__(self, config):
    self.config = config = config.copy_and_resolve_references()
    if config.method == "seqmatch":  # all of its terms, from the second step on
      config.loss.warmup = config.loss.anneal = 0
    self.mesh = mesh_lib.make_mesh(1, devices=jax.devices()[:1])
    self.method, metadata = method_module(config).make_method(config, self.mesh)
    self.network = method_module(config).make_network(config, metadata)
    self.tx = make_optimizer(config)
    init = state_lib.create(self.method, self.tx, dict(config.ema), 0)
    self.shapes = jax.eval_shape(init)
    shardings = mesh_lib.state_sharding(self.shapes, self.mesh)
    self.init = jax.jit(init, out_shardings=shardings)
    self.stream = self.method.stream(0, 0)
    self.batch = mesh_lib.to_global(next(self.stream), self.mesh)
    # As the loop makes it.
    clip, parts = config.optim.clip, config.optim.grad_accum_steps
    step = make_train_step(self.method, self.tx, dict(config.ema), clip, parts)
    step = mesh_lib.with_mesh(self.mesh, step)
    jitted = jax.jit(step, donate_argnums=mesh_lib.donated(0), out_shardings=(shardings, None))
    trees = self.shapes, *frozen_shapes(self.method)
    state, *frozen = (mesh_lib.abstract_state(tree, self.mesh) for tree in trees)
    self.lowered = jitted.lower(state, self.batch, *frozen)

  @cached_property
  def step(self):
    return self.lowered.compile()

  @cached_property
  def state(self):
    return self.init()

  @cached_property
  def frozen(self):
    shapes = frozen_shapes(self.method)
    return tuple(
      self.method.frozen.make(mesh_lib.state_sharding(tree, self.mesh)) for tree in shapes
    )

  def run(self, n: int):
    for _ in range(n):
      self.state, _ = self.step(self.state, self.batch, *self.frozen)
    return self.state

  @cached_property
  def run_bare(self):
    state, rest = jax.tree.map(jnp.copy, ((self.state.params, self.state.opt_state), self.state))

    @partial(jax.jit, donate_argnums=mesh_lib.donated(0, 1))
    def step(params, opt_state, rest, batch, *frozen):
      now, key = replace(rest, params=params), jax.random.key(0)
      aux_state, batch = self.method.augment(now, batch, key, *frozen)
      gradient = jax.grad(self.method.loss, has_aux=True)
      grads, _ = gradient(params, rest.ema, batch, jax.random.key(1), *frozen)
      updates, opt_state = self.tx.update(grads, opt_state, params)
      return optax.apply_updates(params, updates), opt_state, aux_state

    def run(n: int):
      nonlocal state, rest
      for _ in range(n):
        *state, aux_state = step(*state, rest, self.batch, *self.frozen)
        rest = replace(rest, step=rest.step + 1, aux_state=aux_state)
      return state

    return run

  def gibibytes(self) -> float:
    """What the compiler allots on the device: state, batch and temporary arrays."""
    found = self.step.memory_analysis()
    return (found.argument_size_in_bytes + found.temp_size_in_bytes) / 2**30

  def call(self, repeats: int = 20) -> float:
    """Seconds until a call of the step returns; the device is idle before each."""
    seconds = []
    for _ in range(repeats):
      start = time.perf_counter()
      self.state, _ = self.step(self.state, self.batch, *self.frozen)
      seconds.append(time.perf_counter() - start)
      jax.block_until_ready(self.state)
    return float(np.median(seconds))

  def input(self, repeats: int = 50) -> float:
    """Seconds until the next batch is on the device."""
    start = time.perf_counter()
    for _ in range(repeats):
      jax.block_until_ready(mesh_lib.to_global(next(self.stream), self.mesh))
    return (time.perf_counter() - start) / repeats


def frozen_shapes(method) -> tuple:
  """Those of `Method.frozen`, in a tuple; () if it has none."""
  return (method.frozen.shapes,) if method.frozen else ()


def in_loop(step: Step, rounds: int, steps: int) -> float:
  """What the training loop takes, of what `step.run` takes: the ratio of their medians.

  One run of the loop, in turn with the other: it changes inside the stream, where the loop asks for
  its next batch. Of each kind, the first of `rounds` + 1 turns of `steps` is not counted. The loop
  writes a line of metrics in each.
  """
  seconds: dict[str, list[float]] = {"loop": [], "step": []}

  @contextlib.contextmanager
  def turn(name: str):
    jax.block_until_ready(jax.live_arrays())  # the loop's own steps are not at hand
    start = time.perf_counter()
    yield
    jax.block_until_ready(jax.live_arrays())
    seconds[name].append(time.perf_counter() - start)

  def stream(seed: int, position: int):
    with contextlib.closing(step.method.stream(seed, position)) as batches:
      while True:
        with turn("loop"):
          yield from itertools.islice(batches, steps)
        with turn("step"):
          step.run(steps)

  total = steps * (rounds + 1) + 1  # the last one ends the last turn
  config = step.config.copy_and_resolve_references()
  config.update(steps=total, log_every=steps, eval_every=0, save_every=total, keep=1, seed=0)
  rate = optim.schedule(optim.OptimConfig(**config.optim), config.steps)
  method = step.method._replace(stream=stream, evaluate=lambda *_: ())
  with tempfile.TemporaryDirectory() as top:
    engine = step.tx, rate, dict(config.ema), loop.LoopConfig.of(config), step.mesh
    loop.train(method, *engine, Path(top), {})
  medians = {name: np.median(times[1:]) for name, times in seconds.items()}
  return float(medians["loop"] / medians["step"])


def gradient_flops(method, state, batch) -> float:
  """Of the loss and its gradient, counted as they are traced."""
  key, frozen = jax.random.key(0), frozen_shapes(method)
  _, batch = jax.eval_shape(method.augment, state, batch, key, *frozen)
  gradient = jax.grad(method.loss, has_aux=True)
  return cost.flops(jax.make_jaxpr(gradient)(state.params, state.ema, batch, key, *frozen).jaxpr)


def model_flops(config) -> float:
  """`gradient_flops` of a config without recomputation, attention counted however it is made."""
  config = config.copy_and_resolve_references()
  config.model.remat, config.model.unroll = "none", False  # fewer products to find
  if "attention" in config.model:
    config.model.attention = "xla"  # cuDNN's is no product that can be seen
  method, _ = method_module(config).make_method(config, mesh_lib.make_mesh(1))
  state = jax.eval_shape(state_lib.create(method, make_optimizer(config), dict(config.ema), 0))
  stream = method.stream(0, config.loss.get("warmup", 0))  # SequenceMatch's rows with noise
  with contextlib.closing(stream):
    return gradient_flops(method, state, next(stream))


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
  jobs |= {f"{name} bare": lambda step=step: step.run_bare(steps) for name, step in made.items()}
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
    rows[f"loop/{name}"] = in_loop(step, rounds, steps)
    rows[f"engine/{name}"] = seconds[name] / seconds[f"{name} bare"]
    rows[f"GFLOP/{name}"] = flops[name] / 1e9
    rows[f"MFU/{name}"] = flops[name] / each / peaks[configs[name].model.dtype]
    rows[f"MiB/{name}"] = step.gibibytes() * 1024
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
  parser.add_argument("--steps", type=int, default=20, help="in each turn of a round")
  args = parser.parse_args()
  tables = {}
  for batch in map(int, args.batch.split(",")):
    chosen = {text: get_config(text, batch) for text in args.configs.split(";")}
    tables[f"batch {batch or 'of the config'}"] = measure(chosen, args.rounds, args.steps)
  show("train_step", tables)
