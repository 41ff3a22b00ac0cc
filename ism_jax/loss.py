"""The paper's algorithm box: the loss of a batch's velocity, guidance and consistency examples.

    L = mean of |s(x, t, d, c, w) - target|^2 over the examples of all terms

(arXiv 2510.21250, algorithm 1; |.| is the wavelet distance.) The batch is split among the terms of
`TERMS`. Each term makes examples: inputs of the network, and targets with stopped gradients. Flow
matching and the original shortcut objective (arXiv 2410.12557) are the same function with another
`split` and `bootstrap_guidance`.

A new term is a function here, an entry of `TERMS`, and its name in the config's `loss.split`.

`apply(params, x, t, d, label, w)` is the network s; `null` is the label of no class.

Dimensions: b batch, g group, h w image, c channel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ism_jax import path, wavelet
from train_jax.errors import (
  UserError,
  check_above_zero,
  check_at_least,
  check_fraction,
  check_one_of,
)


@dataclass(frozen=True)
class LossConfig:
  """The terms of the loss, and the split of the batch among them.

  Attributes:
    split: number of each term's examples in every group of sum(split) neighbours; 0 by default.
    weighting: 'by_example', one mean over all examples; or 'by_term', the sum of each term's mean
      (the paper).
    class_dropout: probability that a velocity example loses its class.
    w_max, w_step: guidance scales are w_step, 2 w_step, ..., w_max; w_max = 0 has w = 0 only.
    zero_w_prob: probability that a consistency example has w = 0.
    interval_start: guidance acts for t >= interval_start.
    bootstrap_guidance: the original shortcut model's fixed guidance; 0 for iSM.
    wavelet_levels, level_decay: the wavelet distance, see `wavelet.level_weights`.
    norm: of a wavelet coefficient, 'l2' or 'charbonnier'.
    target: of a consistency example: 'two_steps' (the paper), or the derivative of the network
      along its path, 'meanflow' or 'improved_meanflow' (see `derivative_examples`).
  """

  split: Mapping[str, int]
  weighting: str
  class_dropout: float
  w_max: float
  w_step: float
  zero_w_prob: float
  interval_start: float
  bootstrap_guidance: float
  wavelet_levels: int
  level_decay: float
  norm: str
  target: str = "two_steps"

  def __post_init__(self):
    if unknown := [name for name in self.split if name not in TERMS]:
      raise UserError(f"loss.split has no term {unknown[0]!r}; choose from {', '.join(TERMS)}.")
    # In the order of TERMS, as a checkpoint's JSON has another.
    split = {name: self.split.get(name, 0) for name in TERMS}
    object.__setattr__(self, "split", split)
    if any(not isinstance(n, int) or n < 0 for n in split.values()) or not split["velocity"]:
      raise UserError(
        f"loss.split={split} must be whole numbers of examples, and that of velocity at least 1."
      )
    check_one_of("loss.target", self.target, TARGETS)
    if self.target != "two_steps" and self.bootstrap_guidance:
      raise UserError(
        f"loss.bootstrap_guidance={self.bootstrap_guidance:g} is a part of loss.target=two_steps, "
        f"and loss.target={self.target!r}; choose that target, or set it to 0."
      )
    check_one_of("loss.norm", self.norm, ("l2", "charbonnier"))
    check_one_of("loss.weighting", self.weighting, ("by_example", "by_term"))
    if bool(split["guidance"]) != bool(self.w_max):
      raise UserError(
        f"loss.split.guidance={split['guidance']} but loss.w_max={self.w_max:g}: a guidance scale "
        "is learned from guidance examples, so set both or neither to 0."
      )
    check_fraction("loss.interval_start", self.interval_start, inclusive=False)
    check_at_least("loss.bootstrap_guidance", self.bootstrap_guidance, 0)
    check_above_zero("loss.level_decay", self.level_decay)
    for name in ("class_dropout", "zero_w_prob"):
      check_fraction(f"loss.{name}", getattr(self, name))
    if not self.class_dropout and (self.w_max or self.bootstrap_guidance):
      raise UserError(
        "loss.class_dropout=0 with guidance: it needs the network without a class, which is "
        "learned from examples that lose theirs; choose loss.class_dropout=0.1, or no guidance."
      )
    multiple = self.w_step > 0 and 0 <= self.w_max < math.inf
    steps = round(self.w_max / self.w_step) if multiple else -1
    if steps < 0 or abs(steps * self.w_step - self.w_max) > 1e-6:
      raise UserError(
        f"loss.w_max={self.w_max:g} must be a multiple of loss.w_step={self.w_step:g}, "
        "which must be above 0."
      )

  @property
  def group(self) -> int:
    """The number of neighbouring examples that are dealt together: the sum of `split`."""
    return sum(self.split.values())

  @property
  def is_flow_matching(self) -> bool:
    """Whether the model learns velocities only, with and without a class.

    Such a model is guided at sampling time, see `sample.classifier_free`.
    """
    return self.group == self.split["velocity"] and self.class_dropout > 0

  @property
  def weights(self) -> dict[str, float]:
    """The weight of each term's mean distance in the loss."""
    if self.weighting == "by_term":
      return dict.fromkeys(self.split, 1.0)
    return {name: n / self.group for name, n in self.split.items()}


class Examples(NamedTuple):
  """Inputs of the network (see `dit.DiT`) and targets of its outputs."""

  x: jax.Array  # [b, h, w, c]
  t: jax.Array  # [b]
  d: jax.Array  # [b]
  label: jax.Array  # [b]
  w: jax.Array  # [b]
  target: jax.Array  # [b, h, w, c]


class Networks(NamedTuple):
  """The networks that make targets."""

  apply: Callable
  params: Any  # trained; for guidance targets
  target_params: Any  # the fast average; for consistency targets
  null: int  # the label of no class


def _examples(x, t, d, label, w, target) -> Examples:
  return Examples(x, t, d, label, w, jax.lax.stop_gradient(target))


def _scale(factor: jax.Array, field: jax.Array) -> jax.Array:
  return factor[:, None, None, None] * field


# The targets.


def velocity_examples(x0, x1, t, label) -> Examples:
  """d = 0, w = 0: the target is v = x1 - x0 (flow matching)."""
  zero = jnp.zeros_like(t)
  return _examples(path.interpolate(x0, x1, t), t, zero, label, zero, path.velocity(x0, x1))


def guidance_direction(apply: Callable, params, x, t, label, null: int) -> jax.Array:
  """s(x, t, 0, c, 0) - s(x, t, 0, null, 0); zero where c is null."""
  of_class, of_null = path.both_fields(apply, params, x, t, label, null)
  return of_class - of_null


def guidance_examples(
  apply, params, x0, x1, t, label, w, *, interval_start: float, null: int
) -> Examples:
  """d = 0, w > 0: the target is v + w_eff (s(x, t, 0, c, 0) - s(x, t, 0, null, 0)).

  Interval guidance: w_eff is 0 for t < interval_start (high noise) and w elsewhere. The interval
  applies to the target and not to the network's input, because a one-step sample starts at t = 0
  with its w.
  """
  x = path.interpolate(x0, x1, t)
  w_eff = jnp.where(t < interval_start, 0.0, w)
  direction = guidance_direction(apply, params, x, t, label, null)
  target = path.velocity(x0, x1) + _scale(w_eff, direction)
  return _examples(x, t, jnp.zeros_like(t), label, w, target)


def consistency_examples(
  apply, target_params, x0, x1, t, step, label, w, bootstrap_guidance: float, null: int
) -> Examples:
  """One step of size 2d = `step` [b] must land where two steps of d land, at the same w.

      target = (s(x_t, t, d, c, w) + s(x', t + d, d, c, w)) / 2,    x' = x_t + d s(x_t, t, d, c, w)

  with the target network's parameters. No guidance is added here, so none compounds. With
  `bootstrap_guidance` > 0 this is the original shortcut model, as released: its two finest steps
  have the guidance `bootstrap_guidance (s(c) - s(null))`, and the step above them inherits it.
  """
  d = step / 2
  x = path.interpolate(x0, x1, t)

  def half_step(x, t):
    direction = apply(target_params, x, t, path.min_step_is_zero(d), label, w)
    if bootstrap_guidance:
      finest = jnp.where(path.min_step_is_zero(d) == 0, bootstrap_guidance, 0.0)
      direction += _scale(finest, guidance_direction(apply, target_params, x, t, label, null))
    return direction

  first = half_step(x, t)
  second = half_step(x + _scale(d, first), t + d)
  return _examples(x, t, step, label, w, (first + second) / 2)


def derivative_examples(
  apply, params, x0, x1, t, d, label, w, *, own_tangent: bool, interval_start: float, null: int
) -> Examples:
  """A step of any size d [b] must be the mean velocity over [t, t + d], by its derivative.

  d s(x_t, t, d) is the integral of v from t to t + d. Its derivative along the path, with the end
  t + d fixed, gives s = v + d D s with D = v . grad_x + d/dt - d/dd:

      target = g + d jvp(s; (u, 1, -1)),    g = v + w_eff (s(x, t, 0, c, 0) - s(x, t, 0, null, 0))

  w_eff is that of `guidance_examples`. MeanFlow (arXiv 2505.13447) has the tangent u = g. Improved
  MeanFlow (arXiv 2512.02012) has the network's own u = s(x, t, 0, c, w), `own_tangent`. All of it
  uses the current parameters.
  """
  x = path.interpolate(x0, x1, t)
  w_eff = jnp.where(t < interval_start, 0.0, w)
  direction = guidance_direction(apply, params, x, t, label, null)
  g = path.velocity(x0, x1) + _scale(w_eff, direction)
  u = apply(params, x, t, jnp.zeros_like(d), label, w) if own_tangent else g

  def step(x, t, d):
    return apply(params, x, t, d, label, w)

  _, slope = jax.jvp(step, (x, t, d), (u, jnp.ones_like(t), -jnp.ones_like(d)))
  return _examples(x, t, d, label, w, g + _scale(d, slope))


# The terms: (config, networks, x0, x1, label, two keys) -> Examples. They draw t, d and w.


def _velocity(config: LossConfig, net: Networks, x0, x1, label, keys) -> Examples:
  dropped = jax.random.bernoulli(keys[0], config.class_dropout, label.shape)
  t = path.sample_times(keys[1], len(label))
  return velocity_examples(x0, x1, t, jnp.where(dropped, net.null, label))


def _guidance(config: LossConfig, net: Networks, x0, x1, label, keys) -> Examples:
  t = path.sample_times(keys[0], len(label))
  w = path.sample_guidance(keys[1], len(label), config.w_max, config.w_step, zero_prob=0.0)
  interval = {"interval_start": config.interval_start, "null": net.null}
  return guidance_examples(net.apply, net.params, x0, x1, t, label, w, **interval)


def _consistency(config: LossConfig, net: Networks, x0, x1, label, keys) -> Examples:
  w = jnp.zeros(len(label))
  if config.w_max:
    scales = (config.w_max, config.w_step, config.zero_w_prob)
    w = path.sample_guidance(keys[1], len(label), *scales)
  if config.target != "two_steps":
    t, d = path.sample_intervals(keys[0], len(label))
    return derivative_examples(
      *(net.apply, net.params, x0, x1, t, d, label, w),
      own_tangent=config.target == "improved_meanflow",
      interval_start=config.interval_start,
      null=net.null,
    )
  t, step = path.sample_steps(keys[0], len(label))
  target = (config.bootstrap_guidance, net.null)
  return consistency_examples(net.apply, net.target_params, x0, x1, t, step, label, w, *target)


TARGETS = ("two_steps", "meanflow", "improved_meanflow")
TERMS = {"velocity": _velocity, "guidance": _guidance, "consistency": _consistency}


# The loss.


def deal(split: Mapping[str, int], *arrays: jax.Array) -> dict[str, tuple[jax.Array, ...]]:
  """Deals a batch to the terms: of every sum(split) neighbours the first go to the first term, ...

  So each device keeps its examples, if they are whole groups. Otherwise XLA moves and pads them: at
  4, 2 and 1 examples a device a group of 8 costs 1.19, 1.76 and 2.77 times its FLOPs (`method.py`
  warns).
  """
  group, start, parts = sum(split.values()), 0, {}
  for name, n in split.items():
    grouped = (a.reshape(-1, group, *a.shape[1:])[:, start : start + n] for a in arrays)
    parts[name] = tuple(a.reshape(-1, *a.shape[2:]) for a in grouped)
    start += n
  return parts


def gather(split: Mapping[str, int], parts: Mapping[str, jax.Array]) -> jax.Array:
  """The inverse of `deal` for one array."""
  grouped = [parts[name].reshape(-1, n, *parts[name].shape[1:]) for name, n in split.items()]
  batch = jnp.concatenate(grouped, axis=1)
  return batch.reshape(-1, *batch.shape[2:])


def distance(config: LossConfig, error: jax.Array) -> jax.Array:
  """Wavelet distance per element of error [b, h, w, c] -> [b]."""
  weights = wavelet.level_weights(config.wavelet_levels, config.level_decay)
  if config.norm == "l2":
    return wavelet.l2_distance(error, weights)
  return wavelet.charbonnier_distance(error, weights)


def make_examples(
  config: LossConfig, networks: Networks, x0, x1, label, key
) -> dict[str, Examples]:
  """The examples of every term in the split, from noise and images [b, h, w, c], label [b]."""
  keys = jax.random.split(key, (len(TERMS), 2))
  parts = deal(config.split, x0, x1, label)
  return {
    name: TERMS[name](config, networks, *parts[name], keys[i])
    for i, name in enumerate(TERMS)
    if config.split[name]
  }


def loss(
  config: LossConfig, apply: Callable, params, target_params, x0, x1, label, null: int, key
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The objective of one batch.

  All examples that need a gradient go through one call of the network.

  Args:
    apply: the network, see `dit.make_network`.
    params: differentiated; they also make the guidance targets.
    target_params: the fast EMA, which makes the consistency targets.
    x0, x1: [b, h, w, c] noise and images, paired; b divisible by `config.group`.
    label: [b] int32.
    null: the label of no class, which is the number of classes.
    key: for t, d, w and the dropped classes.

  Returns:
    The scalar loss, each term's mean distance, and `curvature`: E|s - v|^2 / E|v|^2 of the velocity
    examples (in the loss's distance), which is 0 for straight, non-crossing paths.
  """
  fixed = jax.lax.stop_gradient((params, target_params))  # forward mode must not meet reverse mode
  networks = Networks(apply, *fixed, null)
  terms = make_examples(config, networks, x0, x1, label, key)
  split = {name: config.split[name] for name in terms}
  fields = zip(*terms.values(), strict=True)
  batch = Examples(*(gather(split, dict(zip(terms, field, strict=True))) for field in fields))
  output = apply(params, batch.x, batch.t, batch.d, batch.label, batch.w)
  distances = deal(split, distance(config, output - batch.target))

  means = {name: jnp.mean(values) for name, (values,) in distances.items()}
  total = sum(config.weights[name] * mean for name, mean in means.items())
  straight = jnp.mean(distance(config, terms["velocity"].target))
  return total, {**means, "curvature": means["velocity"] / straight}
