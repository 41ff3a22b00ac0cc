"""DINOv2 (arXiv 2304.07193): the features of FD-DINOv2.

ViT-S/14, B/14 and L/14 take weights from Hugging Face's `facebook/dinov2-{small,base,large}`
(`model.safetensors`), with either naming of the attention. FD-DINOv2 (Stein et al., arXiv
2306.04675) compares class tokens of ViT-L/14 after the last norm.

Images are resized to 224 x 224 as in EDM2's metric: bicubic, antialiased, in floating point, not
clipped. They are normalised by ImageNet's mean and deviation. dgm-eval, the paper's code, resizes
with PIL, which rounds the same filter to 8 bits.

The stored position embedding has 37 x 37 patches and is interpolated to the 16 x 16 of 224 pixels.
Hugging Face's code uses the ratio 16/37 (`offset` 0), the authors' code 16.1/37 (`offset` 0.1).
Published FD-DINOv2 use the latter.

Dimensions: b batch, h w image, l patches and class token, k width, n heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ism_jax.networks import torch_weights
from train_jax.errors import UserError
from train_jax.layers import Dense, Mlp, recipe, stack_blocks
from train_jax.storage.weights import Weights

SIDE = 224
HEAD = 64  # features of a head, in every size
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for pixels in [0, 1]


@dataclass(frozen=True)
class ViTConfig:
  """Sizes of a DINOv2 encoder; the stored position embeddings are a grid of `stored` x `stored`."""

  width: int
  depth: int
  hidden: int
  patch: int
  stored: int
  offset: float = 0.0  # see the module's docstring


class ViTBlock(nnx.Module):
  """A pre-norm transformer block with layer scale."""

  def __init__(self, config: ViTConfig, *, rngs):
    k = config.width
    self.norm1 = nnx.LayerNorm(k, use_fast_variance=False, rngs=rngs)
    self.query, self.key, self.value, self.out = (Dense(k, k, rngs=rngs) for _ in range(4))
    self.layer_scale1 = nnx.Param(jnp.ones(k))
    self.norm2 = nnx.LayerNorm(k, use_fast_variance=False, rngs=rngs)
    gelu = functools.partial(nnx.gelu, approximate=False)
    self.mlp = Mlp(k, config.hidden, k, gelu, rngs=rngs)
    self.layer_scale2 = nnx.Param(jnp.ones(k))

  def __call__(self, x: jax.Array) -> jax.Array:
    b, l, k = x.shape
    y = self.norm1(x)
    heads = [f(y).reshape(b, l, -1, HEAD) for f in (self.query, self.key, self.value)]
    y = self.out(jax.nn.dot_product_attention(*heads).reshape(b, l, k))
    x = x + self.layer_scale1[...] * y
    return x + self.layer_scale2[...] * self.mlp(self.norm2(x))


def cubic_matrix(size: int, out: int, offset: float) -> np.ndarray:
  """[out, size]: bicubic interpolation as PyTorch's (a = -0.75, edges repeated, no antialiasing).

  Output i is read at (i + 1/2) size / (out + offset) - 1/2.
  """
  a = -0.75
  matrix = np.zeros((out, size))
  position = (np.arange(out) + 0.5) * size / (out + offset) - 0.5
  for tap in range(-1, 3):
    source = np.floor(position) + tap
    x = np.abs(position - source)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    index = np.clip(source, 0, size - 1).astype(int)
    np.add.at(matrix, (np.arange(out), index), np.where(x <= 1, near, far))
  return matrix


class ViT(nnx.Module):
  """Normalised images -> class tokens. The blocks are stacked and scanned over."""

  def __init__(self, config: ViTConfig, *, rngs: nnx.Rngs):
    k, p = config.width, config.patch
    self.config = config
    self.cls_token = nnx.Param(jnp.zeros((1, 1, k)))
    self.position_embeddings = nnx.Param(jnp.zeros((1, 1 + config.stored**2, k)))
    self.patch = nnx.Conv(3, k, (p, p), (p, p), padding="VALID", rngs=rngs)

    self.blocks = stack_blocks(lambda rngs: ViTBlock(config, rngs=rngs), config.depth, rngs)
    self.norm = nnx.LayerNorm(k, use_fast_variance=False, rngs=rngs)

  def positions(self, rows: int, columns: int) -> jax.Array:
    """[1, 1 + rows columns, k]: the stored embedding on another grid."""
    stored, offset = self.config.stored, self.config.offset
    own, grid = jnp.split(self.position_embeddings[...], [1], axis=1)
    grid = grid.reshape(stored, stored, -1)
    down = jnp.asarray(cubic_matrix(stored, rows, offset), jnp.float32)
    across = jnp.asarray(cubic_matrix(stored, columns, offset), jnp.float32)
    grid = jnp.einsum("ri,cj,ijk->rck", down, across, grid)
    return jnp.concatenate([own, grid.reshape(1, rows * columns, -1)], axis=1)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = self.patch(x)
    b, rows, columns, k = x.shape
    own = jnp.broadcast_to(self.cls_token[...], (b, 1, k))
    x = jnp.concatenate([own, x.reshape(b, rows * columns, k)], axis=1)
    x = x + self.positions(rows, columns)  # [b, l, k]

    graphdef, stacked = nnx.split(self.blocks)
    x, _ = jax.lax.scan(lambda x, block: (nnx.merge(graphdef, block)(x), None), x, stacked)
    return self.norm(x[:, 0])


# Hugging Face's names, and the attention's names in the published files.
NAMES = {
  "cls_token": "embeddings.cls_token",
  "position_embeddings": "embeddings.position_embeddings",
  "patch": "embeddings.patch_embeddings.projection",
  "query": "attention.q_proj",
  "key": "attention.k_proj",
  "value": "attention.v_proj",
  "out": "attention.o_proj",
  "layer_scale1": "layer_scale1.lambda1",
  "inner": "fc1",
  "outer": "fc2",
  "layer_scale2": "layer_scale2.lambda1",
  "norm": "layernorm",
}
OLD_NAMES = {
  **NAMES,
  "query": "attention.attention.query",
  "key": "attention.attention.key",
  "value": "attention.attention.value",
  "out": "attention.output.dense",
}


def read_config(weights: Weights, offset: float = 0.0) -> ViTConfig:
  """The sizes of the encoder in a file.

  Raises:
    UserError: the file holds another network, such as ViT-g or a DINOv2 with register tokens.
  """
  shapes = weights.shapes
  position = "embeddings.position_embeddings"
  patch = "embeddings.patch_embeddings.projection.weight"
  mlp = "encoder.layer.0.mlp.fc1.weight"
  for name in (position, patch, mlp):
    if name not in shapes:
      raise UserError(
        f"{weights.path} has no tensor {name!r}, so it is not DINOv2 ViT-S, B or L; give the "
        "model.safetensors of facebook/dinov2-small, -base or -large."
      )
  if "embeddings.register_tokens" in shapes:
    raise UserError(
      f"{weights.path} is a DINOv2 with register tokens, whose features are not those of "
      "FD-DINOv2; give the model.safetensors of facebook/dinov2-small, -base or -large."
    )
  _, tokens, width = shapes[position]
  return ViTConfig(
    width=width,
    depth=len({name.split(".")[2] for name in shapes if name.startswith("encoder.layer.")}),
    hidden=shapes[mlp][0],
    patch=shapes[patch][-1],
    stored=round((tokens - 1) ** 0.5),
    offset=offset,
  )


def make_network(config: ViTConfig) -> tuple[dict, Callable]:
  """Returns (shapes of the parameters, forward).

  `forward(params, x) -> [b, k]` takes normalised images [b, h, w, 3]; h and w are multiples of the
  patch.
  """
  init, merge = recipe(lambda rngs: ViT(config, rngs=rngs))

  @torch_weights.full_precision
  def forward(params, x) -> jax.Array:
    return merge(params)(x)

  return jax.eval_shape(init, jax.random.key(0)), forward


def read_params(weights: Weights, shapes: dict, depth: int) -> dict:
  """The parameters of `make_network`; those of the blocks are stacked along a leading axis."""
  names = OLD_NAMES if "encoder.layer.0.attention.attention.query.weight" in weights else NAMES
  block = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), shapes["blocks"])
  blocks = [torch_weights.read(weights, block, names, f"encoder.layer.{i}.") for i in range(depth)]
  rest = {name: shapes[name] for name in shapes if name != "blocks"}
  stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *blocks)
  return {"blocks": stacked, **torch_weights.read(weights, rest, names)}


def preprocess(images: jax.Array) -> jax.Array:
  """uint8 [b, h, w, 3] -> normalised float32 [b, 224, 224, 3]."""
  torch_weights.check_images(images)
  shape = (len(images), SIDE, SIDE, 3)
  x = jax.image.resize(images.astype(jnp.float32), shape, "cubic", antialias=True)
  return (x / 255 - jnp.array(MEAN)) / jnp.array(STD)


def load(path: str | Path, offset: float = 0.0) -> tuple[dict, Callable]:
  """Reads a DINOv2 -> (params, apply); `apply(params, images uint8 [b, h, w, 3]) -> [b, k]`.

  Args:
    offset: of the position embedding's grid: 0, or 0.1 as in the authors' release.

  Raises:
    UserError: the file is missing, or holds another network.
  """
  weights = Weights(path)
  config = read_config(weights, offset)
  shapes, forward = make_network(config)
  params = read_params(weights, shapes, config.depth)
  return params, lambda params, images: forward(params, preprocess(images))
