"""Which optimiser, at which rate: a sweep over settings, judged by what was kept from training.

    python benchmarks/rates.py --task=digits [--seeds=0,1] [--steps=1000] [--out=DIR]
    python benchmarks/rates.py --task=mnist --data=mnist.npz
    python benchmarks/rates.py --task=two_sum_hard --base="mle"       # also: bc, or nothing
    python benchmarks/rates.py --task=arithmetic --base="mle"
    python benchmarks/rates.py --task=text --base="mle"
    python benchmarks/rates.py --task=digits --rows="optim.name=muon;optim.name=muon optim.b2=0.9"

A row is some of the config's keys with their values, as after --config. Images are judged by the
Fréchet distance to images that were kept from training, texts by the likelihood of texts that were,
questions by others than those of the tables in docs/RESULTS.md. Each row is evaluated --points
times on the way, which shows one that gets worse again.

Writes table.md and results.json. Stopped, it goes on where it was; finished runs are only read. Two
of them with other --seeds and the same --out may run side by side, a core each (taskset).
"""

import argparse
import json
from pathlib import Path

import ablation
import numpy as np
import timing

from configs import ism_digits, ism_mnist, seqmatch_arithmetic, seqmatch_text

ADAMW, MUON = "optim.name=adamw", "optim.name=muon"
GRID = [
  *(f"{ADAMW} optim.lr={rate}" for rate in (1e-3, 3e-3, 1e-2)),
  *(f"{MUON} optim.muon_lr={rate}" for rate in (0.005, 0.01, 0.02, 0.05)),
]
IMAGES = {
  "FD held out, 1 step": ("fd_held_out/nfe1_w0", 2),
  "4 steps": ("fd_held_out/nfe4_w0", 2),
  "FD, 1 step": ("fd/nfe1_w0", 2),
  "FD, 4 steps": ("fd/nfe4_w0", 2),
  "accuracy, 1 step": ("accuracy/nfe1_w0", 3),
  "FD held out, w=0.5, 1 step": ("fd_held_out/nfe1_w0.5", 2),
  "w=0.5, 4 steps": ("fd_held_out/nfe4_w0.5", 2),
}
QUESTIONS = {
  "log-likelihood": ("log_likelihood/data", 3),
  "forbidden": ("log_likelihood/data, forbidden", 3),
  "exact, T=1": ("exact/T=1", 3),
  "greedy": ("exact/greedy", 3),
}
TEXT = {
  "perplexity": ("perplexity/character", 3),
  "forbidden": ("perplexity/character, forbidden", 3),
}


def _digits(options: str, data: str):
  config = ism_digits.get_config(options)
  config.data.held_out = 0.2
  return _images(config, data)


def _mnist(options: str, data: str):
  return _images(ism_mnist.get_config(options), data)


def _images(config, data: str):
  config.data.path = data
  config.eval.nfe, config.eval.guidance = (1, 4), (0.0, 0.5)
  return config


def _two_sum_hard(options: str, data: str):
  config = seqmatch_arithmetic.get_config(f"two_sum,{options}")
  config.data.numbers, config.data.modulus, config.data.seed = 8, 24, 1
  return config


def _arithmetic(options: str, data: str):
  config = seqmatch_arithmetic.get_config(options)
  config.data.source, config.data.seed = "add_or_sub_in_base", 1
  return config


def _text(options: str, data: str):
  config = seqmatch_text.get_config(options)
  config.data.path = data
  return config


TASKS = {
  "digits": (_digits, IMAGES),
  "mnist": (_mnist, IMAGES),
  "two_sum_hard": (_two_sum_hard, QUESTIONS),
  "arithmetic": (_arithmetic, QUESTIONS),
  "text": (_text, TEXT),
}


def on_the_way(workdir: Path, key: str) -> list[float]:
  """A number of each evaluation of a run, in their order."""
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return [line[f"eval/{key}"] for line in lines if f"eval/{key}" in line]


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--task", choices=TASKS, required=True)
  parser.add_argument("--base", default="", help="options of the config that all rows have")
  parser.add_argument("--rows", default=";".join(GRID), help="separated by ;")
  parser.add_argument("--steps", type=int, default=0, help="0: those of the config")
  parser.add_argument("--points", type=int, default=4, help="evaluations of a run")
  parser.add_argument("--seeds", default="0,1")
  parser.add_argument("--data", default="", help="mnist: the .npz; text: the texts")
  parser.add_argument("--out", type=Path)
  args = parser.parse_args()
  make, columns = TASKS[args.task]
  out = args.out or Path("runs") / f"rates_{args.task}"
  rows, seeds = args.rows.split(";"), [int(seed) for seed in args.seeds.split(",")]

  def make_config(row: str, seed: int):
    config = make(args.base, args.data)
    config.seed, config.steps = seed, args.steps or config.steps
    timing.change(config, row)
    config.eval_every = -(-config.steps // args.points)
    return config

  results = ablation.run(out, rows, seeds, make_config)
  first = next(iter(columns.values()))[0]
  lines = []
  for row, runs in results.items():
    found = ablation.spread(runs)
    cells = [ablation.cell(found.get(key), digits) for key, digits in columns.values()]
    way = [on_the_way(out / ablation.folder(row, seed), first) for seed in seeds]
    means = [f"{np.mean(values):.2f}" for values in zip(*way, strict=True)]
    lines.append([f"`{row}`", *cells, " / ".join(means)])
  text = f"{args.task} {args.base}; mean ± spread of {len(seeds)} seeds.\n\n"
  heads = ["", *columns, f"{first} on the way"]
  ablation.write(out, text + ablation.markdown(heads, lines), results)
