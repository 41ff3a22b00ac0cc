"""Replay buffer of the model's own trajectories: plain arrays in the state's `aux_state`.

The buffer is saved, resumed and sharded with the state, so a resumed run replays exactly.

Dimensions: r rows of the buffer, b batch, p prompt, a actions.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from seqmatch_jax.tokens import PAD
from train_jax.errors import UserError, check_at_least

Buffer = dict[str, jax.Array]


@dataclass(frozen=True)
class BufferConfig:
  """The size of the buffer, and the pace of its rollouts.

  Attributes:
    size: trajectories that are kept, r.
    refresh: steps between rollouts.
    rollouts: trajectories made at a time.
    draw: trajectories that a step reads.
  """

  size: int
  refresh: int
  rollouts: int
  draw: int

  def __post_init__(self):
    for name in ("size", "refresh", "rollouts", "draw"):
      check_at_least(f"buffer.{name}", getattr(self, name), 1)
    if self.size < self.rollouts:
      raise UserError(
        f"buffer.size={self.size} must be at least buffer.rollouts={self.rollouts}, which are kept "
        "at once."
      )


def create(size: int, prompt_length: int, max_actions: int) -> Buffer:
  """An empty buffer: prompt [r, p], length [r], actions [r, a], `next` row and `filled` rows."""
  return {
    "prompt": jnp.full((size, prompt_length), PAD, jnp.int32),
    "length": jnp.zeros(size, jnp.int32),
    "actions": jnp.full((size, max_actions), PAD, jnp.int32),
    "next": jnp.zeros((), jnp.int32),
    "filled": jnp.zeros((), jnp.int32),
  }


def insert(buffer: Buffer, prompt: jax.Array, length: jax.Array, actions: jax.Array) -> Buffer:
  """Writes prompt [b, p], length [b] and actions [b, a], b <= r, over the b oldest rows."""
  size, b = len(buffer["length"]), len(length)
  assert b <= size, (b, size)
  index = (buffer["next"] + jnp.arange(b)) % size
  new = {"prompt": prompt, "length": length, "actions": actions}
  return {
    **{name: buffer[name].at[index].set(values) for name, values in new.items()},
    "next": (buffer["next"] + b) % size,
    "filled": jnp.minimum(buffer["filled"] + b, size),
  }


def draw(buffer: Buffer, key: jax.Array, batch: int, multiple: int = 1) -> dict[str, jax.Array]:
  """`batch` filled rows, uniform with replacement: prompt, length, actions.

  Rows without actions follow up to the next `multiple`. An empty buffer gives such rows alone.
  """
  index = jax.random.randint(key, (batch,), 0, jnp.maximum(buffer["filled"], 1))
  index = jnp.pad(index, (0, -batch % multiple))
  drawn = jnp.arange(len(index)) < batch
  rows = {name: buffer[name][index] for name in ("prompt", "length", "actions")}
  return {**rows, "actions": jnp.where(drawn[:, None], rows["actions"], PAD)}
