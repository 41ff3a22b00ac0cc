"""The ladder from shortcut models to iSM on real digits: each rung adds one part of the paper.

    python benchmarks/ism_ablation.py --out=runs/ism_ablation [--seeds=0,1,2] [--rungs=...]

Writes table.md, results.json and ladder.png. Stopped, it goes on where it was: each run resumes
from its checkpoint, and finished runs are only read. 3 seeds of all rungs take about two hours on 2
CPU cores.
"""

import argparse
import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import main
from configs import ism_digits

matplotlib.use("Agg")
from matplotlib import pyplot as plt

METRICS = ("fd", "accuracy", "precision", "recall")
NFES = (1, 2, 4, 8, 128)


def _fast(config):
  config.ema.target = 0.95


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


def _slow(config):
  config.ema.target = 0.999


# Each rung is the one before it and one change more, "- fast EMA" excepted: the paper adds its
# twin EMA last, so the last rung but one has the slow target and the last has both averages.
LADDER = {
  "shortcut": [],
  "shortcut + fast EMA": [_fast],
  "+ intrinsic guidance": [_guidance],
  "+ interval": [_guidance, _interval],
  "+ wavelet": [_guidance, _interval, _wavelet],
  "+ sOT": [_guidance, _interval, _wavelet, _pairing],
  "+ twin EMA": [_guidance, _interval, _wavelet, _pairing, _fast],
}


def rung_config(rung: str, seed: int, steps: int):
  """The config of one run."""
  config = ism_digits.get_config("shortcut")
  for change in LADDER[rung]:
    change(config)
  config.seed = seed
  config.steps = steps
  config.eval_every = 0
  config.eval.nfe = NFES
  return config


def result(workdir: Path, steps: int) -> dict | None:
  """The final evaluation and median step time of a finished run; None if it isn't finished."""
  path = workdir / "metrics.jsonl"
  if not path.exists():
    return None
  records = [json.loads(line) for line in path.read_text().splitlines()]
  final = [r for r in records if r["step"] == steps and "eval/fd/nfe1_w0" in r]
  if not final:
    return None
  times = [r["milliseconds_per_step"] for r in records if "milliseconds_per_step" in r]
  values = {k.removeprefix("eval/"): v for k, v in final[-1].items() if k.startswith("eval/")}
  return {**values, "milliseconds_per_step": float(np.median(times))}


def best_guidance(run: dict) -> str:
  """The strength with the lowest Fréchet distance at one step; 0 is among them."""
  settings = [k.partition("_w")[2] for k in run if k.startswith("fd/nfe1_w")]
  return min(settings, key=lambda w: run[f"fd/nfe1_w{w}"])


def summary(runs: list[dict]) -> dict[str, tuple[float, float]]:
  """Mean and standard deviation over seeds of every number of the tables."""
  rows = []
  for run in runs:
    best = best_guidance(run)
    row = {"ms": run["milliseconds_per_step"], "w": float(best)}
    for nfe, (name, w), metric in product(NFES, (("w0", "0"), ("best", best)), METRICS):
      row[f"{metric}/{nfe}/{name}"] = run[f"{metric}/nfe{nfe}_w{w}"]
    rows.append(row)
  values = {key: [row[key] for row in rows] for key in rows[0]}
  return {key: (float(np.mean(v)), float(np.std(v))) for key, v in values.items()}


def cell(value: tuple[float, float]) -> str:
  return f"{value[0]:.2f} ± {value[1]:.2f}"


def markdown(heads: list[str], rows: list[list[str]]) -> str:
  """A markdown table."""
  lines = [heads, ["---"] * len(heads), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def table(summaries: dict[str, dict], n: int) -> str:
  """Two tables: w = 0, and the strength with the lowest Fréchet distance at one step."""
  unguided, guided = [], []
  for rung, s in summaries.items():
    fd = [cell(s[f"fd/{nfe}/w0"]) for nfe in NFES]
    rest = [cell(s[f"{m}/1/w0"]) for m in METRICS[1:]] + [cell(s["accuracy/4/w0"])]
    unguided.append([rung, *fd, *rest, f"{s['ms'][0]:.1f}"])
    one = [cell(s[f"{m}/1/best"]) for m in METRICS]
    guided.append([rung, cell(s["w"]), *one, cell(s["fd/4/best"]), cell(s["accuracy/4/best"])])
  one = ["accuracy, 1 step", "precision, 1", "recall, 1"]
  heads = ["rung", *(f"FD, {nfe}" for nfe in NFES), *one, "accuracy, 4", "ms a step"]
  text = f"At w = 0; mean ± spread of {n} seeds; columns by number of steps.\n\n"
  text += markdown(heads, unguided)
  text += "\n\nAt the w of the lowest FD at one step.\n\n"
  return text + markdown(["rung", "w", "FD, 1", *one, "FD, 4", "accuracy, 4"], guided)


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


def run(out: Path, rungs: list[str], seeds: list[int], steps: int) -> None:
  results: dict[str, dict[str, dict]] = {}
  for seed in seeds:
    for rung in rungs:
      name = rung.replace("+ ", "").replace(" ", "_")
      workdir = out / f"{rungs.index(rung)}_{name}_seed{seed}"
      if result(workdir, steps) is None:
        print(f"\n{rung}, seed {seed} -> {workdir}", flush=True)
        if not main.train(rung_config(rung, seed, steps), workdir):
          sys.exit(130)
      results.setdefault(rung, {})[str(seed)] = result(workdir, steps)
  summaries = {rung: summary(list(runs.values())) for rung, runs in results.items()}
  text = table(summaries, len(seeds))
  commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
  head = f"commit {commit.stdout.strip()}, `python {' '.join(sys.argv)}`, {steps} steps\n\n"
  (out / "table.md").write_text(head + text + "\n")
  (out / "results.json").write_text(json.dumps(results, indent=1))
  plot(summaries, out / "ladder.png")
  print(f"\n{text}\n\n{out / 'table.md'}\n{out / 'results.json'}\n{out / 'ladder.png'}")


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=Path, default=Path("runs/ism_ablation"))
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--rungs", default=",".join(LADDER))
  parser.add_argument("--steps", type=int, default=ism_digits.get_config().steps)
  args = parser.parse_args()
  chosen = [name.strip() for name in args.rungs.split(",")]
  for name in chosen:
    if name not in LADDER:
      parser.error(f"unknown rung {name!r}; choose from {', '.join(LADDER)}")
  run(args.out, chosen, [int(s) for s in args.seeds.split(",")], args.steps)
