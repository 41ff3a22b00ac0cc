"""Weights in safetensors files: read by name and shape, written atomically. No pickle anywhere.

Shapes are checked against the network's before any value is read. A message names the tensor that
does not fit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  teaches numpy bfloat16, which files of language models hold
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from train_jax.errors import UserError
from train_jax.files import whole_path

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"


class Weights:
  """The tensors of a safetensors file or folder; values are read only on request.

  A folder has either model.safetensors or an index, which lists its files.

  Attributes:
    path: of the file or the folder.
    shapes: by name.

  Raises:
    UserError: a file is missing or not a safetensors file.
  """

  def __init__(self, path: str | Path):
    self.path = Path(path).expanduser()
    files = [_open(file) for file in _files(self.path)]
    self._files = {name: file for file in files for name in file.keys()}  # noqa: SIM118
    self.shapes = {
      name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()
    }

  def __contains__(self, name: str) -> bool:
    return name in self.shapes

  def check(self, name: str, shape: tuple[int, ...]) -> None:
    """Raises UserError if the tensor `name` is missing, or has another shape."""
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

  def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor `name`, in the file's dtype; raises as `check` does."""
    self.check(name, shape)
    return self._files[name].get_tensor(name)

  def part(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
    """A part of the tensor `name`, by a slice of step 1 for each axis; only the part is read."""
    return self._files[name].get_slice(name)[index]

  def digest(self) -> str:
    """SHA-256 of all names and shapes, and of every tensor's first row only, which is quick."""
    digest = hashlib.sha256()
    for name, shape in sorted(self.shapes.items()):
      digest.update(f"{name} {shape} ".encode())
      if shape:
        row = (*(slice(0, 1) for _ in shape[1:]), slice(None))
        digest.update(self.part(name, row).tobytes())
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
  """The file itself, or the files of a folder."""
  index = path / INDEX
  if not path.is_dir() or not index.is_file():
    return [path / WHOLE if path.is_dir() else path]
  try:
    names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
  except (OSError, ValueError, KeyError, AttributeError) as err:
    raise UserError(f"{index} cannot be read ({err!r}); fetch it again.") from err
  if missing := [name for name in names if not (path / name).is_file()]:
    raise UserError(
      f"{missing[0]!r}, one of the {len(names)} files that {index} lists, is not there; fetch it "
      "again."
    )
  return [path / name for name in names]


def _open(path: Path):
  try:
    return safe_open(str(path), framework="numpy")
  except OSError as err:
    raise UserError(
      f"the weights {str(path)!r} cannot be read ({err.strerror or err}); give a .safetensors file."
    ) from err
  except SafetensorError as err:
    raise UserError(
      f"the weights {str(path)!r} are not a whole safetensors file ({err}); convert them with "
      "tools/convert_weights.py, or fetch them again."
    ) from err


def sha256(path: str | Path) -> str:
  """SHA-256 of a file; UserError if it cannot be read."""
  try:
    with Path(path).expanduser().open("rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as err:
    raise UserError(f"the file {str(path)!r} cannot be read: {err.strerror}.") from err


def save(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
  """Writes a safetensors file; a reader sees the old file or the whole new one."""
  with whole_path(Path(path)) as partial:
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, partial, metadata=metadata)
