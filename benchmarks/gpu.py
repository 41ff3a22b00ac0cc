"""The train step on an accelerator in bfloat16: the largest batch that fits, and where time goes.

    python benchmarks/gpu.py [--config=ism_imagenet256:XL/2] [--attention=xla,cudnn]

For the flow and the full iSM objective, with each way to compute attention, the batch doubles until
it does not fit. `MFU` is of this device's own bfloat16 matrix product, FLOPs counted with every
extra forward pass. Then, at the largest batch: the profile of five steps (the operations that take
longest, and the share of time in which the device does nothing), what sOT adds, and how long
a checkpoint in the background stops training.
"""

import argparse
import collections
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from timing import in_turn, matmul_peak, show
from train_step import Step, get_config, model_flops

from configs import ism_digits
from ism_jax import pairing
from train_jax.checkpoint import Checkpoints


def make_config(text: str, objective: str, attention: str, batch: int):
  """The config of one row; `objective` is flow or ism."""
  config = get_config(text, batch)
  if objective == "flow":
    ism_digits.flow(config)
  config.model.attention = attention
  return config


def climb(make, first: int, most: int, steps: int, peak: float) -> tuple[dict[str, float], int]:
  """Rows by batch, doubled from `first` as far as memory allows; and the largest batch."""
  rows, batch, largest = {}, first, 0
  while batch <= most:
    config = make(batch)
    try:
      step = Step(config)
      seconds = in_turn({"step": lambda step=step: step.run(steps)}, 3)["step"] / steps
    except jax.errors.JaxRuntimeError as err:
      if "RESOURCE_EXHAUSTED" not in str(err):
        raise
      break
    flops = model_flops(config)
    name = f"batch {batch}"
    rows[f"ms/{name}"] = 1e3 * seconds
    rows[f"images a second/{name}"] = batch / seconds
    rows[f"TFLOP a second/{name}"] = flops / seconds / 1e12
    rows[f"MFU/{name}"] = flops / seconds / peak
    rows[f"GiB/{name}"] = step.mebibytes() / 1024
    largest, batch = batch, 2 * batch
    del step
  return rows, largest


def profile(step: Step, steps: int = 5, most: int = 12) -> dict[str, float]:
  """Share of the device's time by operation, and the share in which it does nothing."""
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
          busy[event.name.split(".")[0]] += event.duration_ns
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
  size, shape = pool * config.batch, (config.data.side, config.data.side, config.data.channels)
  images = np.random.default_rng(0).normal(size=(size, *shape)).astype(np.float32)
  noise, label = np.arange(size, dtype=np.int32), np.zeros(size, np.int32)
  settings = pairing.PairingConfig(pool=pool, condition="none")
  solve = lambda: pairing.pair(settings, jax.random.key(0), images, label, noise, 1)  # noqa: E731
  spent = in_turn({"pairing": solve}, 2)["pairing"]
  return {"seconds/pairing": spent, "of its steps/pairing": spent / (pool * seconds)}


def saving(step: Step) -> dict[str, float]:
  """How long a save stops training, and how long it takes until it is on disk."""
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


def main(args) -> None:
  peak, tables = matmul_peak("bfloat16"), {}
  print(f"{jax.devices()[0].device_kind}: {peak / 1e12:.1f} TFLOP/s in a bfloat16 matrix product")
  for attention in args.attention.split(","):
    for objective in ("flow", "ism"):
      make = lambda batch, o=objective, a=attention: make_config(args.config, o, a, batch)  # noqa: E731
      rows, largest = climb(make, args.batch, args.most, args.steps, peak)
      title = f"{args.config}, {objective}, attention by {attention}"
      tables[title] = rows
      print(f"{title}: batch {largest} is the largest that fits", flush=True)
  config = make(largest)
  step, seconds = Step(config), rows[f"ms/batch {largest}"] / 1e3
  tables["profile"] = profile(step)
  tables["sOT"] = transport(config, seconds, args.pool)
  tables["checkpoint"] = saving(step)
  show("gpu", tables)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", default="ism_imagenet256:XL/2")
  parser.add_argument("--attention", default="xla,cudnn")
  parser.add_argument("--batch", type=int, default=32, help="the first")
  parser.add_argument("--most", type=int, default=4096)
  parser.add_argument("--steps", type=int, default=10)
  parser.add_argument("--pool", type=int, default=32)
  main(parser.parse_args())
