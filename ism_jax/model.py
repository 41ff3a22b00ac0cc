"""A trained model without its training stack: written by `--mode=export`, used from anywhere.

    import ism_jax
    model = ism_jax.load_pretrained("exported")
    images = model.sample(labels=[0, 3, 5], nfe=4, guidance=1.0, seed=0)

Needs jax, flax, numpy and safetensors; nothing else is imported. The files: see
train_jax/storage/exported.py.

Dimensions: n samples, h w image, c channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from ism_jax import dit, path, sample
from train_jax.errors import UserError
from train_jax.storage import exported

METHOD = "ism"


@dataclass(frozen=True)
class Loaded:
  """A trained model.

  Attributes:
    names: of the classes, by label.
    shape: (h, w, c) of what the network makes.
    w_max: strongest guidance that was trained; inf for a plain flow model, see
      `sample.classifier_free`.
    record: config.json: sizes, step, and the config of the run.
    params: the network's parameters, nested dicts of float32 arrays.
    apply: (params, x, t, d, label, w) -> step direction (see dit.DiT).
    sampler: see sample.make_sampler; decodes if an autoencoder was given.
  """

  names: tuple[str, ...]
  shape: tuple[int, int, int]
  w_max: float
  record: dict = field(repr=False)
  params: dict = field(repr=False)
  apply: Callable = field(repr=False)
  sampler: Callable = field(repr=False)

  def sample(
    self,
    labels: int | Sequence[int],
    nfe: int = 4,
    guidance: float = 0.0,
    seed: int = 0,
    batch: int = sample.BATCH,
  ) -> np.ndarray:
    """One image for each label, those of `--mode=sample` at the same seed.

    Bit for bit where that draws as many, on one device; else they may be rounded otherwise.

    Args:
      labels: [n] classes by number.
      nfe: number of steps, a power of two up to 128.
      guidance: strength w, 0 for none.
      batch: images at a time, at most; less takes less memory.

    Returns:
      float32 [n, h, w, c], around [-1, 1]; latents, if that is what the model makes and no
      autoencoder was given.

    Raises:
      UserError: the model was not trained for what is asked.
    """
    path.check_settings((nfe,), (guidance,), self.w_max)
    labels = np.atleast_1d(labels)
    path.check_labels(labels, len(self.names))
    return self.sampler(self.params, seed, labels, guidance, nfe, batch)


def load_pretrained(directory: str | Path, vae: str | Path | None = None) -> Loaded:
  """The model that `--mode=export` wrote.

  Args:
    directory: with model.safetensors and config.json.
    vae: safetensors file of the autoencoder, for a model that makes latents: samples are decoded.

  Raises:
    UserError: no such model, or an autoencoder that is not the model's.
  """
  record, stored = exported.load(directory, METHOD)
  init, apply = dit.make_network(dit.DiTConfig(**record["network"]))
  params = exported.fill(stored, jax.eval_shape(init, jax.random.key(0)))
  config, facts = record["run"]["config"], record["run"]["facts"]
  shape, names, w_max = tuple(facts["shape"]), tuple(facts["names"]), config["guidance"]["w_max"]
  sampled = apply
  if sample.is_flow(config["loss"]["shares"], config["loss"]["class_dropout"]):
    sampled, w_max = sample.classifier_free(apply, len(names)), math.inf
  sampler = sample.make_sampler(sampled, shape)
  if vae is not None:
    if "vae" not in facts:
      raise UserError(f"vae={str(vae)!r} decodes latents, but {directory} makes images; omit it.")
    from ism_jax.networks import autoencoder

    sampler = autoencoder.decoding(sampler, vae, facts["vae"])
  return Loaded(names, shape, w_max, record, params, apply, sampler)
