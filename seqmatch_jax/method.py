"""Assembles SequenceMatch for the engine. ConfigDict ends here."""

from __future__ import annotations

import functools

import jax
import numpy as np
from ml_collections import ConfigDict

from seqmatch_jax import algorithm, buffer, rollout
from seqmatch_jax.actions import Noise
from seqmatch_jax.algorithm import Learner
from seqmatch_jax.buffer import BufferConfig
from seqmatch_jax.huggingface import decoder, tokenizer
from seqmatch_jax.huggingface.decoder import make_network
from seqmatch_jax.huggingface.saved import make_limits, make_record
from seqmatch_jax.loss import LossConfig
from seqmatch_jax.model import Model, load_features
from seqmatch_jax.tasks.from_config import find_task
from train_jax import lora
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError, check_at_least
from train_jax.step import AbstractCall, Method
from train_jax.warm_start import WarmStart


def _check(config) -> None:
  if config.noise.rate and not config.loss.backspace:
    raise UserError(
      f"noise.rate={config.noise.rate} types errors that loss.backspace=False cannot erase; "
      "choose noise.rate=0 or loss.backspace=True."
    )
  check_at_least("eval.max_backspaces", config.eval.max_backspaces, 0)
  if config.buffer.rollouts > config.batch:
    raise UserError(
      f"buffer.rollouts={config.buffer.rollouts} must be at most batch={config.batch}, whose "
      "prompts they go on from."
    )


def make_method(config, mesh: jax.sharding.Mesh) -> tuple[Method, dict]:
  """The method, and the metadata that sampling needs: the characters, the lengths of rows.

  Raises:
    UserError: the config contradicts itself or the data.
  """
  _check(config)
  loss_config, noise = LossConfig(**config.loss), Noise(**config.noise)
  memory = BufferConfig(**config.buffer)
  config, task_module = decoder.with_tokenizer(config), find_task(config)
  task = task_module.make_task(config, mesh)
  metadata = decoder.make_metadata(config, task.metadata)
  decoder.read(config, metadata)  # refuses wrong files before anything is computed
  network = make_network(config, metadata)
  learner = Learner(
    loss_config,
    memory,
    network,
    rollout.make_rollout(network, make_limits(metadata, task_module)),
    nodes=metadata["max_length"] + metadata["max_backspaces"],
    multiple=mesh_lib.batch_parts(mesh) * config.optim.grad_accum_steps,
  )

  def init(key):
    if not loss_config.on_policy:
      return network.init(key), ()
    return network.init(key), buffer.create(memory.size, task.prompt, metadata["max_actions"])

  record = make_record(config, metadata, decoder.make_sizes(config, metadata), task_module)
  vocab, features = tokenizer.from_metadata(metadata), config.eval.get("features", "")
  model = Model.make(record, vocab, network, dict, mesh)
  evaluate = task.evaluate(model, load_features(features, vocab) if features else None)

  def measure(params, step: int, final: bool, *frozen):
    return evaluate(model.with_params(lora.join(params, *frozen), step), final)

  method = Method(
    init=init,
    loss=functools.partial(algorithm.batch_loss, learner),
    augment=functools.partial(algorithm.augment, learner),
    stream=functools.partial(algorithm.stream, loss_config, noise, task.stream),
    evaluate=measure,
    frozen=decoder.make_frozen(config, metadata),
  )
  return method, metadata


def warm_start(config, metadata: dict) -> WarmStart:
  """The start of a run of `config`: what `init_from` must match, or its pretrained weights."""
  keys = ("config.model.heads", "metadata.symbols", "metadata.tokenizer.sha256")
  if config.get("lora") and config.lora.rank:
    # Adapters belong to the matrices that they were learned on.
    base = "metadata.weights_sha256" if config.get("pretrained") else "config.seed"
    keys = (*keys, "config.lora.alpha", base)
  pretrained = functools.partial(decoder.make_init_params, config, metadata)
  return WarmStart(must_match=keys, pretrained=pretrained)


def without_data(config) -> tuple[ConfigDict, int]:
  """For `--mode=compile`: a config that needs no files but the repository's, and a batch's number.

  The texts are Python's own. A pretrained decoder is drawn, with the sizes in `config.model` and
  `data.vocab` tokens. The batch is the first with noise, because rows of questions are wider then.
  """
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.pretrained = ""
    if config.data.source == "text":
      config.data.path = config.data.test = config.data.tokenizer = ""
      config.model.vocab = config.data.get("vocab", 0)
  return config, config.loss.warmup


def sampler_program(config, metadata: dict, mesh) -> AbstractCall:
  """For `--mode=compile`: generation as `--mode=sample` does it, `config.batch` rows at a time."""
  mesh = decoder.mesh_of(config, list(mesh.devices.flat))
  network = make_network(config, metadata)
  task = find_task(config)
  prompt = task.make_prompts(config, metadata, [], 1).prompt
  generate = rollout.make_rollout(network, make_limits(metadata, task))
  key = jax.eval_shape(jax.random.key, 0)
  shapes = jax.eval_shape(lambda key: lora.join(network.init(key), network.frozen(key)), key)
  params = mesh_lib.abstract_state(shapes, mesh)
  rows = jax.ShapeDtypeStruct((config.batch,), np.int32)
  prompts = jax.ShapeDtypeStruct((config.batch, prompt.shape[1]), np.int32)
  return AbstractCall(
    "generation, the prompts and one action",
    mesh_lib.with_mesh(mesh, generate),
    (params, prompts, rows, key, rows),
    {"parameters": params},
    mesh.size,
    {"out_shardings": mesh_lib.replicated(mesh)},
  )
