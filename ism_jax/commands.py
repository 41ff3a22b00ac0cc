"""The modes of main.py for trained image models: their flags and functions."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
from absl.flags import FlagValues

from train_jax import command
from train_jax.command import Command, Flag, numbers
from train_jax.errors import UserError

# Functions import Model and its dependencies, so --help is quick.
NFE = Flag("list", "nfe", None, "Numbers of steps, 1 to 128.")
GUIDANCE = Flag(
  "list", "guidance", None, "Scales w, 0 to the run's loss.w_max; of flow models any."
)
VAE = Flag("string", "vae", None, "Weights of the autoencoder, for latents.")


def _open(flags: FlagValues, vae: str | None = None):
  from ism_jax.model import Model

  return Model.from_run(flags.workdir, flags.step, vae or "")


def sample(flags: FlagValues) -> None:
  """`--mode=sample`: images by class, steps and guidance, see `pictures.write_samples`."""
  from ism_jax import path
  from ism_jax.evaluation import pictures

  model = _open(flags, flags.vae)
  nfe = numbers(flags, "nfe", int) or (1, 4, path.FINEST)
  guidance = numbers(flags, "guidance", float) or (0.0,)
  path.check_settings(nfe, guidance, model.w_max)
  labels = (
    model.labels(flags.labels) if flags.labels else np.arange(len(model.names), dtype=np.int32)
  )
  if model.makes_latents and not model.vae:
    raise UserError("--vae=FILE is missing: this run's samples are latents, and it decodes them.")
  labels = np.resize(labels, flags.num or 64)
  settings = [(steps, w) for steps in nfe for w in guidance]
  with command.out_directory(flags, "generated", model.record["run"]) as out:
    pictures.write_samples(model, settings, labels, flags.seed, out)


def evaluate(flags: FlagValues) -> None:
  """`--mode=evaluate`: see `Model.evaluate`; flags override the run's config.eval."""
  model = _open(flags, flags.vae)
  choices = {"nfe": numbers(flags, "nfe", int), "guidance": numbers(flags, "guidance", float)}
  choices |= {"samples": flags.num, "metrics": tuple(flags.metrics or ())}
  choices |= {name: flags[name].value for name in ("reference", "inception", "dinov2", "classes")}
  if flags.save_samples and not flags.metrics:
    raise UserError("--save_samples is for --metrics; add --metrics=fid, or leave it out.")
  choices = {name: value for name, value in choices.items() if value}
  with command.out_directory(flags, "generated", model.record["run"]) as out:
    model.evaluate(out, flags.seed, flags.save_samples, **choices)


def export(flags: FlagValues) -> None:
  """`--mode=export`: the `sample` average as files that `Model.from_pretrained` reads."""
  model = _open(flags)
  with command.out_directory(flags, "exported", model.record["run"]) as out:
    model.save_pretrained(out)
  if jax.process_index() == 0:
    usage = f"ism_jax.Model.from_pretrained({str(out)!r}) samples from it"
    print(f"model: {out} (step {model.step}); {usage}")


def encode(flags: FlagValues) -> None:
  """`--mode=encode`: images to latents, see `data.encode.encode`."""
  from ism_jax.data import encode as encode_lib

  for name in ("vae", "out"):
    if not flags[name].value:
      raise UserError(f"--{name} is missing; --mode=encode needs --images, --vae and --out.")
  encode_lib.encode(flags.images, flags.vae, flags.image_size, flags.shards, Path(flags.out))


COMMANDS = {
  "sample": Command(
    sample,
    Flag("integer", "num", None, "Images of each setting; default: 64.", lower_bound=1),
    NFE,
    GUIDANCE,
    Flag("list", "labels", None, "Classes by name or number, in turn; default: all."),
    VAE,
    *command.DRAW_FLAGS,
  ),
  "evaluate": Command(
    evaluate,
    Flag(
      "integer",
      "num",
      None,
      "Images of each setting; default: config.eval.samples, or 50000 with --metrics.",
      lower_bound=1,
    ),
    NFE,
    GUIDANCE,
    Flag("list", "metrics", None, "Of fid, sfid, fd_dinov2, is, pr; default: by a classifier."),
    Flag("string", "reference", None, "Of the metrics: ADM .npz, or a folder of images."),
    Flag("string", "inception", None, "Weights of the FID network."),
    Flag("string", "dinov2", None, "Weights of DINOv2."),
    Flag("enum", "classes", None, "Of the samples.", enum_values=["balanced", "random"]),
    Flag("boolean", "save_samples", False, "Also write the samples, as ADM .npz."),
    VAE,
    *command.DRAW_FLAGS,
  ),
  "export": Command(export, *command.RUN_FLAGS),
  "encode": Command(
    encode,
    Flag("string", "images", None, "A folder, tars, ArrayRecord files or tfds:NAME."),
    Flag("integer", "image_size", 256, "Pixels of a side."),
    VAE,
    *command.DATA_FLAGS,
  ),
}
