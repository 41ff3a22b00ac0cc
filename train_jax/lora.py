"""Low-rank adapters (LoRA, Hu et al., arXiv 2106.09685): a frozen matrix W and a learned A B.

    y = x W + (alpha / rank) (x A) B,   B = 0 at first

Matrices with the same input are parts of one W, and each part has its own adapters.

Dimensions: i inputs, o outputs, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from train_jax.errors import UserError, check_at_least, check_one_of

BASES = ("float32", "bfloat16")


@dataclass(frozen=True)
class LoraConfig:
  """The matrices that have adapters, and the dtype of frozen ones.

  Attributes:
    rank: of the adapters.
    alpha: the adapters' weight is alpha / rank.
    targets: names of the parts that have adapters; ("all",) means every part.
    base: dtype of frozen matrices.
  """

  rank: int
  alpha: float
  targets: tuple[str, ...]
  base: str = "float32"

  def __post_init__(self):
    object.__setattr__(self, "targets", tuple(self.targets))  # config files have lists
    check_at_least("lora.rank", self.rank, 1)
    check_one_of("lora.base", self.base, BASES)

  def check(self, parts: tuple[str, ...]) -> None:
    """Raises UserError unless `targets` names some of `parts`, and nothing else."""
    if not self.targets or set(self.targets) - {*parts, "all"}:
      raise UserError(
        f"lora.targets={', '.join(self.targets)!r} must name some of {', '.join(parts)}, or all."
      )

  def adapts(self, part: str) -> bool:
    """Whether `part` has adapters."""
    return part in self.targets or "all" in self.targets


class Linear(nnx.Module):
  """x [..., i] -> [..., o]; `parts` are the names and sizes of the parts of o."""

  def __init__(
    self,
    inputs: int,
    parts: Mapping[str, int],
    config: LoraConfig,
    *,
    use_bias: bool,
    kernel_init: Callable,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
  ):
    outputs = sum(parts.values())
    self.dtype, self.parts, self.weight = dtype, tuple(parts.items()), config.alpha / config.rank
    kernel = kernel_init(rngs.params(), (inputs, outputs), jnp.float32)
    self.kernel = nnx.Param(kernel.astype(config.base))
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
    if hasattr(self, "bias"):
      y = y + self.bias[...].astype(self.dtype)
    y = y + jnp.concatenate([self._adapter(flat, *part) for part in self.parts], axis=-1)
    return y.reshape(*x.shape[:-1], -1)

  def _adapter(self, flat: jax.Array, part: str, size: int) -> jax.Array:
    if not hasattr(self, f"{part}_a"):
      return jnp.zeros((len(flat), size), self.dtype)
    a, b = (getattr(self, f"{part}_{which}")[...].astype(self.dtype) for which in "ab")
    return self.weight * (flat @ a) @ b


def is_adapter(name: str) -> bool:
  """Whether the parameter with this dotted name is an A or a B."""
  return name.endswith(("_a", "_b"))


def merged(layer: Mapping[str, np.ndarray], parts: Mapping[str, int], weight: float) -> np.ndarray:
  """A layer's parameters merged into one matrix, float32 [..., i, o].

  Args:
    layer: `kernel`, and any of `scale`, `PART_a` and `PART_b`.
    weight: alpha / rank.
  """
  kernel, start = layer["kernel"].astype(np.float32), 0
  for part, size in parts.items():
    if f"{part}_a" in layer:
      kernel[..., start : start + size] += weight * layer[f"{part}_a"] @ layer[f"{part}_b"]
    start += size
  return kernel


def split(params: dict, learned: Callable[[str], bool]) -> tuple[dict, dict]:
  """Nested dicts -> (the leaves whose dotted name is `learned`, the others)."""
  parts = {}, {}
  for name, leaf in traverse_util.flatten_dict(params, sep=".").items():
    parts[not learned(name)][name] = leaf
  return tuple(traverse_util.unflatten_dict(part, sep=".") for part in parts)


def join(params: dict, *frozen: dict) -> dict:
  """Undoes `split`; without `frozen`, returns `params`."""
  flat = {}
  for part in (params, *frozen):
    flat |= traverse_util.flatten_dict(part)
  return traverse_util.unflatten_dict(flat)
