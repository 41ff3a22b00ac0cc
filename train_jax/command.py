"""Modes of main.py: each is a `Command`, which owns its flags, their help and their checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from absl import flags
from absl.flags import FlagValues
from ml_collections import config_flags

from train_jax.errors import UserError
from train_jax.files import check_writable


class Flag:
  """A flag that a command reads: `absl.flags.DEFINE_<kind>(name, default, help, **rules)`."""

  def __init__(self, kind: str, name: str, default, help: str, **rules):
    self.kind, self.name, self.default, self.help, self.rules = kind, name, default, help, rules

  def define(self, values: FlagValues) -> None:
    """Adds the flag to `values`."""
    define = getattr(flags, f"DEFINE_{self.kind}")
    define(self.name, self.default, help=self.help, flag_values=values, **self.rules)


MODE = Flag("string", "mode", "train", "train, sample, evaluate, export, encode or compile.")
WORKDIR = Flag("string", "workdir", None, "Directory of the run: checkpoints, metrics, samples.")
BACKEND = Flag("string", "backend", "", "cpu, gpu or tpu: refuse to run on another.")
OUT = Flag("string", "out", None, "Directory of the results; default: in the run's.")
STEP = Flag(
  "integer",
  "step",
  None,
  "The checkpoint that is used (--config.keep_every keeps older ones); default: the newest good.",
  lower_bound=1,
)
SEED = Flag("integer", "seed", 0, "Of the noise.", lower_bound=0, upper_bound=2**32 - 1)
SHARDS = Flag("integer", "shards", 0, "Files to make; default: one for every 8192.")

STORED = (WORKDIR, STEP, OUT, BACKEND)  # what reads a run
DRAWING = (*STORED, SEED)  # and draws from it
SHARDED = (OUT, SHARDS, BACKEND)  # what makes a data set


class Config:
  """The flag --config=FILE.py[:option], and --config.KEY=VALUE for each key of the file."""

  name = "config"

  def define(self, values: FlagValues) -> None:
    """Adds the flag to `values`."""
    help_ = "File of the run: configs/NAME.py[:option]."
    config_flags.DEFINE_config_file("config", None, help_, values)


@dataclass(frozen=True, init=False)
class Command:
  """What main.py does in one mode.

  Attributes:
    run: flag values -> None, or False where a run was told to stop before its end.
    flags: those that it reads.
  """

  run: Callable[[FlagValues], bool | None]
  flags: tuple[Flag | Config, ...]

  def __init__(self, run: Callable[[FlagValues], bool | None], *flags: Flag | Config):
    object.__setattr__(self, "run", run)
    object.__setattr__(self, "flags", (MODE, *flags))

  def define(self) -> FlagValues:
    """Its flags, with their defaults."""
    values = FlagValues()
    for flag in self.flags:
      flag.define(values)
    return values

  def help(self) -> str:
    """Its flags with their meaning, one a line."""
    lines = [f"  --{flag.name}: {flag.help}" for flag in self.flags if isinstance(flag, Flag)]
    return "\n".join([(self.run.__doc__ or "").partition("\n")[0], *lines])


def numbers(values: FlagValues, name: str, kind: type) -> tuple:
  """A comma-separated flag as numbers, () if it was not given; UserError for what is no number."""
  given = values[name].value
  try:
    return tuple(kind(value) for value in given or ())
  except ValueError as err:
    what = "whole numbers" if kind is int else "numbers"
    raise UserError(f"--{name}={','.join(given)} must be {what} separated by commas.") from err


def out_directory(values: FlagValues, default: str) -> Path:
  """--out, or a directory in --workdir; UserError where nothing can be written."""
  out = Path(values.out) if values.out else Path(values.workdir) / default
  check_writable(out, "--out")
  return out
