"""A trained network, which samples, is evaluated, and is exported.

    import ism_jax
    model = ism_jax.Model.from_run("runs/ism_digits")       # a run's newest good checkpoint
    model = ism_jax.Model.from_pretrained("exported")       # files of save_pretrained
    images = model.sample(labels=["cat", 3], steps=4, guidance=1.0, seed=0)
    numbers = model.evaluate(nfe=[1, 4])
    model.save_pretrained("exported")

`from_pretrained` and `sample` import jax, flax, numpy and safetensors only.
train_jax/storage/exported.py describes the exported files.

Dimensions: n samples, h w image, c channel.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
from absl import logging

from ism_jax import dit, path, sample
from ism_jax.loss import LossConfig
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.storage import exported

METHOD = "ism"
_NUMBER = re.compile("-?[0-9]+")  # of a class; str.isdecimal would take other scripts' digits

_warn_once = functools.cache(logging.warning)


def make_sizes(config: Mapping, metadata: Mapping) -> dit.DiTConfig:
  """The sizes of a run's network, from its config and the metadata of its data."""
  image_size, _, channels = metadata["shape"]
  return dit.DiTConfig(
    image_size,
    channels,
    classes=len(metadata["names"]),
    shortcuts=bool(config["loss"]["split"]["consistency"]),  # these examples train large steps
    **config["model"],
  )


def make_network(config: Mapping, metadata: Mapping) -> tuple[Callable, Callable]:
  """(init, apply) of a run's network, see `dit.make_network`."""
  return dit.make_network(make_sizes(config, metadata))


def make_record(config: Mapping, metadata: Mapping, step: int = 0) -> dict:
  """Everything but the parameters of a `Model`, as JSON: config.json of an export.

  Args:
    config, metadata: the nested dicts of a checkpoint.
  """
  sizes = dataclasses.asdict(make_sizes(config, metadata))
  run = {"config": dict(config), "metadata": dict(metadata)}
  return {"method": METHOD, "step": step, "network": sizes, "run": run}


@dataclass(frozen=True)
class Model:
  """A trained network.

  Attributes:
    record: sizes, step, and the config and metadata of the run (see `make_record`).
    load: () -> the network's parameters, nested dicts of float32 arrays; called at the first use of
      the parameters, after the checks of a request.
    mesh: the devices that share the images; None for one device.
    vae: the autoencoder's file, for a model of latents; "" for none.
    apply: (params, x, t, d, label, w) -> step direction, for samplers.
    sampler: see `sample.make_sampler`; with `vae` its samples are decoded.
  """

  record: dict = field(repr=False)
  load: Callable[[], dict] = field(repr=False)
  mesh: jax.sharding.Mesh | None = field(repr=False)
  vae: str
  apply: Callable = field(repr=False)
  sampler: Callable = field(repr=False)

  @classmethod
  def make(
    cls,
    record: dict,
    load: Callable[[], dict],
    mesh: jax.sharding.Mesh | None = None,
    vae: str | Path = "",
  ) -> Model:
    """The model of a record and the parameters that `load` reads.

    Raises:
      UserError: the autoencoder is another one than the model's, or the model makes images.
    """
    _, apply = dit.make_network(dit.DiTConfig(**record["network"]))
    metadata = record["run"]["metadata"]
    if LossConfig(**record["run"]["config"]["loss"]).is_flow_matching:
      apply = sample.classifier_free(apply, len(metadata["names"]))
    sampler = sample.make_sampler(apply, tuple(metadata["shape"]), mesh)
    if vae:
      if "vae" not in metadata:
        raise UserError(f"vae={str(vae)!r} decodes latents, but this model makes images; omit it.")
      from ism_jax.networks import autoencoder

      sampler = autoencoder.with_decoder(sampler, str(vae), metadata["vae"])
    return cls(record, load, mesh, str(vae), apply, sampler)

  @classmethod
  def from_run(
    cls,
    workdir: str | Path,
    step: int | None = None,
    vae: str | Path = "",
    devices: list | None = None,
  ) -> Model:
    """The `sample` average of a run, on a mesh of the devices at hand.

    The mesh shards parameters by `fsdp` only, so every device has its own images: decoders and the
    networks of metrics are not sharded by `tensor`.

    Args:
      step: of the checkpoint; None for the newest good one.
      vae: the autoencoder's safetensors file, which decodes the samples of a run on latents.
      devices: None for all.

    Raises:
      UserError: the checkpoint is missing or of another method; or as `make`.
    """
    from train_jax.checkpointing.checkpoint import Checkpoints

    checkpoints = Checkpoints(workdir)
    config, metadata, step = checkpoints.require_run(METHOD, step)
    mesh = mesh_lib.mesh_for_inference("fsdp", **config["mesh"], devices=devices)

    def load() -> dict:
      init, _ = make_network(config, metadata)
      abstract = jax.eval_shape(init, jax.random.key(0))
      return checkpoints.restore_ema("sample", abstract, mesh, step)[0]

    return cls.make(make_record(config, metadata, step), load, mesh, vae)

  @classmethod
  def from_pretrained(cls, directory: str | Path, vae: str | Path = "") -> Model:
    """The model that `save_pretrained` wrote, on one device.

    Args:
      directory: with model.safetensors and config.json.
      vae: as in `from_run`.

    Raises:
      UserError: the model is missing; or as `make`.
    """
    record, tensors = exported.load(directory, METHOD)
    init, _ = dit.make_network(dit.DiTConfig(**record["network"]))
    params = exported.fill(tensors, jax.eval_shape(init, jax.random.key(0)))
    return cls.make(record, lambda: params, vae=vae)

  def with_params(self, params, step: int) -> Model:
    """The same model with the parameters of another step; nothing is compiled again."""
    record = {**self.record, "step": step}
    return dataclasses.replace(self, record=record, load=lambda: params)

  @cached_property
  def params(self) -> dict:
    """The network's parameters, read once."""
    return self.load()

  @property
  def step(self) -> int:
    """The training step of the parameters."""
    return self.record["step"]

  @property
  def names(self) -> tuple[str, ...]:
    """The classes' names, by label."""
    return tuple(self.record["run"]["metadata"]["names"])

  @property
  def shape(self) -> tuple[int, int, int]:
    """(h, w, c) of the network's samples."""
    return tuple(self.record["run"]["metadata"]["shape"])

  @property
  def makes_latents(self) -> bool:
    """Whether the network's samples are latents of an autoencoder."""
    return "vae" in self.record["run"]["metadata"]

  @property
  def w_max(self) -> float:
    """The largest trained guidance; inf for a plain flow model."""
    config = LossConfig(**self.record["run"]["config"]["loss"])
    return math.inf if config.is_flow_matching else config.w_max

  def labels(self, classes: int | str | Sequence[int | str]) -> np.ndarray:
    """Labels int32 [n] of classes by name or number; "3" is the name before the number, 3 a number.

    A warning says which class is taken where both could be meant.

    Raises:
      UserError: a class is unknown.
    """
    classes = [classes] if isinstance(classes, str | int | np.integer) else list(classes)
    index, labels = {name: i for i, name in enumerate(self.names)}, []
    for name in classes:
      label = index.get(name, name) if isinstance(name, str) else name
      if isinstance(label, str) and not _NUMBER.fullmatch(label):
        some = ", ".join(f"{i} {name}" for i, name in enumerate(self.names[:20]))
        more = ", ..." if len(self.names) > 20 else ""
        raise UserError(f"labels: {name!r} is no number or name of a class; they are {some}{more}.")
      labels.append(int(label) if isinstance(label, str) else label)
    path.check_labels(labels, len(self.names))
    for given, label in dict(zip(map(str, classes), labels, strict=True)).items():
      taken = self.names[label]
      if not _NUMBER.fullmatch(given):
        continue
      if taken == given:
        how, both = "name", label != int(given) < len(self.names)
      else:  # a class of another name; numbers as names are those of folders 1 ... 10, say
        how, both = "number", given in index or _NUMBER.fullmatch(taken)
      if both:
        _warn_once(f"labels: {given} is taken as the {how} of a class: number {label}, {taken!r}")
    return np.array(labels, np.int32)

  def sample(
    self,
    labels: int | str | Sequence[int | str],
    steps: int = 4,
    guidance: float = 0.0,
    seed: int = 0,
    batch: int = sample.BATCH,
  ) -> np.ndarray:
    """One image for each label: the images of `--mode=sample` at the same seed, up to rounding.

    Args:
      labels: [n] classes, by name or number.
      steps: 1 to 128, see `path.step_start`.
      guidance: scale w, 0 for none.
      batch: images at a time at most; fewer take less memory.

    Returns:
      float32 [n, h, w, c], around [-1, 1]; latents of a model of latents without `vae`.

    Raises:
      UserError: the model has no such classes, or was not trained for these steps or this scale.
    """
    path.check_settings((steps,), (guidance,), self.w_max)
    return self.sampler(self.params, seed, self.labels(labels), guidance, steps, batch)

  def evaluate(
    self, out: str | Path | None = None, seed: int = 0, save_samples: bool = False, **choices
  ) -> dict[str, float]:
    """Numbers by name, such as "fd/nfe4_w0"; docs/METRICS.md explains them.

    Without `metrics`, the data are read again, and a classifier of small images is fitted to them.
    With `metrics`, pretrained networks compare the samples with a reference.

    Args:
      out: if set, the numbers are printed, and written with pictures into this directory.
      seed: of the noise, and of random classes.
      save_samples: with metrics, also write the samples to `out`, as ADM .npz.
      choices: fields of `evaluation.spec.EvaluationSpec` that override the run's config.eval.

    Raises:
      UserError: the model was not trained for these settings, or data or files are missing.
    """
    from ism_jax.evaluation import registry

    return registry.evaluate(self, out, seed, save_samples, choices)

  def save_pretrained(self, directory: str | Path) -> None:
    """Writes files for `from_pretrained`; all processes must call it, and the first writes."""
    exported.save(Path(directory), self.params, self.record)
