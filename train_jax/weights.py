"""Weights in safetensors files: read by name and shape, written atomically. No pickle anywhere.

Shapes are checked against what the network expects before a single value is read; a file that does
not fit is refused by the name of the tensor.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from train_jax.errors import UserError


class Weights:
  """The tensors of one safetensors file, read when they are asked for.

  Attributes:
    path: of the file.
    shapes: name -> shape.
    metadata: the file's strings.
  """

  def __init__(self, path: str | Path):
    """Opens the file; UserError if it is not there or not a safetensors file."""
    self.path = Path(path).expanduser()
    try:
      self._file = safe_open(str(self.path), framework="numpy")
    except OSError as err:
      raise UserError(
        f"the weights {str(path)!r} cannot be read ({err.strerror or err}); give a .safetensors "
        "file."
      ) from err
    except SafetensorError as err:
      raise UserError(
        f"the weights {str(path)!r} are not a whole safetensors file ({err}); convert them with "
        "tools/convert_weights.py, or fetch them again."
      ) from err
    self.metadata = self._file.metadata() or {}
    self.shapes = {
      name: tuple(self._file.get_slice(name).get_shape())
      for name in self._file.keys()  # noqa: SIM118
    }

  def __contains__(self, name: str) -> bool:
    return name in self.shapes

  def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor `name`, in the file's dtype.

    Raises:
      UserError: it is missing, or has another shape.
    """
    if name not in self.shapes:
      raise UserError(
        f"{self.path} has no tensor {name!r}; it holds {len(self.shapes)} others, such as "
        f"{next(iter(self.shapes), 'none')!r}: give the weights of this architecture."
      )
    if self.shapes[name] != tuple(shape):
      raise UserError(
        f"{self.path}: {name!r} has the shape {self.shapes[name]}, and this architecture expects "
        f"{tuple(shape)}; give the weights of this size."
      )
    return self._file.get_tensor(name)


def sha256(path: str | Path) -> str:
  """SHA-256 of a file; UserError if it cannot be read."""
  try:
    with Path(path).expanduser().open("rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as err:
    raise UserError(f"the file {str(path)!r} cannot be read: {err.strerror}.") from err


def save(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
  """Writes a safetensors file; a reader sees the old file or the whole new one."""
  path = Path(path)
  partial = path.with_name(path.name + ".partial")
  save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, partial, metadata=metadata)
  os.replace(partial, path)
