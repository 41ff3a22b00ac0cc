"""`Method`, which is all that the engine knows of a method, and the train step.

    (TrainState, Batch) -> (TrainState, Metrics)

The step is a pure function. It is jitted once, and its state is donated.
"""

from __future__ import annotations

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
  """Parameters that a step only reads: they are not differentiated, averaged or saved.

  Attributes:
    shapes: nested dicts of jax.ShapeDtypeStruct.
    make: shardings of the same structure -> the arrays.
  """

  shapes: PyTree
  make: Callable[[PyTree], PyTree]


class AbstractCall(NamedTuple):
  """A function with the shapes of its arguments: it can be compiled without data or devices.

  Attributes:
    name: the function's purpose, for a reader.
    args: trees of jax.ShapeDtypeStruct with shardings.
    groups: the arguments whose bytes are reported, by name.
    chips: number of devices of the mesh.
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
    init: key -> (params, aux_state); see TrainState.
    loss: (params, ema, batch, key) -> (scalar, metrics); differentiated in `params`. The loss of a
      batch is the mean of the losses of its equal parts (see `mean_of_parts`).
    augment: (state, batch, key) -> (aux_state, batch); runs inside the step before the loss, and
      may use the current parameters, as rollouts into a replay buffer do. It passes no gradient.
    stream: (seed, position) -> iterator of this process's batches (numpy), beginning with batch
      number `position`. The same arguments always give the same batches.
    evaluate: (params, step, final) -> iterator of (name, number or image). `params` is the average
      for inference, an image is uint8 [h, w, 3], `final` asks for the full protocol.
    frozen: None, or parameters that `loss`, `augment` and `evaluate` take as their last argument.
  """

  init: Callable[[jax.Array], tuple[PyTree, PyTree]]
  loss: Callable[[PyTree, dict, Batch, jax.Array], tuple[jax.Array, Metrics]]
  augment: Callable[[TrainState, Batch, jax.Array], tuple[PyTree, Batch]]
  stream: Callable[[int, int], Iterator[Batch]]
  evaluate: Callable[[PyTree, int, bool], Iterator[tuple[str, Any]]]
  frozen: Frozen | None = None


def no_augment(state: TrainState, batch: Batch, key: jax.Array) -> tuple[PyTree, Batch]:
  """`Method.augment` of a method that leaves its batches as they are."""
  del key
  return state.aux_state, batch


def mean_of_parts(grad_fn: Callable, parts: int, params: PyTree, batch: Batch, key: jax.Array):
  """The mean of `grad_fn(batch, key)` over `parts` parts of the batch, one after the other.

  It takes the memory of one part. Part i has examples i, i + parts, ..., so each stays on its
  device, and its own key. Scalars, such as a schedule's value, are the same in all parts. Gradients
  are added in the parameters' dtype.

  Args:
    grad_fn: (batch, key) -> ((loss, metrics), gradient).

  Returns:
    ((loss, metrics), gradient). Metrics are means as well, except that `*_max` are maxima.
  """
  if parts == 1:
    return grad_fn(batch, key)

  def deal(a: jax.Array) -> jax.Array:
    if not jnp.ndim(a):
      return jnp.broadcast_to(a, (parts,))
    return a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1)

  def add(total: PyTree, part: tuple) -> tuple:
    values, grads = grad_fn(*jax.tree.map(lambda a: mesh_lib.shard_batch(a) if a.ndim else a, part))
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

  The gradient is the mean over `parts` parts of the batch (gradient accumulation). Arrays of
  `Method.frozen`, if any, follow the state and the batch as an argument.

  A step with a non-finite loss or gradient changes no parameter, moment, average or `aux_state`. It
  still counts, so the next one draws other numbers; `skipped` counts such steps in a row.
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
    old_parts = (state.params, state.opt_state, state.ema, state.aux_state)
    params, opt_state, ema, aux_state = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old), (params, opt_state, ema, aux_state), old_parts
    )
    skipped = jnp.where(finite, 0, state.skipped + 1)
    new_state = TrainState(state.step + 1, skipped, params, opt_state, ema, aux_state, state.rng)
    return new_state, {"loss": loss, **metrics, "grad_norm": grad_norm, "skipped": skipped}

  return train_step
