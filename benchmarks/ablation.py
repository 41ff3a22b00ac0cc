"""What the ablations share: runs that are resumed or only read, and tables of mean ± spread."""

import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import main
from train_jax.checkpointing.checkpoint import Checkpoints


def read(workdir: Path, steps: int) -> dict[str, float] | None:
  """The final evaluation of a finished run; None if it isn't finished."""
  path = workdir / "metrics.jsonl"
  if not path.exists():
    return None
  for line in reversed(path.read_text().splitlines()):
    record = json.loads(line)
    found = {k: np.nan if v is None else v for k, v in record.items()}  # null: not finite
    values = {k.removeprefix("eval/"): v for k, v in found.items() if k.startswith("eval/")}
    if values and record["step"] == steps:
      return values
  return None


def folder(variant: str, seed: int) -> str:
  """The name of a run's directory."""
  return "_".join(re.findall(r"\w+", variant)) + f"_seed{seed}"


def run(
  out: Path, variants: Sequence[str], seeds: Sequence[int], make_config: Callable
) -> dict[str, list[dict[str, float]]]:
  """Trains every (variant, seed), one after the other: variant -> results by seed.

  Stopped, it goes on where it was: each run resumes from its checkpoint, finished runs are read.

  Args:
    make_config: (variant, seed) -> config.
  """
  results: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
  for seed in seeds:
    for variant in variants:
      config = make_config(variant, seed)
      workdir = out / folder(variant, seed)
      if read(workdir, config.steps) is None:
        # Gone on with, it would be the shorter run with more steps at a higher rate.
        saved = Checkpoints(workdir).newest_meta()
        if saved and (steps := saved["config"]["steps"]) != config.steps:
          sys.exit(f"{workdir} holds a run of {steps} steps; give another --out.")
        print(f"\n{variant}, seed {seed} -> {workdir}", flush=True)
        if not main.train(config, workdir):
          sys.exit(130)
      results[variant].append(read(workdir, config.steps))
  return results


def no_backspace(config) -> None:
  """A variant of SequenceMatch: its objective without <backspace>, and so without noise."""
  config.loss.backspace = False
  config.noise.rate = 0.0


def spread(rows: Sequence[dict[str, float]]) -> dict[str, tuple[float, float]]:
  """Mean and sample standard deviation over seeds of every number that all rows have."""
  common = [key for key in rows[0] if all(key in row for row in rows)]
  values = {key: [row[key] for row in rows] for key in common}
  return {
    key: (float(np.mean(v)), float(np.std(v, ddof=1)) if len(v) > 1 else 0.0)
    for key, v in values.items()
  }


def cell(value: tuple[float, float] | None, digits: int = 2) -> str:
  """mean ± spread, or nothing."""
  return "" if value is None else f"{value[0]:.{digits}f} ± {value[1]:.{digits}f}"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A markdown table."""
  lines = [heads, ["---"] * len(heads), *rows]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(out: Path, text: str, results: dict) -> None:
  """Writes and prints table.md, under the commit and the command; writes results.json."""
  git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
  commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
  head = f"commit {commit}, `python {' '.join(sys.argv)}`\n\n"
  (out / "table.md").write_text(head + text + "\n")
  (out / "results.json").write_text(json.dumps(results, indent=1))
  print(f"\n{text}\n\n{out / 'table.md'}\n{out / 'results.json'}")


def choose(parser, text: str, known: Sequence[str], separator: str = ",") -> list[str]:
  """The names of a flag that lists some, each of which must be known."""
  names = [name.strip() for name in text.split(separator)]
  for name in names:
    if name not in known:
      parser.error(f"unknown {name!r}; choose from {', '.join(known)}")
  return names
