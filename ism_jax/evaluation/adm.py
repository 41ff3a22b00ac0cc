"""Images on disk for evaluation: ADM's .npz files, and folders.

ADM's files (Dhariwal & Nichol, arXiv 2105.05233, github.com/openai/guided-diffusion/evaluations)
hold images as `arr_0`, uint8 [n, h, w, c]. References also have Inception moments as `mu` and
`sigma` (pooled features), `mu_s` and `sigma_s` (spatial). Images are read and written batch by
batch: `np.load` would hold all 50 000, 10 GB at 256 pixels.

Dimensions: n images, b batch, h w image, c channel.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging
from numpy.lib import format as npy

from ism_jax.data import images as images_lib
from ism_jax.data.decode import Fault, square
from train_jax.errors import UserError
from train_jax.files import whole_file


class ImageBatches(NamedTuple):
  """Images on disk.

  Attributes:
    n: their number.
    shape: (h, w, 3).
    batches: (b, rows) -> uint8 [<= len(rows), h, w, 3] of each batch of b: its images at the places
      `rows`, ascending; the last batch may not have all.
    cut: the name of the crop of image files; "" for stored arrays.
  """

  n: int
  shape: tuple[int, int, int]
  batches: Callable[[int, np.ndarray], Iterator[np.ndarray]]
  cut: str = ""


def npz_arrays(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """Name -> (shape, dtype) of the arrays in an .npz, from their headers.

  Raises:
    UserError: the file is not an .npz.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      headers = {}
      for name in archive.namelist():
        with archive.open(name) as file:
          headers[name.removesuffix(".npy")] = _header(file)
      return headers
  except (OSError, ValueError, zipfile.BadZipFile) as err:
    raise UserError(
      f"{str(path)!r} is not a whole .npz file ({err}); fetch it again, or give another."
    ) from err


def npz_images(path: Path) -> ImageBatches:
  """The images `arr_0` of an .npz; grey ones become three equal channels.

  Raises:
    UserError: they are not uint8 [n, h, w, 1 or 3].
  """
  shape, dtype = npz_arrays(path)["arr_0"]
  if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or not math.prod(shape):
    raise UserError(
      f"arr_0 of {str(path)!r} is {dtype} {shape}, and must be uint8 [n, h, w, 3]; convert the "
      "images to 8 bits, channels last."
    )

  def batches(b: int, rows: np.ndarray) -> Iterator[np.ndarray]:
    size = math.prod(shape[1:])
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
      _header(file)
      for start in range(0, shape[0], b):
        count = min(b, shape[0] - start)
        pixels = np.frombuffer(file.read(count * size), np.uint8).reshape(count, *shape[1:])
        images = pixels[rows[rows < count]]
        yield np.broadcast_to(images, (*images.shape[:3], 3))

  return ImageBatches(shape[0], (*shape[1:3], 3), batches)


def _header(file) -> tuple[tuple[int, ...], np.dtype]:
  """(shape, dtype) of an array; ValueError for images in Fortran order."""
  version = npy.read_magic(file)
  read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
  shape, fortran, dtype = read(file)
  if fortran and len(shape) > 2:
    raise ValueError("its images are stored in Fortran order")
  return shape, dtype


def folder_files(folder: Path) -> list[Path]:
  """The image files in a folder and its sub-folders, sorted; see `images.scan`.

  Raises:
    UserError: there is none, or the folder holds the splits of a data set.
  """
  files, left_out = images_lib.scan(folder)
  notes = images_lib.notes(left_out)
  if not files:
    raise UserError(
      f"the folder {str(folder)!r} has no images{notes and f' ({notes})'}; expected files such as "
      "a.png, or with another suffix that Pillow reads."
    )
  if notes:
    logging.warning("reference=%s: %d images; %s", folder, len(files), notes)
  return files


def folder_images(files: list[Path], image_size: int, channels: int | None = None) -> ImageBatches:
  """Image files cropped by `read_square`; grey ones get three equal channels."""

  def batches(b: int, rows: np.ndarray) -> Iterator[np.ndarray]:
    turned = 0
    with ThreadPoolExecutor() as pool:
      for start in range(0, len(files), b):
        paths = [files[start + i] for i in rows if start + i < len(files)]
        found = list(pool.map(lambda path: _read(path, image_size, channels), paths))
        turned += sum(was_turned for _, was_turned in found)
        squares = np.array([pixels for pixels, _ in found], np.uint8)
        pixels = squares.reshape(-1, image_size, image_size, channels or 3)
        yield np.broadcast_to(pixels, (*pixels.shape[:3], 3))
    if turned:
      logging.warning("reference: %s", images_lib.notes({}, turned))

  cut = f"area{channels}" if channels else "adm"
  return ImageBatches(len(files), (image_size, image_size, 3), batches, cut)


def read_square(path: Path, image_size: int, channels: int | None = None) -> np.ndarray:
  """`decode.square` of an image file, uint8 [image_size, image_size, `channels` or 3].

  Raises:
    UserError: the file is unreadable.
  """
  return _read(path, image_size, channels)[0]


def _read(path: Path, image_size: int, channels: int | None) -> tuple[np.ndarray, bool]:
  """`read_square`, and whether EXIF turned the image."""
  with _refusing(path):
    return square(images_lib.file_bytes(path), image_size, channels)


def folder_digest(folder: Path, files: list[Path]) -> bytes:
  """SHA-256 of the names and contents of the image files in a folder; raises as `read_square`."""

  def of_file(path: Path) -> bytes:
    with _refusing(path):
      content = images_lib.file_bytes(path)
    return f"{path.relative_to(folder)}\0".encode() + hashlib.sha256(content).digest()

  with ThreadPoolExecutor() as pool:
    return hashlib.sha256(b"".join(pool.map(of_file, files))).digest()


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
  """A Fault becomes a UserError that names the file."""
  try:
    yield
  except Fault as fault:
    raise UserError(
      f"the image {str(path)!r} cannot be read: {fault}; repair or remove it."
    ) from fault


@contextmanager
def npz_writer(
  path: Path, shape: tuple[int, int, int, int], more: Mapping[str, np.ndarray]
) -> Iterator[Callable[[np.ndarray], None]]:
  """Writes uint8 images of `shape` [n, h, w, c] as `arr_0`, batch by batch, and `more` arrays.

  Yields a function that writes the next images. The file gets its name when it is whole.
  """
  with whole_file(path) as whole, zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as archive:
    with archive.open("arr_0.npy", "w", force_zip64=True) as file:
      npy.write_array_header_1_0(
        file, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)}
      )
      yield lambda images: file.write(np.ascontiguousarray(images, np.uint8).tobytes()) and None
    for name, array in more.items():
      with archive.open(f"{name}.npy", "w") as file:
        npy.write_array(file, np.asarray(array), allow_pickle=False)
