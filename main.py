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

import dataclasses
import functools
import importlib
import os
import sys
import traceback
from pathlib import Path

import jax
from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from train_jax import config as config_lib
from train_jax import loop, mesh, optim, warm_start
from train_jax.checkpointing.checkpoint import Checkpoints
from train_jax.checkpointing.saver import SaveError
from train_jax.errors import UserError
from train_jax.files import check_writable
from train_jax.multihost import distributed, signals
from train_jax.multihost.distributed import check_same_everywhere

FLAGS = flags.FLAGS
config_flags.DEFINE_config_file("config", None, "File of the run: configs/NAME.py[:option].")
flags.DEFINE_string("workdir", None, "Directory of the run: checkpoints, metrics, samples.")
flags.DEFINE_enum(
  "mode", "train", ["train", "sample", "evaluate", "export", "encode", "compile"], "What to do."
)
flags.DEFINE_integer(
  "step",
  None,
  "sample, evaluate, export: the checkpoint that is used (--config.keep_every keeps older ones); "
  "default: the newest good one.",
  lower_bound=1,
)
flags.DEFINE_integer(
  "num",
  None,
  "sample: images of each row, or test questions, or held-out texts; default: 64. "
  "evaluate with --metrics: images of each row; default: 50000.",
  lower_bound=1,
)
flags.DEFINE_integer("seed", 0, "sample, evaluate: seed of the noise.", 0, 2**32 - 1)
flags.DEFINE_list("nfe", None, "sample, evaluate images: numbers of steps, of 1, 2, 4, ... 128.")
flags.DEFINE_list(
  "guidance",
  None,
  "sample, evaluate images: strengths w, 0 to the run's guidance.w_max; of a flow model any.",
)
flags.DEFINE_list(
  "labels", None, "sample images: classes by number or name, in turn; default: all."
)
flags.DEFINE_multi_string("prompt", None, "sample text: a prompt; may be given again.")
flags.DEFINE_string("prompts", None, "sample text: a file of prompts, one a line.")
flags.DEFINE_float(
  "temperature",
  None,
  "sample text: 0 is greedy; default: 0 for questions, 1 for text.",
  lower_bound=0,
)
flags.DEFINE_integer("top_k", None, "sample text: only of so many likeliest.", lower_bound=1)
flags.DEFINE_float(
  "top_p", None, "sample text: only of the likeliest that have this probability.", 0, 1
)
flags.DEFINE_integer(
  "max_actions",
  None,
  "sample text: tokens typed, erased ones and <backspace>s too; default: what the run learned.",
  lower_bound=1,
)
flags.DEFINE_bool("backspace", True, "sample text: whether it may erase.")
flags.DEFINE_bool("stream", False, "sample text: show each as it is typed and erased.")
flags.DEFINE_string(
  "pretrained",
  None,
  "sample, evaluate, export text: where the folder of the run's config.pretrained is now.",
)
flags.DEFINE_string("features", None, "evaluate text: a run or a folder, whose features MAUVE has.")
flags.DEFINE_list("metrics", None, "evaluate images: of fid, sfid, fd_dinov2, is, pr.")
flags.DEFINE_string("reference", None, "evaluate images: ADM .npz, or a folder of images.")
flags.DEFINE_string("inception", None, "evaluate images: weights of the FID network.")
flags.DEFINE_string("dinov2", None, "evaluate images: weights of DINOv2.")
flags.DEFINE_enum("classes", None, ["balanced", "random"], "evaluate images: classes drawn.")
flags.DEFINE_bool("save_samples", False, "evaluate images: also write them, as ADM .npz.")
flags.DEFINE_string("vae", None, "sample, evaluate, encode latents: weights of the autoencoder.")
flags.DEFINE_string("images", None, "encode: a folder, tars, ArrayRecord files or tfds:NAME.")
flags.DEFINE_integer("side", 256, "encode: pixels of a side.")
flags.DEFINE_string("texts", None, "encode: .txt, .jsonl or .array_record files, or tfds:NAME.")
flags.DEFINE_string(
  "tokenizer", None, "encode texts: tokenizer.json, or its folder; default: characters."
)
flags.DEFINE_integer("shards", 0, "encode: files to make; default: one for every 8192.")
flags.DEFINE_string(
  "out", None, "Directory of the results; default: WORKDIR/generated, or WORKDIR/exported."
)
flags.DEFINE_string("topology", None, "compile: v5e:16x16, v5p:2x2x2, v6e:4x4, ... or cpu:8.")

# Which of them are read, beside --workdir and --config; what is not read must not be given.
READ = {
  "train": "",
  "compile": "topology",
  "encode images": "images side vae shards out",
  "encode texts": "texts tokenizer shards out",
  "sample ism": "step num seed nfe guidance labels vae out",
  "sample seqmatch": "step num seed prompt prompts temperature top_k top_p max_actions "
  "backspace stream pretrained out",
  "evaluate ism": "step num seed nfe guidance metrics reference inception dinov2 classes "
  "save_samples vae out",
  "evaluate seqmatch": "step seed features pretrained out",
  "export ism": "step out",
  "export seqmatch": "step pretrained out",
}


def check_flags(of: str = "") -> None:
  """Raises UserError for a flag that does nothing in this mode, or in it for a run of method `of`.

  In `--mode=encode` `of` is what is encoded, images or texts. A key of --config is refused like a
  flag, where none but `backend` is read.
  """
  read = READ.get(f"{FLAGS.mode} {of}".strip(), "").split()
  where = f"--mode={FLAGS.mode}"
  if of:
    where += f" --{of}" if FLAGS.mode == "encode" else f" of a run of {of}"
  for name in sorted({*" ".join(READ.values()).split()} - {*read}):
    if FLAGS[name].value != FLAGS[name].default:
      known = FLAGS.mode == "train" and FLAGS.config and name in FLAGS.config
      raise UserError(
        f"--{name} does nothing in {where}; "
        + (f"did you mean --config.{name}?" if known else "leave it out.")
      )
  if FLAGS.mode in ("train", "compile") or not FLAGS.config:
    return
  for key in sorted(config_flags.get_override_values(FLAGS["config"]).keys() - {"backend"}):
    own = "the run has its own config" if FLAGS.workdir else "it reads no config"
    raise UserError(f"--config.{key} does nothing in {where}: {own}; leave it out.")


def method_module(config):
  """The package that `config.method` names, as its `method` module."""
  names = {"ism": "ism_jax.method", "seqmatch": "seqmatch_jax.method"}
  if config.method not in names:
    raise UserError(f"config.method={config.method!r} is unknown; choose from {', '.join(names)}.")
  return importlib.import_module(names[config.method])


def make_given(config: ConfigDict, facts: dict, devices) -> dict:
  """The parameters that a fresh run begins with instead of drawn ones, by name.

  They are those of `config.init_from`; if it is empty, the pretrained ones of a method that has
  any. A run's parameters are spread over the mesh `devices` while they are read.
  """
  module = method_module(config)
  if not config.init_from:
    return module.make_given(config, facts) if hasattr(module, "make_given") else {}

  def abstract(config, facts):
    init = module.make_network(ConfigDict(config), facts)[0]
    return jax.eval_shape(init, jax.random.key(0))

  convert = None
  if hasattr(module, "convert"):
    convert = functools.partial(module.convert, config=config)
  trained = warm_start.read(config.init_from, config.method, abstract, devices, convert)
  run = {"config": config.to_dict(), "facts": facts}
  warm_start.check_alike(trained, run, module.same(config))
  given, line = warm_start.choose(trained, abstract(config, facts), module.FRESH)
  if jax.process_index() == 0:
    print(line, flush=True)
  return given


def make_optim_config(config: ConfigDict) -> optim.OptimConfig:
  """The optimiser of `config.optim`; clip and accumulate are the step's."""
  names = optim.OptimConfig.__dataclass_fields__
  return optim.OptimConfig(**{name: config.optim[name] for name in names})


def make_schedule(config: ConfigDict):
  """AdamW's learning rate by step."""
  return optim.schedule(make_optim_config(config), config.steps)


def make_optimizer(config: ConfigDict):
  """The optimiser that `config.optim` describes."""
  return optim.make_optimizer(make_optim_config(config), config.steps)


def compile_for(config: ConfigDict, topology: str) -> list:
  """Compiles the train step and the sampler for `topology`; prints what they take.

  Returns:
    Both as tools.plan.aot.Program.
  """
  from tools.plan import aot  # nothing but this mode needs it

  chip = aot.CHIPS.get(topology.partition(":")[0])
  devices = mesh.make_mesh(config.mesh.fsdp, config.mesh.tensor, aot.find_devices(topology))
  mesh.check_batch(config.batch, devices, config.optim.accumulate)
  module = method_module(config)
  config, position = module.without_data(config)
  method, facts = module.make_method(config, devices)
  shape = " ".join(f"{axis}={size}" for axis, size in devices.shape.items())
  print(
    f"{topology}: {devices.size} chips, {shape}, batch {config.batch}; of one chip:", flush=True
  )
  hyper = (make_optimizer(config), dict(config.ema), config.optim.clip, config.optim.accumulate)
  programs = [aot.compile_step(method, *hyper, position, devices, chip)]
  print(aot.describe(programs[0], chip), flush=True)
  programs.append(aot.compile_program(module.sampler_program(config, facts, devices), chip))
  print(aot.describe(programs[1], chip), flush=True)
  if chip:  # else there is no estimate
    print(aot.ASSUMPTIONS)
  return programs


def train(config: ConfigDict, workdir: Path) -> bool:
  """Starts or goes on with a run; True when it is complete, False when it was told to stop."""
  config_lib.check_backend(config.backend)
  of_optim = {name: config.optim[name] for name in ("clip", "accumulate")}
  names = {field.name for field in dataclasses.fields(loop.LoopConfig)} - of_optim.keys()
  settings = loop.LoopConfig(**of_optim, **{name: config[name] for name in names})
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
  mesh.check_batch(config.batch, devices, config.optim.accumulate)
  method, facts = method_module(config).make_method(config, devices)
  check_same_everywhere(facts)
  if saved:  # by a version that knew fewer facts, perhaps
    known = {name: value for name, value in facts.items() if name in saved["facts"]}
    config_lib.check_same(known, saved["facts"], workdir, "set of data")

  record = {"config": config.to_dict(), "facts": facts}
  given = functools.partial(make_given, config, facts, devices)
  check_writable(workdir)
  engine = make_optimizer(config), make_schedule(config), dict(config.ema), settings, devices
  complete = loop.train(method, *engine, workdir, record, given)
  if complete and jax.process_index() == 0:
    for grid in sorted((workdir / "samples").glob("*_grid.png"))[-1:]:
      print(f"samples:     {grid}")
    print(f"metrics:     {workdir / 'metrics.jsonl'} (or: tensorboard --logdir={workdir})")
    print(f"checkpoint:  {workdir / 'checkpoints' / str(config.steps)}")
  return complete


def use_checkpoint(workdir: Path) -> None:
  """Uses the newest good checkpoint, or that of --step, in another mode: its config and average."""
  checkpoints = Checkpoints(workdir)
  saved = checkpoints.require_meta(FLAGS.step)
  config, facts = ConfigDict(saved["config"]), saved["facts"]
  config_lib.check_backend(FLAGS.config.backend if FLAGS.config else "")
  module = method_module(config)

  def load(devices):
    init = module.make_network(config, facts)[0]
    abstract = jax.eval_shape(init, jax.random.key(0))
    return checkpoints.restore_ema("sample", abstract, devices, FLAGS.step)

  check_flags(config.method)
  if FLAGS.pretrained:
    config, facts = module.moved(config, facts, FLAGS.pretrained)
  default = workdir / ("exported" if FLAGS.mode == "export" else "generated")
  out = Path(FLAGS.out) if FLAGS.out else default
  check_writable(out, "--out")
  getattr(module, f"{FLAGS.mode}_mode")(config, facts, load, FLAGS, out)
  checkpoints.close()


def main(argv: list[str]) -> bool:
  """Does what the flags ask for; False where training was told to stop before its end."""
  if len(argv) > 1:
    raise UserError(f"unexpected argument {argv[1]!r}; every option is written --name=value.")
  if not FLAGS.workdir and FLAGS.mode not in ("encode", "compile"):
    raise UserError("--workdir=DIR is missing: the directory of the run.")
  if "://" in (FLAGS.workdir or ""):
    raise UserError(f"--workdir={FLAGS.workdir} is no directory; mount the bucket and name that.")
  # Compiled programs are kept between runs: a restart then takes seconds.
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent / ".cache" / "jax"))
  logging.use_absl_handler()
  if FLAGS.mode in READ:
    check_flags()
  if FLAGS.mode == "encode":
    distributed.start()
    config_lib.check_backend(FLAGS.config.backend if FLAGS.config else "")
    if not (FLAGS.images or FLAGS.texts):
      raise UserError("--mode=encode needs --images=SOURCE or --texts=SOURCE.")
    if FLAGS.images and FLAGS.texts:
      raise UserError("--images and --texts are both given; choose one.")
    check_flags("texts" if FLAGS.texts else "images")
    encode = "seqmatch_jax.data.encode" if FLAGS.texts else "ism_jax.data.encode"
    importlib.import_module(encode).encode_mode(FLAGS)
  elif FLAGS.mode not in ("train", "compile"):
    distributed.start()
    use_checkpoint(Path(FLAGS.workdir))
  elif FLAGS.config is None:
    raise UserError("--config=configs/NAME.py is missing, such as --config=configs/ism_digits.py.")
  elif FLAGS.mode == "compile":
    compile_for(FLAGS.config, FLAGS.topology or "cpu:8")
  else:
    distributed.start()
    return train(FLAGS.config, Path(FLAGS.workdir))
  return True


def show_help() -> None:
  """Prints what this program can do, its flags, and the config's keys with their values."""
  print(f"{__doc__.strip()}\n\n{FLAGS.main_module_help()}")
  for key, value in config_lib.flatten(FLAGS.config.to_dict() if FLAGS.config else {}).items():
    print(f"  --config.{key}={value}")


def run(argv: list[str]) -> int:
  """Exit code: 0 done, 2 the user's mistake (a sentence), 1 a run that failed, 130 Ctrl-C.

  A run that was told to stop has saved everything: 0, or 75 where STOPPED_FAILS is set, so that
  a cluster that counts it as failed starts it again.
  """
  wanted = [arg for arg in argv if arg not in ("-h", "--help")]
  try:
    args = config_lib.parse_flags(wanted)
    if wanted != argv:
      show_help()
      return 0
    with signals.interruptible():
      complete = main(args)
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
