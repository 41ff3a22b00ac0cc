"""Weights in safetensors files: read by name and shape, written atomically. No pickle anywhere.

Shapes and formats are checked against the network's before any value is read. A message names the
tensor that does not fit. Quantised weights are refused: without their scales, which are not read,
integers and packed bits mean nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  teaches numpy bfloat16, which files of language models hold
import numpy as np
from absl import logging
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from train_jax.errors import UserError
from train_jax.files import LFS, is_lfs_pointer, read_json, whole_path

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
FORMATS = ("F64", "F32", "F16", "BF16")
PLAIN = "float32, float16 or bfloat16"
UNKNOWN = ("F4", "F6_", "F8_")  # the formats that NumPy has not begin so
# What quantisers store instead of, or beside, a layer's `weight`.
SIGNS = ("qweight", "weight_packed", "weight_scale", "weight_scale_inv", "scale_weight", "SCB")
# Ends of the names of other weights: of those in a folder, a message speaks of the first.
OTHERS = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack")


class Weights:
  """The tensors of a safetensors file or folder; values are read only on request.

  A folder has model.safetensors, or an index, which lists its files. If it has both, the first is
  read, as transformers does.

  Attributes:
    path: of the file or the folder.
    shapes: by name.

  Raises:
    UserError: a file is missing, is not a safetensors file, or lacks what the index says of it.
  """

  def __init__(self, path: str | Path):
    self.path = Path(path).expanduser()
    paths, listed = _files(self.path)
    files = {path: _open(path) for path in paths}
    self._files = {name: file for file in files.values() for name in file.keys()}  # noqa: SIM118
    for name, file in listed.items():
      if name not in files[file].keys():  # noqa: SIM118
        raise UserError(f"{file} does not hold {name!r}, though {INDEX} says so; fetch both again.")
      self._files[name] = files[file]
    self.shapes = {
      name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()
    }

  def __contains__(self, name: str) -> bool:
    return name in self.shapes

  def check(self, name: str, shape: tuple[int, ...]) -> None:
    """Raises UserError if the tensor `name` is missing, quantised, or has another shape."""
    stem = name.removesuffix("weight")
    if sign := next((stem + sign for sign in SIGNS if stem + sign in self.shapes), None):
      raise UserError(
        f"{self.path} holds {sign!r}, so {name!r} is quantised, and quantised weights are not "
        f"read; give those of this model in {PLAIN}."
      )
    if name not in self.shapes:
      raise UserError(
        f"{self.path} has no tensor {name!r}; it holds {len(self.shapes)} others, such as "
        f"{next(iter(self.shapes), 'none')!r}: give the weights of this architecture."
      )
    if self._format(name) not in FORMATS:
      raise self._quantised(name)
    if self.shapes[name] != tuple(shape):
      raise UserError(
        f"{self.path}: {name!r} has the shape {self.shapes[name]}, and this architecture expects "
        f"{tuple(shape)}; give the weights of this size."
      )

  def _format(self, name: str) -> str:
    return self._files[name].get_slice(name).get_dtype()

  def _quantised(self, name: str) -> UserError:
    return UserError(
      f"{self.path}: {name!r} is stored as {self._format(name)}, and quantised weights are not "
      f"read; give those of this model in {PLAIN}."
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
      if self._format(name).startswith(UNKNOWN):
        raise self._quantised(name)
      digest.update(f"{name} {shape} ".encode())
      if shape:
        row = (*(slice(0, 1) for _ in shape[1:]), slice(None))
        digest.update(self.part(name, row).tobytes())
    return digest.hexdigest()


def _files(path: Path) -> tuple[list[Path], dict[str, Path]]:
  """The file, or the files of a folder; and the file of each tensor that the index lists."""
  index, whole = path / INDEX, path / WHOLE
  if not path.is_dir():
    return [path], {}
  if whole.is_file():
    if index.is_file():
      logging.warning("%s: %s is read, and %s beside it is not.", path, WHOLE, INDEX)
    return [whole], {}
  if not index.is_file():
    raise UserError(f"{path} has no {WHOLE} and no {INDEX}; {_way_out(path)}.")
  try:
    listed = {name: path / file for name, file in read_json(index)["weight_map"].items()}
  except (OSError, ValueError, KeyError, AttributeError, TypeError) as err:
    if is_lfs_pointer(index):
      raise UserError(f"{index} {LFS}.") from err
    raise UserError(f"{index} cannot be read ({err!r}); fetch it again.") from err
  files = sorted(set(listed.values()))
  if missing := [file.name for file in files if not file.is_file()]:
    raise UserError(
      f"{missing[0]!r}, one of the {len(files)} files that {index} lists, is not there; fetch it "
      "again."
    )
  return files, listed


def _way_out(folder: Path) -> str:
  """What to do about a folder without weights, by what it does hold."""
  other = next((file for end in OTHERS for file in sorted(folder.glob(f"*{end}"))), None)
  if other is None:
    return "give a folder with one of them, or a .safetensors file"
  if other.suffix == ".safetensors":
    return f"rename its {other.name!r} if that is the whole model, or give the missing index"
  if other.suffix in (".bin", ".pth", ".pt"):
    if list(folder.glob("*.bin.index.json")):
      return "save the model in its .bin files again, by transformers' `save_pretrained`"
    return f"convert its {other.name}: python tools/convert_weights.py {other} {folder / WHOLE}"
  return f"its {other.name} is not read: save the model again, as safetensors"


def _open(path: Path):
  try:
    return safe_open(str(path), framework="numpy")
  except OSError as err:
    raise UserError(
      f"the weights {str(path)!r} cannot be read ({err.strerror or err}); give a .safetensors file."
    ) from err
  except SafetensorError as err:
    if is_lfs_pointer(path):
      raise UserError(f"{path} {LFS}.") from err
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
