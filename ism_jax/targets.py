"""What to regress on: velocity, intrinsic guidance and consistency (arXiv 2510.21250, algorithm 1).

Each function makes `Rows`: inputs of the network and the target of its output. Every target is a
constant (stop-gradient). `apply(params, x, t, d, label, w)` is the network.

Dimensions: b batch, h w image, c channel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ism_jax.path import interpolate, seen_step, velocity


class Rows(NamedTuple):
  """Inputs of the network (see `dit.DiT`) and the target of its output, row by row."""

  x: jax.Array  # [b, h, w, c]
  t: jax.Array  # [b]
  d: jax.Array  # [b]
  label: jax.Array  # [b]
  w: jax.Array  # [b]
  target: jax.Array  # [b, h, w, c]


def _rows(x, t, d, label, w, target) -> Rows:
  return Rows(x, t, d, label, w, jax.lax.stop_gradient(target))


def _scale(strength: jax.Array, field: jax.Array) -> jax.Array:
  return strength[:, None, None, None] * field


def velocity_rows(x0, x1, t, label) -> Rows:
  """d = 0, w = 0: the target is v = x1 - x0 (flow matching)."""
  zero = jnp.zeros_like(t)
  return _rows(interpolate(x0, x1, t), t, zero, label, zero, velocity(x0, x1))


def both_fields(apply: Callable, params, x, t, label, null: int) -> tuple[jax.Array, jax.Array]:
  """s(x, t, 0, c, 0) and s(x, t, 0, null, 0), from one call."""
  # The two of a row are neighbours in the call: both stay on the row's device.
  x, t = jnp.repeat(x, 2, axis=0), jnp.repeat(t, 2)
  zero = jnp.zeros_like(t)
  labels = jnp.stack([label, jnp.full_like(label, null)], axis=1).reshape(-1)
  both = apply(params, x, t, zero, labels, zero)
  both = both.reshape(-1, 2, *both.shape[1:])
  return both[:, 0], both[:, 1]


def guidance_direction(apply: Callable, params, x, t, label, null: int) -> jax.Array:
  """s(x, t, 0, c, 0) - s(x, t, 0, null, 0); zero where c is null."""
  of_class, of_null = both_fields(apply, params, x, t, label, null)
  return of_class - of_null


def guidance_rows(apply, params, x0, x1, t, label, w, *, start: float, null: int) -> Rows:
  """d = 0, w > 0: the target is v + w_eff (s(x, t, 0, c, 0) - s(x, t, 0, null, 0)).

  Interval guidance: w_eff is 0 for t < start (high noise) and w elsewhere. The interval belongs to
  the target and not to the network's input, since a one-step sample starts at t = 0 with its w.
  """
  x = interpolate(x0, x1, t)
  w_eff = jnp.where(t < start, 0.0, w)
  direction = guidance_direction(apply, params, x, t, label, null)
  target = velocity(x0, x1) + _scale(w_eff, direction)
  return _rows(x, t, jnp.zeros_like(t), label, w, target)


def consistency_rows(
  apply, target_params, x0, x1, t, step, label, w, baked: float, null: int
) -> Rows:
  """One step of size 2d = `step` [b] must land where two steps of d land, at the same w.

      target = (s(x_t, t, d, c, w) + s(x', t + d, d, c, w)) / 2,    x' = x_t + d s(x_t, t, d, c, w)

  with the target network's parameters. No guidance is added here, so none compounds. `baked` > 0 is
  the original shortcut model instead, as released: its two finest steps carry the guidance
  `baked (s(c) - s(null))`, and the step above them inherits it.
  """
  d = step / 2
  x = interpolate(x0, x1, t)

  def half_step(x, t):
    direction = apply(target_params, x, t, seen_step(d), label, w)
    if baked:
      finest = jnp.where(seen_step(d) == 0, baked, 0.0)
      direction += _scale(finest, guidance_direction(apply, target_params, x, t, label, null))
    return direction

  first = half_step(x, t)
  second = half_step(x + _scale(d, first), t + d)
  return _rows(x, t, step, label, w, (first + second) / 2)
