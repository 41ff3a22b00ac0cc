"""The whole of a training run between two steps, as one pytree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def dotted(path) -> str:
  """The name of a leaf of nested dicts: the keys on the way to it, joined with dots."""
  return jax.tree_util.keystr(path, simple=True, separator=".")


def flatten(tree: PyTree) -> dict[str, Any]:
  """Nested dicts -> their leaves by dotted name."""
  return {dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
  """Everything that a step reads and writes; what is not here cannot influence training.

  Attributes:
    step: int32, number of steps taken, skipped ones included.
    skipped: int32, how many of the latest steps, in a row, were not applied (non-finite).
    params: the network's parameters, float32.
    opt_state: the optimiser's moments.
    ema: one exponential moving average of `params` for each named decay.
    extra: the method's own side-car (a replay buffer, say); `()` where there is none.
    rng: uint32 [2], the run's key. Step i draws from `fold_in(rng, i)` and nothing else.
  """

  step: jax.Array
  skipped: jax.Array
  params: PyTree
  opt_state: PyTree
  ema: dict[str, PyTree]
  aux_state: PyTree
  rng: jax.Array


def create(method, tx, decays: dict[str, float], seed: int) -> Callable[..., TrainState]:
  """Returns the function that makes the state of step 0; call it under jit, with shardings.

  It takes the parameters that are given instead of drawn, by dotted name: none if left out.

  One jit for the whole state makes every buffer its own (donation needs that) and lays out the
  optimiser's moments and the EMAs as the parameters are, from the first byte.
  """

  def init(init_params: Mapping[str, jax.Array] | None = None) -> TrainState:
    key = jax.random.key(seed)
    # A weakly typed array (`jnp.full(3, 0.1)`) would come back strong: the step compiled twice.
    params, aux_state = jax.tree.map(
      lambda a: jax.lax.convert_element_type(a, a.dtype), method.init(jax.random.fold_in(key, 0))
    )
    params = jax.tree_util.tree_map_with_path(
      lambda path, drawn: (init_params or {}).get(dotted(path), drawn), params
    )
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      skipped=jnp.zeros((), jnp.int32),
      params=params,
      opt_state=tx.init(params),
      ema={name: jax.tree.map(jnp.copy, params) for name in decays},
      aux_state=aux_state,
      rng=jax.random.key_data(jax.random.fold_in(key, 1)),
    )

  return init
