"""The paper's algorithm box: a batch -> the loss of its velocity, guidance and consistency rows.

    L = weight_v L_velocity + weight_g L_guidance + weight_c L_consistency

(arXiv 2510.21250, algorithm 1). Flow matching and the original shortcut objective (arXiv
2410.12557) are the same function with other shares, weights and `baked_guidance`.

What each term regresses on comes first: `Rows` are inputs of the network and the target of its
output, a constant (stop-gradient). `apply(params, x, t, d, label, w)` is the network.

Dimensions: b batch, g group, h w image, c channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ism_jax import path, wavelet
from train_jax.errors import UserError

ROLES = ("velocity", "guidance", "consistency")


@dataclass(frozen=True)
class LossConfig:
  """Which terms there are and how the batch is spent on them.

  Attributes:
    shares: rows of each role (velocity, guidance, consistency) in every group of sum(shares) rows.
    weights: weight of each role's mean distance in the loss.
    classes: number of classes; the label `classes` is null.
    class_dropout: probability that a velocity row loses its class.
    w_max, w_step: guidance strengths are w_step, 2 w_step, ..., w_max; w_max = 0 has w = 0 only.
    zero_w: probability that a consistency row has w = 0.
    interval_start: guidance acts for t >= interval_start.
    baked_guidance: the original shortcut model's fixed guidance; 0 for iSM.
    levels, level_decay, norm: the wavelet distance, see `wavelet.level_weights`; norm is l2 or
      charbonnier.
  """

  shares: tuple[int, int, int]
  weights: tuple[float, float, float]
  classes: int
  class_dropout: float
  w_max: float
  w_step: float
  zero_w: float
  interval_start: float
  baked_guidance: float
  levels: int
  level_decay: float
  norm: str

  def __post_init__(self):
    check_shares(self.shares)
    if self.norm not in ("l2", "charbonnier"):
      raise UserError(f"wavelet.norm={self.norm!r} is unknown; choose 'l2' or 'charbonnier'.")
    if len(self.weights) != 3:
      raise UserError(
        f"loss.weights={self.weights} must be three numbers (velocity, guidance, consistency)."
      )
    if bool(self.shares[1]) != bool(self.w_max):
      raise UserError(
        f"loss.shares={self.shares} has {self.shares[1]} guidance rows but guidance.w_max="
        f"{self.w_max:g}: a strength is learned in guidance rows, so set both or neither to 0."
      )
    if not 0 <= self.interval_start < 1 or not self.baked_guidance >= 0:
      raise UserError(
        f"guidance.start={self.interval_start:g} must be at least 0 and below 1, where images are "
        f"whole, and guidance.baked={self.baked_guidance:g} at least 0."
      )
    multiple = self.w_step > 0 and 0 <= self.w_max < math.inf
    steps = round(self.w_max / self.w_step) if multiple else -1
    if steps < 0 or abs(steps * self.w_step - self.w_max) > 1e-6:
      raise UserError(
        f"guidance.w_max={self.w_max:g} must be a multiple of guidance.w_step={self.w_step:g}, "
        "which must be above 0."
      )


def check_shares(shares: tuple) -> None:
  """Raises UserError unless they are three counts of rows, some of them of the first role."""
  counts = len(shares) == 3 and all(isinstance(share, int) for share in shares)
  if not counts or shares[0] < 1 or min(shares) < 0:
    raise UserError(
      f"loss.shares={shares} must be three counts (velocity, guidance, consistency), the first at "
      "least 1."
    )


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
  return _rows(path.interpolate(x0, x1, t), t, zero, label, zero, path.velocity(x0, x1))


def guidance_direction(apply: Callable, params, x, t, label, null: int) -> jax.Array:
  """s(x, t, 0, c, 0) - s(x, t, 0, null, 0); zero where c is null."""
  of_class, of_null = path.both_fields(apply, params, x, t, label, null)
  return of_class - of_null


def guidance_rows(apply, params, x0, x1, t, label, w, *, start: float, null: int) -> Rows:
  """d = 0, w > 0: the target is v + w_eff (s(x, t, 0, c, 0) - s(x, t, 0, null, 0)).

  Interval guidance: w_eff is 0 for t < start (high noise) and w elsewhere. The interval belongs to
  the target and not to the network's input, since a one-step sample starts at t = 0 with its w.
  """
  x = path.interpolate(x0, x1, t)
  w_eff = jnp.where(t < start, 0.0, w)
  direction = guidance_direction(apply, params, x, t, label, null)
  target = path.velocity(x0, x1) + _scale(w_eff, direction)
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
  x = path.interpolate(x0, x1, t)

  def half_step(x, t):
    direction = apply(target_params, x, t, path.seen_step(d), label, w)
    if baked:
      finest = jnp.where(path.seen_step(d) == 0, baked, 0.0)
      direction += _scale(finest, guidance_direction(apply, target_params, x, t, label, null))
    return direction

  first = half_step(x, t)
  second = half_step(x + _scale(d, first), t + d)
  return _rows(x, t, step, label, w, (first + second) / 2)


def split_rows(shares: tuple[int, ...], *arrays: jax.Array) -> list[tuple[jax.Array, ...]]:
  """Deals rows to roles: of every sum(shares) neighbours, the first shares[0] to role 0, and so on.

  Dealing inside small groups of neighbours keeps each device's rows on that device, if these are
  whole groups. Else XLA moves rows and fills them up: at 4, 2 and 1 rows a device a group of 8
  costs 1.19, 1.76 and 2.77 times its FLOPs (`method.py` warns).
  """
  group, start, roles = sum(shares), 0, []
  for share in shares:
    taken = slice(start, start + share)
    roles.append(
      tuple(a.reshape(-1, group, *a.shape[1:])[:, taken].reshape(-1, *a.shape[1:]) for a in arrays)
    )
    start += share
  return roles


def merge_rows(shares: tuple[int, ...], roles: list[jax.Array]) -> jax.Array:
  """The inverse of `split_rows` for one array."""
  grouped = [a.reshape(-1, n, *a.shape[1:]) for n, a in zip(shares, roles, strict=True)]
  merged = jnp.concatenate(grouped, axis=1)
  return merged.reshape(-1, *merged.shape[2:])


def distance(config: LossConfig, error: jax.Array) -> jax.Array:
  """Wavelet distance per element of error [b, h, w, c] -> [b]."""
  weights = wavelet.level_weights(config.levels, config.level_decay)
  per_row = wavelet.l2_distance if config.norm == "l2" else wavelet.charbonnier_distance
  return per_row(error, weights)


def make_rows(
  config: LossConfig, apply: Callable, params, target_params, x0, x1, label, key
) -> dict[str, Rows]:
  """The rows of each role that has a share; x0, x1 [b, h, w, c] and label [b] are dealt to them."""
  dealt = dict(zip(ROLES, split_rows(config.shares, x0, x1, label), strict=True))
  keys = jax.random.split(key, 6)
  null, rows = config.classes, {}

  x0, x1, label = dealt["velocity"]
  n = len(label)
  dropped = jax.random.bernoulli(keys[0], config.class_dropout, (n,))
  t = path.sample_times(keys[1], n)
  rows["velocity"] = velocity_rows(x0, x1, t, jnp.where(dropped, null, label))

  if config.shares[1]:
    x0, x1, label = dealt["guidance"]
    n = len(label)
    t = path.sample_times(keys[2], n)
    w = path.sample_guidance(keys[3], n, config.w_max, config.w_step, zero=0.0)
    start = config.interval_start
    rows["guidance"] = guidance_rows(apply, params, x0, x1, t, label, w, start=start, null=null)

  if config.shares[2]:
    x0, x1, label = dealt["consistency"]
    n = len(label)
    t, step = path.sample_steps(keys[4], n)
    w = jnp.zeros(n)
    if config.w_max:
      w = path.sample_guidance(keys[5], n, config.w_max, config.w_step, config.zero_w)
    rows["consistency"] = consistency_rows(
      apply, target_params, x0, x1, t, step, label, w, config.baked_guidance, null
    )
  return rows


def loss(
  config: LossConfig, apply: Callable, params, target_params, x0, x1, label, key
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The objective of one batch.

  All rows that need a gradient go through one call of the network.

  Args:
    apply: the network, see `dit.make_network`.
    params: differentiated; they also make the guidance targets.
    target_params: the fast EMA, which makes the consistency targets.
    x0, x1: [b, h, w, c] noise and images, paired; b divisible by sum(shares).
    label: [b] int32.
    key: for t, d, w and the dropped classes.

  Returns:
    The scalar loss, each role's mean distance, and `curvature`, E|s - v|^2 / E|v|^2 of the velocity
    rows (in the loss's distance): 0 where noise and image determine each other along straight
    lines.
  """
  rows = make_rows(config, apply, params, target_params, x0, x1, label, key)
  shares = tuple(s for s in config.shares if s)
  merged = Rows(*(merge_rows(shares, list(parts)) for parts in zip(*rows.values(), strict=True)))
  output = apply(params, merged.x, merged.t, merged.d, merged.label, merged.w)
  per_row = distance(config, output - merged.target)

  means = {
    role: jnp.mean(part) for role, (part,) in zip(rows, split_rows(shares, per_row), strict=True)
  }
  weights = dict(zip(ROLES, config.weights, strict=True))
  total = sum(weights[role] * mean for role, mean in means.items())
  straight = jnp.mean(distance(config, rows["velocity"].target))
  return total, {**means, "curvature": means["velocity"] / straight}
