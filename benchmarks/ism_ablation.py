"""The ladder from shortcut models to iSM on real digits: each rung adds one part of the paper.

    python benchmarks/ism_ablation.py --out=runs/ism_ablation [--seeds=0,1,2] [--rungs=...]

Writes table.md, results.json and ladder.png. Stopped, it goes on where it was: each run resumes
from its checkpoint, and finished runs are only read. 3 seeds of all rungs take about two hours on 2
CPU cores.
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

METRICS = ("fd", "accuracy", "precision", "recall")
NFES = (1, 2, 4, 8, 128)


def _fast(config):
  config.ema.target = 0.95


def _unguided(config):
  config.guidance.baked = 0.0


def _guidance(config):
  full = ism_digits.get_config()
  config.loss = full.loss
  config.guidance = full.guidance
  config.guidance.start = 0.0
  config.eval.guidance = full.eval.guidance


def _interval(config):
  config.guidance.start = ism_digits.get_config().guidance.start


def _wavelet(config):
  config.wavelet = ism_digits.get_config().wavelet


def _pairing(config):
  config.pairing = ism_digits.get_config().pairing


# Shortcut models as released have guidance baked in; at w = 0 the others are to be compared with
# those that have none. From there on each rung is the one before it and one change more, from the
# slow target average: the paper adds its twin EMA last.
LADDER = {
  "shortcut": [],
  "shortcut, unguided": [_unguided],
  "shortcut + fast EMA": [_fast],
  "shortcut + fast EMA, unguided": [_fast, _unguided],
  "+ intrinsic guidance": [_guidance],
  "+ interval": [_guidance, _interval],
  "+ wavelet": [_guidance, _interval, _wavelet],
  "+ sOT": [_guidance, _interval, _wavelet, _pairing],
  "+ twin EMA": [_guidance, _interval, _wavelet, _pairing, _fast],
}

# Weightings of the bands, compared on the whole recipe: --rungs="+ twin EMA;no wavelet;...".
_FULL = LADDER["+ twin EMA"]


def _set(section: str, **values):
  def change(config):
    config[section].update(values)

  return change


WAVELETS = {
  "no wavelet": [*_FULL, _set("wavelet", levels=0)],
  "wavelet, levels equal": [*_FULL, _set("wavelet", decay=4.0)],
  "wavelet, charbonnier": [*_FULL, _set("wavelet", norm="charbonnier")],
}


def _no_guidance(config):
  config.loss.shares = (5, 0, 3)
  config.guidance.w_max = 0.0
  config.eval.guidance = (0.0,)


CONTROLS = {
  "shortcut + fast EMA, unguided, iSM's shares": [_fast, _unguided, _set("loss", shares=(5, 0, 3))],
  "whole method, no guidance": [*_FULL, _no_guidance],
}
ALL = LADDER | WAVELETS | CONTROLS


def rung_config(rung: str, seed: int, steps: int):
  """The config of one run."""
  config = ism_digits.get_config("shortcut")
  for change in ALL[rung]:
    change(config)
  config.seed = seed
  config.steps = steps
  config.eval_every = 0
  config.eval.nfe = NFES
  return config


def best_guidance(run: dict) -> str:
  """The strength with the lowest Fréchet distance at one step; 0 is among them."""
  settings = [k.partition("_w")[2] for k in run if k.startswith("fd/nfe1_w")]
  return min(settings, key=lambda w: run[f"fd/nfe1_w{w}"])


def summary(runs: list[dict]) -> dict[str, tuple[float, float]]:
  """Mean and spread over seeds of every number of the tables."""
  rows = []
  for run in runs:
    best = best_guidance(run)
    row = {"w": float(best)}
    for nfe, (name, w), metric in product(NFES, (("w0", "0"), ("best", best)), METRICS):
      row[f"{metric}/{nfe}/{name}"] = run[f"{metric}/nfe{nfe}_w{w}"]
    row |= {"leak": run["class_leak"]} if "class_leak" in run else {}
    rows.append(row)
  return ablation.spread(rows)


def table(summaries: dict[str, dict], times: dict[str, float], n: int) -> str:
  """Two tables: w = 0, and the strength with the lowest Fréchet distance at one step."""
  unguided, guided = [], []
  for rung, s in summaries.items():
    fd = [ablation.cell(s[f"fd/{nfe}/w0"]) for nfe in NFES]
    rest = [ablation.cell(s[f"{m}/1/w0"]) for m in METRICS[1:]] + [
      ablation.cell(s["accuracy/4/w0"])
    ]
    speed = [f"{times[f'ms/{rung}']:.1f}", f"{times[f'ratio/{rung}']:.2f}"]
    unguided.append([rung, *fd, *rest, ablation.cell(s.get("leak")), *speed])
    one = [ablation.cell(s[f"{m}/1/best"]) for m in METRICS]
    guided.append(
      [
        rung,
        ablation.cell(s["w"]),
        *one,
        ablation.cell(s["fd/4/best"]),
        ablation.cell(s["accuracy/4/best"]),
      ]
    )
  one = ["accuracy, 1 step", "precision, 1", "recall, 1"]
  heads = [
    "rung",
    *(f"FD, {nfe}" for nfe in NFES),
    *one,
    "accuracy, 4",
    "class leak",
    "ms a step",
    "ratio",
  ]
  text = f"At w = 0; mean ± spread of {n} seeds; columns by number of steps.\n\n"
  text += ablation.markdown(heads, unguided)
  text += "\n\nAt the w of the lowest FD at one step.\n\n"
  return text + ablation.markdown(["rung", "w", "FD, 1", *one, "FD, 4", "accuracy, 4"], guided)


def plot(summaries: dict[str, dict], path: Path) -> None:
  """Fréchet distance and class accuracy at w = 0 by rung, a line for each number of steps."""
  figure, axes = plt.subplots(1, 2, figsize=(11, 4), dpi=120)
  x = np.arange(len(summaries))
  for nfe in NFES:
    for axis, key in zip(axes, (f"fd/{nfe}/w0", f"accuracy/{nfe}/w0"), strict=True):
      mean, spread = np.array([s[key] for s in summaries.values()]).T
      axis.errorbar(x, mean, spread, marker="o", capsize=2, label=f"{nfe} step{'s' * (nfe > 1)}")
  for axis, title in zip(axes, ("Fréchet distance, w = 0", "class accuracy, w = 0"), strict=True):
    axis.set_title(title)
    axis.set_xticks(x, list(summaries), rotation=30, ha="right")
  axes[0].set_yscale("log")
  axes[0].legend(fontsize=8)
  figure.tight_layout()
  figure.savefig(path)
  plt.close(figure)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=Path, default=Path("runs/ism_ablation"))
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--rungs", default=";".join(LADDER), help="separated by ;")
  parser.add_argument("--steps", type=int, default=ism_digits.get_config().steps)
  args = parser.parse_args()
  rungs = ablation.choose(parser, args.rungs, list(ALL), ";")
  seeds = [int(seed) for seed in args.seeds.split(",")]
  results = ablation.run(
    args.out, rungs, seeds, lambda rung, seed: rung_config(rung, seed, args.steps)
  )
  times = train_step.measure({rung: rung_config(rung, 0, args.steps) for rung in rungs})
  summaries = {rung: summary(runs) for rung, runs in results.items()}
  plot(summaries, args.out / "ladder.png")
  text = table(summaries, times, len(seeds))
  ablation.write(args.out, text, {"runs": results, "step": times})
