"""Shared by networks trained in PyTorch: their tensors under Flax's names, precision, inputs.

Flax and PyTorch name and lay out the same parameter differently:

    here                               in the file
    kernel [h, w, in, out]             weight [out, in, h, w]
    kernel [in, out]                   weight [out, in]
    scale                              weight
    anything else                      the same

A linear layer and a 1 x 1 convolution are the same matrix, and files may store either shape.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from train_jax.storage.weights import Weights


def kernel(weights: Weights, name: str, shape: tuple[int, ...]) -> np.ndarray:
  """The weight `name` of a convolution or a linear layer, as a kernel of `shape`.

  Args:
    shape: [h, w, in, out] or [in, out].

  Raises:
    UserError: the file has no such tensor, or one of another shape.
  """
  *window, inputs, outputs = shape
  stored = (outputs, inputs, *window)
  matrix = (outputs, inputs)
  if set(window) <= {1} and weights.shapes.get(name) in (matrix, (*matrix, 1, 1)):
    stored = weights.shapes[name]
  tensor = weights.get(name, stored).reshape(outputs, inputs, *window)
  return np.moveaxis(tensor, (1, 0), (-2, -1))


def read(
  weights: Weights, shapes: dict, names: Mapping[str, str] | None = None, prefix: str = ""
) -> dict:
  """The parameters of a network, float32.

  Args:
    shapes: the network's parameters as a nested dict of jax.ShapeDtypeStruct.
    names: component of a parameter's path -> its name in the file, if that differs.
    prefix: of every name in the file.

  Raises:
    UserError: the file lacks a tensor, or has one of another shape.
  """
  names = {"kernel": "weight", "scale": "weight", **(names or {})}

  def leaf(path, expected) -> jax.Array:
    parts = [str(key.key) for key in path]
    name = prefix + ".".join(names.get(part, part) for part in parts)
    get = functools.partial(kernel, weights) if parts[-1] == "kernel" else weights.get
    return jnp.asarray(get(name, expected.shape), jnp.float32)

  return jax.tree_util.tree_map_with_path(leaf, shapes)


def full_precision(function: Callable) -> Callable:
  """`function` with full float32 products on every device.

  By default GPUs and TPUs round the factors of a float32 product to 10 or 7 bits, which changes
  published numbers. Products of bfloat16 stay the same.
  """

  @functools.wraps(function)
  def wrapped(*args):
    with jax.default_matmul_precision("highest"):
      return function(*args)

  return wrapped


def check_images(images: jax.Array) -> None:
  """Asserts that images are uint8 [b, h, w, 3]."""
  assert images.dtype == jnp.uint8 and images.ndim == 4 and images.shape[3] == 3, images.shape
