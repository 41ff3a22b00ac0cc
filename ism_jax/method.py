"""Assembles iSM for the engine. ConfigDict ends here: below are dataclasses and plain arguments."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ism_jax import loss, pairing, path, sample, wavelet
from ism_jax.data import from_config, latents, sources
from ism_jax.data.pairs import Pairs
from ism_jax.evaluation import registry
from ism_jax.loss import LossConfig
from ism_jax.model import Model, make_network, make_record
from ism_jax.networks import sit
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.step import AbstractCall, Method, no_augment
from train_jax.warm_start import WarmStart


def _check(config, loss_config: LossConfig, shape: tuple[int, int, int]) -> None:
  wavelet.check_levels(*shape[:2], loss_config.wavelet_levels)
  if loss_config.target != "two_steps" and config.model.attention != "xla":
    raise UserError(
      f"loss.target={loss_config.target!r} differentiates the network in forward mode, which "
      f"model.attention={config.model.attention!r} does not have; choose model.attention=xla."
    )
  group, parts = loss_config.group, config.optim.grad_accum_steps
  if config.batch % (group * parts):
    times = f" times optim.grad_accum_steps={parts}" if parts > 1 else ""
    raise UserError(
      f"batch={config.batch} is not divisible by {group}, the sum of loss.split="
      f"{loss_config.split}{times}; choose a multiple of {group * parts}."
    )


def _warn_of_split_groups(config, group: int, mesh: jax.sharding.Mesh) -> None:
  """Warns if the examples of a device are not whole groups of loss.split."""
  parts = mesh_lib.batch_parts(mesh) * config.optim.grad_accum_steps
  examples = config.batch // parts
  if examples % group and jax.process_index() == 0:
    logging.warning(
      "batch=%d is %d examples at a time for each of the %s, and loss.split deals out groups of "
      "%d: examples move between devices and are padded, up to 2.8 times the work; choose a batch "
      "that is a multiple of %d, or put part of the devices in mesh.tensor.",
      *(config.batch, examples, mesh_lib.parts_in_words(mesh), group, group * parts),
    )


def make_method(config, mesh: jax.sharding.Mesh) -> tuple[Method, dict]:
  """The method, and the metadata of its data (see `from_config.make_metadata`).

  Raises:
    UserError: the config contradicts itself or the data.
  """
  loss_config = LossConfig(**config.loss)
  pair_config = pairing.PairingConfig(**config.pairing)
  source, held_out = from_config.make_source(config)
  _check(config, loss_config, source.shape)
  spec = registry.make_spec(config)
  pairing.check_size(pair_config, config.batch, from_config.share_of_largest_class(source))
  _warn_of_split_groups(config, loss_config.group, mesh)
  if not config.data.synthetic:
    from_config.describe(config, source, len(held_out.labels) if held_out else 0)
  classes, metadata = len(source.names), from_config.make_metadata(source)
  in_latents = isinstance(source, latents.Latents)
  init, apply = make_network(config, metadata)
  # The evaluation with metrics has its own decoder.
  vae = config.eval.vae if in_latents and not spec.metrics else ""
  model = Model.make(make_record(config.to_dict(), metadata), dict, mesh, vae)
  path.check_settings(spec.nfe, spec.guidance, model.w_max)
  noise_rng = jax.random.fold_in(jax.random.key(config.seed), 2)
  pairs = Pairs(pair_config, source, config.batch, noise_rng)

  def loss_fn(params, ema, batch, key):
    x1 = batch["image"]
    x0 = path.draw_noise(noise_rng, batch["noise"], source.shape)
    value, metrics = loss.loss(
      loss_config, apply, params, ema["target"], x0, x1, batch["label"], classes, key
    )
    return value, {**metrics, "pair_cost": pairing.relative_cost(x0, x1)}

  def stream(seed: int, position: int):
    rows = mesh_lib.process_rows(config.batch, mesh)
    noise = functools.partial(pairs.noise_of_pool, seed)
    return sources.stream(source, config.batch, rows, seed, position, noise, pairs.pool)

  def leak() -> Iterator[tuple[str, float]]:
    if np.isfinite(value := pairs.class_leak(config.seed)):
      yield "class_leak", value

  # On latents, with thousands of inputs and classes, the leak would take longer than the run.
  has_leak = pair_config.pool and classes > 1 and not in_latents
  run = registry.make_evaluate(spec, model, source, held_out, leak if has_leak else None, mesh)
  method = Method(
    init=lambda key: (init(key), ()),
    loss=loss_fn,
    augment=latents.draw if in_latents else no_augment,
    stream=stream,
    evaluate=lambda params, step, final: run(model.with_params(params, step), final),
  )
  return method, metadata


def warm_start(config, metadata: dict) -> WarmStart:
  """`init_from` of a run may be another run, or SiT's published weights."""
  del metadata
  return WarmStart(
    must_match=("config.model.heads",),
    # These may be missing or of another size.
    reinitialized=("embed_class", "embed_guidance", "embed_step"),
    convert=functools.partial(sit.convert, config=config),
  )


def without_data(config) -> tuple[ConfigDict, int]:
  """For `--mode=compile`: `config` with synthetic data, and the step to compile.

  Classes of the data become a thousand. Pairing is off, as it is a part of the data stream.
  """
  config = config.copy_and_resolve_references()
  config.pairing.pool = 0
  if config.data.source != "digits":
    config.data.update(path="", synthetic=2000, classes=1000, held_out=0.0)
    config.eval.update(metrics=(), vae="")
  return config, 0


def sampler_program(config, metadata: dict, mesh) -> AbstractCall:
  """For `--mode=compile`: the sampler of `--mode=sample`, `config.batch` images at a time."""
  mesh = mesh_lib.mesh_for_inference("fsdp", **config.mesh, devices=list(mesh.devices.flat))
  init, apply = make_network(config, metadata)
  params = mesh_lib.abstract_state(jax.eval_shape(init, jax.random.key(0)), mesh)
  split = mesh_lib.batch_sharding(mesh)
  x0, label, w = (
    jax.ShapeDtypeStruct((config.batch, *shape), kind, sharding=split)
    for shape, kind in ((metadata["shape"], np.float32), ((), np.int32), ((), np.float32))
  )
  return AbstractCall(
    "sampler, one step",
    mesh_lib.with_mesh(mesh, functools.partial(sample.integrate, apply)),
    (params, x0, label, w, jax.ShapeDtypeStruct((), np.int32)),
    {"parameters": params},
    mesh.size,
    {"out_shardings": split},
  )
