"""SiT/DiT with inputs (x, t, d, c, w): the network of both papers' shortcut models.

This is DiT (arXiv 2212.09748) with adaLN-zero blocks, as in SiT (arXiv 2401.08740). Two scalars are
new in its conditioning: the step size d and the guidance scale w. Their embeddings begin at zero
effect, so a plain flow model is a valid starting point.

Dimensions: b batch, h w image, c channel, l patches, k width, n heads, p patch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from ism_jax.path import FINEST
from train_jax.errors import UserError
from train_jax.layers import (
  Dense,
  Embed,
  Mlp,
  attend,
  check_network,
  output,
  recipe,
  scan_blocks,
  sinusoidal,
  sinusoidal_grid,
  stack_blocks,
)
from train_jax.mesh import shard_batch


@dataclass(frozen=True)
class DiTConfig:
  """Sizes of a DiT. `classes` excludes the null class, whose label is `classes`."""

  image_size: int
  channels: int
  classes: int
  patch: int
  width: int
  depth: int
  heads: int
  mlp_ratio: int = 4
  qk_norm: bool = False
  dtype: str = "float32"  # of the computation; parameters are float32
  remat: str = "none"  # the recomputed part of the backward pass, see layers.REMAT
  unroll: bool = False  # the loop over blocks: faster if shallow, slower to compile if deep
  attention: str = "xla"  # or cudnn: fused, for bfloat16 on NVIDIA GPUs
  time_scale: float = 1000.0  # the sinusoids see t in [0, 1) times this; DiT's is 1000
  shortcuts: bool = True  # False: all steps are Euler steps, and d is ignored

  def __post_init__(self):
    # Positions take a sine and a cosine for each of two axes.
    check_network(self, ("patch", "width", "depth", "heads", "mlp_ratio"), 4)
    if self.image_size % self.patch:
      raise UserError(
        f"model.patch={self.patch} does not divide data.image_size={self.image_size}; "
        "choose a divisor."
      )


_normal = nnx.initializers.normal(0.02)
_zeros = nnx.initializers.zeros_init()
_xavier = nnx.initializers.xavier_uniform()


class ScalarEmbedding(nnx.Module):
  """Sinusoids of a number times `scale`, through an MLP -> [b, k]; `zero`: initially zero."""

  def __init__(self, width: int, scale: float, *, zero: bool, rngs, dtype, features: int = 256):
    self.scale, self.features = scale, features
    self.inner = Dense(features, width, kernel_init=_normal, rngs=rngs, dtype=dtype)
    self.outer = Dense(
      width, width, kernel_init=_zeros if zero else _normal, rngs=rngs, dtype=dtype
    )

  def __call__(self, value: jax.Array) -> jax.Array:
    return self.outer(nnx.silu(self.inner(sinusoidal(self.scale * value, self.features))))


class PatchAttention(nnx.Module):
  """Multi-head self-attention over patches; queries and keys RMS-normalised if `qk_norm`."""

  def __init__(self, config: DiTConfig, *, rngs, dtype):
    width, self.heads = config.width, config.heads
    head = width // config.heads
    self.qkv = Dense(width, 3 * width, kernel_init=_xavier, rngs=rngs, dtype=dtype)
    self.out = Dense(width, width, kernel_init=_xavier, rngs=rngs, dtype=dtype)
    if config.qk_norm:
      self.norm_query = nnx.RMSNorm(head, rngs=rngs, dtype=dtype)
      self.norm_key = nnx.RMSNorm(head, rngs=rngs, dtype=dtype)
    self.qk_norm, self.kernel = config.qk_norm, config.attention

  def __call__(self, x: jax.Array) -> jax.Array:
    b, l, k = x.shape
    q, key, value = jnp.moveaxis(self.qkv(x).reshape(b, l, 3, self.heads, -1), 2, 0)
    if self.qk_norm:
      q, key = self.norm_query(q), self.norm_key(key)
    return self.out(attend(q, key, value, self.kernel).reshape(b, l, k))


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """x [b, l, k] -> x (1 + scale) + shift, with shift and scale [b, k]."""
  return x * (1 + scale[:, None]) + shift[:, None]


def make_norm(width: int, rngs, dtype) -> nnx.LayerNorm:
  """A LayerNorm without parameters: adaLN supplies scale and shift."""
  return nnx.LayerNorm(width, use_scale=False, use_bias=False, epsilon=1e-6, rngs=rngs, dtype=dtype)


class DiTBlock(nnx.Module):
  """adaLN-zero transformer block (DiT, figure 3)."""

  def __init__(self, config: DiTConfig, *, rngs):
    k, dtype = config.width, jnp.dtype(config.dtype)
    self.norm1 = make_norm(k, rngs, dtype)
    self.norm2 = make_norm(k, rngs, dtype)
    self.attention = PatchAttention(config, rngs=rngs, dtype=dtype)
    self.mlp = Mlp(
      k, config.mlp_ratio * k, k, nnx.gelu, kernel_init=_xavier, rngs=rngs, dtype=dtype
    )
    self.modulation = Dense(k, 6 * k, kernel_init=_zeros, rngs=rngs, dtype=dtype)

  def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
    shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(self.modulation(c), 6, axis=-1)
    x = x + gate1[:, None] * self.attention(modulate(self.norm1(x), shift1, scale1))
    return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class DiT(nnx.Module):
  """s(x, t, d, c, w). The blocks are stacked along a leading axis and scanned over."""

  def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
    k, dtype = config.width, jnp.dtype(config.dtype)
    self.config = config
    patch_size = config.patch**2 * config.channels
    self.embed_patch = Dense(patch_size, k, kernel_init=_xavier, rngs=rngs, dtype=dtype)
    # d as its level 0..8; w in steps of a quarter.
    self.embed_time = ScalarEmbedding(k, config.time_scale, zero=False, rngs=rngs, dtype=dtype)
    self.embed_step = ScalarEmbedding(k, 1.0, zero=True, rngs=rngs, dtype=dtype)
    self.embed_guidance = ScalarEmbedding(k, 4.0, zero=True, rngs=rngs, dtype=dtype)
    self.embed_class = Embed(config.classes + 1, k, embedding_init=_normal, rngs=rngs, dtype=dtype)

    self.blocks = stack_blocks(lambda rngs: DiTBlock(config, rngs=rngs), config.depth, rngs)
    self.norm = make_norm(k, rngs, dtype)
    self.modulation = Dense(k, 2 * k, kernel_init=_zeros, rngs=rngs, dtype=dtype)
    self.out = Dense(k, patch_size, kernel_init=_zeros, rngs=rngs, dtype=dtype)

  def __call__(self, x, t, d, label, w) -> jax.Array:
    """The step direction at x.

    Args:
      x: [b, h, w, c] float32.
      t: [b] time in [0, 1).
      d: [b] step size: 0 for the instantaneous velocity, else a power of two from 1/64 to 1.
      label: [b] int32, `classes` for the null class.
      w: [b] guidance scale, 0 for none.

    Returns:
      [b, h, w, c] float32.
    """
    config = self.config
    d = d if config.shortcuts else jnp.zeros_like(d)
    level = jnp.where(d > 0, jnp.log2(jnp.maximum(d, 1 / FINEST) * FINEST) + 1, 0.0)
    c = self.embed_time(t) + self.embed_step(level) + self.embed_guidance(w)
    c = shard_batch(nnx.silu(c + self.embed_class(label)))  # [b, k]

    grid, p = config.image_size // config.patch, config.patch
    b = x.shape[0]
    x = x.reshape(b, grid, p, grid, p, -1).transpose(0, 1, 3, 2, 4, 5).reshape(b, grid**2, -1)
    position = sinusoidal_grid(grid, grid, config.width)
    x = self.embed_patch(x) + position.astype(config.dtype)  # [b, l, k]

    graphdef, stacked = nnx.split(self.blocks)

    def body(x, block):
      return nnx.merge(graphdef, block)(shard_batch(x), c), None

    x, _ = scan_blocks(body, x, stacked, remat=config.remat, unroll=config.unroll)

    shift, scale = jnp.split(self.modulation(c), 2, axis=-1)
    x = modulate(self.norm(x), shift, scale)
    x = output(x, self.out.kernel[...].astype(x.dtype)) + self.out.bias[...]  # [b, l, p p c]
    x = x.reshape(b, grid, grid, p, p, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, config.image_size, config.image_size, -1)


def make_network(config: DiTConfig) -> tuple[Callable, Callable]:
  """Returns (init, apply): `init(key) -> params`, a nested dict of arrays, and
  `apply(params, x, t, d, label, w) -> step direction`, see `DiT`.
  """
  init, merge = recipe(lambda rngs: DiT(config, rngs=rngs))
  return init, lambda params, *inputs: merge(params)(*inputs)
