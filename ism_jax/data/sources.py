"""Images and labels from disk to batches, addressed by position.

A source has random access to examples, in memory (`Source`) or on disk (`latents.Latents`, which
has the same labels, names, shape, images and rows). An example is an image or a mirror image. Each
epoch is a new permutation of the examples. Batch `position` has the same examples for any number of
processes, so this integer is the whole state of the data.

Dimensions: n images, b batch, h w image, c channel.
"""

from __future__ import annotations

import functools
import hashlib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from absl import logging
from tqdm import tqdm

from ism_jax.data import images as images_lib
from train_jax.errors import UserError, check_fraction
from train_jax.storage.faults import LIMIT, Faults


@dataclass(frozen=True)
class Source:
  """Class-labelled images in memory.

  Attributes:
    pixels: [n, h, w, c], uint8 or float32.
    labels: int32 [n], 0 .. classes - 1; [2 n] with mirror images.
    names: one name for each class.
    decode: pixels -> float32 in [-1, 1].
    flip: if True, example 2 i + f is image i, mirrored if f = 1; else example i is image i.
    notes: what to say of the files, see `images.notes`.
    sha256: of the content of all files, also of those that are held out; "" for data made here.
  """

  pixels: np.ndarray
  labels: np.ndarray
  names: tuple[str, ...]
  decode: Callable[[np.ndarray], np.ndarray]
  flip: bool = False
  notes: str = ""
  sha256: str = ""

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
    """The examples `index` [b] as a batch stores them, beside labels and noise."""
    return {"image": self.images(index)}


def with_mirror_images(source: Source) -> Source:
  """Each image and its mirror image as two examples, as in latents.py; needs no more memory."""
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


# Names of arrays in the .npz files of keras.datasets and ADM, and the singular of both.
NPZ_IMAGES = ("image", "images", "x_train", "arr_0")
NPZ_LABELS = ("label", "labels", "y_train")


def npz(path: str) -> Source:
  """The images and labels of an .npz, each under one of the usual names.

  Images are [n, h, w], [n, h, w, 1] or [n, h, w, 3]: uint8, or floats that span [0, 1] or [-1, 1].
  Labels are whole numbers [n] or [n, 1]; each number that occurs is a class of that name.

  Raises:
    UserError: the file or an array is missing, or the arrays are not images with a label each.
  """
  flag = f"data.path={path!r}"
  try:
    content = np.load(Path(path).expanduser())  # pickled objects are refused: they are code
    if isinstance(content, np.ndarray):
      raise ValueError("it is one array, without labels")
    with content as file:
      arrays = {name: file[name] for name in (*NPZ_IMAGES, *NPZ_LABELS) if name in file}
      shapes = ", ".join(f"{name} {file[name].shape}" for name in file)
  except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as err:
    raise UserError(f"{flag} cannot be read as an .npz of arrays ({err}).") from err

  def choose(kind: str, names: tuple[str, ...]) -> np.ndarray:
    matches = [name for name in names if name in arrays]
    if not matches:
      raise UserError(
        f"{flag} has no {kind} under any of the names {', '.join(names)}; it has "
        f"{shapes or 'none'}."
      )
    if len(matches) > 1:
      raise UserError(
        f"{flag} has {kind} under {' and '.join(matches)}; leave one of them in the file."
      )
    return arrays[matches[0]]

  images, labels = choose("images", NPZ_IMAGES), choose("labels", NPZ_LABELS)
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
  content = (str(images.dtype), str(images.shape), images, classes[labels])
  pixels, decode = _npz_pixels(pixels, flag)
  names = tuple(map(str, classes))
  return Source(pixels, labels.astype(np.int32), names, decode, sha256=_sha256(content))


def _sha256(parts: Iterable[str | bytes | np.ndarray]) -> str:
  """The SHA-256 of the parts, one after the other."""
  digest = hashlib.sha256()
  for part in parts:
    digest.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part).data)
  return digest.hexdigest()


def _npz_pixels(pixels: np.ndarray, flag: str) -> tuple[np.ndarray, Callable]:
  """(pixels to store, function that maps them into [-1, 1])."""
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
  """Splits a source into (training, held-out) images, always in the same way.

  Args:
    share: of each class, to hold out.

  Raises:
    UserError: `share` is not between 0 and 1, or leaves a class without images on either side.
  """
  check_fraction("data.held_out", share, inclusive=False)
  held_out = np.zeros(len(source.labels), bool)
  for label, name in enumerate(source.names):
    members = np.random.default_rng(0).permutation(np.flatnonzero(source.labels == label))
    n = round(share * len(members))
    if not 0 < n < len(members):
      raise UserError(
        f"data.held_out={share} of the {len(members)} images of class {name!r} is {n}; choose a "
        "share that leaves images on both sides."
      )
    held_out[members[:n]] = True
  return tuple(
    replace(source, pixels=source.pixels[mask], labels=source.labels[mask])
    for mask in (~held_out, held_out)
  )


def synthetic(n: int, shape: tuple[int, int, int], classes: int = 10) -> Source:
  """n noise images of `shape`; the classes differ in brightness only."""
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
  if channels not in (1, 3):
    raise UserError(f"data.channels={channels} must be 1 (grey) or 3 (RGB).")
  names = images.names
  # One array from the start: joining separate ones at the end would take the memory twice.
  pixels = np.empty((images.size, image_size, image_size, channels), np.uint8)
  labels, turned, bad = [], 0, {}
  digests = [b""] * images.size

  def noted(i: int) -> tuple[bytes, int]:
    content, label = images.read(i)
    digests[i] = hashlib.sha256(content).digest()
    return content, label

  with ThreadPoolExecutor() as pool:
    read = functools.partial(
      images_lib.read_image, replace(images, read=noted), image_size=image_size, channels=channels
    )
    results = pool.map(read, range(images.size))
    results = tqdm(results, total=images.size, desc="reading images", unit="img", disable=None)
    for i, image in enumerate(results):
      if image.pixels is None:
        bad[i] = image.why
      else:
        pixels[len(labels)] = image.pixels
        labels.append(image.label)
        turned += image.turned

  faults = Faults(max_faults, f"data.path={path!r}")
  for i, why in bad.items():
    faults.add(images.name(i), why)
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
  notes = images_lib.notes(images.left_out, turned)
  content = (f"{images.name(i)}\0".encode() + digests[i] for i in range(images.size))
  digest = _sha256((*content, labels))
  return Source(pixels, labels, names, _decode_bytes, notes=notes, sha256=digest)


def folder(root: str, image_size: int, channels: int, max_faults: int = LIMIT) -> Source:
  """The images of `images.folder`: the centre square of each, resized to `image_size`.

  Unreadable files are named, skipped and counted.

  Raises:
    UserError: no such folder, a class without a readable image, or more than `max_faults`
      unreadable files.
  """
  return _in_memory(images_lib.folder(root, "data.path"), root, image_size, channels, max_faults)


def tfds(name: str, image_size: int, channels: int, max_faults: int = LIMIT) -> Source:
  """A prepared TFDS data set of small images, NAME[@SPLIT] or DIRECTORY[@SPLIT]; see `folder`.

  Raises:
    UserError: the set is not prepared, or has no labelled images; else as `folder`.
  """
  return _in_memory(images_lib.tfds(name, "data.path"), name, image_size, channels, max_faults)


def batches(source: Source, batch: int, seed: int) -> Callable[[int], np.ndarray]:
  """Returns position -> int64 [batch], the examples of that global batch.

  An epoch is a permutation of all examples. A batch may span two epochs.
  """
  n = len(source.labels)

  @functools.lru_cache(2)
  def epoch(number: int) -> np.ndarray:
    return np.random.default_rng((seed, number)).permutation(n)

  def index(position: int) -> np.ndarray:
    number, offset = np.divmod(np.arange(position * batch, (position + 1) * batch), n)
    return np.concatenate([epoch(int(k))[offset[number == k]] for k in np.unique(number)])

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
  """This process's part of the batches `position`, `position + 1`, ...

  Args:
    batch: global batch size.
    rows: the places of this process's examples in the global batch.
    noise_of_pool: number of a pool -> int32 [pool * batch], the noise index of each example.
    pool: batches in a pool.

  Yields:
    {"label": int32 [b], "noise": int32 [b]} and `source.rows`: "image" float32 [b, h, w, c].
  """
  index = batches(source, batch, seed)

  def load(position: int) -> dict[str, np.ndarray]:
    examples = index(position)[rows]
    return {**source.rows(examples), "label": source.labels[examples]}

  # Two threads pair the next pool and read the next batch while the device works.
  with ThreadPoolExecutor(1, "pairing") as pairing, ThreadPoolExecutor(1, "reading") as reading:
    number, offset = divmod(position, pool)
    next_noise, next_batch = pairing.submit(noise_of_pool, number), reading.submit(load, position)
    while True:
      noise = next_noise.result().reshape(pool, batch)
      next_noise = pairing.submit(noise_of_pool, number + 1)
      for i in range(offset, pool):
        examples = next_batch.result()
        next_batch = reading.submit(load, number * pool + i + 1)
        yield {**examples, "noise": noise[i, rows]}
      number, offset = number + 1, 0
