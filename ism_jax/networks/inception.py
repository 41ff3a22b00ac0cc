"""FID-Inception: the network of 2015-12-05 that defines FID, sFID and the inception score.

This is Inception v3 (Szegedy et al., arXiv 1512.00567) as in TensorFlow's
`classify_image_graph_def.pb`. It differs from every later Inception v3: it has 1008 logits, average
pools without the padding, a maximum pool in the last block, and TensorFlow 1's bilinear resize to
299 x 299, which aligns corner pixels at the top left only. tools/convert_weights.py converts the
weights of torch-fidelity or pytorch-fid (`*-inception-2015-12-05-*.pth`).

The metrics use these features, as in guided-diffusion's evaluator (ADM):

    FID, precision, recall    pool, 2048: the average over the last feature map
    sFID                      spatial, 17 x 17 x 7: the first 7 channels of `mixed_6/conv`, which
                              are the first 7 of Mixed_6d; flattened rows first, channels last
    inception score           logits, 1008: without the bias ("unbiased")

Dimensions: b batch, h w image, f features.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ism_jax.networks import torch_weights
from train_jax.layers import recipe
from train_jax.storage.weights import Weights

SIDE = 299
SPATIAL_CHANNELS = 7


def resize(images: jax.Array) -> jax.Array:
  """[b, h, w, c] -> [b, 299, 299, c] float32, as TensorFlow 1's `resize_bilinear`.

  Output pixel i is read at i h / 299, with no half pixels and no antialiasing.
  """
  x = images.astype(jnp.float32)
  for axis in (2, 1):  # TensorFlow's order: along each row first
    size = x.shape[axis]
    position = np.arange(SIDE, dtype=np.float32) * np.float32(size / SIDE)
    low = position.astype(np.int32)
    shape = [1, 1, 1, 1]
    shape[axis] = SIDE
    fraction = (position - low).reshape(shape)
    lower = jnp.take(x, low, axis)
    x = lower + (jnp.take(x, np.minimum(low + 1, size - 1), axis) - lower) * fraction
  return x


class Conv(nnx.Conv):
  """A convolution with its batch norm folded in, then ReLU."""

  def __init__(self, inputs, outputs, window=(1, 1), strides=1, padding="SAME", **kwargs):
    super().__init__(inputs, outputs, window, strides, padding=padding, **kwargs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return nnx.relu(super().__call__(x))


def average(x: jax.Array) -> jax.Array:
  """The mean over 3 x 3 pixels, without the padding."""
  return nnx.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def halve(x: jax.Array) -> jax.Array:
  """The maximum over 3 x 3 pixels, with stride 2."""
  return nnx.max_pool(x, (3, 3), (2, 2), "VALID")


def join(*branches: jax.Array) -> jax.Array:
  return jnp.concatenate(branches, axis=-1)


HALF = {"window": (3, 3), "strides": 2, "padding": "VALID"}


class MixedA(nnx.Module):
  """35 x 35: branches of 1 x 1, 5 x 5, two of 3 x 3, and a pool."""

  def __init__(self, inputs: int, pool: int, **kwargs):
    self.branch1x1 = Conv(inputs, 64, **kwargs)
    self.branch5x5_1 = Conv(inputs, 48, **kwargs)
    self.branch5x5_2 = Conv(48, 64, (5, 5), **kwargs)
    self.branch3x3dbl_1 = Conv(inputs, 64, **kwargs)
    self.branch3x3dbl_2 = Conv(64, 96, (3, 3), **kwargs)
    self.branch3x3dbl_3 = Conv(96, 96, (3, 3), **kwargs)
    self.branch_pool = Conv(inputs, pool, **kwargs)

  def __call__(self, x: jax.Array) -> jax.Array:
    wide = self.branch5x5_2(self.branch5x5_1(x))
    double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
    return join(self.branch1x1(x), wide, double, self.branch_pool(average(x)))


class MixedB(nnx.Module):
  """35 x 35 to 17 x 17."""

  def __init__(self, inputs: int, **kwargs):
    self.branch3x3 = Conv(inputs, 384, **HALF, **kwargs)
    self.branch3x3dbl_1 = Conv(inputs, 64, **kwargs)
    self.branch3x3dbl_2 = Conv(64, 96, (3, 3), **kwargs)
    self.branch3x3dbl_3 = Conv(96, 96, **HALF, **kwargs)

  def __call__(self, x: jax.Array) -> jax.Array:
    double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
    return join(self.branch3x3(x), double, halve(x))


class MixedC(nnx.Module):
  """17 x 17: 7 x 7 windows as a row and a column, once and twice."""

  def __init__(self, inputs: int, inner: int, **kwargs):
    row, column = (1, 7), (7, 1)
    self.branch1x1 = Conv(inputs, 192, **kwargs)
    self.branch7x7_1 = Conv(inputs, inner, **kwargs)
    self.branch7x7_2 = Conv(inner, inner, row, **kwargs)
    self.branch7x7_3 = Conv(inner, 192, column, **kwargs)
    self.branch7x7dbl_1 = Conv(inputs, inner, **kwargs)
    self.branch7x7dbl_2 = Conv(inner, inner, column, **kwargs)
    self.branch7x7dbl_3 = Conv(inner, inner, row, **kwargs)
    self.branch7x7dbl_4 = Conv(inner, inner, column, **kwargs)
    self.branch7x7dbl_5 = Conv(inner, 192, row, **kwargs)
    self.branch_pool = Conv(inputs, 192, **kwargs)

  def __call__(self, x: jax.Array) -> jax.Array:
    single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
    double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
    double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
    return join(self.branch1x1(x), single, double, self.branch_pool(average(x)))


class MixedD(nnx.Module):
  """17 x 17 to 8 x 8."""

  def __init__(self, inputs: int, **kwargs):
    self.branch3x3_1 = Conv(inputs, 192, **kwargs)
    self.branch3x3_2 = Conv(192, 320, **HALF, **kwargs)
    self.branch7x7x3_1 = Conv(inputs, 192, **kwargs)
    self.branch7x7x3_2 = Conv(192, 192, (1, 7), **kwargs)
    self.branch7x7x3_3 = Conv(192, 192, (7, 1), **kwargs)
    self.branch7x7x3_4 = Conv(192, 192, **HALF, **kwargs)

  def __call__(self, x: jax.Array) -> jax.Array:
    wide = self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x)))
    return join(self.branch3x3_2(self.branch3x3_1(x)), self.branch7x7x3_4(wide), halve(x))


class MixedE(nnx.Module):
  """8 x 8: parallel rows and columns of 3; the last block has a maximum pool."""

  def __init__(self, inputs: int, maximum: bool, **kwargs):
    row, column = (1, 3), (3, 1)
    self.branch1x1 = Conv(inputs, 320, **kwargs)
    self.branch3x3_1 = Conv(inputs, 384, **kwargs)
    self.branch3x3_2a = Conv(384, 384, row, **kwargs)
    self.branch3x3_2b = Conv(384, 384, column, **kwargs)
    self.branch3x3dbl_1 = Conv(inputs, 448, **kwargs)
    self.branch3x3dbl_2 = Conv(448, 384, (3, 3), **kwargs)
    self.branch3x3dbl_3a = Conv(384, 384, row, **kwargs)
    self.branch3x3dbl_3b = Conv(384, 384, column, **kwargs)
    self.branch_pool = Conv(inputs, 192, **kwargs)
    self.maximum = maximum

  def __call__(self, x: jax.Array) -> jax.Array:
    one = self.branch3x3_1(x)
    two = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
    pooled = nnx.max_pool(x, (3, 3), (1, 1), "SAME") if self.maximum else average(x)
    return join(
      self.branch1x1(x),
      self.branch3x3_2a(one),
      self.branch3x3_2b(one),
      self.branch3x3dbl_3a(two),
      self.branch3x3dbl_3b(two),
      self.branch_pool(pooled),
    )


class Inception(nnx.Module):
  """Images in [-1, 1) of 299 x 299 -> the features of `load`."""

  def __init__(self, **kwargs):
    self.Conv2d_1a_3x3 = Conv(3, 32, **HALF, **kwargs)
    self.Conv2d_2a_3x3 = Conv(32, 32, (3, 3), padding="VALID", **kwargs)
    self.Conv2d_2b_3x3 = Conv(32, 64, (3, 3), **kwargs)
    self.Conv2d_3b_1x1 = Conv(64, 80, **kwargs)
    self.Conv2d_4a_3x3 = Conv(80, 192, (3, 3), padding="VALID", **kwargs)
    self.Mixed_5b = MixedA(192, 32, **kwargs)
    self.Mixed_5c = MixedA(256, 64, **kwargs)
    self.Mixed_5d = MixedA(288, 64, **kwargs)
    self.Mixed_6a = MixedB(288, **kwargs)
    self.Mixed_6b = MixedC(768, 128, **kwargs)
    self.Mixed_6c = MixedC(768, 160, **kwargs)
    self.Mixed_6d = MixedC(768, 160, **kwargs)
    self.Mixed_6e = MixedC(768, 192, **kwargs)
    self.Mixed_7a = MixedD(768, **kwargs)
    self.Mixed_7b = MixedE(1280, maximum=False, **kwargs)
    self.Mixed_7c = MixedE(2048, maximum=True, **kwargs)
    self.fc = nnx.Linear(2048, 1008, use_bias=False, rngs=kwargs["rngs"])

  def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
    x = halve(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
    x = halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
    x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
    x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
    spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
    x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
    pool = x.mean((1, 2))
    return {"pool": pool, "spatial": spatial, "logits": pool @ self.fc.kernel[...]}


def fold(weights: Weights, name: str, shape: tuple[int, ...]) -> dict[str, jax.Array]:
  """The convolution `name` with its batch norm (epsilon 0.001) folded in: kernel and bias."""
  norm = {
    key: weights.get(f"{name}.bn.{key}", shape[-1:]).astype(np.float64)
    for key in ("weight", "bias", "running_mean", "running_var")
  }
  scale = norm["weight"] / np.sqrt(norm["running_var"] + 1e-3)
  kernel = torch_weights.kernel(weights, f"{name}.conv.weight", shape) * scale
  bias = norm["bias"] - norm["running_mean"] * scale
  return {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}


def load(path: str | Path) -> tuple[dict, Callable]:
  """Reads FID-Inception -> (params, apply).

  `apply(params, images)` takes uint8 [b, h, w, 3] of any size and returns float32 arrays: "pool"
  [b, 2048], "spatial" [b, 2023] and "logits" [b, 1008] without the bias.

  Raises:
    UserError: the file is missing, or lacks a tensor of this network.
  """
  weights = Weights(path)
  init, merge = recipe(lambda rngs: Inception(rngs=rngs))

  def parameters(shapes: dict, name: str) -> dict:
    if "kernel" in shapes:
      return fold(weights, name, shapes["kernel"].shape)
    return {key: parameters(inner, f"{name}.{key}") for key, inner in shapes.items()}

  shapes = jax.eval_shape(init, jax.random.key(0))
  params = {key: parameters(shapes[key], key) for key in shapes if key != "fc"}
  params["fc"] = torch_weights.read(weights, shapes["fc"], prefix="fc.")

  @torch_weights.full_precision
  def apply(params, images) -> dict[str, jax.Array]:
    torch_weights.check_images(images)
    return merge(params)((resize(images) - 128) / 128)

  return params, apply
