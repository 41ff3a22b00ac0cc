"""Compounding guidance, shown on a learned velocity field.

    python benchmarks/compounding_guidance.py --workdir=runs/ism_digits [--w=0.5] [--num=64]

A shortcut model's step of size 1 learns what N of its finest steps compose to. Here they are
composed exactly, with no learning in between, from the d = 0 field of a trained model, with
guidance added in three ways:

    once         guidance is added at the finest step only (the released shortcut code)
    every level  guidance is added again each time two steps are merged (the shortcut paper's text)
    intrinsic    guidance is an input, trained at d = 0; merging adds none (iSM)

For each number N of finest steps in one step of size 1 it prints the norm of the one-step sample
against real images, and saturation: the share of pixels outside [-1.05, 1.05]. Writes a plot and
JSON.

Dimensions: n samples, h w image, c channel.
"""

import argparse
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ml_collections import ConfigDict

from ism_jax import path
from ism_jax.data.from_config import make_source
from ism_jax.model import Model

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def compose(finest, merged_guidance, levels: int):
  """The step of size 1 that 2^levels steps of `finest` merge to.

  Args:
    finest: (x, t, guided) -> direction of a step of size 2^-levels at x; `guided` False asks for
      the null class.
    merged_guidance: w added at each merge; 0 for none.

  Returns:
    (x, t, guided) -> direction.
  """

  def step(level):
    if level == levels:
      return finest
    half, d = step(level + 1), 0.5 ** (level + 1)

    def two(x, t, guided):
      # A loop, so that the program grows with the levels and not with the steps.
      def body(i, carry):
        x, total = carry
        direction = half(x, t + i * d, guided)
        return x + d * direction, total + direction

      return jax.lax.fori_loop(0, 2, body, (x, jnp.zeros_like(x)))[1] / 2

    def merged(x, t, guided):
      direction = two(x, t, guided)
      if guided and merged_guidance:
        direction += merged_guidance * (direction - two(x, t, False))
      return direction

    return merged

  return step(0)


def fields(apply, params, label, classes: int, w: float):
  """name -> (finest field, guidance at each merge)."""

  def network(x, t, c, scale):
    zero = jnp.zeros(len(x))
    return apply(params, x, zero + t, zero, jnp.broadcast_to(c, label.shape), zero + scale)

  def once(x, t, guided):
    null = network(x, t, classes, 0.0)
    return null + (1 + w) * (network(x, t, label, 0.0) - null) if guided else null

  def intrinsic(x, t, guided):
    return network(x, t, label if guided else classes, w if guided else 0.0)

  return {"once": (once, 0.0), "every level": (once, w), "intrinsic": (intrinsic, 0.0)}


def main(workdir: Path, w: float, num: int, finest: int) -> None:
  model = Model.from_run(workdir, devices=jax.devices()[:1])
  classes = len(model.names)
  label = jnp.arange(num) % classes
  x0 = path.draw_noise(jax.random.key(0), jnp.arange(num), model.shape)
  source, _ = make_source(ConfigDict(model.record["run"]["config"]))
  real = np.sqrt(np.mean(source.images(np.arange(len(source.labels))) ** 2))

  rows = []
  for levels in range(finest.bit_length()):
    row = {"N": 2**levels}
    for name, (field, merged) in fields(model.apply, model.params, label, classes, w).items():
      composed = compose(field, merged, levels)
      image = np.asarray(x0 + jax.jit(composed, static_argnums=2)(x0, 0.0, True))
      row[name] = {
        "norm": float(np.sqrt(np.mean(image**2)) / real),
        "saturation": float(np.mean(np.abs(image) > 1.05)),
      }
    rows.append(row)
    cells = [f"{row[n]['norm']:6.2f} {row[n]['saturation']:6.1%}" for n in list(row)[1:]]
    if levels == 0:
      print(f"{'N':>4}  " + "  ".join(f"{n:>13}" for n in list(row)[1:]))
      print(f"{'':>4}  " + "  ".join(["  norm  satur."] * 3))
    print(f"{row['N']:>4}  " + "  ".join(cells), flush=True)

  out = workdir / "compounding_guidance"
  out.with_suffix(".json").write_text(json.dumps({"w": w, "num": num, "rows": rows}, indent=1))
  figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), dpi=120)
  for axis, key in zip(axes, ("norm", "saturation"), strict=True):
    for name in list(rows[0])[1:]:
      axis.plot([r["N"] for r in rows], [r[name][key] for r in rows], marker="o", label=name)
    axis.set(xscale="log", xlabel="finest steps in one step, N", title=key)
  axes[0].legend()
  figure.suptitle(f"one-step samples, w = {w:g}; norm relative to real images")
  figure.tight_layout()
  figure.savefig(out.with_suffix(".png"))
  print(out.with_suffix(".png"))


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--workdir", type=Path, default=Path("runs/ism_digits"))
  parser.add_argument("--w", type=float, default=0.5)
  parser.add_argument("--num", type=int, default=64)
  parser.add_argument("--finest", type=int, default=64, help="largest N, a power of two")
  args = parser.parse_args()
  main(args.workdir, args.w, args.num, args.finest)
