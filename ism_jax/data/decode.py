"""An image file's bytes become the pixels of its centre square, upright, or a reason why not.

There are two crops. Images to encode, and the references of models of latents, are cropped as in
ADM (arXiv 2105.05233, `center_crop`). Training images of models of pixels, and their references,
are cropped by `area_square`.

Dimension: s image_size.
"""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

ASPECT = 50  # the longer side may be so many times the shorter: ADM's crop resizes all of an image
DARK = 4096  # 16-bit values that are all below this would be black with 8 bits

# Pillow's errors for a file that is not a whole image.
_UNREADABLE = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)

_TURNS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}  # by EXIF's orientation
_ORIENTATION = 0x0112

# What stands in the place of an image, by its first bytes.
_IMPOSTORS = {
  b"version https://git-lfs": "it is a pointer of git-LFS; run `git lfs pull`",
  b"/annex/objects/": "it is a pointer of git-annex; run `git annex get`",
  b"<": "it is text, such as SVG or the page of a failed download; fetch it again",
}


class Fault(ValueError):
  """An image that cannot be used; its message says why, and the way out."""


def _suffixes() -> frozenset[str]:
  """Suffixes of what Pillow reads here; of .eps, .h5, .mpeg and the like it knows the header."""
  Image.init()

  def reads(kind: str) -> bool:
    opener = Image.OPEN[kind][0] if kind in Image.OPEN else ImageFile.StubImageFile
    is_stub = isinstance(opener, type) and issubclass(opener, ImageFile.StubImageFile)
    return not is_stub and kind not in ("EPS", "MPEG")

  return frozenset(end for end, kind in Image.registered_extensions().items() if reads(kind))


SUFFIXES = _suffixes()


def square(content: bytes, image_size: int, channels: int | None = None) -> tuple[np.ndarray, bool]:
  """The centre square of an encoded image, and whether EXIF turned it.

  Args:
    channels: `area_square` [s, s, channels] of uint8; None for `center_crop` [s, s, 3].

  Raises:
    Fault: it cannot be read, or cannot be read right.
  """
  try:
    with Image.open(io.BytesIO(content)) as file:
      image, turned = _upright(file, "L" if channels == 1 else "RGB")
  except Fault:
    raise
  except _UNREADABLE as err:
    raise Fault(_why(content, err)) from err
  if channels:
    return area_square(image, image_size).reshape(image_size, image_size, channels), turned
  return center_crop(image, image_size), turned


def _why(content: bytes, err: Exception) -> str:
  """What is wrong with the bytes of an image that Pillow refused."""
  if not content:
    return "it is empty"
  if isinstance(err, Image.DecompressionBombError):
    limit = 2 * Image.MAX_IMAGE_PIXELS // 10**6
    return f"it has more than {limit} million pixels, Pillow's limit; make it smaller"
  if content[4:8] == b"ftyp" and content[8:12] in (b"heic", b"heix", b"hevc", b"mif1"):
    return "it is HEIC, which Pillow does not read; convert it to JPEG"
  if not isinstance(err, UnidentifiedImageError):
    return f"it is damaged: {(str(err).strip() or type(err).__name__).splitlines()[0]}"
  start = content.lstrip(b"\xef\xbb\xbf \r\n")
  reasons = (why for first, why in _IMPOSTORS.items() if start.startswith(first))
  return next(reasons, "it is no image that Pillow knows")


def _upright(image: Image.Image, mode: str) -> tuple[Image.Image, bool]:
  """An opened image in `mode` (L or RGB), as the camera was held, and whether EXIF turned it."""
  if max(image.size) > ASPECT * min(image.size):
    raise Fault(
      f"it is {image.width} x {image.height} pixels, and the longer side may be {ASPECT} times the "
      "shorter; crop it"
    )
  # As it loads, Pillow cuts colours of 16 bits to 8, and turns TIFF.
  has_16_bits = any(";16" in str(tile.args) for tile in image.tile)
  turned = getattr(image, "tag_v2", {}).get(_ORIENTATION) in _TURNS
  image.load()
  try:
    turn = _TURNS.get(image.getexif().get(_ORIENTATION))
  except (SyntaxError, ValueError, struct.error):  # damaged, and no viewer would turn the image
    turn = None
  image = convert(_eight_bits(image, has_16_bits), mode)
  return (image, turned) if turn is None else (image.transpose(turn), True)


def _eight_bits(image: Image.Image, has_16_bits: bool) -> Image.Image:
  """An image with 8 bits a channel.

  Raises:
    Fault: neither the file nor its values say which value is white.
  """
  if image.mode != "F" and not image.mode.startswith("I"):
    # Pillow has cut 16 bits of colour to the upper 8.
    if has_16_bits and np.asarray(image.convert("RGB")).max() < DARK >> 8:
      raise Fault(_dark(f"all below {DARK}"))
    return image
  values = np.asarray(image)
  low, high = values.min(), values.max()
  if image.mode == "F":
    if low >= 0 and high <= 1:
      values = 255 * values
    elif not (low >= 0 and high <= 255 and (values == np.rint(values)).all()):  # NaN fails
      raise Fault(
        f"its floats go from {low:g} to {high:g}, and must be in [0, 1], or whole numbers up to "
        "255; save it with 8 bits"
      )
  elif image.mode != "I" or image.format in ("PNG", "PPM"):  # white is 65535
    # These two state their white, and Pillow scales by it.
    if 0 < high < DARK and image.format not in ("PPM", "JPEG2000"):
      raise Fault(_dark(f"up to {high}"))
    values = values >> 8
  elif DARK <= high < 1 << 16 and low >= 0:
    values = values >> 8
  elif low < 0 or high == 1 or high > 255:
    raise Fault(
      f"its 32-bit values go from {low} to {high}, which does not say the value of white; save it "
      "with 8 bits"
    )
  return Image.fromarray(np.rint(values).astype(np.uint8))


def _dark(values: str) -> str:
  return (
    f"its 16-bit values are {values}, which is black if white is 65535; save it with 8 bits, or "
    "scale it to 65535"
  )


def convert(image: Image.Image, mode: str) -> Image.Image:
  """An image of 8 bits a channel in `mode` (L or RGB), on a white background."""
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


def area_square(image: Image.Image, image_size: int) -> np.ndarray:
  """The centre square of an image, averaged over areas: uint8 [s, s] or [s, s, 3]."""
  edge = min(image.size)
  left, top = (image.width - edge) // 2, (image.height - edge) // 2
  box = (left, top, left + edge, top + edge)
  image = image.resize((image_size, image_size), Image.Resampling.BOX, box=box, reducing_gap=None)
  return np.asarray(image, np.uint8)
