"""The time convention, and the random draws of noise, t, d and w (arXiv 2510.21250).

t = 0 is noise and t = 1 is data, on the straight line between a noise sample x0 and an image x1:

    x_t = (1 - t) x0 + t x1,      v = dx_t/dt = x1 - x0.

One network s(x_t, t, d, c, w) is trained for steps of any size d (0 is the instantaneous velocity):

    x_{t+d} = x_t + d s(x_t, t, d, c, w).

Step sizes are powers of two from 1/128 to 1, and a step of size d starts at a multiple of d. A step
of the finest size is an Euler step of the velocity: the network sees d = 0.

Dimensions: b batch, h w image, c channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from train_jax.errors import UserError

FINEST = 128  # steps of the finest grid


def interpolate(x0: jax.Array, x1: jax.Array, t: jax.Array) -> jax.Array:
  """x_t for noise x0 and images x1 [b, h, w, c] at times t [b]."""
  t = t[:, None, None, None]
  return (1 - t) * x0 + t * x1


def velocity(x0: jax.Array, x1: jax.Array) -> jax.Array:
  """v = x1 - x0 [b, h, w, c], the same at every t."""
  return x1 - x0


def min_step_is_zero(d: jax.Array) -> jax.Array:
  """The step size as the network sees it: 0 for the finest step, d otherwise."""
  return jnp.where(d <= 1 / FINEST, 0.0, d)


def step_start(i: jax.Array, nfe: jax.Array) -> jax.Array:
  """The time at which step i of `nfe` starts, float32; i = nfe is 1. Both are int32, maybe traced.

  Every number of steps consists of trained ones: powers of two, each at a multiple of its size. Of
  the largest power 2^k <= nfe equal steps, the last nfe - 2^k are halved: 3 is 1/2, 1/4, 1/4.
  """
  i, nfe = jnp.int32(i), jnp.int32(nfe)
  power = jnp.left_shift(1, 31 - jax.lax.clz(nfe))
  whole = 2 * power - nfe  # steps that are not halved
  return jnp.where(i <= whole, 2 * i, whole + i) / (2 * power)


def both_fields(apply: Callable, params, x, t, label, null: int) -> tuple[jax.Array, jax.Array]:
  """s(x, t, 0, c, 0) and s(x, t, 0, null, 0), from one call."""
  # An example's two inputs are neighbours, so both stay on its device.
  x, t = jnp.repeat(x, 2, axis=0), jnp.repeat(t, 2)
  zero = jnp.zeros_like(t)
  labels = jnp.stack([label, jnp.full_like(label, null)], axis=1).reshape(-1)
  both = apply(params, x, t, zero, labels, zero)
  both = both.reshape(-1, 2, *both.shape[1:])
  return both[:, 0], both[:, 1]


def check_settings(nfe: Sequence[int], guidance: Sequence[float], w_max: float) -> None:
  """Raises UserError unless the network was trained for these numbers of steps and scales."""
  if not nfe:
    raise UserError(f"nfe has no value; choose from 1 to {FINEST}.")
  for steps in nfe:
    if not isinstance(steps, (int, np.integer)) or not 1 <= steps <= FINEST:
      raise UserError(f"nfe={steps} must be a whole number from 1 to {FINEST}.")
  for w in guidance:
    if not isinstance(w, (int, float)):
      raise UserError(f"guidance={w!r} must be a number.")
    if not 0 <= w <= w_max:
      raise UserError(f"guidance={w:g} is outside the trained range 0 to {w_max:g}; choose within.")


def check_labels(labels: Sequence[int], classes: int) -> None:
  """Raises UserError unless there is a label, and each is a class."""
  labels = np.asarray(labels)
  if not labels.size or labels.dtype.kind not in "iu":
    raise UserError(
      f"labels={labels.tolist()} must be whole numbers, at least one; the classes are 0 to "
      f"{classes - 1}."
    )
  for label in labels.flat:
    if not 0 <= label < classes:
      raise UserError(f"label {label} is out of range: the classes are 0 to {classes - 1}.")


def draw_noise(rng: jax.Array, index: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
  """x0 [b, h, w, c]: x0[i] is a standard normal that depends on `rng` and `index[i]` only.

  So a noise sample can be drawn again anywhere: in the pairing, on another host, after a restart.
  Only int32 indices move.
  """
  return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(rng, i), shape))(index)


def sample_times(key: jax.Array, n: int) -> jax.Array:
  """t [n], uniform on the finest grid {0, 1/128, ..., 127/128}, at which samplers use v."""
  return jax.random.randint(key, (n,), 0, FINEST) / FINEST


def sample_steps(key: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
  """(t, 2d), both [n], for consistency examples.

  2d is uniform on {1/64, 1/32, ..., 1} and t on the multiples of 2d below 1 (Frans et al.,
  arXiv 2410.12557, section 3.2).
  """
  key_step, key_time = jax.random.split(key)
  log = jax.random.randint(key_step, (n,), 0, FINEST.bit_length() - 1)  # 2d = 2^-log
  starts = 2**log
  t = jnp.floor(jax.random.uniform(key_time, (n,)) * starts) / starts
  return t, 1 / starts


def sample_intervals(key: jax.Array, n: int) -> tuple[jax.Array, jax.Array]:
  """(t, d), both [n]: where a step starts and its size, for the derivative's targets.

  d is 1 with probability 1/8, else log-uniform on [1/128, 1]; t is uniform on [0, 1 - d].
  """
  key_whole, key_size, key_time = jax.random.split(key, 3)
  size = jnp.exp2(-jnp.log2(FINEST) * jax.random.uniform(key_size, (n,)))
  d = jnp.where(jax.random.uniform(key_whole, (n,)) < 1 / 8, 1.0, size)
  return (1 - d) * jax.random.uniform(key_time, (n,)), d


def sample_guidance(
  key: jax.Array, n: int, w_max: float, w_step: float, zero_prob: float
) -> jax.Array:
  """w [n]: 0 with probability `zero_prob`, else uniform on {w_step, 2 w_step, ..., w_max}."""
  key_zero, key_value = jax.random.split(key)
  value = w_step * jax.random.randint(key_value, (n,), 1, round(w_max / w_step) + 1)
  return jnp.where(jax.random.uniform(key_zero, (n,)) < zero_prob, 0.0, value)
