"""A trained network, opened once and used everywhere: to sample, to evaluate, to hand on.

    import ism_jax
    model = ism_jax.Model.from_run("runs/ism_digits")       # a run's newest good checkpoint
    model = ism_jax.Model.from_pretrained("exported")       # what save_pretrained wrote
    images = model.sample(labels=["cat", 3], steps=4, guidance=1.0, seed=0)
    numbers = model.evaluate(nfe=[1, 4])
    model.save_pretrained("exported")

`from_pretrained` and `sample` need jax, flax, numpy and safetensors, and import nothing else. The
files: see train_jax/storage/exported.py.

Dimensions: n samples, h w image, c channel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import jax
import numpy as np

from ism_jax import dit, path, sample
from ism_jax.loss import LossConfig
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.storage import exported

METHOD = "ism"


def make_sizes(config: Mapping, metadata: Mapping) -> dit.DiTConfig:
  """Sizes of the network of a run: its config's, and what `metadata` says of its data."""
  image_size, _, channels = metadata["shape"]
  return dit.DiTConfig(
    image_size,
    channels,
    classes=len(metadata["names"]),
    shortcuts=bool(config["loss"]["split"]["consistency"]),  # learned in consistency examples
    **config["model"],
  )


def make_network(config: Mapping, metadata: Mapping) -> tuple[Callable, Callable]:
  """(init, apply) of the network of a run, see `dit.make_network`."""
  return dit.make_network(make_sizes(config, metadata))


def make_record(config: Mapping, metadata: Mapping, step: int = 0) -> dict:
  """What a `Model` is made of beside its parameters, as JSON: config.json of an export.

  Args:
    config, metadata: those saved with a checkpoint, nested dicts.
  """
  sizes = dataclasses.asdict(make_sizes(config, metadata))
  run = {"config": dict(config), "metadata": dict(metadata)}
  return {"method": METHOD, "step": step, "network": sizes, "run": run}


@dataclass(frozen=True)
class Model:
  """A trained network.

  Attributes:
    record: sizes, step, and the config and metadata of the run (see `make_record`).
    load: () -> the network's parameters, nested dicts of float32 arrays; called when they are first
      needed, so that a wrong request is refused before.
    mesh: of the devices that share the images out; None for one.
    vae: the autoencoder's file, for a model that makes latents; "" for none.
    apply: (params, x, t, d, label, w) -> step direction, as samplers call it.
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
      UserError: an autoencoder for a model that makes images, or another one than the model's.
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

      sampler = autoencoder.decoding(sampler, str(vae), metadata["vae"])
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

    The mesh shares parameters by `fsdp` only, as far as the run does, so that every device has its
    own images: decoders and the networks of metrics are not split by `tensor`.

    Args:
      step: of the checkpoint; None for the newest good one.
      vae: safetensors file of the autoencoder, for a run on latents: samples are decoded.
      devices: all, by default.

    Raises:
      UserError: no such checkpoint, of another method, or an autoencoder that is not the run's.
    """
    from train_jax.checkpointing.checkpoint import Checkpoints

    checkpoints = Checkpoints(workdir)
    config, metadata, found = checkpoints.require_run(METHOD, step)
    mesh = mesh_lib.mesh_for_inference("fsdp", **config["mesh"], devices=devices)

    def load() -> dict:
      init, _ = make_network(config, metadata)
      abstract = jax.eval_shape(init, jax.random.key(0))
      return checkpoints.restore_ema("sample", abstract, mesh, found)[0]

    return cls.make(make_record(config, metadata, found), load, mesh, vae)

  @classmethod
  def from_pretrained(cls, directory: str | Path, vae: str | Path = "") -> Model:
    """The model that `save_pretrained` wrote, on one device.

    Args:
      directory: with model.safetensors and config.json.
      vae: as in `from_run`.

    Raises:
      UserError: no such model, or an autoencoder that is not the model's.
    """
    record, stored = exported.load(directory, METHOD)
    init, _ = dit.make_network(dit.DiTConfig(**record["network"]))
    params = exported.fill(stored, jax.eval_shape(init, jax.random.key(0)))
    return cls.make(record, lambda: params, vae=vae)

  def with_params(self, params, step: int) -> Model:
    """The same model with other parameters, those of `step`; nothing is compiled again."""
    record = {**self.record, "step": step}
    return dataclasses.replace(self, record=record, load=lambda: params)

  @cached_property
  def params(self) -> dict:
    """The network's parameters, read once."""
    return self.load()

  @property
  def step(self) -> int:
    """The training step that the parameters are of."""
    return self.record["step"]

  @property
  def names(self) -> tuple[str, ...]:
    """Of the classes, by label."""
    return tuple(self.record["run"]["metadata"]["names"])

  @property
  def shape(self) -> tuple[int, int, int]:
    """(h, w, c) of what the network makes."""
    return tuple(self.record["run"]["metadata"]["shape"])

  @property
  def makes_latents(self) -> bool:
    """Whether the network's samples are latents of an autoencoder."""
    return "vae" in self.record["run"]["metadata"]

  @property
  def w_max(self) -> float:
    """The strongest guidance that was trained; inf for a plain flow model."""
    config = LossConfig(**self.record["run"]["config"]["loss"])
    return math.inf if config.is_flow_matching else config.w_max

  def labels(self, classes: int | str | Sequence[int | str]) -> np.ndarray:
    """Labels int32 [n] of classes by name or number; a string that is a name is that name.

    Raises:
      UserError: one is neither.
    """
    classes = [classes] if isinstance(classes, str | int | np.integer) else list(classes)
    index = {name: i for i, name in enumerate(self.names)}
    found = [index.get(c, c) if isinstance(c, str) else c for c in classes]
    for each in (c for c in found if isinstance(c, str) and not c.lstrip("-").isdecimal()):
      some = ", ".join(f"{i} {name}" for i, name in enumerate(self.names[:20]))
      more = ", ..." if len(self.names) > 20 else ""
      raise UserError(f"labels: {each!r} is no number or name of a class; they are {some}{more}.")
    labels = [int(c) if isinstance(c, str) else c for c in found]
    path.check_labels(labels, len(self.names))
    return np.array(labels, np.int32)

  def sample(
    self,
    labels: int | str | Sequence[int | str],
    steps: int = 4,
    guidance: float = 0.0,
    seed: int = 0,
    batch: int = sample.BATCH,
  ) -> np.ndarray:
    """One image for each label, those of `--mode=sample` at the same seed.

    Bit for bit where that draws as many, on one device; else they may be rounded otherwise.

    Args:
      labels: [n] classes, by name or number.
      steps: a power of two up to 128.
      guidance: scale w, 0 for none.
      batch: images at a time, at most; less takes less memory.

    Returns:
      float32 [n, h, w, c], around [-1, 1]; latents, if that is what the model makes and no
      autoencoder was given.

    Raises:
      UserError: the model was not trained for what is asked.
    """
    path.check_settings((steps,), (guidance,), self.w_max)
    return self.sampler(self.params, seed, self.labels(labels), guidance, steps, batch)

  def evaluate(
    self, out: str | Path | None = None, seed: int = 0, save_samples: bool = False, **choices
  ) -> dict[str, float]:
    """Numbers by name, such as "fd/nfe4_w0"; docs/METRICS.md says what is what.

    Small images are judged by a classifier fitted to the data, which are read again; with `metrics`
    the pretrained networks' statistics are compared, and none of the data is read.

    Args:
      out: also prints the numbers, and writes them and pictures into this directory.
      seed: of the noise, and of random classes.
      save_samples: with metrics, leave the samples in `out` as ADM .npz.
      choices: fields of `evaluation.spec.EvaluationSpec`, in place of the run's config.eval.

    Raises:
      UserError: the model was not trained for it, or the data or files are not there.
    """
    from ism_jax.evaluation import registry

    return registry.evaluate(self, out, seed, save_samples, choices)

  def save_pretrained(self, directory: str | Path) -> None:
    """Writes files that `from_pretrained` reads; all processes must call it, the first writes."""
    exported.save(Path(directory), self.params, self.record)
