"""Encoded images with labels, in random access: a folder, TFDS, ArrayRecord files, tars of JPEGs.

A source knows how many images there are, where each lies, and its class; they are read one by one.
There are two cuts: what is encoded, and what latents are compared with, is cut as in ADM (arXiv
2105.05233); what is trained on in pixels, and what these are compared with, by `area_square`.

Dimensions: n images.
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

# What Pillow raises on a file that is not a whole image; struct.error is of damaged EXIF.
UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class EncodedImages:
  """n encoded images.

  Attributes:
    size: n.
    names: one name for each class; () where the source does not say.
    read: i -> (the file's bytes, its class).
    name: i -> where it is from, the same wherever the source lies.
  """

  size: int
  names: tuple[str, ...]
  read: Callable[[int], tuple[bytes, int]]
  name: Callable[[int], str]


def folder(root: str, flag: str = "--images") -> EncodedImages:
  """`root/<class name>/*.png|jpg|...`; classes are numbered in the order of their names.

  Where these have no images, those in `root` itself are one class, of its name.

  Raises:
    UserError: no such folder, or no image; it names the option `flag`.
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
    with tarfile.open(path, "r:") as tar:  # not compressed: members are read where they lie
      for member in tar:
        folder_, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        key = f"{folder_}/{stem}".lstrip("/")
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
  return [(path, key, *where, classes[key]) for key, where in images.items()]


def tars(paths: list[Path]) -> EncodedImages:
  """WebDataset's layout: uncompressed tars with `KEY.jpg` (or .png, ...) and `KEY.cls`, a number.

  Only the tars' headers are read now; the images are read later where they lie.

  Raises:
    UserError: a damaged tar, an image without its class, or no image.
  """
  found = [member for path in paths for member in _members(path)]
  if not found:
    raise UserError(f"{paths[0]} has no images; expected members KEY.jpg and KEY.cls.")

  def read(i: int) -> tuple[bytes, int]:
    path, _, offset, size, label = found[i]
    with path.open("rb") as file:
      file.seek(offset)
      return file.read(size), label

  return EncodedImages(len(found), (), read, lambda i: f"{found[i][0].name}:{found[i][1]}")


def _labelled(found: records.Records) -> EncodedImages:
  return EncodedImages(found.size, found.classes, found.read, found.name)


def tfds(name: str, flag: str = "--images") -> EncodedImages:
  """A prepared TFDS builder with `image` and `label`, see `records.open_tfds`."""
  return _labelled(records.open_tfds(name, flag, *FIELDS))


def find(source: str) -> EncodedImages:
  """Whatever `--images=SOURCE` names.

  Args:
    source: a folder of images, or with one sub-folder a class; a directory, file or pattern of
      `.tar` or `.array_record` files; a TFDS builder's directory; or `tfds:NAME[@SPLIT]`.

  Raises:
    UserError: it is none of these.
  """
  if records.is_tfds(source):
    return tfds(source)
  path = Path(source).expanduser()
  inside = path.iterdir() if path.is_dir() else map(Path, glob.glob(str(path)))
  files = sorted(file for file in inside if file.is_file())
  if chosen := [file for file in files if file.suffix == ".tar"]:
    return tars(chosen)
  if chosen := [file for file in files if ".array_record" in file.name]:
    return _labelled(records.open_array_records(chosen, *FIELDS))
  if path.is_dir():
    return folder(source)
  raise UserError(
    f"--images={source!r} is not there; give a folder of images, or with one sub-folder a class, "
    ".tar or .array_record files, a TFDS directory, or tfds:NAME."
  )


def convert(image: Image.Image, mode: str) -> Image.Image:
  """An image of any kind in `mode`, L or RGB: 8 bits a channel; what is transparent is white."""
  if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  if image.has_transparency_data:  # what colour lies under it, often black, was not to be seen
    image = image.convert("RGBA")
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
  return image.convert(mode)


def center_crop(image: Image.Image, image_size: int) -> np.ndarray:
  """The centre square of an RGB image, as guided-diffusion's `center_crop_arr`.

  Halved by box averages while both sides stay above twice the size; then bicubic; then cut.

  Returns:
    uint8 [side, side, 3].
  """
  while min(image.size) >= 2 * image_size:
    image = image.resize(tuple(x // 2 for x in image.size), Image.Resampling.BOX)
  scale = image_size / min(image.size)
  size = tuple(round(x * scale) for x in image.size)
  pixels = np.array(image.resize(size, Image.Resampling.BICUBIC))
  top, left = (pixels.shape[0] - image_size) // 2, (pixels.shape[1] - image_size) // 2
  return pixels[top : top + image_size, left : left + image_size]


def area_square(image: Image.Image, image_size: int, channels: int) -> np.ndarray:
  """The centre square of an image, as the camera was held; a pixel is the mean of its area.

  Returns:
    uint8 [side, side, channels]: 1, grey, or 3, RGB.
  """
  image = convert(ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB")
  edge = min(image.size)
  left, top = (image.width - edge) // 2, (image.height - edge) // 2
  box = (left, top, left + edge, top + edge)
  image = image.resize((image_size, image_size), Image.Resampling.BOX, box=box, reducing_gap=None)
  return np.asarray(image, np.uint8).reshape(image_size, image_size, channels)


def square(image: Image.Image, image_size: int, channels: int | None = None) -> np.ndarray:
  """The centre square, uint8 [side, side, c]: `area_square`, or as in ADM without `channels`."""
  if channels:
    return area_square(image, image_size, channels)
  return center_crop(convert(image, "RGB"), image_size)


def read_image(
  images: EncodedImages, i: int, image_size: int, channels: int | None = None
) -> tuple[np.ndarray | None, int]:
  """(the centre square of image i, see `square`; its class); None where it cannot be read."""
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
  """(number, pixels, class) of the images `rows`, `batch` at a time, one batch read ahead."""

  def start(first: int) -> list:
    numbers = rows[first : first + batch]
    return [(i, pool.submit(read_image, images, i, image_size)) for i in numbers]

  ahead = start(0)
  for first in range(0, len(rows), batch):
    ready, ahead = ahead, start(first + batch)
    yield [(i, *future.result()) for i, future in ready]
