"""Images and labels from disk to batches, addressed by position.

A source is random access, in memory (`Source`) or on disk (`latents.Latents`, with the same labels,
names, shape, images and rows). An example is an image, or one of an image and its mirror image. The
order of examples is a new permutation each epoch. The batch number `position` is the same rows
whatever the number of processes, so the one integer is the whole state of the data.

Dimensions: n images, b batch, h w image, c channel.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from absl import logging
from tqdm import tqdm

from ism_jax.data import images as images_lib
from train_jax.errors import UserError
from train_jax.storage.faults import LIMIT, Faults


@dataclass(frozen=True)
class Source:
  """Class-labelled images in memory.

  Attributes:
    pixels: [n, h, w, c], uint8 or float32.
    labels: int32 [n], 0 .. classes - 1; [2 n] with mirror images.
    names: one name for each class.
    decode: pixels -> float32 in [-1, 1].
    flip: whether example 2 i + f is image i, mirrored if f = 1; else example i is image i.
  """

  pixels: np.ndarray
  labels: np.ndarray
  names: tuple[str, ...]
  decode: Callable[[np.ndarray], np.ndarray]
  flip: bool = False

  @property
  def shape(self) -> tuple[int, int, int]:
    """(h, w, c) of one image."""
    return self.pixels.shape[1:]

  def images(self, index) -> np.ndarray:
    """float32 images [b, h, w, c] in [-1, 1] of the examples `index` [b]."""
    if not self.flip:
      return self.decode(self.pixels[index])
    image, mirrored = np.divmod(index, 2)
    pixels = self.pixels[image]
    pixels = np.where(mirrored[:, None, None, None], pixels[:, :, ::-1], pixels)
    return self.decode(pixels)

  def rows(self, index) -> dict[str, np.ndarray]:
    """What a batch holds of the examples `index` [b], beside label and noise."""
    return {"image": self.images(index)}


def with_mirror_images(source: Source) -> Source:
  """Each image and its mirror image as two examples, as in latents.py; takes no more memory."""
  return replace(source, labels=np.repeat(source.labels, 2), flip=True)


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


# Names that others give the arrays of an .npz: keras.datasets, ADM, and the singular of both.
NPZ_IMAGES = ("image", "images", "x_train", "arr_0")
NPZ_LABELS = ("label", "labels", "y_train")


def npz(path: str) -> Source:
  """The images and labels of an .npz, each under one of the usual names.

  Images are [n, h, w], [n, h, w, 1] or [n, h, w, 3]: uint8, or floats that span [0, 1] or [-1, 1].
  Labels are whole numbers [n] or [n, 1]; each number that occurs is a class, of that name.

  Raises:
    UserError: no such file, no such arrays (it says which there are), or they are no images with a
      label each.
  """
  flag = f"data.path={path!r}"
  try:
    opened = np.load(Path(path).expanduser())  # pickled objects are refused: they are code
    if isinstance(opened, np.ndarray):
      raise ValueError("it is one array, without labels")
    with opened as file:
      arrays = {name: file[name] for name in (*NPZ_IMAGES, *NPZ_LABELS) if name in file}
      known = ", ".join(f"{name} {file[name].shape}" for name in file)
  except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as err:
    raise UserError(f"{flag} cannot be read as an .npz of arrays ({err}).") from err
  found = []
  for what, names in (("images", NPZ_IMAGES), ("labels", NPZ_LABELS)):
    present = [name for name in names if name in arrays]
    if not present:
      raise UserError(
        f"{flag} has no {what} under any of the names {', '.join(names)}; it has {known or 'none'}."
      )
    if len(present) > 1:
      raise UserError(
        f"{flag} has {what} under {' and '.join(present)}; leave one of them in the file."
      )
    found.append(arrays[present[0]])
  images, labels = found
  pixels = images[..., None] if images.ndim == 3 else images
  if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3) or not pixels.size:
    raise UserError(
      f"{flag}: its images have the shape {images.shape}, and must be [n, h, w], [n, h, w, 1] or "
      "[n, h, w, 3]."
    )
  if labels.shape not in ((len(pixels),), (len(pixels), 1)) or labels.dtype.kind not in "iu":
    raise UserError(
      f"{flag}: its labels are {labels.dtype} {labels.shape}, and must be one whole number for "
      f"each of the {len(pixels)} images."
    )
  classes, labels = np.unique(labels.reshape(-1), return_inverse=True)
  pixels, decode = _npz_pixels(pixels, flag)
  return Source(pixels, labels.astype(np.int32), tuple(map(str, classes)), decode)


def _npz_pixels(pixels: np.ndarray, flag: str) -> tuple[np.ndarray, Callable]:
  """Pixels as they are kept, and what brings them into [-1, 1]."""
  if pixels.dtype == np.uint8:
    return pixels, _decode_bytes
  low, high = float(pixels.min()), float(pixels.max())  # NaN fails both tests below
  if pixels.dtype.kind == "f" and low >= -1 and high <= 1:
    pixels = pixels.astype(np.float32)
    return (pixels, lambda pixels: pixels) if low < 0 else (pixels, lambda pixels: 2 * pixels - 1)
  raise UserError(
    f"{flag}: its images are {pixels.dtype} from {low:g} to {high:g}, and must be uint8, or floats "
    "in [0, 1] or [-1, 1]; convert them."
  )


def hold_out(source: Source, share: float) -> tuple[Source, Source]:
  """(what is trained on, what is kept from training): `share` of each class, always the same.

  Raises:
    UserError: `share` is no share, or leaves a class without images on either side.
  """
  if not 0 < share < 1:
    raise UserError(f"data.held_out={share} is a share of each class; choose it between 0 and 1.")
  kept = []
  for label, name in enumerate(source.names):
    rows = np.random.default_rng(0).permutation(np.flatnonzero(source.labels == label))
    n = round(share * len(rows))
    if not 0 < n < len(rows):
      raise UserError(
        f"data.held_out={share} of the {len(rows)} images of class {name!r} is {n}; choose another "
        "share, so that some are kept and some are left."
      )
    kept.append(rows[:n])
  kept = np.isin(np.arange(len(source.labels)), np.concatenate(kept))
  return tuple(
    replace(source, pixels=source.pixels[rows], labels=source.labels[rows])
    for rows in (~kept, kept)
  )


def synthetic(n: int, shape: tuple[int, int, int], classes: int = 10) -> Source:
  """n images of noise in `shape`, with nothing to learn but the grey of each class."""
  rng = np.random.default_rng(0)
  labels = (np.arange(n) % classes).astype(np.int32)
  noise = rng.integers(0, 128, (n, *shape))
  pixels = (noise + (128 * labels // classes)[:, None, None, None]).astype(np.uint8)
  return Source(pixels, labels, tuple(map(str, range(classes))), _decode_bytes)


def _decode_bytes(pixels: np.ndarray) -> np.ndarray:
  return pixels.astype(np.float32) / 127.5 - 1


def _in_memory(
  images: images_lib.EncodedImages, path: str, image_size: int, channels: int, max_faults: int
) -> Source:
  """The centre square of each image; files that can't be read are named, skipped and counted."""
  if channels not in (1, 3):
    raise UserError(f"data.channels={channels} must be 1 (grey) or 3 (RGB).")
  names = images.names
  # One array from the start: put together in the end, they would take the memory twice.
  pixels = np.empty((images.size, image_size, image_size, channels), np.uint8)
  labels, bad = [], []
  with ThreadPoolExecutor() as pool:
    read = pool.map(
      lambda i: images_lib.read_image(images, i, image_size, channels), range(images.size)
    )
    read = tqdm(read, total=images.size, desc="reading images", unit="img", disable=None)
    for i, (image, label) in enumerate(read):
      if image is None:
        bad.append(i)
      else:
        pixels[len(labels)] = image
        labels.append(label)

  faults = Faults(max_faults, f"data.path={path!r}")
  for i in bad:
    faults.add(images.name(i), "it is no whole image")
  if bad:
    logging.warning("skipped %d of %d images that cannot be read", len(bad), images.size)
  pixels, labels = pixels[: len(labels)], np.array(labels, np.int32)
  empty = [name for label, name in enumerate(names) if label not in labels]
  if empty:
    raise UserError(
      f"data.path={path!r}: the class {empty[0]!r} has no readable image; add some or remove it."
    )
  if labels.min() < 0:
    raise UserError(
      f"data.path={path!r}: an image has the label {labels.min()}; choose a split with labels."
    )
  return Source(pixels, labels, names, _decode_bytes)


def folder(root: str, image_size: int, channels: int, max_faults: int = LIMIT) -> Source:
  """The images of `images.folder`: the centre square of each, resized to `image_size`.

  Files that can't be read are named, skipped and counted.

  Raises:
    UserError: no such folder, a class without a readable image, or more than `max_faults` that
      cannot be read.
  """
  return _in_memory(images_lib.folder(root, "data.path"), root, image_size, channels, max_faults)


def tfds(name: str, image_size: int, channels: int, max_faults: int = LIMIT) -> Source:
  """A prepared TFDS data set of small images, NAME or directory, `@SPLIT` after it; see `folder`.

  Raises:
    UserError: it is not prepared, or has no labelled images.
  """
  return _in_memory(images_lib.tfds(name, "data.path"), name, image_size, channels, max_faults)


def batches(source: Source, batch: int, seed: int) -> Callable[[int], np.ndarray]:
  """Returns position -> int64 [batch], the examples of that global batch.

  Each epoch is a new permutation; every example comes exactly once in it. A batch may span two
  epochs.
  """
  n = len(source.labels)

  @lru_cache(2)
  def epoch(number: int) -> np.ndarray:
    return np.random.default_rng((seed, number)).permutation(n)

  def index(position: int) -> np.ndarray:
    number, place = np.divmod(np.arange(position * batch, (position + 1) * batch), n)
    return np.concatenate([epoch(int(k))[place[number == k]] for k in np.unique(number)])

  return index


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
    {"label": int32 [b], "noise": int32 [b]} and `source.rows`: "image" float32 [b, h, w, c].
  """
  index = batches(source, batch, seed)

  def load(position: int) -> dict[str, np.ndarray]:
    mine = index(position)[rows]
    return {**source.rows(mine), "label": source.labels[mine]}

  # A pool is paired ahead and a batch read ahead, each on a thread: behind the steps before it.
  with ThreadPoolExecutor(1, "pairing") as pairing, ThreadPoolExecutor(1, "reading") as reading:
    number, offset = divmod(position, pool)
    paired, loaded = pairing.submit(noise_of_pool, number), reading.submit(load, position)
    while True:
      noise = paired.result().reshape(pool, batch)
      paired = pairing.submit(noise_of_pool, number + 1)
      for i in range(offset, pool):
        ready = loaded.result()
        loaded = reading.submit(load, number * pool + i + 1)
        yield {**ready, "noise": noise[i, rows]}
      number, offset = number + 1, 0
