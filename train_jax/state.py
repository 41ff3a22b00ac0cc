"""The state of a training run between two steps, as one pytree."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def dotted(path) -> str:
  """The name of a leaf of nested dicts: its keys, joined with dots."""
  return jax.tree_util.keystr(path, simple=True, separator=".")


def flatten(tree: PyTree) -> dict[str, Any]:
  """Nested dicts -> their leaves by dotted name."""
  return {dotted(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
  """Everything that a step reads and writes; nothing else can influence training.

  Attributes:
    step: int32, number of steps taken, skipped ones included.
    skipped: int32, number of latest steps in a row that were not applied (non-finite).
    params: the network's parameters, float32.
    opt_state: the optimiser's moments.
    ema: exponential moving averages of `params`, by name.
    aux_state: the method's own state, such as a replay buffer; `()` where there is none.
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
  """Returns `init(init_params)`, the state of step 0; call it under jit, with shardings.

  `init_params` are parameters by dotted name, which replace drawn ones.

  With one jit for the whole state every buffer has its own memory, which donation needs. Moments
  and averages are laid out as the parameters are, from the first byte.
  """

  def init(init_params: Mapping[str, jax.Array] | None = None) -> TrainState:
    key = jax.random.key(seed)
    # A step returns weakly typed arrays (`jnp.full(3, 0.1)`) as strong ones and compiles twice.
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
