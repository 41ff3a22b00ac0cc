"""What each part of SequenceMatch does: loss x backspace x noise, on one task.

    python benchmarks/seqmatch_ablation.py --task=two_sum [--out=DIR] [--seeds=0,1,2]
    python benchmarks/seqmatch_ablation.py --task=two_sum_hard   # 8 numbers modulo 24
    python benchmarks/seqmatch_ablation.py --task=arithmetic [--variants=...] [--steps=...]

The 2 x 2 is maximum likelihood (MLE) or chi2-mixture, without or with <backspace>. "MLE +
<backspace>" is the paper's baseline: the action exists and the data never show it. BC, behavioural
cloning, is maximum likelihood on noised data. The last rows are the paper's figure: noise rates.
"best of 3" is the control for what erasing costs: a model without <backspace> draws three answers
and keeps the one that it finds likeliest. All variants have the rates of the config, and as many
steps as MLE's likelihood of held-out questions rises for (benchmarks/rates.py). Writes table.md,
results.json and ablation.png; stopped, it goes on where it was.
"""

import argparse
from pathlib import Path

import ablation
import matplotlib
import numpy as np

from configs import common, seqmatch_arithmetic

matplotlib.use("Agg")
from matplotlib import pyplot as plt

TASKS = ("two_sum", "two_sum_hard", "arithmetic", "generated")
COLUMNS = {
  "T=1": "exact/T=1",
  "T=1, forbidden": "forbidden/T=1",
  "T=1, no retyping": "exact/T=1, no retyping",
  "best of 3": "exact/T=1, best of 3",
  "T=0.5": "exact/T=0.5",
  "greedy": "exact/greedy",
  "recovery, T=1": "recovery/T=1",
  "recovery, greedy": "recovery/greedy",
  "actions, T=1": "actions/T=1",
  "actions, best of 3": "actions/T=1, best of 3",
  "erased, of actions": "rate/T=1",
  "precision": "precision/T=1",
  "recall": "recall/T=1",
  "log-likelihood": "log_likelihood/data",
  "log-likelihood, forbidden": "log_likelihood/data, forbidden",
}


def _mle_backspace(config):
  common.mle(config)
  config.loss.backspace = True


def _chi2(config):
  config.loss.divergence = "chi2"


def _noise(rate):
  def change(config):
    config.noise.rate = rate

  return change


VARIANTS = {
  "MLE": common.mle,
  "MLE + <backspace>": _mle_backspace,
  "BC": common.bc,
  "chi2-mixture, no <backspace>": ablation.no_backspace,
  "chi2": _chi2,
  "chi2-mixture": lambda config: None,
  "chi2-mixture, noise 0.1": _noise(0.1),
  "chi2-mixture, noise 0.6": _noise(0.6),
}


def make_config(task: str, variant: str, seed: int, steps: int):
  """The config of one run."""
  config = seqmatch_arithmetic.get_config("two_sum" if task.startswith("two_sum") else "")
  if task == "two_sum_hard":
    config.data.numbers, config.data.modulus = 8, 24
  if task == "generated":  # so many that none comes twice
    config.data.source, config.data.examples = "add_or_sub_in_base", 200_000
  VARIANTS[variant](config)
  config.seed = seed
  config.steps = steps or config.steps
  config.eval_every = 0
  return config


def plot(summaries: dict[str, dict], path: Path) -> None:
  """Exact match at T = 1 with and without <backspace>, and recovery, by variant."""
  figure, axis = plt.subplots(figsize=(9, 4), dpi=120)
  x, none = np.arange(len(summaries)), (np.nan, 0.0)
  bars = ("exact/T=1", "forbidden/T=1", "recovery/T=1")
  names = ("exact match", "<backspace> forbidden", "recovery from a forced error")
  for i, (key, name) in enumerate(zip(bars, names, strict=True)):
    mean, spread = np.array([s.get(key, none) for s in summaries.values()]).T
    axis.bar(x + (i - 1) * 0.27, mean, 0.25, yerr=spread, capsize=2, label=name)
  axis.set(ylim=(0, 1), ylabel="of test questions, T = 1")
  axis.set_xticks(x, list(summaries), rotation=25, ha="right")
  axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
  figure.tight_layout()
  figure.savefig(path)
  plt.close(figure)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--task", choices=TASKS, default=TASKS[0])
  parser.add_argument("--out", type=Path)
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--variants", default=";".join(VARIANTS), help="separated by ;")
  parser.add_argument("--steps", type=int, default=0, help="0: those of the config")
  args = parser.parse_args()
  out = args.out or Path("runs") / f"{args.task}_ablation"
  names = ablation.choose(parser, args.variants, list(VARIANTS), ";")
  seeds = [int(seed) for seed in args.seeds.split(",")]
  results = ablation.run(
    out, names, seeds, lambda name, seed: make_config(args.task, name, seed, args.steps)
  )
  summaries = {name: ablation.spread(runs) for name, runs in results.items()}
  rows = [
    [name, *(ablation.cell(s.get(key), 3) for key in COLUMNS.values())]
    for name, s in summaries.items()
  ]
  plot(summaries, out / "ablation.png")
  text = f"{args.task}; exact match unless named; mean ± spread of {len(seeds)} seeds.\n\n"
  ablation.write(out, text + ablation.markdown(["", *COLUMNS], rows), results)
