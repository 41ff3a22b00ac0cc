"""How time grows with size: the exponent p of time ~ size^p, and that of the counted FLOPs.

    python benchmarks/growth.py [--only="pool;generation"] [--points=5] [--rounds=3]

Each line of the first table is a straight line fitted to log time against log size, with the
standard error of its slope; `last two` is the slope between the two largest sizes, where the line
bends. `counted` are the same of the FLOPs in matrix products. A table for each follows, and
runs/benchmarks/growth.png has the curves.

One size changes at a time. iSM: the digits config with its blocks scanned, batch 64, depth 4, 16
tokens (8 x 8 pixels, patch 2); tokens at batch 8. SequenceMatch: the text config with its blocks
scanned, rows of 128 tokens, batch 8, without the rollouts, which are generation; context at batch
4. The pairing: a pool in 64 dimensions, blind or within 10 classes. Generation: tokens, with a
cache.
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from decode import PROMPT, VOCAB, random_actions
from scipy.stats import linregress
from timing import KEPT, ROOT, in_turn, show
from train_step import Step, get_config, gradient_flops

from configs import ism_digits
from ism_jax import method as ism_method
from ism_jax import pairing
from seqmatch_jax.rollout import RolloutConfig, make_rollout
from seqmatch_jax.tokens import SPECIAL
from seqmatch_jax.transformer import TransformerConfig, make_network
from tools.plan import cost


class Case(NamedTuple):
  """One size of something: `run()` does it `times` times; FLOPs of one, 0 if they are not known."""

  run: Callable
  times: int = 1
  flops: float = 0.0


def train(config) -> Case:
  """Two steps of a config."""
  step = Step(config)
  return Case(lambda: step.run(2), 2, gradient_flops(step.method, step.state, step.batch))


def ism(batch: int = 64, depth: int = 4, image_size: int = 8) -> Case:
  config = ism_digits.get_config()
  config.data.source, config.data.image_size, config.batch = "folder", image_size, batch
  config.model.depth, config.model.unroll = depth, False
  return train(ism_method.without_data(config)[0])


def seqmatch(batch: int = 8, context: int = 128) -> Case:
  config = get_config("seqmatch_text", batch)
  config.data.context, config.eval.max_backspaces = context, context // 8
  config.model.unroll = False
  config.buffer.update(refresh=10**9, size=batch, rollouts=batch, draw=batch // 4)
  return train(config)


def pair(n: int, condition: str, d: int = 64) -> Case:
  """A pool of n images of 10 Gaussian classes and as many noise samples."""
  rng = np.random.default_rng(0)
  label = (np.arange(n) % 10).astype(np.int32)
  pixels = rng.normal(size=(10, d))[label] + 0.3 * rng.normal(size=(n, d))
  pixels = pixels.reshape(n, d, 1, 1).astype(np.float32)
  config, noise = pairing.PairingConfig(1, condition), np.arange(n, dtype=np.int32)
  return Case(lambda: pairing.pair(config, jax.random.key(0), pixels, label, noise, 10))


def generate(length: int, batch: int = 16) -> Case:
  """Texts of `length` tokens, all rows to their end."""
  sizes = {"width": 128, "depth": 2, "heads": 4, "hidden": 384}
  network = make_network(TransformerConfig(VOCAB, **sizes, unroll=True))
  params, rng, count = network.init(jax.random.key(0)), np.random.default_rng(0), length - PROMPT
  rollout = make_rollout(network, RolloutConfig(length, count, 8))
  prompt = rng.integers(SPECIAL, VOCAB, (batch, PROMPT)).astype(np.int32)
  row, begin = np.arange(batch), np.full(batch, PROMPT, np.int32)
  forced, key = random_actions(rng, batch, count, 0.0), jax.random.key(0)
  cache = network.read(params, prompt, length)
  one = params, cache, prompt[:, -1], begin
  flops = count * cost.flops(jax.make_jaxpr(network.extend)(*one).jaxpr)
  return Case(lambda: rollout(params, prompt, begin, key, row, forced=forced), 1, flops)


# What grows: its sizes, ascending, and the case of one; tokens by the side of an image.
GROWTH = {
  "iSM, batch": ((8, 32, 128, 512), lambda n: ism(batch=n)),
  "iSM, depth": ((2, 4, 8, 16), lambda n: ism(depth=n)),
  "iSM, tokens": ((16, 64, 256, 1024), lambda n: ism(batch=8, image_size=2 * int(n**0.5))),
  "SequenceMatch, batch": ((4, 8, 16, 32), lambda n: seqmatch(batch=n)),
  "SequenceMatch, context": ((128, 256, 512, 1024), lambda n: seqmatch(4, n)),
  "pairing, pool": ((512, 1024, 2048, 4096, 8192), lambda n: pair(n, "class")),
  "pairing, blind pool": ((512, 1024, 2048, 4096, 8192), lambda n: pair(n, "none")),
  "generation, length": ((64, 128, 256, 512, 1024), generate),
}


def slopes(sizes, values) -> tuple[float, float, float]:
  """Exponent of values in sizes, its standard error, and the exponent between the last two."""
  x, y = np.log(sizes), np.log(values)
  fit = linregress(x, y)
  return float(fit.slope), float(fit.stderr), float((y[-1] - y[-2]) / (x[-1] - x[-2]))


def draw(measured: dict, path) -> None:
  """A log-log plot for each table, milliseconds against size; dashed: as the FLOPs predict."""
  from matplotlib.figure import Figure

  figure = Figure(figsize=(14, 7), layout="constrained")
  for i, (name, (sizes, seconds, flops)) in enumerate(measured.items()):
    axes = figure.add_subplot(2, 4, i + 1)
    axes.loglog(sizes, 1e3 * seconds, "o-")
    if flops.all():
      axes.loglog(sizes, 1e3 * seconds[-1] * flops / flops[-1], "--", color="grey")
    axes.set(title=f"{name}: {slopes(sizes, seconds)[0]:.2f}", ylabel="ms")
    axes.set_xticks(sizes, map(str, sizes))
    axes.minorticks_off()
  figure.savefig(path)


def main(args) -> None:
  jax.config.update("jax_compilation_cache_dir", str(ROOT / ".cache" / "jax"))
  rows, tables, measured = {}, {}, {}
  for name, (sizes, make) in GROWTH.items():
    if not any(part in name for part in args.only.split(";")):
      continue
    sizes = sizes[: args.points]
    cases = {str(size): make(size) for size in sizes}
    found = in_turn({size: case.run for size, case in cases.items()}, args.rounds)
    seconds = np.array([found[size] / case.times for size, case in cases.items()])
    flops = np.array([case.flops for case in cases.values()])
    measured[name] = sizes, seconds, flops
    tables[name] = {f"ms/{n}": 1e3 * t for n, t in zip(sizes, seconds, strict=True)}
    columns = dict(zip(("exponent", "error", "last two"), slopes(sizes, seconds), strict=True))
    if flops.all():
      columns["counted"], _, columns["counted, last two"] = slopes(sizes, flops)
      tables[name] |= {f"GFLOP/{n}": f / 1e9 for n, f in zip(sizes, flops, strict=True)}
    rows |= {f"{column}/{name}": value for column, value in columns.items()}
    print(name, " ".join(f"{k} {v:.2f}" for k, v in columns.items()), flush=True)
  show("growth", {"exponents": rows, **tables})
  draw(measured, KEPT / "growth.png")
  print(f"curves:  {KEPT / 'growth.png'}")


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--only", default="", help="what has one of these in its name, ; between")
  parser.add_argument("--points", type=int, default=5, help="sizes of each, from the smallest")
  parser.add_argument("--rounds", type=int, default=3)
  main(parser.parse_args())
