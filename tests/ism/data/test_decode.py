"""From the bytes of a file to a square, or a fault with its reason."""

import io
import os
import re
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from ism_jax.data import decode, images, sources
from ism_jax.evaluation import adm
from train_jax.errors import UserError


def encoded(i: int, kind: str = "png", shape=(20, 30)) -> bytes:
  """An image whose first pixel is i, as a file's bytes."""
  pixels = np.random.default_rng(i).integers(0, 256, (*shape, 3)).astype(np.uint8)
  pixels[0, 0] = i
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, kind)
  return file.getvalue()


# --- the crop -------------------------------------------------------------------------------------


def center_crop_arr(pil_image, image_size):
  """guided_diffusion/image_datasets.py, as published."""
  while min(*pil_image.size) >= 2 * image_size:
    pil_image = pil_image.resize(tuple(x // 2 for x in pil_image.size), resample=Image.BOX)
  scale = image_size / min(*pil_image.size)
  pil_image = pil_image.resize(
    tuple(round(x * scale) for x in pil_image.size), resample=Image.BICUBIC
  )
  arr = np.array(pil_image)
  crop_y = (arr.shape[0] - image_size) // 2
  crop_x = (arr.shape[1] - image_size) // 2
  return arr[crop_y : crop_y + image_size, crop_x : crop_x + image_size]


@pytest.mark.parametrize("shape", [(64, 64), (33, 64), (200, 131), (128, 257), (65, 17), (511, 90)])
def test_the_crop_is_adms(shape):
  pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
  image = Image.fromarray(pixels)
  ours = decode.center_crop(image, 32)
  assert ours.shape == (32, 32, 3) and ours.dtype == np.uint8
  np.testing.assert_array_equal(ours, center_crop_arr(image, 32))


def test_grey_palette_and_alpha_become_rgb():
  for mode in ("L", "P", "RGBA", "CMYK"):
    file, colour = io.BytesIO(), Image.new("RGB", (40, 32), (200, 100, 50))
    colour.convert(mode).save(file, "jpeg" if mode == "CMYK" else "png")
    content = [file.getvalue()]
    one = images.EncodedImages(1, (), lambda i, content=content: (content[i], 5), str)
    pixels, label, *_ = images.read_image(one, 0, 32)
    assert pixels.shape == (32, 32, 3) and label == 5


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode):
  """A black square; around it nothing, under which lies black as well."""
  drawn = Image.new("RGBA", (32, 32))
  drawn.paste((0, 0, 0, 255), (8, 8, 24, 24))
  file = io.BytesIO()
  drawn.convert(mode).save(file, "png")
  one = images.EncodedImages(1, (), lambda i: (file.getvalue(), 0), str)
  wanted = np.full((32, 32, 3), 255)
  wanted[8:24, 8:24] = 0
  np.testing.assert_array_equal(images.read_image(one, 0, 32)[0], wanted)
  grey, _ = decode.square(file.getvalue(), 32, 1)
  np.testing.assert_array_equal(grey, wanted[..., :1])


@pytest.mark.parametrize(
  ("values", "kind", "wanted"),
  [
    (np.int32([0, 100, 255]), "tiff", [0, 100, 255]),
    (np.int32([0, 25600, 65535]), "tiff", [0, 100, 255]),
    (np.float32([0, 0.2, 1]), "tiff", [0, 51, 255]),
    (np.float32([0, 51, 255]), "tiff", [0, 51, 255]),
    (np.uint16([0, 0, 0]), "png", [0, 0, 0]),  # black, whatever white is
    (np.int32([0, 0, 0]), "tiff", [0, 0, 0]),
    (np.uint16([0, 100, 255]), "png", "16-bit values are up to 255, which is black if white is"),
    (np.uint16([0, 100, 4095]), "tiff", "16-bit values are up to 4095"),
    (np.int32([0, 1, 1]), "tiff", "32-bit values go from 0 to 1, which does not say the value of"),
    (np.int32([0, 100, 4095]), "tiff", "32-bit values go from 0 to 4095"),
    (np.int32([0, 100, 1 << 20]), "tiff", "32-bit values go from 0 to 1048576"),
    (np.int32([-1, 100, 255]), "tiff", "32-bit values go from -1 to 255"),
    (np.float32([0, 51.5, 255]), "tiff", r"floats go from 0 to 255, and must be in \[0, 1\]"),
    (np.float32([-1, 0, 1]), "tiff", "floats go from -1 to 1"),
    (np.float32([0, 1, np.nan]), "tiff", "floats go from nan to nan"),
    (b"P5 3 1 4095\n" + np.array([0, 1606, 4095], ">u2").tobytes(), "", [0, 100, 255]),
    (b"P5 3 1 65535\n" + np.array([0, 100, 255], ">u2").tobytes(), "", [0, 0, 0]),  # it says so
  ],
)
def test_values_of_many_bits_are_scaled_by_what_the_file_says(values, kind, wanted):
  content = values
  if kind:
    file = io.BytesIO()
    Image.fromarray(np.tile(values, (3, 1))).save(file, kind)
    content = file.getvalue()
  if isinstance(wanted, str):
    with pytest.raises(decode.Fault, match=wanted):
      decode.square(content, 3, 1)
  else:
    with Image.open(io.BytesIO(content)) as image:
      image, _ = decode._upright(image, "L")
    np.testing.assert_array_equal(np.asarray(image)[0], wanted)


@pytest.mark.parametrize("value", [200, 40000])
def test_colours_of_sixteen_bits(value):
  """A PNG of 3 x 3 pixels, which Pillow can read and not write."""

  def chunk(kind, content):
    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

  rows = 3 * (b"\0" + 3 * struct.pack(">3H", value, 0, 0))
  header = chunk(b"IHDR", struct.pack(">2I5B", 3, 3, 16, 2, 0, 0, 0))
  content = (
    b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
  )
  if value < decode.DARK:
    with pytest.raises(decode.Fault, match="16-bit values are all below 4096"):
      decode.square(content, 3)
  else:
    np.testing.assert_array_equal(decode.square(content, 3)[0][0, 0], [value >> 8, 0, 0])


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_photos_are_upright_in_every_crop(orientation, kind):
  exif = Image.Exif()
  exif[0x0112] = orientation
  stored = np.zeros((16, 16, 3), np.uint8)
  stored[:8] = 255  # white above black
  file, lossless = io.BytesIO(), {"lossless": True} if kind == "webp" else {}
  Image.fromarray(stored).save(file, kind, exif=exif, **lossless)
  wanted = np.rot90(stored, {1: 0, 3: 2, 6: -1, 8: 1}[orientation])
  for channels in (None, 3):
    pixels, turned = decode.square(file.getvalue(), 16, channels)
    np.testing.assert_allclose(pixels, wanted, atol=2)
    assert turned == (orientation != 1)


@pytest.mark.parametrize(
  ("old", "new", "is_turned"),
  [
    (b"\x01\x0e\x00\x02", b"\x01\x23\x00\x02", True),  # the description in the place of numbers
    (b"Exif\0\0MM\0*", b"Exif\0\0no\0*", False),
  ],
)
def test_damaged_exif_does_not_cost_the_image(old, new, is_turned):
  exif, file = Image.Exif(), io.BytesIO()
  exif[0x0112], exif[0x010E] = 6, "a picture"
  Image.new("RGB", (8, 8), "red").save(file, "jpeg", exif=exif)
  content = file.getvalue()
  assert old in content
  pixels, turned = decode.square(content.replace(old, new), 8, 3)
  np.testing.assert_allclose(pixels, np.broadcast_to([255, 0, 0], (8, 8, 3)), atol=2)
  assert turned == is_turned


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("size", [(2, 4000), (4000, 2), (1, 51)])
def test_strips_are_faults(size, channels):
  file = io.BytesIO()
  Image.new("L", size).save(file, "png")
  with pytest.raises(
    decode.Fault, match="{} x {} pixels, and the longer side may be 50 ti".format(*size)
  ):
    decode.square(file.getvalue(), 256, channels)
  file = io.BytesIO()
  Image.new("L", (1, 50)).save(file, "png")
  assert decode.square(file.getvalue(), 256, channels)[0].shape == (256, 256, 3)


def _large() -> bytes:
  file = io.BytesIO()
  Image.new("1", (20000, 20000)).save(file, "png")
  return file.getvalue()


@pytest.mark.parametrize(
  ("content", "why"),
  [
    (lambda: b"", "it is empty"),
    (lambda: b"text", "it is no image that Pillow knows"),
    (lambda: b"version https://git-lfs.github.com/spec/v1\n", "git-LFS; run `git lfs pull`"),
    (lambda: b"/annex/objects/MD5E-s1--x.png\n", "git-annex; run `git annex get`"),
    (
      lambda: b"\n<!doctype html><html>",
      "it is text, such as SVG or the page of a failed download",
    ),
    (lambda: b"\0\0\0\x18ftypheic\0\0\0\0", "it is HEIC, .* convert it to JPEG"),
    (lambda: encoded(0, "jpeg", (64, 64))[:900], "it is damaged: .*truncated"),
    (_large, "more than 178 million pixels, Pillow's limit; make it smaller"),
  ],
)
def test_what_is_no_image_is_called_by_its_name(content, why, tmp_path):
  (tmp_path / "0.png").write_bytes(content())
  assert re.search(why, images.read_image(images.find(str(tmp_path)), 0, 16).why)
  with pytest.raises(UserError, match=rf"0.png' cannot be read: .*{why}"):
    adm.read_square(tmp_path / "0.png", 16)


def test_files_that_are_not_there_are_called_by_their_name(tmp_path):
  (tmp_path / "c" / "z.png").mkdir(parents=True)  # a folder, and its image is one
  (tmp_path / "c" / "z.png" / "in.png").write_bytes(encoded(0))
  (tmp_path / "c" / "dead.png").symlink_to("/no/such/file.png")
  os.mkfifo(tmp_path / "c" / "pipe.png")
  found = images.find(str(tmp_path))
  read = {found.name(i): images.read_image(found, i, 16).why for i in range(found.size)}
  dead = "it is a link to /no/such/file.png, which is not there; restore that or remove it"
  assert read == {
    "c/dead.png": dead,
    "c/pipe.png": "it is no regular file",
    "c/z.png/in.png": "",
  }
  (tmp_path / "c" / "z.png" / "in.png").unlink()
  assert images.read_image(found, 2, 16).why == "it is gone"


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
  values = (np.arange(256).reshape(16, 16) * 256).astype(np.uint16)
  Image.fromarray(values).save(tmp_path / "1.png")
  folder = sources.folder(str(tmp_path), image_size=16, channels=1)
  np.testing.assert_array_equal(folder.pixels[0, :, :, 0], values // 256)
  one = images.EncodedImages(1, (), lambda i: ((tmp_path / "1.png").read_bytes(), 5), str)
  for pixels in (images.read_image(one, 0, 16)[0], adm.read_square(tmp_path / "1.png", 16)):
    np.testing.assert_array_equal(pixels, np.repeat(values[..., None] // 256, 3, axis=-1))


def test_what_cannot_be_read_is_none_and_order_is_kept():
  contents = [encoded(0, "jpeg"), b"no image", encoded(2, "jpeg")[:300], encoded(3), b""]
  source = images.EncodedImages(5, (), lambda i: (contents[i], i), str)
  with ThreadPoolExecutor(2) as pool:
    batches = list(images.read_batches(source, range(5), 2, 16, pool))
  assert [[i for i, _ in batch] for batch in batches] == [[0, 1], [2, 3], [4]]
  flat = [image for batch in batches for _, image in batch]
  assert [image.pixels is None for image in flat] == [False, True, True, False, True]
  assert [image.label for image in flat] == [0, 1, 2, 3, 4]
