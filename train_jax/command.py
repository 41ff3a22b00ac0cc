"""Modes of main.py: each is a `Command`, which owns its flags, their help and their checks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from absl import flags
from absl.flags import FlagValues
from ml_collections import config_flags

from train_jax.config import is_same
from train_jax.errors import UserError
from train_jax.files import check_writable, read_json, write_json

OWNER = ".run.json"  # in a directory of results: the `workdir` of their run, and its `run`

KINDS = {
  "string": flags.DEFINE_string,
  "integer": flags.DEFINE_integer,
  "float": flags.DEFINE_float,
  "boolean": flags.DEFINE_boolean,
  "enum": flags.DEFINE_enum,
  "list": flags.DEFINE_list,
  "multi_string": flags.DEFINE_multi_string,
}


class Flag:
  """A flag that a command reads: `absl.flags.DEFINE_<kind>(name, default, help, **rules)`."""

  def __init__(self, kind: str, name: str, default, help: str, **rules):
    self.kind, self.name, self.default, self.help, self.rules = kind, name, default, help, rules

  def define(self, values: FlagValues) -> None:
    """Adds the flag to `values`."""
    KINDS[self.kind](self.name, self.default, help=self.help, flag_values=values, **self.rules)


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

RUN_FLAGS = (WORKDIR, STEP, OUT, BACKEND)  # of commands that read a run
DRAW_FLAGS = (*RUN_FLAGS, SEED)  # ... and draw noise
DATA_FLAGS = (OUT, SHARDS, BACKEND)  # of commands that make a data set


class Config(Flag):
  """The flag --config=FILE.py[:option], and --config.KEY=VALUE for each key of the file."""

  def __init__(self):
    super().__init__("", "config", None, "File of the run: configs/NAME.py[:option].")

  def define(self, values: FlagValues) -> None:
    config_flags.DEFINE_config_file(self.name, None, self.help, values)


class Command:
  """A mode of main.py.

  Attributes:
    run: flag values -> None, or False if a run was stopped before its end.
    flags: the flags that `run` reads, and --mode.
  """

  def __init__(self, run: Callable[[FlagValues], bool | None], *flags: Flag):
    self.run, self.flags = run, (MODE, *flags)

  def define(self) -> FlagValues:
    """New flag values, with their defaults."""
    values = FlagValues()
    for flag in self.flags:
      flag.define(values)
    return values

  def help(self) -> str:
    """The first line of `run`'s docstring, and a line for each flag."""
    summary = (self.run.__doc__ or "").partition("\n")[0].rpartition("`: ")[2]
    return "\n".join([summary, *(f"  --{flag.name}: {flag.help}" for flag in self.flags)])


def numbers(values: FlagValues, name: str, kind: type) -> tuple:
  """A comma-separated flag as numbers, () if it is not set; UserError unless all are numbers."""
  words = values[name].value or ()
  try:
    return tuple(map(kind, words))
  except ValueError as err:
    expected = "whole numbers" if kind is int else "numbers"
    raise UserError(f"--{name}={','.join(words)} must be {expected} separated by commas.") from err


@contextmanager
def out_directory(values: FlagValues, default: str, run: dict) -> Iterator[Path]:
  """--out, or `default` in --workdir, to write to; it is marked as this run's at the end.

  Args:
    run: `config` and `metadata` of the run.

  Raises:
    UserError: it cannot be written to, or holds files of another run or a model of other origin.
  """
  out = Path(values.out) if values.out else Path(values.workdir) / default
  check_writable(out, "--out")
  for path in (out / OWNER, out / "config.json"):
    _check_owner(path, run)
  try:
    yield out
  finally:  # after an error, too, but for a refusal, which writes nothing
    if jax.process_index() == 0 and out.is_dir() and not isinstance(sys.exception(), UserError):
      write_json(out / OWNER, {"workdir": str(Path(values.workdir).resolve()), "run": run})


def _check_owner(path: Path, run: dict) -> None:
  """Raises UserError if the JSON at `path` names another run than `run`, or none.

  config.json of a Hugging Face folder has the record of its run under the name of the method.
  """
  try:
    record = read_json(path)
  except FileNotFoundError:
    return
  except (OSError, ValueError):
    record = {}
  record = record.get(run["config"]["method"], record)
  other = record.get("run")
  if isinstance(other, dict) and all(k in other and is_same(run[k], other[k]) for k in run):
    return
  if path.name == OWNER and [file.name for file in path.parent.iterdir()] == [OWNER]:
    return  # the other run's files are gone
  owner = f"the run in {record['workdir']}" if "workdir" in record else "another run or program"
  raise UserError(
    f"--out={path.parent} holds files of {owner} (says {path.name}), which would be lost; choose "
    "another directory, or empty that one."
  )
