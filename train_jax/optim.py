"""Schedule and optimisers. The step clips gradients, as it needs their norm anyway."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from train_jax import lora
from train_jax.errors import (
  UserError,
  check_above_zero,
  check_at_least,
  check_fraction,
  check_one_of,
)
from train_jax.state import dotted, flatten

OPTIMIZERS = ("adamw", "muon")
# Muon has Jordan's momentum. Four Newton-Schulz iterations after almost-orthogonal scaling bring
# singular values as near to 1 as his five do, for a fifth less work (Boissin et al., arXiv
# 2512.04632).
MOMENTUM, ITERATIONS, SCALING = 0.95, 4, "aol"


@dataclass(frozen=True)
class OptimConfig:
  """The optimiser and its rates.

  Attributes:
    name: adamw, or muon for the matrices inside the blocks and AdamW for all else.
    lr: AdamW's peak learning rate.
    muon_lr: Muon's.
    warmup: steps over which both rates grow linearly.
    final: both rates end at `final` times their peak, along a cosine; 1 keeps them constant.
    b1, b2: decays of AdamW's moments.
    weight_decay: a step takes AdamW's rate * `weight_decay` off each matrix, also where Muon moves
      the matrix: Muon's rate is larger, and would decay it that much more.
    mu_dtype: dtype of first moments and of Muon's momentum, float32 or bfloat16. Second moments
      stay in float32: with b2 near 1 a step changes them by less than bfloat16 resolves.
    clip: global gradient norm, see the step.
    grad_accum_steps: parts of a batch whose gradients the step takes one after the other.
  """

  name: str
  lr: float
  muon_lr: float
  warmup: int
  final: float
  b1: float
  b2: float
  weight_decay: float
  mu_dtype: str
  clip: float
  grad_accum_steps: int

  def __post_init__(self):
    check_one_of("optim.name", self.name, OPTIMIZERS)
    check_one_of("optim.mu_dtype", self.mu_dtype, ("float32", "bfloat16"))
    for name in ("lr", "muon_lr", "clip"):
      check_above_zero(f"optim.{name}", getattr(self, name))
    for name in ("warmup", "final", "weight_decay"):
      check_at_least(f"optim.{name}", getattr(self, name), 0)
    for name in ("b1", "b2"):
      check_fraction(f"optim.{name}", getattr(self, name), inclusive=False)
    check_at_least("optim.grad_accum_steps", self.grad_accum_steps, 1)


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
  """AdamW's rate by step: linear warm-up, then a cosine from `lr` to `final * lr` at `steps`."""
  return optax.warmup_cosine_decay_schedule(
    init_value=config.lr / max(config.warmup, 1),
    peak_value=config.lr,
    warmup_steps=config.warmup,
    decay_steps=max(steps, config.warmup + 1),
    end_value=config.final * config.lr,
  )


def _has_decay(name: str, _) -> bool:
  """Whether a parameter is a kernel or an adapter: stacked biases are matrices only by shape."""
  return name.split(".")[-1] == "kernel" or lora.is_adapter(name)


def _muon_axes(name: str, leaf) -> contrib.MuonDimensionNumbers | None:
  """The axes of a matrix inside the blocks (the last two); None for every other parameter."""
  *sections, kind = name.split(".")
  if "blocks" not in sections or kind != "kernel":
    return None
  if jnp.ndim(leaf) < 2:
    raise UserError(
      f"optim.name='muon' takes matrices, and the parameter {name} has the shape "
      f"{jnp.shape(leaf)}; choose optim.name=adamw."
    )
  return contrib.MuonDimensionNumbers(jnp.ndim(leaf) - 2, jnp.ndim(leaf) - 1)


def _scale_by_shape(matrix: jax.Array) -> jax.Array:
  inputs, outputs = matrix.shape[-2:]
  return max(1, outputs / inputs) ** 0.5 * matrix


def by_muon(params) -> dict[str, bool]:
  """Whether Muon moves a parameter, by dotted name."""
  return {name: _muon_axes(name, leaf) is not None for name, leaf in flatten(params).items()}


def _map_by_name(function: Callable, params):
  """`function(dotted name, leaf)` of each leaf, in the structure of `params`."""
  return jax.tree_util.tree_map_with_path(lambda path, leaf: function(dotted(path), leaf), params)


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
  """AdamW (Loshchilov & Hutter, arXiv 1711.05101), or Muon (Jordan et al., 2024) with AdamW.

  Newton-Schulz iterations bring the singular values of Muon's momentum near 1. Its step is the
  result times sqrt(max(1, outputs / inputs)) and `muon_lr`. Its `init` raises UserError if the
  parameters have no matrix that it can move.
  """
  rate = schedule(config, steps)
  mu_dtype = jnp.dtype(config.mu_dtype)
  mask = partial(_map_by_name, _has_decay)
  adamw = optax.adamw(
    rate, config.b1, config.b2, weight_decay=config.weight_decay, mask=mask, mu_dtype=mu_dtype
  )
  if config.name == "adamw":
    return adamw

  def labels(params):
    moved = by_muon(params)
    if not any(moved.values()):
      raise UserError(
        "optim.name='muon' moves the matrices inside the blocks, and none of them is trained here; "
        "choose optim.name=adamw."
      )
    return _map_by_name(lambda name, _: "muon" if moved[name] else "adamw", params)

  muon = optax.chain(
    contrib.scale_by_muon(
      ns_steps=ITERATIONS,
      beta=MOMENTUM,
      mu_dtype=mu_dtype,
      preconditioning=SCALING,
      weight_dimension_numbers=partial(_map_by_name, _muon_axes),
    ),
    optax.stateless(lambda updates, _: jax.tree.map(_scale_by_shape, updates)),
    optax.scale(config.muon_lr / config.lr),
    optax.add_decayed_weights(config.weight_decay),
    optax.scale_by_learning_rate(rate),
  )
  return optax.partition({"muon": muon, "adamw": adamw}, labels)
