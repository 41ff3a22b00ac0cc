"""What each part of SequenceMatch does to text: loss x backspace, on a model of characters.

    python benchmarks/text_ablation.py [--out=DIR] [--seeds=0,1,2] [--variants=...] [--part=0.1]

Of each seed there is one model that maximum likelihood (MLE) pretrains on the paragraphs that come
with Python; every variant goes on from it, for as many steps. BC, behavioural cloning, is MLE on
noised data, with <backspace>; the 2 x 2 is MLE or chi2-mixture, without or with noise and
<backspace>. Nucleus sampling needs no training of its own: it is a column of every row. MAUVE is
measured with the features of another model of characters, which was trained on other text: the
docstrings of Python's packages. "training text" is what training documents get in a model's place.
Writes table.md, results.json and ablation.png; stopped, it goes on where it was.
"""

import argparse
import os
import re
from pathlib import Path

import ablation
import matplotlib
import numpy as np

from configs import common, seqmatch_text
from seqmatch_jax.data import corpus, packing
from seqmatch_jax.evaluation import text as evaluate_text
from seqmatch_jax.model import load_features
from seqmatch_jax.tasks import text

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FEATURES, PRETRAINED, TUNED = 1500, 1200, 600  # steps
COLUMNS = {
  "MAUVE": "mauve/T=1",
  "spread of k-means": "mauve_spread/T=1",
  "MAUVE*": "mauve_star/T=1",
  "MAUVE, forbidden": "mauve/T=1, forbidden",
  "MAUVE, p=0.95": "mauve/p=0.95",
  "perplexity": "perplexity/character",
  "perplexity, forbidden": "perplexity/character, forbidden",
  "4-gram entropy": "entropy/T=1",
  "rep-4": "repetition/T=1",
  "distinct-4": "distinct/T=1",
  "rep-4, p=0.95": "repetition/p=0.95",
  "<backspace>s": "backspaces/T=1",
  "ended": "finished/T=1",
  "tokens": "tokens/T=1",
}


def _unlikelihood(config):
  common.mle(config)
  config.loss.unlikelihood = 0.1


VARIANTS = {
  "MLE": common.mle,
  "MLE + unlikelihood": _unlikelihood,
  "BC": common.bc,
  "chi2-mixture, no <backspace>": ablation.no_backspace,
  "chi2-mixture": lambda config: None,
}


def write_docstrings(path: Path) -> None:
  """The paragraphs of the docstrings in Python's packages, without those of the corpus."""
  prose, found = corpus.python_prose(), {}
  known = {prose.read(i) for i in range(prose.size)}
  for file in sorted(Path(os.__file__).parent.glob("*/**/*.py")):
    if {"site-packages", "test", "tests", "idle_test"}.isdisjoint(file.parts):
      for docstring in re.findall(r'"""(.*?)"""', file.read_text("utf-8", "ignore"), re.S):
        for paragraph in re.split(r"\n\s*\n", docstring):
          line = " ".join(paragraph.split())
          if len(line) >= 32 and line[-1] == "." and line.isascii() and line.isprintable():
            found[line] = line not in known
  lines = [line for line, new in found.items() if new]
  path.write_text("\n<|endoftext|>\n".join([corpus.PRINTABLE, *lines]) + "\n")


def make_config(steps: int, seed: int):
  """What all runs share: a small model, texts of at most 120 characters with their prompts."""
  config = seqmatch_text.get_config()
  config.seed, config.steps = seed, steps
  config.eval_every = 0
  config.save_every = 200
  config.data.context = 128
  config.data.tests = 1000
  config.model.depth = 2
  config.eval.samples = 1000
  return config


def make_features(out: Path, part: float):
  """The model that MAUVE's features are of."""
  config = make_config(max(round(FEATURES * part), 1), 0)
  common.mle(config)
  config.data.path = str(out / "docstrings.txt")
  config.data.tests = 100
  config.eval.samples = 32
  return config


def make_pretrained(seed: int, part: float):
  """The model that the variants go on from."""
  config = make_config(max(round(PRETRAINED * part), 1), seed)
  common.mle(config)
  config.eval.samples = 32
  return config


def make_variant(out: Path, variant: str, seed: int, part: float):
  """One variant, from the pretrained model of its seed on."""
  config = make_config(max(round(TUNED * part), 2), seed)
  VARIANTS[variant](config)
  config.init_from = str(out / f"pretrained_seed{seed}")
  config.eval.features = str(out / "features_seed0")
  config.optim.lr = 5e-4
  config.optim.warmup = 50
  config.loss.warmup = 0
  config.loss.anneal = config.steps // 2
  return config


def training_text(out: Path) -> dict[str, float]:
  """The numbers of 1000 training documents, as if a model had written them: what can be reached."""
  config = make_config(1, 0)
  train, test, vocab = text.open_documents(config.data)
  source, errors = config.data, config.noise.max_errors
  held, known = (
    packing.pack(documents, vocab.size, source.context, errors, source.prompt)
    for documents in (test, train)
  )
  begins, known_begins = (np.flatnonzero(packed.start == 0) for packed in (held, known))
  chosen = np.random.default_rng(0).choice(known_begins, config.eval.samples, replace=False)
  real = evaluate_text.real_texts(held, begins)
  drawn = evaluate_text.real_texts(known, chosen)
  features = load_features(str(out / "features_seed0"), vocab)
  both = [evaluate_text.embed(x, vocab, features) for x in (real, drawn)]
  found = *evaluate_text.variety(drawn, "T=1"), *evaluate_text.closeness(*both, "T=1")
  return dict(found)


def real_cell(summary: dict, key: str) -> str:
  """The cell of held-out text in the column `key`."""
  value = summary.get(f"{key.partition('/')[0]}/real")
  return f"{value[0]:.3f}" if value and key.endswith("/T=1") else ""


def plot(summaries: dict[str, dict], path: Path) -> None:
  """MAUVE and repetition by variant, with and without nucleus sampling."""
  figure, axes = plt.subplots(1, 2, figsize=(11, 4), dpi=120)
  x, none = np.arange(len(summaries)), (np.nan, 0.0)
  for axis, metric, label in zip(
    axes, ("mauve", "repetition"), ("MAUVE", "4-grams that were there before"), strict=True
  ):
    for i, name in enumerate(("T=1", "T=1, forbidden", "p=0.95")):
      mean, spread = np.array([s.get(f"{metric}/{name}", none) for s in summaries.values()]).T
      axis.bar(x + (i - 1) * 0.27, mean, 0.25, yerr=spread, capsize=2, label=name)
    axis.set(ylabel=label)
    axis.set_xticks(x, list(summaries), rotation=25, ha="right")
  axes[1].axhline(next(iter(summaries.values()))["repetition/real"][0], color="black", lw=0.8)
  axes[0].legend(fontsize=8)
  figure.tight_layout()
  figure.savefig(path)
  plt.close(figure)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--out", type=Path, default=Path("runs/text_ablation"))
  parser.add_argument("--seeds", default="0,1,2")
  parser.add_argument("--variants", default=";".join(VARIANTS), help="separated by ;")
  parser.add_argument("--part", type=float, default=1.0, help="of all steps")
  args = parser.parse_args()
  out, part = args.out, args.part
  names = ablation.choose(parser, args.variants, list(VARIANTS), ";")
  seeds = [int(seed) for seed in args.seeds.split(",")]
  out.mkdir(parents=True, exist_ok=True)
  write_docstrings(out / "docstrings.txt")
  ablation.run(out, ["features"], [0], lambda name, seed: make_features(out, part))
  ablation.run(out, ["pretrained"], seeds, lambda name, seed: make_pretrained(seed, part))
  results = ablation.run(out, names, seeds, lambda v, seed: make_variant(out, v, seed, part))
  summaries = {name: ablation.spread(runs) for name, runs in results.items()}
  real = next(iter(summaries.values()))
  rows = [
    [name, *(ablation.cell(s.get(key), 3) for key in COLUMNS.values())]
    for name, s in summaries.items()
  ]
  drawn = training_text(out)
  rows += [
    ["training text", *(f"{drawn[key]:.3f}" if key in drawn else "" for key in COLUMNS.values())],
    ["held-out text", *(real_cell(real, key) for key in COLUMNS.values())],
  ]
  plot(summaries, out / "ablation.png")
  head = f"T = 1 unless named; mean ± spread of {len(seeds)} seeds; 1000 texts a seed.\n\n"
  ablation.write(out, head + ablation.markdown(["", *COLUMNS], rows), results)
