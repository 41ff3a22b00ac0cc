"""Images and labels from disk to batches, addressed by position.

A source is random access; its order is a shuffle that grain makes anew each epoch. The global batch
number `position` is the same rows whatever the number of processes, so the one integer is the whole
state of the data.

Dimensions: n images, b batch, h w image, c channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np
from absl import logging
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from train_jax.errors import UserError

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Source:
  """Class-labelled images in memory.

  Attributes:
    pixels: [n, h, w, c], uint8 or float32.
    labels: int32 [n], 0 .. classes - 1.
    names: one name for each class.
    decode: pixels -> float32 in [-1, 1].
  """

  pixels: np.ndarray
  labels: np.ndarray
  names: tuple[str, ...]
  decode: Callable[[np.ndarray], np.ndarray]

  @property
  def shape(self) -> tuple[int, int, int]:
    """(h, w, c) of one image."""
    return self.pixels.shape[1:]

  def images(self, index) -> np.ndarray:
    """float32 images [b, h, w, c] in [-1, 1] at `index` [b]."""
    return self.decode(self.pixels[index])


def digits() -> Source:
  """scikit-learn's 1797 handwritten digits, 8x8 in 17 grey levels (Alpaydin & Kaynak, 1998)."""
  from sklearn.datasets import load_digits

  data = load_digits()
  return Source(
    pixels=data.images[..., None].astype(np.float32),
    labels=data.target.astype(np.int32),
    names=tuple(str(i) for i in range(10)),
    decode=lambda pixels: pixels / 8 - 1,
  )


def _read(path: Path, side: int, mode: str) -> np.ndarray | None:
  """The centre square of an image file at `side` pixels, or None if it can't be read."""
  try:
    with Image.open(path) as image:
      upright = ImageOps.exif_transpose(image)  # as the camera was held
      if upright.mode.startswith("I"):  # 16 bits a pixel, which `convert` would clip
        upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
      image = upright.convert(mode)
  except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
    return None
  edge = min(image.size)
  left, top = (image.width - edge) // 2, (image.height - edge) // 2
  box = (left, top, left + edge, top + edge)
  image = image.resize((side, side), Image.Resampling.BOX, box=box, reducing_gap=None)
  return np.asarray(image, np.uint8).reshape(side, side, -1)


def folder(root: str, side: int, channels: int) -> Source:
  """`root/<class name>/*.png|jpg|...`: the centre square of each image, resized to `side`.

  Files that can't be read are named, skipped and counted.

  Raises:
    UserError: no such folder, no class folders, or no readable image in one of them.
  """
  top = Path(root).expanduser()
  if not top.is_dir():
    raise UserError(
      f"data.path={root!r} is not a folder; give a folder with one sub-folder a class."
    )
  names = sorted(p.name for p in top.iterdir() if p.is_dir() and not p.name.startswith("."))
  files = [
    (path, label)
    for label, name in enumerate(names)
    for path in sorted((top / name).rglob("*"))
    if path.suffix.lower() in SUFFIXES
  ]
  if not files:
    raise UserError(
      f"data.path={root!r} has no images in sub-folders; expected {root}/<class name>/<image>.png "
      f"or another of {', '.join(sorted(SUFFIXES))}."
    )
  if channels not in (1, 3):
    raise UserError(f"data.channels={channels} must be 1 (grey) or 3 (RGB).")
  mode = "L" if channels == 1 else "RGB"
  with ThreadPoolExecutor() as pool:
    read = pool.map(lambda item: _read(item[0], side, mode), files)
    pixels = list(tqdm(read, total=len(files), desc="reading images", unit="img", disable=None))

  bad = [path for (path, _), image in zip(files, pixels, strict=True) if image is None]
  for path in bad:
    logging.warning("skipped: cannot read the image %s", path)
  if bad:
    logging.warning("skipped %d of %d images that cannot be read", len(bad), len(files))
  kept = [(im, label) for (_, label), im in zip(files, pixels, strict=True) if im is not None]
  labels = np.array([label for _, label in kept], np.int32)
  empty = [name for label, name in enumerate(names) if label not in labels]
  if empty:
    raise UserError(
      f"data.path={root!r}: the class folder {empty[0]!r} has no readable image; "
      "add some or remove the folder."
    )
  stacked = np.stack([image for image, _ in kept])
  return Source(stacked, labels, tuple(names), lambda p: p.astype(np.float32) / 127.5 - 1)


def batches(source: Source, batch: int, seed: int) -> Callable[[int], np.ndarray]:
  """Returns position -> int64 [batch], the image indices of that global batch.

  Each epoch is a new permutation; every image comes exactly once in it. A batch may span two
  epochs.
  """
  order = grain.MapDataset.range(len(source.labels)).seed(seed).shuffle().repeat().batch(batch)
  return lambda position: np.asarray(order[position])


def stream(
  source: Source,
  batch: int,
  rows: slice | np.ndarray,
  seed: int,
  position: int,
  noise_of_pool: Callable[[int], np.ndarray],
  pool: int,
) -> Iterator[dict[str, np.ndarray]]:
  """This process's rows of batch `position`, `position + 1`, ...

  Args:
    batch: global batch size.
    rows: this process's rows of it.
    noise_of_pool: number of a pool -> int32 [pool * batch], the noise index of each of its rows.
    pool: batches in a pool.

  Yields:
    {"image": float32 [b, h, w, c], "label": int32 [b], "noise": int32 [b]}.
  """
  index = batches(source, batch, seed)
  # One pool is paired ahead on a thread: its cost hides behind the steps of the pool before it.
  with ThreadPoolExecutor(1, thread_name_prefix="pairing") as ahead:
    number, offset = divmod(position, pool)
    waiting = ahead.submit(noise_of_pool, number)
    while True:
      noise = waiting.result().reshape(pool, batch)
      waiting = ahead.submit(noise_of_pool, number + 1)
      for i in range(offset, pool):
        mine = index(number * pool + i)[rows]
        yield {
          "image": source.images(mine),
          "label": source.labels[mine],
          "noise": noise[i, rows],
        }
      number, offset = number + 1, 0
