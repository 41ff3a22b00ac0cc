"""Trains, samples, evaluates, exports, encodes images or texts, compiles ahead of time.

    python main.py --config=configs/ism_digits.py --workdir=runs/ism_digits [--config.steps=500 ...]
    python main.py --mode=sample --workdir=runs/ism_digits --nfe=1,4 --guidance=0,0.5
    python main.py --mode=evaluate --workdir=runs/ism_digits [--metrics=fid,is --reference=FILE ...]
    python main.py --mode=encode --images=imagenet/train --vae=vae.safetensors --out=latents
    python main.py --mode=encode --texts=corpus --tokenizer=tokenizer.json --out=tokens
    python main.py --mode=export --workdir=runs/ism_digits --out=exported
    python main.py --mode=compile --config=configs/ism_digits.py --topology=v5e:4x4

Only training and compiling need a config. The other modes read it from the checkpoint.
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
from train_jax.multihost import distributed, lock

# A method is a package with method.py for training and commands.py for the other modes.
METHODS = {"ism": "ism_jax", "seqmatch": "seqmatch_jax"}


def method_module(config: ConfigDict):
  """The module `method` of the package that `config.method` names."""
  check_one_of("config.method", config.method, METHODS)
  return importlib.import_module(f"{METHODS[config.method]}.method")


def make_optimizer(config: ConfigDict):
  """The optimiser of `config.optim`."""
  return optim.make_optimizer(optim.OptimConfig(**config.optim), config.steps)


def train(config: ConfigDict, workdir: Path) -> bool:
  """Starts or resumes a run; returns True if it is complete, False if a signal stopped it."""
  config_lib.check_backend(config.backend)
  optim_config = optim.OptimConfig(**config.optim)
  loop_config = loop.LoopConfig.of(config)
  distributed.check_shared(workdir)
  check_writable(workdir)
  lock.check_free(workdir)  # now, and not only once the data are read; `loop.train` holds it
  saved = Checkpoints(workdir).newest_meta()
  if saved:
    config_lib.check_same(config.to_dict(), saved["config"], workdir)
    if config.init_from and config.init_from != saved["config"]["init_from"]:
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
  """Compiles the train step and the sampler for `topology`, and prints their needs.

  Returns:
    Both as tools.plan.aot.Program.
  """
  from tools.plan import aot  # only this mode needs it

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
  tx, decays = make_optimizer(config), dict(config.ema)
  step = aot.compile_step(method, tx, decays, optim_config, position, devices, chip)
  print(aot.describe(step, chip), flush=True)
  sampler = aot.compile_program(module.sampler_program(config, metadata, devices), chip)
  print(aot.describe(sampler, chip), flush=True)
  if chip:  # otherwise there is no estimate
    print(aot.ASSUMPTIONS)
  return [step, sampler]


def train_mode(values: flags.FlagValues) -> bool:
  """`--mode=train`: starts or resumes a run."""
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
OWN = {  # modes that are the same for every method
  "train": Command(train_mode, Config(), WORKDIR),
  "compile": Command(compile_mode, Config(), TOPOLOGY),
}


def commands() -> dict[tuple[str, str], Command]:
  """All commands by mode and method, which is "" for modes in OWN."""
  table = {(mode, ""): command for mode, command in OWN.items()}
  for method, package in METHODS.items():
    module = importlib.import_module(f"{package}.commands")
    table |= {(mode, method): command for mode, command in module.COMMANDS.items()}
  return table


def find_command(argv: list[str]) -> tuple[str, str]:
  """The (mode, method) of the arguments; joins the processes if the method is in a checkpoint.

  Raises:
    UserError: there is no such mode, or a flag that decides is missing.
  """
  values = flags.FlagValues()
  for name in ("mode", "workdir", "images", "texts", "backend"):
    flags.DEFINE_string(name, None, name, flag_values=values)
  try:
    values(argv, known_only=True)
  except flags.Error as err:
    raise UserError(str(err)) from err
  mode = values.mode or "train"
  check_one_of("--mode", mode, dict.fromkeys(mode for mode, _ in commands()))
  if mode == "encode":
    if not (values.images or values.texts):
      raise UserError("--mode=encode needs --images=SOURCE or --texts=SOURCE.")
    if values.images and values.texts:
      raise UserError("--images and --texts are both given; choose one.")
    return mode, "seqmatch" if values.texts else "ism"
  if mode == "compile":
    return mode, ""
  if not values.workdir:
    raise UserError("--workdir=DIR is missing: the directory of the run.")
  if "://" in values.workdir:
    raise UserError(f"--workdir={values.workdir} is no directory; mount the bucket and name that.")
  if mode == "train":
    return mode, ""
  distributed.start()
  config_lib.check_backend(values.backend or "")
  return mode, Checkpoints(values.workdir).require_meta()["config"]["method"]


def explain_unknown_flag(name: str, mode: str, method: str, values: flags.FlagValues) -> str:
  """One sentence for a flag that a mode does not have."""
  where = f"--mode={mode}" + (f" of a run of {method}" if method and mode != "encode" else "")
  if name == "config" or name.startswith("config."):
    if mode in OWN:
      return f"--{name} needs --config=configs/NAME.py beside it."
    return f"--{name} does nothing in {where}: the run has its own config; leave it out."
  if name == "side":
    return "--side is --image_size now."
  config = values["config"].value if "config" in values else None  # they are not parsed
  if config is not None and name in config:
    return f"--{name} does nothing in {where}; did you mean --config.{name}?"
  if any(flag.name == name for command in commands().values() for flag in command.flags):
    return f"--{name} does nothing in {where}; leave it out."
  return (
    f"Unknown command line flag {name!r}; --help lists the options, and a config's keys are "
    "written --config.KEY=VALUE."
  )


def main(argv: list[str]) -> bool:
  """Runs the command of the arguments; returns False if a signal stopped training."""
  # With compiled programs kept between runs, a restart takes seconds.
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
  if mode in ("encode", "train"):
    distributed.start()
  if mode == "encode":
    config_lib.check_backend(values.backend)
  return command.run(values) is not False


def show_help(argv: list[str]) -> None:
  """Prints the modes with their flags, and the keys and values of a config in `argv`."""
  print(__doc__.strip())
  for (mode, method), command in commands().items():
    print(f"\n--mode={mode}{f', {method}' if method else ''}: {command.help()}")
  values = OWN["train"].define()
  if any(arg.startswith("--config") for arg in argv):
    config_lib.parse_flags([arg for arg in argv if arg.startswith(("--config", argv[0]))], values)
    for key, value in config_lib.flatten(values.config.to_dict()).items():
      print(f"  --config.{key}={value}")


def run(argv: list[str]) -> int:
  """Runs main and returns an exit code: 0 done, 1 failed, 2 the user's mistake, 130 Ctrl-C.

  A run that a signal stopped has saved everything. Its code is 0, or 75 if STOPPED_FAILS is set:
  then a cluster counts it as failed and starts it again.
  """
  other_args = [arg for arg in argv if arg not in ("-h", "--help")]
  try:
    if other_args != argv:
      show_help(other_args)
      return 0
    complete = main(argv)
    if not complete and os.environ.get("STOPPED_FAILS"):
      return os.EX_TEMPFAIL
  except UserError as err:
    print(f"error: {err}", file=sys.stderr)
    return 2
  except (loop.DivergedError, SaveError) as err:
    print(f"stopped: {err}", file=sys.stderr)
    return 1
  except KeyboardInterrupt:  # in training the loop handles it
    print("interrupted", file=sys.stderr)
    return 130
  except Exception:
    traceback.print_exc()
    return 1
  return 0


if __name__ == "__main__":
  sys.exit(distributed.leave(run(sys.argv)))
