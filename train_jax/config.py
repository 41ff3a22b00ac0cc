"""Reading configs: overrides, the backend they ask for, and what two of them differ in."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

import jax
from absl import flags, logging
from flax import traverse_util
from ml_collections import config_flags

from train_jax.errors import UserError

# Changing these does not change what is learned, so a run may go on with other values.
FREE = (
  "backend",
  "log_every",
  "eval_every",
  "save_every",
  "keep",
  "max_skipped",
  "mesh.",
  "eval.",
  "data.max_faults",
  "tokenizer.path",  # of the facts
  "init_from",
  "model.remat",
  "model.unroll",
  "model.attention",
)
# A run may go on with other values of these too, and says so. None has a part in the structure of
# the optimiser's state.
TOLD = (
  "steps",
  "optim.lr",
  "optim.muon_lr",
  "optim.warmup",
  "optim.final",
  "optim.b1",
  "optim.b2",
  "optim.weight_decay",
  "optim.clip",
  "optim.accumulate",
)
# The same, from one path to another: whether the same is there is said by the facts about the data.
PATHS = ("data.path", "data.train", "data.test", "data.tokenizer", "pretrained")
BOUND = ("eval.erasures",)  # not free after all: the size of a replay buffer depends on it


def flatten(config: dict) -> dict:
  """Nested dict -> {"a.b": value}; tuples are lists, as in JSON."""
  flat = traverse_util.flatten_dict(config, sep=".")
  return {key: list(value) if isinstance(value, tuple) else value for key, value in flat.items()}


def _config_file(argv: list[str]) -> str | None:
  """What `--config=FILE` or `--config FILE` names."""
  for arg, following in zip(argv, [*argv[1:], None], strict=True):
    if arg == "--config":
      return following
    if arg.startswith("--config="):
      return arg.removeprefix("--config=")
  return None


def _no_config(path: str, why: str) -> UserError:
  known = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py") if p.stem != "common"))
  return UserError(f"--config={path} {why}; the configs here are {known}.")


def _check_config_file(path: str | None) -> None:
  """Raises UserError for a file that cannot be a config; without running it."""
  file = Path((path or "").partition(":")[0])
  if path and file.is_file() and "get_config" not in file.read_text(errors="replace"):
    raise _no_config(path, "is no config, it has no get_config")


def parse_flags(argv: list[str]) -> list[str]:
  """Parses absl flags, config overrides included; returns the arguments left over.

  Raises:
    UserError: for whatever is wrong with them, in one sentence.
  """
  if sum(arg.partition("=")[0] == "--config" for arg in argv) > 1:
    raise UserError("--config is given twice; give one config.")
  _check_config_file(_config_file(argv))
  try:
    left = flags.FLAGS(argv)
    if flags.FLAGS.config is not None:
      flags.FLAGS.config.to_dict()  # a file that can't be loaded raises only once it is used
      if "method" in config_flags.get_override_values(flags.FLAGS["config"]):
        raise UserError("--config.method belongs to the config; choose another --config instead.")
    return left
  except flags.Error as err:
    if _config_file(argv) is None and any(arg.startswith("--config.") for arg in argv):
      raise UserError(
        "--config.KEY=VALUE needs --config=configs/NAME.py beside it, in training; in other modes "
        "leave it out, they have options of their own, such as --seed."
      ) from err
    lines = [line for line in str(err).splitlines() if line.strip()]
    said = lines[-1].removeprefix("ValueError: ")
    if isinstance(err, flags.UnrecognizedFlagError):
      said += "; --help lists the options, and a config's keys are written --config.KEY=VALUE."
    raise UserError(said) from err
  except OSError as err:
    raise _no_config(_config_file(argv), "cannot be read") from err
  except (AttributeError, KeyError) as err:
    sys.argv = [argv[0], f"--config={_config_file(argv)}"]  # config_flags looks for overrides here
    flags.FLAGS(sys.argv)
    config = flags.FLAGS.config.to_dict()
    given = [a.partition("=")[0].removeprefix("--config.") for a in argv if "--config." in a]
    unknown = next((key for key in given if key not in flatten(config)), given[-1])
    raise UserError(explain_unknown_key(unknown, config)) from err


def explain_unknown_key(key: str, config: dict) -> str:
  """One sentence for an override of a key that is not there, with the nearest one that is."""
  known = list(flatten(config))
  near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
  by_leaf = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
  guess = (by_leaf or near or [known[0]])[0]
  section = key.rpartition(".")[0]
  there = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
  has = f" ({section} has {', '.join(there)})" if section and there else ""
  return f"the config has no key {key!r}; did you mean --config.{guess}?{has}"


def check_same(config: dict, saved: dict, workdir, what: str = "config") -> None:
  """Raises UserError, saying what differs, if `config` must not go on from a run of `saved`.

  So it does for facts about the data; `what` is what they are called.

  What differs in TOLD and PATHS is printed by process 0. Keys that `saved` does not have are of a
  newer version, and are told.
  """
  if (found := saved.get("method")) != (wanted := config.get("method")):
    raise UserError(
      f"--workdir={workdir} holds a run of {found}, and this config is of {wanted}; choose another "
      "--workdir."
    )
  new, old = flatten(config), flatten(saved)
  changed = [
    key
    for key, value in sorted(old.items())
    if new.get(key) != value and (not key.startswith(FREE) or key in BOUND)
  ]
  differ = [
    f"{key}: {old[key]!r} there, {new.get(key)!r} here"
    for key in changed
    if key not in TOLD and not (key in PATHS and old[key] and new.get(key))
  ]
  if differ:
    raise UserError(
      f"--workdir={workdir} holds a run of another {what} ({'; '.join(differ[:5])}"
      f"{f'; and {len(differ) - 5} more' if len(differ) > 5 else ''}); choose another --workdir "
      "(with init_from= this one, to train it further), or "
      + ("set these as they were there." if what == "config" else "put the data of that time back.")
    )
  for key in changed if jax.process_index() == 0 else ():
    print(f"goes on with {key}={new.get(key)!r} ({old[key]!r} before)", flush=True)
  added = [key for key in sorted(new.keys() - old.keys()) if not key.startswith(FREE)]
  if added:
    known = ", ".join(f"{key}={new[key]!r}" for key in added)
    logging.warning("%s was saved before these were there; it goes on with %s.", workdir, known)


def check_backend(wanted: str) -> None:
  """Prints the backend; raises UserError if the config asks for another: never silently the CPU."""
  try:
    found = jax.default_backend()
  except RuntimeError as err:
    raise UserError(f"JAX cannot start a backend: {err}") from err
  kinds = ", ".join(sorted({d.device_kind for d in jax.devices()}))
  processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
  print(f"backend: {found}, {jax.device_count()} device(s) ({kinds}){processes}", flush=True)
  if wanted and wanted != found:
    raise UserError(
      f"backend={wanted!r} was asked for but JAX found {found!r}; install its wheels "
      f"(ACCELERATOR=... ./launch.sh install) or pass --config.backend={found}."
    )


def numbers(name: str, values: list[str] | None, kind: type) -> tuple:
  """A comma-separated flag as numbers, () if it was not given; UserError for what is no number."""
  try:
    return tuple(kind(value) for value in values or ())
  except ValueError as err:
    what = "whole numbers" if kind is int else "numbers"
    raise UserError(f"--{name}={','.join(values)} must be {what} separated by commas.") from err
