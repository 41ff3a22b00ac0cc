"""The seam between what is learned (a Method) and how it is run, and the one train step.

    (TrainState, Batch) -> (TrainState, Metrics)

A pure function: jitted once, its state donated, sharded by whatever mesh its arguments lie on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from train_jax import ema as ema_lib
from train_jax import mesh as mesh_lib
from train_jax.state import TrainState

PyTree = Any
Batch = dict[str, Any]
Metrics = dict[str, Any]


class Frozen(NamedTuple):
  """Parameters that a step reads and never changes: not differentiated, averaged or saved.

  Attributes:
    shapes: nested dicts of jax.ShapeDtypeStruct.
    make: shardings of the same structure -> the arrays.
  """

  shapes: PyTree
  make: Callable[[PyTree], PyTree]


class AbstractCall(NamedTuple):
  """A function with the shapes of its arguments: it can be compiled without data or devices.

  Attributes:
    name: what the function does, for a reader.
    args: trees of jax.ShapeDtypeStruct, laid out on the mesh that the function runs on.
    groups: those trees of them whose bytes are reported, by name.
    chips: devices of the mesh.
    options: keywords of jax.jit.
  """

  name: str
  function: Callable
  args: tuple
  groups: dict[str, PyTree]
  chips: int
  options: dict[str, Any]


class Method(NamedTuple):
  """Everything that the loop needs to know about a method: functions over pytrees, no objects.

  Attributes:
    init: key -> (params, extra); `aux_state` is the method's side-car in the state, or `()`.
    loss: (params, ema, batch, key) -> (scalar, metrics); differentiated in `params`. That of a
      batch is the mean of those of equal parts of its rows (see `mean_of_parts`).
    augment: (state, batch, key) -> (extra, batch); runs inside the step, before the loss, where the
      current parameters are at hand: rollouts into a replay buffer. It passes no gradient.
    stream: (seed, position) -> iterator of this process's batches (numpy), beginning with batch
      number `position`. The same arguments always give the same batches.
    evaluate: (params, step, final) -> iterator of (name, number or image); `params` are the
      inference EMA's, an image is uint8 [h, w, 3], `final` asks for the full protocol.
    frozen: None, or what `loss`, `augment` and `evaluate` then take as one argument more, the last.
  """

  init: Callable[[jax.Array], tuple[PyTree, PyTree]]
  loss: Callable[[PyTree, dict, Batch, jax.Array], tuple[jax.Array, Metrics]]
  augment: Callable[[TrainState, Batch, jax.Array], tuple[PyTree, Batch]]
  stream: Callable[[int, int], Iterator[Batch]]
  evaluate: Callable[[PyTree, int, bool], Iterator[tuple[str, Any]]]
  frozen: Frozen | None = None


def no_augment(state: TrainState, batch: Batch, key: jax.Array) -> tuple[PyTree, Batch]:
  """`Method.augment` of a method that learns from its data as they come."""
  del key
  return state.aux_state, batch


def mean_of_parts(grad_fn: Callable, parts: int, params: PyTree, batch: Batch, key: jax.Array):
  """`grad_fn(batch, key)` of `parts` parts of the batch, one after the other, and their mean.

  It takes the memory of one part. Part i has rows i, i + parts, ..., so that each stays on its
  device, and a key of its own; arrays without rows, such as a schedule's value, are the same in
  all. Gradients are added in the parameters' type.

  Args:
    grad_fn: (batch, key) -> ((loss, metrics), gradient).

  Returns:
    ((loss, metrics), gradient). Metrics are means as well, but the largest of those named `*_max`.
  """
  if parts == 1:
    return grad_fn(batch, key)

  def deal(a: jax.Array) -> jax.Array:
    if not jnp.ndim(a):
      return jnp.broadcast_to(a, (parts,))
    return a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1)

  def add(total: PyTree, part: tuple) -> tuple:
    rows, key = jax.tree.map(lambda a: mesh_lib.shard_batch(a) if a.ndim else a, part)
    values, grads = grad_fn(rows, key)
    return mesh_lib.by_rule(jax.tree.map(jnp.add, total, grads)), values

  zeros = mesh_lib.by_rule(jax.tree.map(jnp.zeros_like, params))
  total, (losses, metrics) = jax.lax.scan(
    add, zeros, (jax.tree.map(deal, batch), jax.random.split(key, parts))
  )
  largest = {name: values.max() for name, values in metrics.items() if name.endswith("_max")}
  metrics = {**jax.tree.map(jnp.mean, metrics), **largest}
  return (jnp.mean(losses), metrics), jax.tree.map(lambda g: g / parts, total)


def make_train_step(
  method: Method,
  tx: optax.GradientTransformation,
  decays: dict[str, float],
  clip: float,
  parts: int = 1,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """Returns the step: augment, gradient, clip to global norm `clip`, update, average.

  The gradient is the mean of that of `parts` parts of the batch (gradient accumulation).

  It takes the arrays of `Method.frozen`, where there are any, after the state and the batch.

  A step whose loss or gradient is not finite changes no parameter, moment, average or side-car; it
  still counts, so that the next one draws other numbers, and `skipped` says how many came in a row.
  """

  def train_step(state: TrainState, batch: Batch, *frozen) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
    key_augment, key_loss = jax.random.split(key)

    aux_state, batch = method.augment(state, batch, key_augment, *frozen)

    def grad_fn(batch: Batch, key: jax.Array):
      loss = jax.value_and_grad(method.loss, has_aux=True)
      return loss(state.params, state.ema, batch, key, *frozen)

    (loss, metrics), grads = mean_of_parts(grad_fn, parts, state.params, batch, key_loss)

    grad_norm = optax.tree.norm(grads)
    scale = jnp.minimum(1.0, clip / jnp.maximum(grad_norm, 1e-12))
    updates, opt_state = tx.update(
      jax.tree.map(lambda g: g * scale, grads), state.opt_state, state.params
    )
    params = optax.apply_updates(state.params, updates)
    ema = ema_lib.update(state.ema, params, decays, state.step)

    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    keep = (state.params, state.opt_state, state.ema, state.aux_state)
    params, opt_state, ema, aux_state = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old), (params, opt_state, ema, aux_state), keep
    )
    skipped = jnp.where(finite, 0, state.skipped + 1)
    new_state = dataclasses.replace(
      state,
      step=state.step + 1,
      skipped=skipped,
      params=params,
      opt_state=opt_state,
      ema=ema,
      aux_state=aux_state,
    )
    return new_state, {"loss": loss, **metrics, "grad_norm": grad_norm, "skipped": skipped}

  return train_step
