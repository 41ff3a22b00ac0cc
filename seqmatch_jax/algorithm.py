"""The paper's algorithm box: what a train step does with a batch (arXiv 2306.05426, algorithm 1).

    steps 0 to warmup      maximum likelihood, on data without noise
    the next `anneal`      errors are typed and erased in the data, and alpha grows from 0
    then                   the whole objective

A divergence may need the model's own trajectories. From the end of the warm-up on, the model writes
some into a replay buffer every `refresh` steps, and each step draws from there.

These are pure functions of the state, a batch and a key. All else that they read is a `Learner`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqmatch_jax import buffer, loss
from seqmatch_jax.actions import Noise, tree
from seqmatch_jax.buffer import BufferConfig
from seqmatch_jax.loss import LossConfig
from seqmatch_jax.transformer import TransformerFunctions
from train_jax import lora


class Learner(NamedTuple):
  """The constants of a train step.

  Attributes:
    generate: the function of `rollout.make_rollout`, traced inside the step.
    nodes: of a trajectory's tree: all that is typed, whether it stays in the text or is erased.
    multiple: the drawn trajectories are padded to this multiple; every device would compute all of
      those that the devices cannot share.
  """

  loss: LossConfig
  buffer: BufferConfig
  network: TransformerFunctions
  generate: Callable
  nodes: int
  multiple: int


def alpha_scale(config: LossConfig, step: jax.Array) -> jax.Array:
  """The factor of alpha: 0 until the end of the warm-up, 1 after the annealing."""
  return jnp.clip((step - config.warmup) / max(config.anneal, 1), 0.0, 1.0)


def stream(
  config: LossConfig, noise: Noise, batches: Callable, seed: int, position: int
) -> Iterator[dict]:
  """The batches from `position` on, without noise during the warm-up.

  Args:
    batches: (noise, seed, position) -> iterator of batches.
  """
  quiet = dataclasses.replace(noise, rate=0.0)
  yield from itertools.islice(batches(quiet, seed, position), max(config.warmup - position, 0))
  yield from batches(noise, seed, max(position, config.warmup))


def roll_out(learner: Learner, memory: buffer.Buffer, params, batch: dict, key) -> buffer.Buffer:
  """The buffer with new trajectories: the current policy continues the batch's prompts."""
  prompt, length = (batch[name][: learner.buffer.rollouts] for name in ("prompt", "prompt_length"))
  row, erases = jnp.arange(len(prompt)), learner.loss.backspace
  # The policy itself: temperature 1, no token excluded.
  rollout = learner.generate(params, prompt, length, key, row, 1.0, erases, allow_retype=True)
  return buffer.insert(memory, prompt, length, rollout.actions)


def replay(learner: Learner, memory: buffer.Buffer, key: jax.Array) -> dict:
  """Trajectories drawn from the buffer, as a batch of trees; of weight 0 while it is empty."""
  drawn = buffer.draw(memory, key, learner.buffer.draw, learner.multiple)
  return tree(drawn["prompt"], drawn["length"], drawn["actions"], learner.nodes)


def augment(learner: Learner, state, batch: dict, key: jax.Array, *frozen):
  """`Method.augment`: (buffer, batch) with alpha's scale, and with the model's own trajectories."""
  config, memory, model = learner.loss, state.aux_state, None
  if config.on_policy:
    key_roll, key_draw = jax.random.split(key)
    past = state.step - config.warmup
    memory = jax.lax.cond(
      (past >= 0) & (past % learner.buffer.refresh == 0),
      lambda old: roll_out(learner, old, lora.join(state.params, *frozen), batch, key_roll),
      lambda old: old,
      memory,
    )
    model = replay(learner, memory, key_draw)
  batch, model = loss.normalized(batch, model)
  batch["alpha_scale"] = alpha_scale(config, state.step)
  return memory, batch if model is None else {**batch, "model": model}


def batch_loss(learner: Learner, params, ema, batch: dict, key: jax.Array, *frozen):
  """`Method.loss` of the batch that `augment` returned."""
  del ema, key
  params, scale = lora.join(params, *frozen), batch["alpha_scale"]

  def logits(params, trees):
    return learner.network.apply(params, trees["token"], trees["position"], trees["end"])

  model, model_logits = batch.get("model"), None
  if model is not None:
    # Their penalty is 0 while alpha is 0, and the pass is saved.
    shape = jax.eval_shape(logits, params, model)
    zeros = lambda params, trees: jnp.zeros(shape.shape, shape.dtype)  # noqa: E731
    model_logits = jax.lax.cond(scale > 0, logits, zeros, params, model)
  return loss.loss(learner.loss, logits(params, batch), batch, model, model_logits, scale)
