"""The autoencoder of Stable Diffusion: images to latents an eighth as wide, and back.

This is the AutoencoderKL of `stabilityai/sd-vae-ft-mse` (latent diffusion, arXiv 2112.10752), which
DiT, SiT and iSM use. The weights are diffusers' `diffusion_pytorch_model.safetensors`.

There are two latent spaces. `encode` returns the posterior's mean and standard deviation in the
autoencoder's own, UNSCALED space. Generative models use the scaled space, SCALE times the unscaled
one, where latents have about unit variance: `sample` returns scaled latents and `decode` takes
them.

Dimensions: b batch, h w image, c channel, z latent channel, k width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ism_jax.networks import torch_weights
from train_jax.errors import UserError
from train_jax.layers import Dense, recipe
from train_jax.storage.weights import Weights, sha256

SCALE = 0.18215


@dataclass(frozen=True)
class AutoencoderConfig:
  """Sizes of an AutoencoderKL; the defaults are Stable Diffusion's."""

  widths: tuple[int, ...] = (128, 256, 512, 512)  # from the finest level to the coarsest
  depth: int = 2  # residual blocks a level of the encoder; the decoder has one more
  channels: int = 3
  latents: int = 4
  groups: int = 32  # of the group norms

  @property
  def shrink(self) -> int:
    """The number of image pixels along one latent pixel."""
    return 2 ** (len(self.widths) - 1)


class Autoencoder(NamedTuple):
  """An autoencoder with its weights.

  Attributes:
    params: nested dict of float32 arrays.
    encode: (params, images [b, h, w, c] in [-1, 1]) -> mean, std of the posterior in the unscaled
      space, each float32 [b, h/8, w/8, z].
    decode: (params, scaled latents [b, h, w, z]) -> images float32 [b, 8 h, 8 w, c], around
      [-1, 1]: clip before rounding.
  """

  params: dict
  encode: Callable
  decode: Callable


def sample(mean: jax.Array, std: jax.Array, key: jax.Array) -> jax.Array:
  """A draw from the posterior of `encode`, in the scaled space; std = 0 gives the mode."""
  return SCALE * (mean + std * jax.random.normal(key, mean.shape, mean.dtype))


def make_norm(width: int, groups: int, **kwargs) -> nnx.GroupNorm:
  return nnx.GroupNorm(width, groups, epsilon=1e-6, use_fast_variance=False, **kwargs)


def make_conv(inputs: int, outputs: int, side: int = 3, **kwargs) -> nnx.Conv:
  return nnx.Conv(inputs, outputs, (side, side), **kwargs)


class Residual(nnx.Module):
  """Two convolutions, each after a norm and a SiLU, with a skip connection."""

  def __init__(self, inputs: int, outputs: int, groups: int, **kwargs):
    self.norm1 = make_norm(inputs, groups, **kwargs)
    self.conv1 = make_conv(inputs, outputs, **kwargs)
    self.norm2 = make_norm(outputs, groups, **kwargs)
    self.conv2 = make_conv(outputs, outputs, **kwargs)
    self.conv_shortcut = None if inputs == outputs else make_conv(inputs, outputs, 1, **kwargs)

  def __call__(self, x: jax.Array) -> jax.Array:
    y = self.conv1(nnx.silu(self.norm1(x)))
    y = self.conv2(nnx.silu(self.norm2(y)))
    return y + (self.conv_shortcut(x) if self.conv_shortcut else x)


class PixelAttention(nnx.Module):
  """Self-attention with one head over the pixels, with a skip connection."""

  def __init__(self, width: int, groups: int, **kwargs):
    self.group_norm = make_norm(width, groups, **kwargs)
    self.to_q = Dense(width, width, **kwargs)
    self.to_k = Dense(width, width, **kwargs)
    self.to_v = Dense(width, width, **kwargs)
    self.to_out = Dense(width, width, **kwargs)

  def __call__(self, x: jax.Array) -> jax.Array:
    b, h, w, k = x.shape
    y = self.group_norm(x).reshape(b, h * w, 1, k)
    y = jax.nn.dot_product_attention(self.to_q(y), self.to_k(y), self.to_v(y))
    return x + self.to_out(y).reshape(x.shape)


class Middle(nnx.Module):
  """The coarsest level: attention between two residual blocks."""

  def __init__(self, width: int, groups: int, **kwargs):
    self.resnets = nnx.List([Residual(width, width, groups, **kwargs) for _ in range(2)])
    self.attention = PixelAttention(width, groups, **kwargs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.resnets[1](self.attention(self.resnets[0](x)))


class Level(nnx.Module):
  """Residual blocks of one resolution, then `resize`: 'halve', 'double' or ''."""

  def __init__(self, inputs: int, outputs: int, depth: int, groups: int, resize: str, **kwargs):
    widths = (inputs, *[outputs] * depth)
    self.resnets = nnx.List(
      [Residual(widths[i], widths[i + 1], groups, **kwargs) for i in range(depth)]
    )
    # Downsampling pads with zeros only at the bottom and right.
    half = {"strides": 2, "padding": ((0, 1), (0, 1))}
    halve, double = resize == "halve", resize == "double"
    self.downsample = make_conv(outputs, outputs, **half, **kwargs) if halve else None
    self.upsample = make_conv(outputs, outputs, **kwargs) if double else None

  def __call__(self, x: jax.Array) -> jax.Array:
    for block in self.resnets:
      x = block(x)
    if self.downsample:
      return self.downsample(x)
    return self.upsample(x.repeat(2, axis=1).repeat(2, axis=2)) if self.upsample else x


def make_levels(widths: tuple[int, ...], depth: int, groups: int, resize: str, **kwargs):
  """One `Level` for each of `widths`; all but the last resize."""
  inputs = (widths[0], *widths[:-1])
  last = len(widths) - 1
  return nnx.List(
    [
      Level(inputs[i], widths[i], depth, groups, resize if i < last else "", **kwargs)
      for i in range(len(widths))
    ]
  )


class Encoder(nnx.Module):
  """[b, h, w, c] -> mean and log variance, [b, h/8, w/8, 2 z]."""

  def __init__(self, config: AutoencoderConfig, **kwargs):
    first, last, groups = config.widths[0], config.widths[-1], config.groups
    self.conv_in = make_conv(config.channels, first, **kwargs)
    self.down_blocks = make_levels(config.widths, config.depth, groups, "halve", **kwargs)
    self.mid_block = Middle(last, groups, **kwargs)
    self.conv_norm_out = make_norm(last, groups, **kwargs)
    self.conv_out = make_conv(last, 2 * config.latents, **kwargs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.conv_in(x)
    for level in self.down_blocks:
      x = level(x)
    return self.conv_out(nnx.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
  """[b, h, w, z] -> [b, 8 h, 8 w, c]."""

  def __init__(self, config: AutoencoderConfig, **kwargs):
    widths, groups = config.widths[::-1], config.groups
    self.conv_in = make_conv(config.latents, widths[0], **kwargs)
    self.mid_block = Middle(widths[0], groups, **kwargs)
    self.up_blocks = make_levels(widths, config.depth + 1, groups, "double", **kwargs)
    self.conv_norm_out = make_norm(widths[-1], groups, **kwargs)
    self.conv_out = make_conv(widths[-1], config.channels, **kwargs)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.mid_block(self.conv_in(x))
    for level in self.up_blocks:
      x = level(x)
    return self.conv_out(nnx.silu(self.conv_norm_out(x)))


class AutoencoderModule(nnx.Module):
  """Encoder and decoder, and the 1 x 1 convolutions on either side of the latents."""

  def __init__(self, config: AutoencoderConfig, **kwargs):
    z = config.latents
    self.encoder = Encoder(config, **kwargs)
    self.quant_conv = make_conv(2 * z, 2 * z, 1, **kwargs)
    self.post_quant_conv = make_conv(z, z, 1, **kwargs)
    self.decoder = Decoder(config, **kwargs)


# diffusers' names, and the attention's names in older files.
NAMES = {
  "attention": "attentions.0",
  "downsample": "downsamplers.0.conv",
  "upsample": "upsamplers.0.conv",
  "to_out": "to_out.0",
}
OLD_NAMES = {**NAMES, "to_q": "query", "to_k": "key", "to_v": "value", "to_out": "proj_attn"}


def load(path: str | Path, config: AutoencoderConfig = AutoencoderConfig()) -> Autoencoder:
  """Reads an autoencoder from diffusers' safetensors file, with either naming of its attention.

  Raises:
    UserError: the file is missing, or lacks a tensor of these sizes.
  """
  weights = Weights(path)
  init, merge = recipe(lambda rngs: AutoencoderModule(config, rngs=rngs))
  old = "encoder.mid_block.attentions.0.query.weight" in weights
  shapes = jax.eval_shape(init, jax.random.key(0))
  params = torch_weights.read(weights, shapes, OLD_NAMES if old else NAMES)

  @torch_weights.full_precision
  def encode(params, images) -> tuple[jax.Array, jax.Array]:
    _check(images, config.channels, config.shrink)
    network = merge(params)
    moments = network.quant_conv(network.encoder(images))
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return mean, jnp.exp(0.5 * jnp.clip(log_variance, -30.0, 20.0))

  @torch_weights.full_precision
  def decode(params, latents) -> jax.Array:
    _check(latents, config.latents, 1)
    network = merge(params)
    return network.decoder(network.post_quant_conv(latents / SCALE))

  return Autoencoder(params, encode, decode)


def with_decoder(sample: Callable, path: str, digest: str) -> Callable:
  """A sampler of latents (see ism_jax/sample.py) -> a sampler of images in [-1, 1].

  Args:
    path: the autoencoder's safetensors file.
    digest: SHA-256 of the autoencoder of the training latents; "" accepts any.

  Raises:
    UserError: the file is missing, or another autoencoder.
  """
  if digest and (actual := sha256(path)) != digest:
    raise UserError(
      f"{path} (SHA-256 {actual[:12]}) is not the autoencoder that the latents were encoded with "
      f"({digest[:12]}); give that one."
    )
  model = load(path)
  decode = jax.jit(model.decode)

  @functools.wraps(sample)
  def sample_images(*args, **kwargs) -> np.ndarray:
    latents = sample(*args, **kwargs)
    # A power of two, at most 16: few latents are cheap, and all numbers share few compilations.
    images, batch = [], min(16, 1 << (len(latents) - 1).bit_length())
    for start in range(0, len(latents), batch):
      rows = np.minimum(np.arange(start, start + batch), len(latents) - 1)  # pads the last batch
      images.append(np.asarray(decode(model.params, latents[rows]))[: len(latents) - start])
    return np.concatenate(images)

  return sample_images


def _check(x: jax.Array, channels: int, multiple: int) -> None:
  assert x.ndim == 4 and x.shape[3] == channels and jnp.issubdtype(x.dtype, jnp.floating), x.shape
  assert not any(size % multiple for size in x.shape[1:3]), x.shape
