"""Image files with labels, in random access: a folder, TFDS, ArrayRecord files, tars of JPEGs.

Images are read one by one. There are two crops. Images to encode, and the references of models of
latents, are cropped as in ADM (arXiv 2105.05233, `center_crop`). Training images of models of
pixels, and their references, are cropped by `area_square`.

Dimensions: n images, s image_size.
"""

from __future__ import annotations

import glob
import io
import struct
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from absl import logging
from PIL import Image, ImageOps

from train_jax.errors import UserError
from train_jax.storage import records

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

FIELDS = {"image": bytes, "label": int}, "an encoded 'image' and an integer 'label'"  # of records

# Pillow's errors for a file that is not a whole image; damaged EXIF raises struct.error.
UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class EncodedImages:
  """n encoded images.

  Attributes:
    size: n.
    names: one name for each class; () where the source has none.
    read: i -> (the file's bytes, its class).
    name: i -> the image's name inside the source, which does not depend on the source's place.
  """

  size: int
  names: tuple[str, ...]
  read: Callable[[int], tuple[bytes, int]]
  name: Callable[[int], str]


def folder(root: str, flag: str = "--images") -> EncodedImages:
  """`root/<class name>/*.png|jpg|...`; classes are numbered in the order of their names.

  If these have no images, those in `root` itself are one class of its name.

  Raises:
    UserError: no such folder, or no image; the message names the option `flag`.
  """
  top = Path(root).expanduser()
  if not top.is_dir():
    raise UserError(
      f"{flag}={root!r} is not a folder; give a folder of images, or with one sub-folder a class."
    )
  names = sorted(p.name for p in top.iterdir() if p.is_dir() and not p.name.startswith("."))
  files = [
    (path, label)
    for label, name in enumerate(names)
    for path in sorted((top / name).rglob("*"))
    if path.suffix.lower() in SUFFIXES
  ]
  loose = sorted(p for p in top.iterdir() if p.is_file() and p.suffix.lower() in SUFFIXES)
  if not files:
    names, files = [top.resolve().name], [(path, 0) for path in loose]
  elif loose:
    logging.warning("%s=%s: %d images beside its sub-folders are left out", flag, root, len(loose))
  if not files:
    raise UserError(
      f"{flag}={root!r} has no images; expected {root}/<class name>/<image>.png, or "
      f"{root}/<image>.png of one class, or another of {', '.join(sorted(SUFFIXES))}."
    )
  return EncodedImages(
    len(files),
    tuple(names),
    lambda i: (files[i][0].read_bytes(), files[i][1]),
    lambda i: str(files[i][0].relative_to(top)),
  )


def _members(path: Path) -> list[tuple[Path, str, int, int, int]]:
  """(tar, key, offset, bytes, class) of each image of one tar, in its order."""
  images, classes = {}, {}
  try:
    with tarfile.open(path, "r:") as tar:  # uncompressed only: members are read by offset
      for member in tar:
        parent, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        key = f"{parent}/{stem}".lstrip("/")
        if f".{extension.lower()}" in SUFFIXES:
          images[key] = (member.offset_data, member.size)
        elif extension == "cls":
          classes[key] = int(tar.extractfile(member).read())
  except (tarfile.TarError, ValueError) as err:
    raise UserError(
      f"{path} cannot be read as a tar of KEY.jpg and KEY.cls, a class number ({err}); give whole "
      "tars that are not compressed."
    ) from err
  for key in images:
    if key not in classes:
      raise UserError(
        f"{path}: the image {key!r} has no {key}.cls beside it; add its class number."
      )
  return [(path, key, *place, classes[key]) for key, place in images.items()]


def tars(paths: list[Path]) -> EncodedImages:
  """WebDataset's layout: uncompressed tars with `KEY.jpg` (or .png, ...) and `KEY.cls`, a number.

  Only the tars' headers are read now; images are read later by their offsets.

  Raises:
    UserError: a damaged tar, an image without its class, or no image.
  """
  members = [member for path in paths for member in _members(path)]
  if not members:
    raise UserError(f"{paths[0]} has no images; expected members KEY.jpg and KEY.cls.")

  def read(i: int) -> tuple[bytes, int]:
    path, _, offset, size, label = members[i]
    with path.open("rb") as file:
      file.seek(offset)
      return file.read(size), label

  return EncodedImages(len(members), (), read, lambda i: f"{members[i][0].name}:{members[i][1]}")


def _from_records(source: records.Records) -> EncodedImages:
  return EncodedImages(source.size, source.classes, source.read, source.name)


def tfds(name: str, flag: str = "--images") -> EncodedImages:
  """A prepared TFDS builder with `image` and `label`, see `records.open_tfds`."""
  return _from_records(records.open_tfds(name, flag, *FIELDS))


def find(source: str) -> EncodedImages:
  """The images that `--images=SOURCE` names.

  Args:
    source: a folder of images, or of one sub-folder for each class; a directory, file or pattern
      of `.tar` or `.array_record` files; a TFDS builder's directory; or `tfds:NAME[@SPLIT]`.

  Raises:
    UserError: it is none of these.
  """
  if records.is_tfds(source):
    return tfds(source)
  path = Path(source).expanduser()
  paths = path.iterdir() if path.is_dir() else map(Path, glob.glob(str(path)))
  files = sorted(file for file in paths if file.is_file())
  if tar_files := [file for file in files if file.suffix == ".tar"]:
    return tars(tar_files)
  if record_files := [file for file in files if ".array_record" in file.name]:
    return _from_records(records.open_array_records(record_files, *FIELDS))
  if path.is_dir():
    return folder(source)
  raise UserError(
    f"--images={source!r} is not there; give a folder of images, or with one sub-folder a class, "
    ".tar or .array_record files, a TFDS directory, or tfds:NAME."
  )


def convert(image: Image.Image, mode: str) -> Image.Image:
  """An image of any kind in `mode` (L or RGB), 8 bits a channel, on a white background."""
  if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  if image.has_transparency_data:  # the colour under it, often black, was never visible
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  return image.convert(mode)


def center_crop(image: Image.Image, image_size: int) -> np.ndarray:
  """The centre square of an RGB image, uint8 [s, s, 3], as guided-diffusion's `center_crop_arr`.

  The image is halved by box averages while both sides are at least 2 s, resized by a bicubic filter
  so that the shorter side is s, and cropped.
  """
  while min(image.size) >= 2 * image_size:
    image = image.resize(tuple(x // 2 for x in image.size), Image.Resampling.BOX)
  scale = image_size / min(image.size)
  size = tuple(round(x * scale) for x in image.size)
  pixels = np.array(image.resize(size, Image.Resampling.BICUBIC))
  top, left = (pixels.shape[0] - image_size) // 2, (pixels.shape[1] - image_size) // 2
  return pixels[top : top + image_size, left : left + image_size]


def area_square(image: Image.Image, image_size: int, channels: int) -> np.ndarray:
  """The centre square of the upright image, averaged over areas: uint8 [s, s, 1 or 3]."""
  image = convert(ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB")
  edge = min(image.size)
  left, top = (image.width - edge) // 2, (image.height - edge) // 2
  box = (left, top, left + edge, top + edge)
  image = image.resize((image_size, image_size), Image.Resampling.BOX, box=box, reducing_gap=None)
  return np.asarray(image, np.uint8).reshape(image_size, image_size, channels)


def square(image: Image.Image, image_size: int, channels: int | None = None) -> np.ndarray:
  """`area_square` [s, s, channels]; without `channels`, `center_crop` [s, s, 3]."""
  if channels:
    return area_square(image, image_size, channels)
  return center_crop(convert(image, "RGB"), image_size)


def read_image(
  images: EncodedImages, i: int, image_size: int, channels: int | None = None
) -> tuple[np.ndarray | None, int]:
  """(`square` of image i, or None if it cannot be read; its class)."""
  label = -1
  try:
    content, label = images.read(i)
    with Image.open(io.BytesIO(content)) as image:
      return square(image, image_size, channels), label
  except UserError:
    raise
  except UNREADABLE:
    return None, label


def read_batches(
  images: EncodedImages, rows: range, batch: int, image_size: int, pool: ThreadPoolExecutor
) -> Iterator[list[tuple[int, np.ndarray | None, int]]]:
  """Lists of (number, pixels, class) of the images `rows`: batches, with one read ahead."""

  def start(first: int) -> list:
    numbers = rows[first : first + batch]
    return [(i, pool.submit(read_image, images, i, image_size)) for i in numbers]

  futures = start(0)
  for first in range(0, len(rows), batch):
    current, futures = futures, start(first + batch)
    yield [(i, *future.result()) for i, future in current]
