"""The causal decoder whose logits are soft Q-values; it reads trees of tokens.

Two families. `llama` is Llama 2 and 3 (arXiv 2307.09288, 2407.21783): RMSNorm, rotary positions
(arXiv 2104.09864), SwiGLU (arXiv 2002.05202), grouped-query attention (arXiv 2305.13245) and no
biases. `gpt2` (Radford et al., 2019) has LayerNorm, learned positions, GELU and biases. Position
and visibility are inputs. So one pass gives the logits of every state of a trajectory with
<backspace>s, and in generation a <backspace> is a smaller position.

Dimensions: b batch, s nodes, l cached entries, v vocabulary, k width, n heads, m heads of keys and
values, f head features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from seqmatch_jax.actions import visible
from seqmatch_jax.tokens import BACKSPACE
from train_jax import layers, lora
from train_jax.errors import UserError, check_one_of
from train_jax.mesh import shard_batch


@dataclass(frozen=True)
class TransformerConfig:
  """Sizes of a decoder."""

  vocab: int
  width: int
  depth: int
  heads: int
  hidden: int  # of the SwiGLU, or of GPT-2's layer
  dtype: str = "float32"  # of the computation; parameters and logits are float32
  remat: str = "none"  # the parts that the backward pass computes again, see layers.REMAT
  unroll: bool = False  # of the scan over blocks: faster when shallow, slower to compile when deep
  attention: str = "xla"  # or cudnn: fused, for bfloat16 on NVIDIA GPUs; not in generation
  family: str = "llama"  # or gpt2
  kv_heads: int = 0  # of keys and values, which groups of heads share; 0: as many as heads
  theta: float = 10_000.0  # of the rotary positions
  scaling: tuple[float, ...] = ()  # of the rotary positions, see `frequencies`
  context: int = 0  # of GPT-2's learned positions
  epsilon: float = 1e-5  # of the norms
  tied: bool = False  # the embedding is also the output
  erase: bool = False  # <backspace>'s logit has a row and a bias of its own
  lora: lora.LoraConfig | None = None  # only these adapters (and `erase`) are learned

  def __post_init__(self):
    object.__setattr__(self, "scaling", tuple(self.scaling))  # JSON has lists
    layers.check_network(
      self, ("vocab", "width", "depth", "heads", "hidden"), 2
    )  # rotary: in pairs
    check_one_of("model.family", self.family, ("llama", "gpt2"))
    if self.kv_heads < 0 or (self.kv_heads and self.heads % self.kv_heads):
      raise UserError(
        f"model.kv_heads={self.kv_heads} must divide model.heads={self.heads}, or be 0."
      )
    if self.family == "gpt2" and self.context < 1:
      raise UserError(f"model.context={self.context} must be at least 1: GPT-2 learns positions.")
    if self.lora:
      self.lora.check(tuple(part for layer in self.parts.values() for part in layer))

  @property
  def head(self) -> int:
    """Features of a head."""
    return self.width // self.heads

  @property
  def parts(self) -> dict[str, dict[str, int]]:
    """The matrices of a block by layer: those that read the same input, with their output sizes."""
    groups = (self.kv_heads or self.heads) * self.head
    attention = {"qkv": {"q": self.width, "k": groups, "v": groups}, "out": {"o": self.width}}
    if self.family == "gpt2":
      return {**attention, "up": {"up": self.hidden}, "down": {"down": self.width}}
    gate_up = {"gate": self.hidden, "up": self.hidden}
    return {**attention, "gate_up": gate_up, "down": {"down": self.width}}

  def check_length(self, length: int) -> None:
    """Raises UserError if a text of `length` tokens exceeds the learned positions."""
    if self.family == "gpt2" and length > self.context:
      raise UserError(
        f"a text of {length} tokens does not fit into the {self.context} positions that this model "
        f"has learned; choose a context of at most {self.context}."
      )


class TransformerFunctions(NamedTuple):
  """A decoder as functions; `params` is a nested dict of float32 arrays.

  Attributes:
    init: key -> params; with LoRA only the learned ones, and the functions below take
      `lora.join(params, frozen)`.
    frozen: key -> the others, stored as LoraConfig.base says; {} without LoRA.
    apply: (params, token, position, end) -> logits [b, s, v] float32. The arguments are int32
      [b, s], and node j sees node k iff k <= j < end[k] (see `actions.tree`).
    features: the same arguments -> the input of the output layer, [b, s, k] float32.
    read: (params, prompt int32 [b, p], length) -> a cache of `length` slots that begins with the
      prompts: for each layer, keys and values [b, m, l, f]. Prompts are left-aligned; later tokens
      overwrite the padding. UserError if GPT-2 has fewer positions.
    extend: (params, cache, token int32 [b], start int32 [b]) -> (logits [b, v] float32, cache). A
      token is at position `start`, fills that slot, and sees the slots up to it. Later slots are
      not seen, and are overwritten in time: to go back is to start earlier.
  """

  init: Callable
  frozen: Callable
  apply: Callable
  features: Callable
  read: Callable
  extend: Callable


def frequencies(features: int, theta: float, scaling: tuple[float, ...] = ()) -> np.ndarray:
  """The rotary frequencies -> float32 [f / 2].

  Args:
    scaling: () or Llama 3's (factor, low, high, original context). Waves that fit less than `low`
      times into the original context become `factor` times as long, those that fit more than `high`
      times stay, and between the two the frequency is interpolated.
  """
  frequency = theta ** (-np.arange(0, features, 2) / features)
  if scaling:
    factor, low, high, context = scaling
    fit = context * frequency / (2 * np.pi)
    kept = np.clip((fit - low) / (high - low), 0, 1)
    frequency = frequency * (kept + (1 - kept) / factor)
  return frequency.astype(np.float32)


def waves(position: jax.Array, frequency: np.ndarray) -> tuple[jax.Array, jax.Array]:
  """cos and sin of the rotary angles at position [b, s], each [b, s, 1, f / 2]."""
  angle = position[..., None, None] * frequency
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, wave: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Turns feature i of x [b, s, n, f] with feature i + f / 2, so that q k depends on distance."""
  (cos, sin), (x1, x2) = wave, jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


@jax.vmap
def put(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
  """Writes new [b, 1, m, f] into slot start [b] of cache [b, m, l, f]."""
  return jax.lax.dynamic_update_slice(cache, new.swapaxes(0, 1), (0, start, 0))


def make_norm(config: TransformerConfig, rngs) -> nnx.Module:
  """The family's norm over the width."""
  shared = {"epsilon": config.epsilon, "dtype": jnp.dtype(config.dtype), "rngs": rngs}
  if config.family == "gpt2":
    return nnx.LayerNorm(config.width, use_fast_variance=False, **shared)
  return nnx.RMSNorm(config.width, **shared)


class TransformerBlock(nnx.Module):
  """Attention and a feed-forward layer, each on a normalised input and added to it."""

  def __init__(self, config: TransformerConfig, *, rngs):
    self.config = config

    def layer(name: str) -> nnx.Module:
      parts, inputs = config.parts[name], config.hidden if name == "down" else config.width
      # The layers that add to the residual stream begin smaller, by their number (GPT-2).
      depth = 2 * config.depth if name in ("out", "down") else 1
      shared = {
        "use_bias": config.family == "gpt2",
        "kernel_init": nnx.initializers.normal(0.02 / depth**0.5),
        "dtype": jnp.dtype(config.dtype),
        "rngs": rngs,
      }
      if config.lora:
        return lora.Linear(inputs, parts, config.lora, **shared)
      return layers.Dense(inputs, sum(parts.values()), **shared)

    self.norm1 = make_norm(config, rngs)
    self.qkv, self.out = layer("qkv"), layer("out")
    self.norm2 = make_norm(config, rngs)
    inner = "up" if config.family == "gpt2" else "gate_up"
    setattr(self, inner, layer(inner))
    self.down = layer("down")

  def __call__(self, x, wave, mask, attention: str, cache=None, start=None):
    """x [b, s, k], mask bool [b, 1, s, s] -> x, (keys, values), these of [b, s, m, f].

    A `cache` is the layer's keys and values [b, m, l, f]. Then x holds one token a row (s = 1),
    which is written into slot `start` [b] and sees the slots of mask [b, 1, 1, l], and the new
    cache is returned. `wave` is None without rotary positions; `attention`: see `attend`.
    """
    (b, s, k), config = x.shape, self.config
    sizes = np.cumsum(list(config.parts["qkv"].values()))[:-1]
    parts = jnp.split(self.qkv(self.norm1(x)), sizes, axis=-1)
    q, key, value = (part.reshape(b, s, -1, config.head) for part in parts)
    if wave is not None:
      q, key = rotate(q, wave), rotate(key, wave)
    kept = key, value
    if cache is not None:
      kept = put(cache[0], key, start), put(cache[1], value, start)
      key, value = (part.swapaxes(1, 2) for part in kept)
    x = x + self.out(layers.attend(q, key, value, attention, mask).reshape(b, s, k))
    inner = self.norm2(x)
    if config.family == "gpt2":
      inner = nnx.gelu(self.up(inner), approximate=True)
    else:
      gate, up = jnp.split(self.gate_up(inner), 2, axis=-1)
      inner = nnx.silu(gate) * up
    return x + self.down(inner), kept


class Transformer(nnx.Module):
  """The decoder. The blocks are stacked along a leading axis."""

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    v, k, normal = config.vocab, config.width, nnx.initializers.normal(0.02)
    self.config = config
    stored = config.lora.base if config.lora else jnp.float32
    shared = {"dtype": jnp.dtype(config.dtype), "param_dtype": stored, "rngs": rngs}
    self.embed = layers.Embed(v, k, embedding_init=normal, **shared)
    if config.family == "gpt2":
      self.place = layers.Embed(config.context, k, embedding_init=normal, **shared)

    self.blocks = layers.stack_blocks(
      lambda rngs: TransformerBlock(config, rngs=rngs), config.depth, rngs
    )
    self.norm = make_norm(config, rngs)
    if not config.tied:
      self.out = layers.Dense(k, v, use_bias=False, kernel_init=normal, **shared)
    if config.erase:
      self.erase = layers.Dense(k, 1, kernel_init=normal, rngs=rngs)

  def _begin(self, token, position):
    """token, position [b, s] -> x [b, s, k], rotary waves, and the blocks' graphdef and arrays."""
    config, x, wave = self.config, self.embed(token), None
    if config.family == "gpt2":
      x = x + self.place(position)
    else:
      wave = waves(position, frequencies(config.head, config.theta, config.scaling))
    return x, wave, *nnx.split(self.blocks)

  def __call__(self, token, position, mask, keep=False):
    """token, position [b, s], mask bool [b, s, s] -> normalised x [b, s, k], (keys, values).

    Those are of all layers, [depth, b, s, m, f] each, and None without `keep`.
    """
    config, (x, wave, graphdef, stacked) = self.config, self._begin(token, position)
    attention = "xla" if keep else config.attention  # prompts are short

    def body(x, block):
      x, kept = nnx.merge(graphdef, block)(shard_batch(x), wave, mask[:, None], attention)
      return x, kept if keep else None

    x, kept = layers.scan_blocks(body, x, stacked, remat=config.remat, unroll=config.unroll)
    return self.norm(x), kept

  def extend(self, token, position, mask, cache):
    """token, position [b, 1], mask bool [b, 1, l], caches -> normalised x [b, 1, k], caches."""
    x, wave, graphdef, stacked = self._begin(token, position)
    mask, start, cache = mask[:, None], position[:, 0], list(cache)
    # A scan would copy the whole cache twice to write one entry.
    for i, layer in enumerate(cache):
      block = nnx.merge(graphdef, jax.tree.map(itemgetter(i), stacked))
      # A kernel would not help one row of scores: reading the cache takes the time.
      x, cache[i] = block(shard_batch(x), wave, mask, "xla", layer, start)
    return self.norm(x), cache

  def logits(self, x):
    """x [b, s, k], normalised -> [b, s, v] float32."""
    matrix = self.embed.embedding[...].T if self.config.tied else self.out.kernel[...]
    logits = layers.output(x, matrix.astype(x.dtype))
    if self.config.erase:
      erase = layers.output(x, self.erase.kernel[...].astype(x.dtype)) + self.erase.bias[...]
      logits = jnp.where(jnp.arange(self.config.vocab) == BACKSPACE, erase, logits)
    return logits


def make_network(config: TransformerConfig) -> TransformerFunctions:
  """The functions of a decoder."""
  draw, merge = layers.recipe(lambda rngs: Transformer(config, rngs=rngs))

  def split(key: jax.Array) -> tuple[dict, dict]:
    return lora.split(draw(key), lambda name: lora.is_adapter(name) or name.startswith("erase."))

  def features(params, token, position, end) -> jax.Array:
    return merge(params)(token, position, visible(end))[0].astype(jnp.float32)

  def apply(params, token, position, end) -> jax.Array:
    module = merge(params)
    return module.logits(module(token, position, visible(end))[0])

  def read(params, prompt, length: int) -> list[tuple[jax.Array, jax.Array]]:
    config.check_length(length)
    p = prompt.shape[1]
    position, end = jnp.broadcast_to(jnp.arange(p), prompt.shape), jnp.full_like(prompt, p)
    _, kept = merge(params)(prompt, position, visible(end), keep=True)

    def slots(x):  # [b, p, m, f] -> [b, m, l, f]
      x = jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, length - p), (0, 0)))
      return shard_batch(x, rest=PartitionSpec.UNCONSTRAINED)

    return [tuple(map(slots, layer)) for layer in zip(*kept, strict=True)]

  def extend(params, cache, token, start):
    module, position = merge(params), start[:, None]
    mask = jnp.arange(cache[0][0].shape[2]) <= position[..., None]  # [b, 1, l]
    x, cache = module.extend(token[:, None], position, mask, cache)
    return module.logits(x)[:, 0], cache

  return TransformerFunctions(
    init=lambda key: split(key)[0] if config.lora else draw(key),
    frozen=lambda key: split(key)[1] if config.lora else {},
    apply=apply,
    features=features,
    read=read,
    extend=extend,
  )
