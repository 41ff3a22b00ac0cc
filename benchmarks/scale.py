"""What a run needs of a TPU slice, from programs compiled for it: the table of docs/SCALE.md.

    python benchmarks/scale.py [--only="XL/2 v5e"] > table.md

Needs TPU's compiler (pip install 'jax[tpu]') and no TPU. A row is `main.py --mode=compile` with the
config, mesh and batch that it names. GiB are of one chip: `state` is parameters, moments, averages
and replay buffer, `peak` all that a step needs, `moved` what comes from other chips in a step,
`between` from other slices. `ms` is an estimate, not a measurement; docs/SCALE.md has its
assumptions.
"""

import argparse
import contextlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import main
from configs import ism_imagenet256, seqmatch_arithmetic, seqmatch_llama7b
from tools.plan import aot, cost

# (model, topology, fsdp, tensor, rows of the batch)
ROWS = (
  ("XL/2", "v5e:2x4", 8, 1, 128),
  ("XL/2", "v5e:4x4", 16, 1, 256),
  ("XL/2", "v5e:16x16", 8, 1, 2048),
  ("XL/2", "v5e:4x4*2", 16, 1, 512),
  ("XL/2", "v5p:2x2x2", 1, 1, 256),
  ("XL/2", "v6e:2x4", 8, 1, 256),
  ("7B", "v5p:2x2x2", 8, 1, 8),
  ("7B", "v5p:4x4x4", 64, 1, 64),
  ("7B", "v5p:4x4x4", 16, 4, 64),
  ("7B", "v6e:8x8", 64, 1, 64),
  ("7B", "v5e:16x16", 64, 1, 256),
)
COLUMNS = (
  "model, topology, mesh, batch, state, peak, of, fits, TFLOP, moved, between, ms, sampler, "
  "compiled in"
)


def get_config(model: str, rows: int):
  """The config of a model at `rows` rows a batch."""
  if model != "7B":
    config = ism_imagenet256.get_config(model)
    config.batch = rows
    return config
  config = seqmatch_arithmetic.get_config()
  sizes = seqmatch_llama7b.get_config().model
  config.model.update({name: sizes[name] for name in ("width", "depth", "heads", "hidden")})
  config.model.update(dtype="bfloat16", remat="block", unroll=False)
  config.data.sequences_per_row = 32  # questions in a row: about 1500 tokens
  config.batch = rows * config.data.sequences_per_row
  config.buffer.rollouts = config.buffer.draw = max(rows, 8)
  return config


def row(model: str, topology: str, fsdp: int, tensor: int, rows: int) -> list[str]:
  """The cells of one row."""
  config = get_config(model, rows)
  config.mesh.fsdp, config.mesh.tensor = fsdp, tensor
  with contextlib.redirect_stdout(sys.stderr):
    step, *sampler = main.compile_for(config, topology)
  chip = aot.CHIPS[topology.partition(":")[0]]
  compute, memory, network = step.estimate(chip)
  chips = len(aot.find_devices(topology))
  between = step.received.get(cost.BETWEEN, 0.0)
  return [
    model,
    topology,
    f"{chips // (fsdp * tensor)} x {fsdp} x {tensor}",
    str(rows),
    f"{sum(step.arguments.values()) / aot.GIB:.2f}",
    f"{step.peak / aot.GIB:.2f}",
    f"{chip.memory / aot.GIB:.0f}",
    "yes" if step.fits else "no",
    f"{step.flops / 1e12:.1f}",
    f"{(sum(step.received.values()) - between) / aot.GIB:.2f}" if step.fits else "",
    f"{between / aot.GIB:.2f}" if between else "",
    f"{1e3 * (max(compute, memory) + network):.0f}" if step.fits else "",
    f"{sampler[0].peak / aot.GIB:.2f}" if sampler else "",
    f"{step.seconds:.0f} s",
  ]


def run() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--only", default="", help="rows whose model or topology has this in it")
  only = parser.parse_args().only
  columns = COLUMNS.split(", ")
  print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
  for case in ROWS:
    if only in f"{case[0]} {case[1]}":
      print(f"| {' | '.join(row(*case))} |", flush=True)


if __name__ == "__main__":
  run()
