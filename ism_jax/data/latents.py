"""Stored latents as training data: posteriors of an autoencoder, sampled anew at every step.

A latent set is a directory that `--mode=encode` writes (see encode.py):

    manifest.json                            counts, classes, statistics, autoencoder
    latents-00003-of-00157.array_record      the records of one shard, uncompressed
    latents-00003-of-00157.json              its labels, in order, and its part of the statistics

A record is a `record_dtype`, little-endian and without padding: the class (int32), then float16
mean and standard deviation of the image's posterior, then those of its mirror image, all unscaled.
Training sees an image and its mirror image as two examples: example 2 i + f is image i, mirrored if
f = 1.

The host only reads. The train step draws the latent x1 = SCALE (mean + std noise) on the device
from its own key, so x1 is a function of (seed, position).

Dimensions: n images, b batch, h w latent, c channel.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ism_jax.networks import autoencoder
from ism_jax.networks.autoencoder import SCALE
from train_jax.errors import UserError
from train_jax.files import read_json
from train_jax.storage.faults import LIMIT, Faults
from train_jax.storage.shards import shard_name
from train_jax.storage.weights import sha256

VERSION = 1  # of the layout above
MEAN_LIMIT = 1.0  # of a channel of scaled latents
STD_RANGE = (0.5, 2.0)  # sd-vae-ft-mse on ImageNet: about 0.7 to 1
UNREADABLE = (OSError, RuntimeError, ValueError)  # the errors of reading a damaged record
THREADS = 32  # for reading: across a network a record takes milliseconds, which are mostly waiting
READS_PER_TURN = 8  # records that a thread reads before another call may have its turn


def record_dtype(shape: tuple[int, int, int]) -> np.dtype:
  """One image's record; `posterior[f, 0]` is the mean and `posterior[f, 1]` the std of view f."""
  return np.dtype([("label", "<i4"), ("posterior", "<f2", (2, 2, *shape))])


def moments(posterior: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and mean square of the scaled latents of each image, by channel.

  posterior [b, 2, 2, h, w, c] -> two float64 [b, c], over both views and all pixels.
  """
  mean, std = (posterior[:, :, i].astype(np.float64) for i in (0, 1))
  axes = (1, 2, 3)
  return SCALE * mean.mean(axes), SCALE**2 * (mean**2 + std**2).mean(axes)


@dataclass(frozen=True)
class Latents:
  """A source of examples (see sources.Source): example 2 i + f is view f of the stored image i.

  Attributes:
    read: images [b] and their views [b] -> float16 [2, b, h, w, c], unscaled mean and std.
    labels: int32 [2 n], of the examples.
    names: one name for each class.
    shape: (h, w, c) of one latent.
    vae, manifest: SHA-256 of the autoencoder's file and of manifest.json; "" for synthetic latents.
  """

  read: Callable[[np.ndarray, np.ndarray], np.ndarray]
  labels: np.ndarray
  names: tuple[str, ...]
  shape: tuple[int, int, int]
  vae: str
  manifest: str

  def images(self, index) -> np.ndarray:
    """The scaled posterior means, float32 [b, h, w, c], with which noise is paired.

    The std is far smaller than the distances that the pairing compares.
    """
    return SCALE * self.read(*np.divmod(index, 2))[0].astype(np.float32)

  def rows(self, index) -> dict[str, np.ndarray]:
    """The examples as a batch stores them: unscaled float16 `mean` and `std` [b, h, w, c]."""
    mean, std = self.read(*np.divmod(index, 2))
    return {"mean": mean, "std": std}


def draw(state, batch: dict, key: jax.Array) -> tuple:
  """`Method.augment`: replaces a batch's `mean` and `std` by `image`, a draw of scaled latents."""
  batch = dict(batch)
  mean, std = (batch.pop(name).astype(jnp.float32) for name in ("mean", "std"))
  return state.aux_state, {**batch, "image": autoencoder.sample(mean, std, key)}


def synthetic(n: int, shape: tuple[int, int, int], classes: int = 10) -> Latents:
  """n random records with the shapes and scales of real ones; only the class is learnable."""
  rng = np.random.default_rng(0)
  label = (np.arange(n) % classes).astype(np.int32)
  shift = rng.normal(size=(classes, 1, 1, shape[2]))
  mean = rng.normal(0, 1 / SCALE, (n, *shape)) + shift[label]
  views = np.stack([mean, mean[:, :, ::-1]]).astype(np.float16)

  def read(image, view):
    means = views[view, image]
    return np.stack([means, np.full_like(means, 0.1)])

  names = tuple(map(str, range(classes)))
  return Latents(read, np.repeat(label, 2), names, shape, "", "")


def _read_json(path: Path) -> dict:
  try:
    return read_json(path)
  except (OSError, ValueError) as err:
    raise UserError(
      f"{path} is missing or damaged, so {path.parent} is not a whole latent set; run its "
      "--mode=encode command again, which keeps finished shards."
    ) from err


def make_reader(
  files: list[Path], labels: list[np.ndarray], shape: tuple[int, int, int], faults: Faults
) -> Callable:
  """Returns `read(image, view)`, see `Latents`: random access without a cache.

  Threads share the records of a call, and several threads may call.

  An unreadable record is replaced by the next readable one of its class. This choice depends on the
  files alone, so batches are full and the same for any number of processes and after a resume.

  Args:
    labels: the labels of the images in each file.

  Raises:
    UserError: a shard is missing, damaged, or of another length than `labels` says.
  """
  from array_record.python.array_record_module import ArrayRecordReader

  def open_shard(file: Path, count: int) -> ArrayRecordReader:
    options = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 32768}
    try:
      reader = ArrayRecordReader(str(file), **options)
      records = reader.num_records() if reader.ok() else 0
    except UNREADABLE:
      records = 0
    if records != count:
      raise UserError(
        f"{file} holds {records} whole records and its manifest says {count}; delete it and run "
        "the --mode=encode command again, which makes only missing shards."
      )
    return reader

  counts = [len(each) for each in labels]
  readers = [open_shard(file, count) for file, count in zip(files, counts, strict=True)]
  starts, label = np.concatenate([[0], np.cumsum(counts)]), np.concatenate(labels)
  dtype, bad = record_dtype(shape), set()

  def read_one(image: int) -> np.ndarray:
    number = int(np.searchsorted(starts, image, side="right")) - 1
    # One by one: a list of positions costs the library twice the processor time.
    content = readers[number].read([int(image - starts[number])])[0]
    if len(content) != dtype.itemsize:
      raise ValueError(f"it has {len(content)} bytes, and a record has {dtype.itemsize}")
    record = np.frombuffer(content, dtype)[0]
    # Both views are checked, so the verdict on a record does not depend on the requested view.
    # Infinity and NaN have all bits of the exponent; np.isfinite takes six times as long.
    exponent = record["posterior"].view(np.uint16) & 0x7C00
    if record["label"] != label[image] or exponent.max() == 0x7C00:
      raise ValueError("its class is another, or its numbers are not finite")
    return record["posterior"]

  def read_with_retries(image: int) -> np.ndarray:
    for pause in (0.1, 1.0):
      try:
        return read_one(image)
      except UNREADABLE:  # perhaps a network disk is away for a moment
        time.sleep(pause)
    return read_one(image)

  def candidates(image: int) -> Iterator[int]:
    yield image
    same_class = np.flatnonzero(label == label[image])
    yield from np.roll(same_class, -1 - int(np.searchsorted(same_class, image)))[:-1].tolist()

  def read_or_replace(image: int) -> np.ndarray:
    for candidate in candidates(image):
      if candidate not in bad:
        try:
          return read_with_retries(candidate)
        except UNREADABLE as err:
          bad.add(candidate)
          faults.add(f"image {candidate}", " ".join(str(err).split()))
    raise UserError(
      f"no image of the class {label[image]} in {files[0].parent} can be read; repair the set."
    )

  def read_part(out: np.ndarray, image: np.ndarray, view: np.ndarray, part: range) -> list[int]:
    """Fills the places `part` of `out`; returns those that it could not read."""
    failures = []
    for i in part:
      try:
        out[:, i] = read_one(image[i])[view[i]]
      except UNREADABLE:
        failures.append(i)
    return failures

  pool, lock = ThreadPoolExecutor(THREADS, thread_name_prefix="latents"), threading.Lock()

  def read(image: np.ndarray, view: np.ndarray) -> np.ndarray:
    n = len(image)
    out, image, view = np.empty((2, n, *shape), np.float16), image.tolist(), view.tolist()
    # A large call takes turns: the images of a pairing pool must not hold up the next batch.
    for start in range(0, n, THREADS * READS_PER_TURN):
      turn = range(start, min(start + THREADS * READS_PER_TURN, n))
      parts = [turn[i::THREADS] for i in range(min(THREADS, len(turn)))]
      failures = pool.map(functools.partial(read_part, out, image, view), parts)
      # Failures are rare. Under the lock each is retried and counted once.
      for i in sorted(i for part in failures for i in part):
        with lock:
          out[:, i] = read_or_replace(image[i])[view[i]]
    return out

  return read


def _check_statistics(path: str, manifest: dict, read: Callable, std: tuple[float, float]) -> None:
  """Raises UserError unless the set's statistics are plausible and agree with its records."""
  mean, spread = (np.array(manifest[name]) for name in ("mean", "std"))
  if not (np.all(np.abs(mean) <= MEAN_LIMIT) and np.all((std[0] <= spread) & (spread <= std[1]))):
    raise UserError(
      f"the scaled latents of data.path={path!r} have the means {np.round(mean, 3).tolist()} and "
      f"stds {np.round(spread, 3).tolist()} by channel, which must be within {MEAN_LIMIT:g} of 0 "
      f"and in data.std={tuple(std)}; encode with the right autoencoder, or set data.std for "
      "another one."
    )
  n = manifest["count"]
  sample = np.unique(np.linspace(0, n - 1, 256).astype(np.int64))
  views = np.stack([read(sample, np.full_like(sample, view)) for view in (0, 1)])  # [f, 2, b, ...]
  posterior = np.moveaxis(views, 2, 0)
  for values, expected in zip(moments(posterior), (mean, spread**2 + mean**2), strict=True):
    # Six standard errors of a sample of k images out of n, and one per cent for rounding.
    k = len(values)
    error = values.std(0) * np.sqrt((1 - k / n) / k)
    if not np.all(np.abs(values.mean(0) - expected) <= 6 * error + 0.01 * spread**2 + 0.001):
      raise UserError(
        f"the records of data.path={path!r} do not have the statistics of its manifest.json; the "
        "files do not belong together: encode into an empty directory."
      )


def open_set(path: str, std: tuple[float, float] = STD_RANGE, max_faults: int = LIMIT) -> Latents:
  """The latent set in the directory `path`.

  Args:
    std: the accepted range of the standard deviation of a channel of scaled latents.
    max_faults: records that may be unreadable.

  Raises:
    UserError: the set is incomplete, of another layout, or has implausible statistics; `read`
      raises it for too many unreadable records.
  """
  top = Path(path).expanduser()
  manifest = _read_json(top / "manifest.json")
  if manifest.get("version") != VERSION:
    raise UserError(
      f"data.path={path!r} has the layout version {manifest.get('version')}, and this program "
      f"reads {VERSION}; encode it again."
    )
  shards, shape = manifest["shards"], tuple(manifest["shape"])
  parts = [_read_json(top / shard_name("latents.json", i, shards)) for i in range(shards)]
  labels = [np.array(part["labels"], np.int32) for part in parts]
  files = [top / shard_name("latents.array_record", i, shards) for i in range(shards)]
  read = make_reader(files, labels, shape, Faults(max_faults, f"data.path={path!r}"))
  labels = np.concatenate(labels)
  if not 0 < len(labels) == manifest["count"]:
    raise UserError(
      f"data.path={path!r} has labels of {len(labels)} images and its manifest.json says "
      f"{manifest['count']}; encode into an empty directory."
    )
  _check_statistics(path, manifest, read, std)
  names, digest = tuple(manifest["names"]), sha256(top / "manifest.json")
  return Latents(read, np.repeat(labels, 2), names, shape, manifest["vae"], digest)
