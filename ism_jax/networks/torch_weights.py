"""What networks trained in PyTorch share: their tensors in Flax's names, precision, inputs.

Flax and PyTorch name and lay out the same parameter differently:

    here                               in the file
    kernel [h, w, in, out]             weight [out, in, h, w]
    kernel [in, out]                   weight [out, in]
    scale                              weight
    anything else                      the same

A linear layer and a 1 x 1 convolution are the same matrix, and files have either for the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from train_jax.errors import UserError
from train_jax.storage.weights import Weights


def kernel(weights: Weights, name: str, shape: tuple[int, ...]) -> np.ndarray:
  """The weight `name` of a convolution or a linear layer, turned into the kernel `shape`.

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
    names: what a component of a parameter's path is called in the file, where that differs.
    prefix: of every name in the file.

  Raises:
    UserError: the file has no tensor of a name that is needed, or one of another shape.
  """
  names = {"kernel": "weight", "scale": "weight", **(names or {})}

  def leaf(path, expected) -> jax.Array:
    parts = [str(key.key) for key in path]
    name = prefix + ".".join(names.get(part, part) for part in parts)
    get = functools.partial(kernel, weights) if parts[-1] == "kernel" else weights.get
    return jnp.asarray(get(name, expected.shape), jnp.float32)

  return jax.tree_util.tree_map_with_path(leaf, shapes)


def full_precision(function: Callable) -> Callable:
  """`function` with float32 products that are float32 on every device.

  GPUs and TPUs round the factors of a float32 product to 10 or 7 bits unless they are told not to:
  enough to move a published number. Products of bfloat16 are as they were.
  """

  @functools.wraps(function)
  def wrapped(*args):
    with jax.default_matmul_precision("highest"):
      return function(*args)

  return wrapped


def check_images(images: jax.Array) -> None:
  """UserError unless images are uint8 [b, h, w, 3]."""
  if images.dtype != jnp.uint8 or images.ndim != 4 or images.shape[3] != 3:
    raise UserError(
      f"images are {images.dtype} of the shape {tuple(images.shape)}, and must be uint8 "
      "[b, h, w, 3]: round them as the metric's reference was, and repeat a single channel."
    )
