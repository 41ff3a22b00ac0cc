"""The causal decoder whose logits are soft Q-values; it reads trees of tokens.

The architecture of Llama 2 (arXiv 2307.09288): RMSNorm, rotary positions (arXiv 2104.09864), SwiGLU
(arXiv 2002.05202), no biases. Position and visibility are inputs, so that one pass gives the logits
of every state of a trajectory with <backspace>s; in generation a <backspace> is a smaller position.

Dimensions: b batch, s nodes, l cached entries, v vocabulary, k width, n heads, f head features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from seqmatch_jax.actions import visible
from train_jax.errors import UserError
from train_jax.layers import Dense
from train_jax.mesh import by_rows


@dataclass(frozen=True)
class TransformerConfig:
  """Sizes of a decoder."""

  vocab: int
  width: int
  depth: int
  heads: int
  hidden: int  # of the SwiGLU
  dtype: str = "float32"  # of the computation; parameters and logits are float32
  remat: bool = False  # recompute each block in the backward pass
  unroll: bool = False  # of the scan over blocks: faster when shallow, slower to compile when deep

  def __post_init__(self):
    for name in ("vocab", "width", "depth", "heads", "hidden"):
      if getattr(self, name) < 1:
        raise UserError(f"model.{name}={getattr(self, name)} must be at least 1.")
    if self.width % (2 * self.heads):
      raise UserError(
        f"model.width={self.width} must be a multiple of 2 x model.heads={self.heads}; "
        f"the nearest is {max(1, round(self.width / (2 * self.heads))) * 2 * self.heads}."
      )


class Network(NamedTuple):
  """A decoder as functions; `params` is a nested dict of float32 arrays.

  Attributes:
    init: key -> params.
    apply: (params, token, position, end) -> logits [b, s, v] float32, where the arguments are
      int32 [b, s] and node j sees node k iff k <= j < end[k] (see `actions.tree`).
    make_cache: (batch, length) -> an empty cache: of each layer, keys and values [b, n, l, f].
    extend: (params, cache, token [b, s], start [b]) -> (logits [b, s, v] float32, cache). Token i
      of a row is at position start + i, fills that slot, and sees the slots up to it. What lies
      behind is not seen, and is overwritten in time: to go back is to start earlier. Prompts that
      are left-aligned are read in one pass from 0; their padding does no harm.
  """

  init: Callable
  apply: Callable
  make_cache: Callable
  extend: Callable


def waves(position: jax.Array, features: int) -> tuple[jax.Array, jax.Array]:
  """cos and sin of the rotary angles at position [b, s] -> two of [b, s, 1, f / 2]."""
  frequency = 10_000.0 ** (-jnp.arange(0, features, 2) / features)
  angle = position[..., None, None] * frequency
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, wave: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Turns feature i of x [b, s, n, f] with feature i + f / 2, so that q k depends on distance."""
  (cos, sin), (x1, x2) = wave, jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


@jax.vmap
def put(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
  """Writes new [b, s, n, f] into cache [b, n, l, f] from slot start [b] on."""
  return jax.lax.dynamic_update_slice(cache, new.swapaxes(0, 1), (0, start, 0))


class Block(nnx.Module):
  """Attention and SwiGLU, each on a normalised input and added to it."""

  def __init__(self, config: TransformerConfig, *, rngs):
    k, h, self.heads = config.width, config.hidden, config.heads
    dtype = jnp.dtype(config.dtype)
    shared = {"use_bias": False, "rngs": rngs, "dtype": dtype}
    inner = shared | {"kernel_init": nnx.initializers.normal(0.02)}
    # What is added to the sum over layers shrinks with their number (GPT-2).
    outer = shared | {"kernel_init": nnx.initializers.normal(0.02 / (2 * config.depth) ** 0.5)}
    self.norm1 = nnx.RMSNorm(k, epsilon=1e-5, rngs=rngs, dtype=dtype)
    self.qkv = Dense(k, 3 * k, **inner)
    self.out = Dense(k, k, **outer)
    self.norm2 = nnx.RMSNorm(k, epsilon=1e-5, rngs=rngs, dtype=dtype)
    self.gate_up = Dense(k, 2 * h, **inner)
    self.down = Dense(h, k, **outer)

  def __call__(self, x, wave, mask, cache, start):
    """x [b, s, k], mask bool [b, 1, s, s or l] -> x, cache; keys and values go through the cache.

    `cache` is None, or the layer's keys and values [b, n, l, f], written from slot `start` [b].
    """
    b, s, k = x.shape
    q, key, value = jnp.moveaxis(self.qkv(self.norm1(x)).reshape(b, s, 3, self.heads, -1), 2, 0)
    q, key = rotate(q, wave), rotate(key, wave)
    if cache is not None:
      cache = put(cache[0], key, start), put(cache[1], value, start)
      key, value = (part.swapaxes(1, 2) for part in cache)
    attended = jax.nn.dot_product_attention(q, key, value, mask=mask)
    x = x + self.out(attended.reshape(b, s, k))
    gate, up = jnp.split(self.gate_up(self.norm2(x)), 2, axis=-1)
    return x + self.down(nnx.silu(gate) * up), cache


class Transformer(nnx.Module):
  """The decoder. The blocks are stacked along a leading axis."""

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    v, k, dtype = config.vocab, config.width, jnp.dtype(config.dtype)
    normal = nnx.initializers.normal(0.02)
    self.config = config
    self.embed = nnx.Embed(v, k, embedding_init=normal, rngs=rngs, dtype=dtype)

    @nnx.split_rngs(splits=config.depth)
    @nnx.vmap
    def stack(rngs):
      return Block(config, rngs=rngs)

    self.blocks = stack(rngs)
    self.norm = nnx.RMSNorm(k, epsilon=1e-5, rngs=rngs, dtype=dtype)
    self.out = Dense(k, v, use_bias=False, kernel_init=normal, rngs=rngs, dtype=dtype)

  def __call__(self, token, position, mask, cache=None, start=None):
    """token, position [b, s], mask bool [b, s, s or l] -> logits [b, s, v] float32, cache."""
    config = self.config
    wave = waves(position, config.width // config.heads)
    graphdef, stacked = nnx.split(self.blocks)

    x = self.embed(token)

    def body(x, block, cache=None):
      return nnx.merge(graphdef, block)(by_rows(x), wave, mask[:, None], cache, start)

    if cache is None:
      body = jax.checkpoint(body) if config.remat else body
      x, _ = jax.lax.scan(body, x, stacked, unroll=config.depth if config.unroll else 1)
    else:
      # Not a scan, which would copy the whole cache twice to write one entry.
      cache = list(cache)
      for i, layer in enumerate(cache):
        x, cache[i] = body(x, jax.tree.map(itemgetter(i), stacked), layer)
    return self.out(self.norm(x)).astype(jnp.float32), cache


def make_network(config: TransformerConfig) -> Network:
  """The functions of a decoder; the module is only the recipe between parameters and them."""
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0))))

  def init(key: jax.Array) -> dict:
    return nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(key))))

  def apply(params, token, position, end) -> jax.Array:
    return nnx.merge(graphdef, nnx.State(params))(token, position, visible(end))[0]

  def make_cache(batch: int, length: int) -> list[tuple[jax.Array, jax.Array]]:
    empty = jnp.zeros((batch, config.heads, length, config.width // config.heads), config.dtype)
    return [(empty, empty)] * config.depth

  def extend(params, cache, token, start):
    position = start[:, None] + jnp.arange(token.shape[1])
    mask = jnp.arange(cache[0][0].shape[2]) <= position[..., None]  # [b, s, l]
    return nnx.merge(graphdef, nnx.State(params))(token, position, mask, cache, start)

  return Network(init, apply, make_cache, extend)


# (width, depth, heads, hidden). "mini" is for short tasks on a CPU; "base" has the width and depth
# of GPT-2; "7B" is Llama 2's.
SIZES = {
  "tiny": (32, 2, 2, 96),
  "mini": (128, 2, 4, 384),
  "base": (768, 12, 12, 2048),
  "7B": (4096, 32, 32, 11008),
}


def with_size(config: TransformerConfig, name: str) -> TransformerConfig:
  """`config` at a size of the table."""
  if name not in SIZES:
    raise UserError(f"unknown model size {name!r}; choose one of {', '.join(SIZES)}.")
  width, depth, heads, hidden = SIZES[name]
  return replace(config, width=width, depth=depth, heads=heads, hidden=hidden)
