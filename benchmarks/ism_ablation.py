"""What each part of iSM is worth on real digits: the whole method, and the same without one part.

    python benchmarks/ism_ablation.py --out=runs/ism_ablation [--seeds=0,1,2] [--rungs=...]

A fifth of the digits is kept from training, and samples are compared with both sides. All rungs
have the rates of the config, which suit the whole method and the control (docs/RESULTS.md). Writes
table.md, results.json and ladder.png. Stopped, it goes on where it was: each run resumes from its
checkpoint, and finished runs are only read. 3 seeds of all rungs take about an hour on 2 CPU cores.
"""

import argparse
from itertools import product
from pathlib import Path

import ablation
import matplotlib
import numpy as np
import train_step

from configs import ism_digits

matplotlib.use("Agg")
from matplotlib import pyplot as plt

METRICS = ("fd", "fd_held_out", "accuracy", "precision", "recall")
NFES = (1, 2, 4, 8, 128)
GUIDED = "0.5"  # the guidance beside 0


def _no_guidance(config):
  config.loss.split.update(velocity=5, guidance=0)
  config.loss.w_max = 0.0
  config.eval.guidance = (0.0,)


def _no_interval(config):
  config.loss.interval_start = 0.0


def _no_wavelet(config):
  config.loss.wavelet_levels = 0


def _no_pairing(config):
  config.pairing.pool = 0


def _no_fast_ema(config):
  config.ema.target = config.ema.sample


def _shortcut(config):
  """The original objective with two parts of iSM, which make it the strongest control."""
  _no_guidance(config)
  _no_wavelet(config)
  _no_pairing(config)


RUNGS = {
  "shortcut, fast EMA, iSM's split": _shortcut,
  "whole method": lambda config: None,
  "no guidance": _no_guidance,
  "no interval": _no_interval,
  "no wavelet": _no_wavelet,
  "no sOT": _no_pairing,
  "no twin EMA": _no_fast_ema,
}


def rung_config(rung: str, seed: int, steps: int):
  """The config of one run."""
  config = ism_digits.get_config()
  config.data.held_out = 0.2
  config.eval.nfe, config.eval.guidance = NFES, (0.0, float(GUIDED))
  RUNGS[rung](config)
  config.seed = seed
  config.steps = steps or config.steps
  config.eval_every = 0
  return config


def table(summaries: dict[str, dict], times: dict[str, float], n: int) -> str:
  """A table for each guidance scale, and what a step takes."""
  text = f"Mean ± spread of {n} seeds; columns by number of steps.\n"
  for w in ("0", GUIDED):
    heads = ["", *(f"held out, {nfe}" for nfe in NFES), *(f"FD, {nfe}" for nfe in NFES)]
    heads += ["accuracy, 1", "precision, 1", "recall, 1", "accuracy, 4", "recall, 4"]
    keys = [f"{m}/nfe{nfe}_w{w}" for m, nfe in product(("fd_held_out", "fd"), NFES)]
    keys += [f"{m}/nfe1_w{w}" for m in METRICS[2:]]
    keys += [f"{m}/nfe4_w{w}" for m in ("accuracy", "recall")]
    rows = [
      [rung, *(ablation.cell(found.get(key)) for key in keys)]
      for rung, found in summaries.items()
      if keys[0] in found
    ]
    text += f"\nAt w = {w}.\n\n{ablation.markdown(heads, rows)}\n"
  heads = ["", "class leak", "ms a step", "ratio", "FD of the training images, held out"]
  rows = [
    [
      rung,
      ablation.cell(found.get("class_leak")),
      f"{times[f'ms/{rung}']:.1f}",
      f"{times[f'ratio/{rung}']:.2f}",
      ablation.cell(found["fd_held_out/data"]),
    ]
    for rung, found in summaries.items()
  ]
  return f"{text}\n{ablation.markdown(heads, rows)}"


def plot(summaries: dict[str, dict], path: Path) -> None:
  """Fréchet distances at w = 0 by rung, a line for each number of steps."""
  figure, axes = plt.subplots(1, 2, figsize=(11, 4), dpi=120)
  x = np.arange(len(summaries))
  for nfe in NFES:
    for axis, metric in zip(axes, ("fd_held_out", "fd"), strict=True):
      found = [s[f"{metric}/nfe{nfe}_w0"] for s in summaries.values()]
      mean, spread = np.array(found).T
      axis.errorbar(x, mean, spread, marker="o", capsize=2, label=f"{nfe} step{'s' * (nfe > 1)}")
  floor = np.mean([s["fd_held_out/data"][0] for s in summaries.values()])
  axes[0].axhline(floor, color="grey", linestyle="--", label="training images")
  titles = ("Fréchet distance to held-out digits, w = 0", "to the training digits, w = 0")
  for axis, title in zip(axes, titles, strict=True):
    axis.set_title(title)
    axis.set_xticks(x, list(summaries), rotation=30, ha="right")
  axes[1].legend(fontsize=8, loc="upper left")
  figure.tight_layout()
  figure.savefig(path)
  plt.close(figure)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=Path, default=Path("runs/ism_ablation"))
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--rungs", default=";".join(RUNGS), help="separated by ;")
  parser.add_argument("--steps", type=int, default=0, help="0: those of the config")
  args = parser.parse_args()
  rungs = ablation.choose(parser, args.rungs, list(RUNGS), ";")
  seeds = [int(seed) for seed in args.seeds.split(",")]
  results = ablation.run(
    args.out, rungs, seeds, lambda rung, seed: rung_config(rung, seed, args.steps)
  )
  times = train_step.measure({rung: rung_config(rung, 0, args.steps) for rung in rungs})
  summaries = {rung: ablation.spread(runs) for rung, runs in results.items()}
  plot(summaries, args.out / "ladder.png")
  text = table(summaries, times, len(seeds))
  ablation.write(args.out, text, {"runs": results, "step": times})
