"""Trains, samples, evaluates, exports, encodes images or texts, compiles for other hardware.

    python main.py --config=configs/ism_digits.py --workdir=runs/ism_digits [--config.steps=500 ...]
    python main.py --mode=sample --workdir=runs/ism_digits --nfe=1,4 --guidance=0,0.5
    python main.py --mode=evaluate --workdir=runs/ism_digits [--metrics=fid,is --reference=FILE ...]
    python main.py --mode=encode --images=imagenet/train --vae=vae.safetensors --out=latents
    python main.py --mode=encode --texts=corpus --tokenizer=tokenizer.json --out=tokens
    python main.py --mode=export --workdir=runs/ism_digits --out=exported
    python main.py --mode=compile --config=configs/ism_digits.py --topology=v5e:4x4

Only training and compiling need a config: the others read the one saved with the checkpoint.
"""

import functools
import importlib
import os
import sys
import traceback
from pathlib import Path

import jax
from absl import flags, logging
from ml_collections import ConfigDict

from train_jax import config as config_lib
from train_jax import loop, mesh, optim, warm_start
from train_jax.checkpointing.checkpoint import Checkpoints
from train_jax.checkpointing.saver import SaveError
from train_jax.command import WORKDIR, Command, Config, Flag
from train_jax.errors import UserError, check_one_of
from train_jax.files import check_writable
from train_jax.multihost import distributed, signals

# A method is a package with method.py, which trains, and commands.py, the modes that come after.
METHODS = {"ism": "ism_jax", "seqmatch": "seqmatch_jax"}


def method_module(config):
  """The package that `config.method` names, as its `method` module."""
  check_one_of("config.method", config.method, METHODS)
  return importlib.import_module(f"{METHODS[config.method]}.method")


def make_optimizer(config: ConfigDict):
  """The optimiser that `config.optim` describes."""
  return optim.make_optimizer(optim.OptimConfig(**config.optim), config.steps)


def train(config: ConfigDict, workdir: Path) -> bool:
  """Starts or goes on with a run; True when it is complete, False when it was told to stop."""
  config_lib.check_backend(config.backend)
  optim_config = optim.OptimConfig(**config.optim)
  loop_config = loop.LoopConfig.of(config)
  distributed.check_shared(workdir)
  saved = Checkpoints(workdir).newest_meta()
  if saved:
    config_lib.check_same(config.to_dict(), saved["config"], workdir)
    if config.init_from and config.init_from != saved["config"].get("init_from"):
      raise UserError(
        f"--workdir={workdir} holds a run, which goes on from its own checkpoint and would not "
        f"read init_from={config.init_from!r}; choose another --workdir, or leave it out."
      )
  devices = mesh.make_mesh(config.mesh.fsdp, config.mesh.tensor)
  mesh.check_batch(config.batch, devices, optim_config.grad_accum_steps)
  module = method_module(config)
  method, metadata = module.make_method(config, devices)
  distributed.check_same_everywhere(metadata)
  if saved:
    config_lib.check_same(metadata, saved["metadata"], workdir, "set of data")

  record = {"config": config.to_dict(), "metadata": metadata}
  rules = module.warm_start(config, metadata)
  init_params = functools.partial(
    warm_start.make_init_params, rules, module.make_network, **record, mesh=devices
  )
  check_writable(workdir)
  rate, averages = optim.schedule(optim_config, config.steps), dict(config.ema)
  engine = make_optimizer(config), rate, averages, loop_config, devices
  complete = loop.train(method, *engine, workdir, record, init_params)
  if complete and jax.process_index() == 0:
    for grid in sorted((workdir / "samples").glob("*_grid.png"))[-1:]:
      print(f"samples:     {grid}")
    print(f"metrics:     {workdir / 'metrics.jsonl'} (or: tensorboard --logdir={workdir})")
    print(f"checkpoint:  {workdir / 'checkpoints' / str(config.steps)}")
  return complete


def compile_for(config: ConfigDict, topology: str) -> list:
  """Compiles the train step and the sampler for `topology`; prints what they take.

  Returns:
    Both as tools.plan.aot.Program.
  """
  from tools.plan import aot  # nothing but this mode needs it

  chip = aot.CHIPS.get(topology.partition(":")[0])
  devices = mesh.make_mesh(config.mesh.fsdp, config.mesh.tensor, aot.find_devices(topology))
  optim_config = optim.OptimConfig(**config.optim)
  mesh.check_batch(config.batch, devices, optim_config.grad_accum_steps)
  module = method_module(config)
  config, position = module.without_data(config)
  method, metadata = module.make_method(config, devices)
  shape = " ".join(f"{axis}={size}" for axis, size in devices.shape.items())
  print(
    f"{topology}: {devices.size} chips, {shape}, batch {config.batch}; of one chip:", flush=True
  )
  hyper = (
    make_optimizer(config),
    dict(config.ema),
    optim_config.clip,
    optim_config.grad_accum_steps,
  )
  programs = [aot.compile_step(method, *hyper, position, devices, chip)]
  print(aot.describe(programs[0], chip), flush=True)
  programs.append(aot.compile_program(module.sampler_program(config, metadata, devices), chip))
  print(aot.describe(programs[1], chip), flush=True)
  if chip:  # else there is no estimate
    print(aot.ASSUMPTIONS)
  return programs


def train_mode(values: flags.FlagValues) -> bool:
  """`--mode=train`: starts or goes on with a run."""
  return train(_config(values), Path(values.workdir))


def compile_mode(values: flags.FlagValues) -> None:
  """`--mode=compile`: the train step and the sampler for other hardware, without it."""
  compile_for(_config(values), values.topology)


def _config(values: flags.FlagValues) -> ConfigDict:
  if values.config is None:
    raise UserError("--config=configs/NAME.py is missing, such as --config=configs/ism_digits.py.")
  return values.config


TOPOLOGY = Flag(
  "string", "topology", "cpu:8", "Such as v5e:16x16, v5p:2x2x2, v6e:4x4, ... or cpu:8."
)
OWN = {
  "train": Command(train_mode, Config(), WORKDIR),
  "compile": Command(compile_mode, Config(), TOPOLOGY),
}


def commands() -> dict[tuple[str, str], Command]:
  """Everything that main.py can do, by mode and method ("" for any)."""
  found = {(mode, ""): command for mode, command in OWN.items()}
  for method, package in METHODS.items():
    theirs = importlib.import_module(f"{package}.commands").COMMANDS
    found |= {(mode, method): command for mode, command in theirs.items()}
  return found


def find_command(argv: list[str]) -> tuple[str, str]:
  """The (mode, method) that the arguments ask for.

  Raises:
    UserError: there is none, or what it needs to be found out is missing.
  """
  first = flags.FlagValues()
  names = ("mode", "workdir", "images", "texts", "backend")
  for name in names:
    flags.DEFINE_string(name, None, name, flag_values=first)
  try:
    first(argv, known_only=True)
  except flags.Error as err:
    raise UserError(str(err)) from err
  mode, known = first.mode or "train", commands()
  check_one_of("--mode", mode, dict.fromkeys(mode for mode, _ in known))
  if mode == "encode":
    if not (first.images or first.texts):
      raise UserError("--mode=encode needs --images=SOURCE or --texts=SOURCE.")
    if first.images and first.texts:
      raise UserError("--images and --texts are both given; choose one.")
    return mode, "seqmatch" if first.texts else "ism"
  if mode == "compile":
    return mode, ""
  if not first.workdir:
    raise UserError("--workdir=DIR is missing: the directory of the run.")
  if "://" in first.workdir:
    raise UserError(f"--workdir={first.workdir} is no directory; mount the bucket and name that.")
  if mode == "train":
    return mode, ""
  distributed.start()
  config_lib.check_backend(first.backend or "")
  return mode, Checkpoints(first.workdir).require_meta()["config"]["method"]


def explain_unknown_flag(name: str, mode: str, method: str, values: flags.FlagValues) -> str:
  """One sentence for a flag that a mode does not have: whose it is, or that there is none."""
  where = f"--mode={mode}" + (f" of a run of {method}" if method and mode != "encode" else "")
  if name == "config" or name.startswith("config."):
    if mode in OWN:
      return f"--{name} needs --config=configs/NAME.py beside it."
    return f"--{name} does nothing in {where}: the run has its own config; leave it out."
  if name == "side":
    return "--side is --image_size now."
  config = values.config if "config" in values else None
  if config is not None and name in config:
    return f"--{name} does nothing in {where}; did you mean --config.{name}?"
  if any(flag.name == name for command in commands().values() for flag in command.flags):
    return f"--{name} does nothing in {where}; leave it out."
  return (
    f"Unknown command line flag {name!r}; --help lists the options, and a config's keys are "
    "written --config.KEY=VALUE."
  )


def main(argv: list[str]) -> bool:
  """Does what the flags ask for; False where training was told to stop before its end."""
  # Compiled programs are kept between runs: a restart then takes seconds.
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent / ".cache" / "jax"))
  logging.use_absl_handler()
  mode, method = find_command(argv)
  command = commands()[mode, method]
  values = command.define()
  try:
    config_lib.parse_flags(argv, values)
  except flags.UnrecognizedFlagError as err:
    raise UserError(explain_unknown_flag(err.flagname, mode, method, values)) from err
  if mode == "encode":
    distributed.start()
    config_lib.check_backend(values.backend)
  elif mode == "train":
    distributed.start()
  return command.run(values) is not False


def show_help(argv: list[str]) -> None:
  """Prints what this program can do, its flags by mode, and the config's keys with their values."""
  print(__doc__.strip())
  for (mode, method), command in commands().items():
    print(f"\n--mode={mode}{f', {method}' if method else ''}: {command.help()}")
  values = OWN["train"].define()
  if any(arg.startswith("--config") for arg in argv):
    config_lib.parse_flags([arg for arg in argv if arg.startswith(("--config", argv[0]))], values)
    for key, value in config_lib.flatten(values.config.to_dict()).items():
      print(f"  --config.{key}={value}")


def run(argv: list[str]) -> int:
  """Exit code: 0 done, 2 the user's mistake (a sentence), 1 a run that failed, 130 Ctrl-C.

  A run that was told to stop has saved everything: 0, or 75 where STOPPED_FAILS is set, so that
  a cluster that counts it as failed starts it again.
  """
  wanted = [arg for arg in argv if arg not in ("-h", "--help")]
  try:
    if wanted != argv:
      show_help(wanted)
      return 0
    with signals.interruptible():
      complete = main(argv)
    if not complete and os.environ.get("STOPPED_FAILS"):
      return os.EX_TEMPFAIL
  except UserError as err:
    print(f"error: {err}", file=sys.stderr)
    return 2
  except (loop.DivergedError, SaveError) as err:
    print(f"stopped: {err}", file=sys.stderr)
    return 1
  except (KeyboardInterrupt, signals.Interrupted):  # while training, the loop takes it
    print("interrupted", file=sys.stderr)
    return 130
  except Exception:
    traceback.print_exc()
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(distributed.leave(run(sys.argv)))
