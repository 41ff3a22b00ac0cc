"""The train step on an accelerator in bfloat16: what is fastest, what fits, and where time goes.

    python benchmarks/gpu.py [--config=ism_imagenet256:XL/2]
    python benchmarks/gpu.py --rows="flow 128 cudnn unrolled none;ism 256 xla scanned block"
    python benchmarks/gpu.py --config=seqmatch_gpt2:gpu --rows="seqmatch 8 cudnn unrolled none"

A row is an objective (flow or ism; mle or seqmatch), a batch, and what the network is made with:
how attention is computed (model.attention), whether the blocks are scanned over or written out
(model.unroll), and what the backward pass computes again (model.remat). All are compiled first,
side by side; what does not fit by the compiler's count is not timed.

  MFU    of this device's own bfloat16 matrix product; FLOPs are counted with every extra forward
         pass, but not those of remat. `TFLOP a second` compares with a data sheet.
  GiB    what the compiler allots: state, batch and temporary arrays

The rollouts of SequenceMatch are not in these steps: there is one, before them.

Then, of the fastest row of the whole method: the profile of three steps (the kernels that take
longest, and the share of time in which the device does nothing), the training loop, what sOT adds,
how long a checkpoint in the background stops training, and how far cuDNN's attention is from XLA's.
"""

import argparse
import collections
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from timing import in_turn, keep, matmul_peak, show
from train_step import Step, get_config, in_loop, model_flops

from configs import common
from ism_jax import pairing
from train_jax.checkpointing.checkpoint import Checkpoints
from train_jax.layers import ATTENTION, attend
from train_jax.metrics import table

ROWS = ";".join(
  f"{objective} {batch} {variant}"
  for objective in ("flow", "ism")
  for batch, variant in (
    (128, "xla scanned block"),
    (128, "cudnn scanned block"),
    (128, "cudnn scanned none"),
    (128, "cudnn unrolled none"),
    (256, "cudnn unrolled none"),
    (256, "cudnn unrolled products"),
    (512, "cudnn unrolled products"),
  )
)


# Objectives that are a part of the method.
BASELINES = {"flow": common.flow, "mle": common.mle}


def make_config(text: str, row: str):
  """The config of one row."""
  objective, batch, attention, blocks, remat = row.split()
  config = get_config(text, int(batch))
  if objective in BASELINES:
    BASELINES[objective](config)
  if config.method == "seqmatch":
    config.buffer.refresh = 10**9  # rollouts in the first step only
  config.model.attention, config.model.remat = attention, remat
  config.model.unroll = {"scanned": False, "unrolled": True}[blocks]
  return config


def compiled(configs: dict, workers: int) -> dict[str, Step]:
  """Their steps; XLA compiles `workers` at a time."""
  steps = {name: Step(config) for name, config in configs.items()}

  def work(name: str):
    start = time.perf_counter()
    steps[name].step  # noqa: B018
    print(f"compiled in {time.perf_counter() - start:.0f} s: {name}", flush=True)

  with ThreadPoolExecutor(workers) as pool:
    list(pool.map(work, steps))
  return steps


def measure(steps: dict[str, Step], turn: int, room: float, peak: float) -> dict[str, float]:
  """Rows of the table. The steps share one state, which fits only once."""
  rows, state = {}, None
  for name, step in steps.items():
    rows[f"GiB/{name}"] = step.gibibytes()
    if step.gibibytes() > room:
      continue
    if jax.tree.structure(state) != jax.tree.structure(step.shapes):  # of another objective
      state = None  # its memory is free before there is another
      state = step.init()
    step.state = state
    seconds = in_turn({"step": lambda step=step: step.run(turn)}, 2)["step"] / turn
    state = step.state
    del step.state
    flops, batch = model_flops(step.config), step.config.batch
    rows[f"ms/{name}"] = 1e3 * seconds
    rows[f"rows a second/{name}"] = batch / seconds
    rows[f"TFLOP a second/{name}"] = flops / seconds / 1e12
    rows[f"MFU/{name}"] = flops / seconds / peak
    print(f"{name}: {1e3 * seconds:.1f} ms, {batch / seconds:.0f} rows a second", flush=True)
  return rows


def profile(step: Step, steps: int = 3, most: int = 15) -> dict[str, float]:
  """Share of the device's time by kernel, and the share in which it does nothing."""
  with tempfile.TemporaryDirectory() as top:
    with jax.profiler.trace(top):
      jax.block_until_ready(step.run(steps))
    file = next(Path(top).rglob("*.xplane.pb"))
    planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
  spans, busy = [], collections.Counter()
  for plane in planes:
    if "/device:" not in plane.name:
      continue
    for line in plane.lines:
      if line.name.startswith("Stream") or line.name == "XLA Ops":
        for event in line.events:
          spans.append((event.start_ns, event.start_ns + event.duration_ns))
          busy[event.name.split("(")[0].split(".")[0][:60]] += event.duration_ns
  if not spans:
    return {}
  total = max(end for _, end in spans) - min(start for start, _ in spans)
  idle, reached = 0.0, min(spans)[0]
  for start, end in sorted(spans):
    idle += max(start - reached, 0)
    reached = max(reached, end)
  rows = {f"share of time/{name}": ns / total for name, ns in busy.most_common(most)}
  return rows | {"share of time/nothing": idle / total}


def transport(config, seconds: float, pool: int) -> dict[str, float]:
  """Seconds that pairing a pool takes alone, against those of the steps that use it up."""
  size, shape = (
    pool * config.batch,
    (config.data.image_size, config.data.image_size, config.data.channels),
  )
  images = np.random.default_rng(0).normal(size=(size, *shape)).astype(np.float32)
  noise, rows = np.arange(size, dtype=np.int32), {}
  label = noise % 1000
  for condition in ("class", "none"):
    settings = pairing.PairingConfig(pool=pool, condition=condition)
    solve = lambda s=settings: pairing.pair(s, jax.random.key(0), images, label, noise, 1000)  # noqa: E731
    spent = in_turn({"pairing": solve}, 2)["pairing"]
    rows |= {f"seconds/{condition}": spent, f"of its steps/{condition}": spent / (pool * seconds)}
  return rows


def saving(step: Step) -> dict[str, float]:
  """How long a save stops training, and how long until it is on disk and has been read back."""
  with tempfile.TemporaryDirectory() as top:
    checkpoints = Checkpoints(top, keep=1)
    rows = {}
    for turn in ("the first", "another"):
      step.run(1)
      jax.block_until_ready(step.state)
      start = time.perf_counter()
      checkpoints.save(step.state, {"step": int(step.state.step)})
      rows[f"seconds stopped/{turn}"] = time.perf_counter() - start
      checkpoints.wait()
      rows[f"until on disk/{turn}"] = time.perf_counter() - start
    checkpoints.close()
  rows["GiB/another"] = sum(a.nbytes for a in jax.tree.leaves(step.state)) / 2**30
  return rows


def attention(config) -> dict[str, float]:
  """XLA's and cuDNN's with their gradients, at the network's sizes: time, and errors.

  In bfloat16; errors are relative, of the norm, to XLA's of the same numbers in float32. Where a
  text is read, half of what is behind a token is not seen, as erased tokens are not.
  """
  model, rows = config.model, {}
  length = config.data.get("context", 0) or (config.data.image_size // model.patch) ** 2
  shape = (8, length, model.heads, model.width // model.heads)
  *arrays, weight = (jax.random.normal(jax.random.key(i), shape, "bfloat16") for i in range(4))
  mask = None
  if config.method == "seqmatch":
    index = np.arange(length)
    end = np.where(index % 2, length, index + length // 2)
    mask = jnp.asarray((index <= index[:, None]) & (index[:, None] < end))[None, None]
    mask = jnp.broadcast_to(mask, (8, 1, length, length))

  def gradient(kind: str):
    def value(arrays):
      found = attend(*arrays, kind, mask)
      return jnp.sum(found.astype("float32") * weight), found

    return jax.jit(jax.grad(value, has_aux=True))

  exact = gradient("xla")([a.astype("float32") for a in arrays])
  for kind in ATTENTION:
    run = gradient(kind)
    found = jax.tree.map(relative_error, run(arrays), exact)
    rows[f"ms/{kind}"] = 1e3 * in_turn({"it": lambda run=run: run(arrays)}, 10)["it"]
    rows[f"error/{kind}"] = found[1]
    rows[f"of the gradient/{kind}"] = max(found[0])
  return rows


def relative_error(found, exact) -> float:
  """The norm of the difference, of that of `exact`."""
  found, exact = (np.asarray(a, np.float64) for a in (found, exact))
  return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def main(args) -> None:
  with tempfile.TemporaryDirectory() as cache:  # of programs: the loop compiles its step again
    jax.config.update("jax_compilation_cache_dir", cache)
    peak, tables = matmul_peak("bfloat16"), {}
    print(f"{jax.devices()[0].device_kind}: {peak / 1e12:.1f} TFLOP/s in a bfloat16 matrix product")
    configs = {row: make_config(args.config, row) for row in args.rows.split(";")}
    steps = compiled(configs, args.workers)
    room = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", np.inf) / 2**30
    rows = tables[args.config] = measure(steps, args.steps, room, peak)
    show("gpu", tables)
    timed = [row for row in configs if f"ms/{row}" in rows]
    if not timed:
      sys.exit(f"no row fits into {room:.0f} GiB; give --rows smaller batches.")
    best = max(timed, key=lambda row: (row.split()[0] not in BASELINES, rows[f"MFU/{row}"]))
    step, seconds = steps[best], rows[f"ms/{best}"] / 1e3
    parts = {
      f"profile of {best}": lambda: profile(step),
      "sOT": lambda: transport(configs[best], seconds, args.pool),
      "loop": lambda: {"of the step alone/loop": in_loop(step, 2, args.steps)},
      "checkpoint": lambda: saving(step),
      "attention": lambda: attention(configs[best]),
    }
    if configs[best].method != "ism":
      del parts["sOT"]
    for title, part in parts.items():
      tables[title] = part()
      print(f"\n{title}\n{table(tables[title])}", flush=True)
      keep("gpu", tables)  # a part that takes too long loses none before it


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", default="ism_imagenet256:XL/2")
  parser.add_argument("--rows", default=ROWS, help="separated by ;")
  parser.add_argument("--steps", type=int, default=8, help="in a turn")
  parser.add_argument("--pool", type=int, default=32, help="batches that are paired together")
  parser.add_argument("--workers", type=int, default=min(8, os.cpu_count()), help="that compile")
  main(parser.parse_args())
