"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685): a frozen matrix W and a learned A B.

    y = x W + (alpha / rank) (x A) B,   B = 0 at first

Several matrices that read the same input are one W of several parts, each with adapters of its own.
W may be kept as int8 with a scale for each output (weights only: products are of floats).

Dimensions: i inputs, o outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from train_jax.errors import UserError

BASES = ("float32", "bfloat16", "int8")


@dataclass(frozen=True)
class LoraConfig:
  """Which matrices have adapters, and how the frozen ones are kept.

  Attributes:
    rank: of the adapters.
    alpha: their weight is alpha / rank.
    targets: names of the parts that have them; ("all",) is every one.
    base: what frozen matrices are kept as; where it is int8, embeddings are bfloat16.
  """

  rank: int
  alpha: float
  targets: tuple[str, ...]
  base: str = "float32"

  def __post_init__(self):
    object.__setattr__(self, "targets", tuple(self.targets))  # config files have lists
    if self.rank < 1:
      raise UserError(f"lora.rank={self.rank} must be at least 1.")
    if self.base not in BASES:
      raise UserError(f"lora.base={self.base!r} is unknown; choose from {', '.join(BASES)}.")

  @property
  def embedding_dtype(self) -> jnp.dtype:
    """What embeddings are kept as."""
    return jnp.dtype("bfloat16" if self.base == "int8" else self.base)

  def check(self, known: tuple[str, ...]) -> None:
    """Raises UserError unless all targets are among `known`."""
    unknown = sorted(set(self.targets) - {*known, "all"})
    if unknown or not self.targets:
      raise UserError(
        f"lora.targets={', '.join(self.targets)!r} must name some of {', '.join(known)}, or all."
      )

  def adapts(self, part: str) -> bool:
    """Whether `part` has adapters."""
    return part in self.targets or "all" in self.targets


def quantise(kernel: jax.Array) -> tuple[jax.Array, jax.Array]:
  """kernel [..., i, o] -> int8 [..., i, o] and float32 scale [..., o], their product nearest it."""
  kernel = kernel.astype(jnp.float32)
  scale = jnp.max(jnp.abs(kernel), axis=-2) / 127
  steps = jnp.round(kernel / jnp.where(scale > 0, scale, 1)[..., None, :])
  return steps.astype(jnp.int8), scale


class Linear(nnx.Module):
  """x [..., i] -> [..., o]; `parts` are the names and sizes that o consists of."""

  def __init__(
    self,
    inputs: int,
    parts: Mapping[str, int],
    config: LoraConfig,
    *,
    use_bias,
    kernel_init,
    **kind,
  ):
    self.dtype, rngs = kind["dtype"], kind["rngs"]
    outputs, base = sum(parts.values()), config.base
    self.parts, self.weight = tuple(parts.items()), config.alpha / config.rank
    kernel = kernel_init(rngs.params(), (inputs, outputs), jnp.float32)
    if base == "int8":
      kernel, scale = quantise(kernel)
      self.scale = nnx.Param(scale)
    self.kernel = nnx.Param(kernel if base == "int8" else kernel.astype(base))
    if use_bias:
      self.bias = nnx.Param(jnp.zeros(outputs))
    draw = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # as torch draws a layer
    for part, size in parts.items():
      if config.adapts(part):
        first = draw(rngs.params(), (inputs, config.rank), jnp.float32)
        setattr(self, f"{part}_a", nnx.Param(first))
        setattr(self, f"{part}_b", nnx.Param(jnp.zeros((config.rank, size))))

  def __call__(self, x: jax.Array) -> jax.Array:
    flat = x.reshape(-1, x.shape[-1]).astype(self.dtype)
    y = flat @ self.kernel[...].astype(self.dtype)
    if hasattr(self, "scale"):
      y = (y * self.scale[...]).astype(self.dtype)
    if hasattr(self, "bias"):
      y = y + self.bias[...].astype(self.dtype)
    y = y + jnp.concatenate([self._adapted(flat, *part) for part in self.parts], axis=-1)
    return y.reshape(*x.shape[:-1], -1)

  def _adapted(self, flat: jax.Array, part: str, size: int) -> jax.Array:
    if not hasattr(self, f"{part}_a"):
      return jnp.zeros((len(flat), size), self.dtype)
    a, b = (getattr(self, f"{part}_{which}")[...].astype(self.dtype) for which in "ab")
    return self.weight * (flat @ a) @ b


def is_adapter(name: str) -> bool:
  """Whether the parameter of that dotted name is an A or a B."""
  return name.endswith(("_a", "_b"))


def merged(layer: Mapping[str, np.ndarray], parts: Mapping[str, int], weight: float) -> np.ndarray:
  """The one matrix, float32 [..., i, o], that a layer's parameters amount to.

  Args:
    layer: `kernel`, and what there is of `scale`, `PART_a` and `PART_b`.
    weight: alpha / rank.
  """
  kernel, start = layer["kernel"].astype(np.float32), 0
  if "scale" in layer:
    kernel *= layer["scale"][..., None, :]
  for part, size in parts.items():
    if f"{part}_a" in layer:
      kernel[..., start : start + size] += weight * layer[f"{part}_a"] @ layer[f"{part}_b"]
    start += size
  return kernel


def split(params: dict, learned: Callable[[str], bool]) -> tuple[dict, dict]:
  """Nested dicts -> (those leaves whose dotted name is `learned`, the others)."""
  parts = {True: {}, False: {}}
  for name, leaf in traverse_util.flatten_dict(params, sep=".").items():
    parts[learned(name)][name] = leaf
  return tuple(traverse_util.unflatten_dict(parts[which], sep=".") for which in (True, False))


def join(params: dict, *frozen: dict) -> dict:
  """Undoes `split`; without `frozen`, `params` as they are."""
  flat = {}
  for part in (params, *frozen):
    flat |= traverse_util.flatten_dict(part)
  return traverse_util.unflatten_dict(flat)
