"""Images on disk for evaluation: ADM's .npz files, and folders.

ADM's files (Dhariwal & Nichol, arXiv 2105.05233, github.com/openai/guided-diffusion/evaluations)
hold images as `arr_0`, uint8 [n, h, w, c]. References also have Inception moments as `mu` and
`sigma` (pooled features), `mu_s` and `sigma_s` (spatial). Images are read and written batch by
batch: `np.load` would hold all 50 000, 10 GB at 256 pixels.

Dimensions: n images, b batch, h w image, c channel.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.lib import format as npy
from PIL import Image

from ism_jax.data.images import SUFFIXES, UNREADABLE, square
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
  """The image files in a folder and its sub-folders, sorted; UserError if there is none."""
  files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
  if not files:
    raise UserError(
      f"the folder {str(folder)!r} has no images; expected files ending in "
      f"{', '.join(sorted(SUFFIXES))}."
    )
  return files


def folder_images(files: list[Path], image_size: int, channels: int | None = None) -> ImageBatches:
  """Image files cropped by `read_square`; grey ones get three equal channels."""

  def batches(b: int, rows: np.ndarray) -> Iterator[np.ndarray]:
    with ThreadPoolExecutor() as pool:
      for start in range(0, len(files), b):
        paths = [files[start + i] for i in rows if start + i < len(files)]
        squares = list(pool.map(lambda path: read_square(path, image_size, channels), paths))
        pixels = np.array(squares, np.uint8).reshape(-1, image_size, image_size, channels or 3)
        yield np.broadcast_to(pixels, (*pixels.shape[:3], 3))

  cut = f"area{channels}" if channels else "adm"
  return ImageBatches(len(files), (image_size, image_size, 3), batches, cut)


def read_square(path: Path, image_size: int, channels: int | None = None) -> np.ndarray:
  """`images.square` of an image file, uint8 [image_size, image_size, `channels` or 3].

  Raises:
    UserError: the file is unreadable.
  """
  try:
    with Image.open(path) as file:
      return square(file, image_size, channels)
  except UNREADABLE as err:
    raise UserError(f"the image {str(path)!r} cannot be read; repair or remove it.") from err


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
