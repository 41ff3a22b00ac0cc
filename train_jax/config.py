"""Configs: overrides on the command line, differences between two configs, and the backend."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path

import jax
from absl import flags, logging
from flax import traverse_util
from ml_collections import config_flags

from train_jax.errors import UserError

# A run may go on with other values of these keys: they do not change what is learned.
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
  "tokenizer.path",  # in the metadata
  "init_from",
  "model.remat",
  "model.unroll",
  "model.attention",
)
# A run may go on with other values of these keys, too, and prints them. None of them changes the
# structure of the optimiser's state.
REPORTED = (
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
# The same for paths, from one to another: the metadata say whether the data there are the same.
PATHS = ("data.path", "data.train", "data.test", "data.tokenizer", "pretrained")
# The size of a replay buffer depends on this one, so it is not free.
NOT_FREE = ("eval.max_backspaces",)
# Keys of earlier versions: an override of one is answered with its new name.
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


def flatten(config: dict) -> dict:
  """Nested dict -> {"a.b": value}; tuples become lists, as in JSON."""
  flat = traverse_util.flatten_dict(config, sep=".")
  return {key: list(value) if isinstance(value, tuple) else value for key, value in flat.items()}


def _config_file(argv: list[str]) -> str | None:
  """FILE of `--config=FILE` or `--config FILE`."""
  for arg, following in zip(argv, [*argv[1:], None], strict=True):
    if arg == "--config":
      return following
    if arg.startswith("--config="):
      return arg.removeprefix("--config=")
  return None


def _no_config(path: str, why: str) -> UserError:
  known = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py") if p.stem != "common"))
  return UserError(f"--config={path} {why}; the configs here are {known}.")


def parse_flags(argv: list[str], values: flags.FlagValues) -> None:
  """Parses the flags that `values` defines, and overrides of the config.

  Raises:
    UserError: for everything that is wrong with them, in one sentence.
    flags.UnrecognizedFlagError: a flag is not defined.
  """
  if sum(arg.partition("=")[0] == "--config" for arg in argv) > 1:
    raise UserError("--config is given twice; give one config.")
  path = _config_file(argv)
  file = Path((path or "").partition(":")[0])
  if path and file.is_file() and "get_config" not in file.read_text(errors="replace"):
    raise _no_config(path, "is no config, it has no get_config")
  try:
    unparsed = values(argv)
    config = values.config if "config" in values else None
    if config is not None:
      config.to_dict()  # absl reports a file that cannot be loaded only when the config is used
      if "method" in config_flags.get_override_values(values["config"]):
        raise UserError("--config.method belongs to the config; choose another --config instead.")
    if len(unparsed) > 1:
      raise UserError(f"unexpected argument {unparsed[1]!r}; every option is written --name=value.")
  except flags.UnrecognizedFlagError:
    raise
  except flags.Error as err:
    lines = [line for line in str(err).splitlines() if line.strip()]
    raise UserError(lines[-1].removeprefix("ValueError: ")) from err
  except OSError as err:
    raise _no_config(path, "cannot be read") from err
  except (AttributeError, KeyError) as err:
    config = _without_overrides(argv[0], path, values)
    keys = [a.partition("=")[0].removeprefix("--config.") for a in argv if "--config." in a]
    unknown = next((key for key in keys if key not in flatten(config)), keys[-1])
    raise UserError(explain_unknown_key(unknown, config)) from err


def _without_overrides(program: str, path: str, values: flags.FlagValues) -> dict:
  """The config in the file `path`."""
  before, sys.argv = sys.argv, [program, f"--config={path}"]  # config_flags reads sys.argv
  try:
    values.unparse_flags()
    values(sys.argv)
    return values.config.to_dict()
  finally:
    sys.argv = before


def explain_unknown_key(key: str, config: dict) -> str:
  """One sentence for an override of a key that does not exist, with the nearest key that does."""
  if key in RENAMED:
    return f"the config's key {key!r} is --config.{RENAMED[key]} now."
  names, (section, _, leaf) = list(flatten(config)), key.rpartition(".")
  near = difflib.get_close_matches(key, names, n=1, cutoff=0.4)
  same_leaf = [name for name in names if name.rpartition(".")[2] == leaf]
  guess = (same_leaf or near or names)[0]
  siblings = [name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == section]
  has = f" ({section} has {', '.join(siblings)})" if section and siblings else ""
  return f"the config has no key {key!r}; did you mean --config.{guess}?{has}"


def _changed(new: dict, old: dict) -> list[str]:
  """The keys of `old`, both flat, that are not FREE and have another value in `new`."""
  return [
    key
    for key, value in sorted(old.items())
    if new.get(key) != value and (not key.startswith(FREE) or key in NOT_FREE)
  ]


def _refused(changed: list[str], new: dict, old: dict) -> list[str]:
  """Those of `changed` with which a run cannot go on."""
  return [
    key
    for key in changed
    if key not in REPORTED and not (key in PATHS and old[key] and new.get(key))
  ]


def is_same(config: dict, saved: dict) -> bool:
  """Whether a run of `saved` could go on with `config`; both may be metadata of the data."""
  new, old = flatten(config), flatten(saved)
  return not _refused(_changed(new, old), new, old)


def check_same(config: dict, saved: dict, workdir, what: str = "config") -> None:
  """Raises UserError, with the differences, if `config` must not go on from a run of `saved`.

  Both may also be metadata of the data; `what` is their name in the message.

  Process 0 prints differences in REPORTED and PATHS. Keys that `saved` does not have belong to a
  newer version, and are logged.
  """
  if (old_method := saved.get("method")) != (method := config.get("method")):
    raise UserError(
      f"--workdir={workdir} holds a run of {old_method}, and this config is of {method}; choose "
      "another --workdir."
    )
  new, old = flatten(config), flatten(saved)
  changed = _changed(new, old)
  refused = [
    f"{key}: {old[key]!r} there, {new.get(key)!r} here" for key in _refused(changed, new, old)
  ]
  # An average is a part of the state.
  refused += [f"{key}: not there" for key in new if key.startswith("ema.") and key not in old]
  if refused:
    raise UserError(
      f"--workdir={workdir} holds a run of another {what} ({'; '.join(refused[:5])}"
      f"{f'; and {len(refused) - 5} more' if len(refused) > 5 else ''}); choose another --workdir "
      "(with init_from= this one, to train it further), or "
      + ("set these as they were there." if what == "config" else "put the data of that time back.")
    )
  for key in changed if jax.process_index() == 0 else ():
    print(f"goes on with {key}={new.get(key)!r} ({old[key]!r} before)", flush=True)
  added = [f"{k}={new[k]!r}" for k in sorted(new.keys() - old.keys()) if not k.startswith(FREE)]
  if added:
    logging.warning("%s lacks keys of this version; it goes on with %s.", workdir, ", ".join(added))


def check_backend(expected: str) -> None:
  """Prints the backend; UserError if it is not `expected` ("": any), never silently the CPU."""
  try:
    backend = jax.default_backend()
  except RuntimeError as err:
    raise UserError(f"JAX cannot start a backend: {err}") from err
  kinds = ", ".join(sorted({d.device_kind for d in jax.devices()}))
  processes = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
  print(f"backend: {backend}, {jax.device_count()} device(s) ({kinds}){processes}", flush=True)
  if expected and expected != backend:
    raise UserError(
      f"backend={expected!r} was asked for but JAX found {backend!r}; install its wheels "
      f"(ACCELERATOR=... ./launch.sh install) or choose backend={backend!r}."
    )
