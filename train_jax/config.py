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
  "tokenizer.path",  # of the metadata
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
  "optim.grad_accum_steps",
)
# The same, from one path to another: whether the same data are there is said by the metadata.
PATHS = ("data.path", "data.train", "data.test", "data.tokenizer", "pretrained")
# Keys of earlier versions, for who still types them.
RENAMED = {
  "optim.accumulate": "optim.grad_accum_steps",
  "data.side": "data.image_size",
  "data.made_up": "data.synthetic",
  "data.lanes": "data.sequences_per_row",
  "loss.shares": "loss.split.velocity, .guidance and .consistency",
  "loss.weights": "loss.weighting=by_example or by_term",
  "guidance.w_max": "loss.w_max",
  "guidance.w_step": "loss.w_step",
  "guidance.zero": "loss.zero_w_prob",
  "guidance.start": "loss.interval_start",
  "guidance.baked": "loss.bootstrap_guidance",
  "wavelet.levels": "loss.wavelet_levels",
  "wavelet.decay": "loss.level_decay",
  "wavelet.norm": "loss.norm",
  "buffer.rows": "buffer.size",
  "eval.erasures": "eval.max_backspaces",
}
BOUND = ("eval.max_backspaces",)  # not free after all: the size of a replay buffer depends on it


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


def parse_flags(argv: list[str], values: flags.FlagValues) -> None:
  """Parses the flags that `values` defines, overrides of a config among them.

  Raises:
    UserError: for whatever is wrong with them, in one sentence.
    flags.UnrecognizedFlagError: one is not among them.
  """
  if sum(arg.partition("=")[0] == "--config" for arg in argv) > 1:
    raise UserError("--config is given twice; give one config.")
  _check_config_file(_config_file(argv))
  try:
    left = values(argv)
    config = values.config if "config" in values else None
    if config is not None:
      config.to_dict()  # a file that can't be loaded raises only once it is used
      if "method" in config_flags.get_override_values(values["config"]):
        raise UserError("--config.method belongs to the config; choose another --config instead.")
    if len(left) > 1:
      raise UserError(f"unexpected argument {left[1]!r}; every option is written --name=value.")
  except flags.UnrecognizedFlagError:
    raise
  except flags.Error as err:
    lines = [line for line in str(err).splitlines() if line.strip()]
    raise UserError(lines[-1].removeprefix("ValueError: ")) from err
  except OSError as err:
    raise _no_config(_config_file(argv), "cannot be read") from err
  except (AttributeError, KeyError) as err:
    config = _without_overrides(argv, values)
    given = [a.partition("=")[0].removeprefix("--config.") for a in argv if "--config." in a]
    unknown = next((key for key in given if key not in flatten(config)), given[-1])
    raise UserError(explain_unknown_key(unknown, config)) from err


def _without_overrides(argv: list[str], values: flags.FlagValues) -> dict:
  """The config that --config names, as the file has it."""
  before, sys.argv = sys.argv, [argv[0], f"--config={_config_file(argv)}"]  # config_flags reads it
  try:
    values.unparse_flags()
    values(sys.argv)
    return values.config.to_dict()
  finally:
    sys.argv = before


def explain_unknown_key(key: str, config: dict) -> str:
  """One sentence for an override of a key that is not there, with the nearest one that is."""
  if key in RENAMED:
    return f"the config's key {key!r} is --config.{RENAMED[key]} now."
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

  So it does for metadata about the data; `what` is what they are called.

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
