"""`--mode=encode`: images -> a latent set (see latents.py), in shards.

Images are cropped as in ADM (see `decode.center_crop`), encoded with their mirror images, and
stored as mean and standard deviation of the posterior. Each process encodes its own shards on its
own devices, see shards.py.

Dimensions: n images, b batch, h w image or latent, c channel.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import logging

from ism_jax.data.images import CLASSES, EncodedImages, find, notes, read_batches
from ism_jax.data.latents import VERSION, moments, record_dtype
from ism_jax.networks import autoencoder
from ism_jax.networks.autoencoder import SCALE
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.files import commit, write_json
from train_jax.storage import shards as shards_lib
from train_jax.storage.shards import Job, make_missing
from train_jax.storage.weights import sha256

KIND = "images", "img", ("latents.array_record", "latents.json")  # see shards.Job
CUT = "adm, upright"  # of the images; shards of other cuts do not mix
PER_DEVICE = 32  # images in one call of the encoder


def make_encoder(model) -> Callable:
  """Returns `encode(pixels)`: uint8 [b, h, w, 3] -> posterior of `latents.record_dtype`, float16.

  The batch is split over this process's devices.
  """
  mesh = mesh_lib.make_mesh(devices=jax.local_devices())
  split, params = mesh_lib.batch_sharding(mesh), mesh_lib.replicate(model.params, mesh)

  def both_views(params, pixels):
    x = pixels.astype(np.float32) / 127.5 - 1
    views = [jax.numpy.stack(model.encode(params, v), axis=1) for v in (x, x[:, :, ::-1])]
    return jax.numpy.stack(views, axis=1).astype(np.float16)

  encode = jax.jit(both_views, out_shardings=split)
  return lambda pixels: encode(params, jax.device_put(pixels, split))


class ShardWriter:
  """Writes the records of one shard; the file gets its name in `finish`."""

  def __init__(self, out: Path, job: Job, shard: int):
    from array_record.python.array_record_module import ArrayRecordWriter

    self.job, (self.records, self.json) = job, job.paths(out, shard)
    self.partial = out / f".{self.records.stem}.partial"
    # Groups of 1 for random access; latents are mostly noise and do not compress.
    self.writer = ArrayRecordWriter(str(self.partial), "group_size:1,uncompressed")
    self.labels: list[int] = []
    self.sums: list = []  # of means and mean squares, by channel

  def write(self, posterior: jax.Array, names: list[str], labels: list[int]) -> None:
    """Appends the first len(labels) of posterior [b, 2, 2, h, w, c]; errors quote `names`."""
    posterior = np.asarray(posterior)[: len(labels)]
    if not np.all(np.isfinite(posterior)):
      raise UserError(
        f"--vae gives latents that are not finite (near {names[0]!r}); give the weights of a "
        "trained autoencoder."
      )
    for name, label in zip(names, labels, strict=True):
      if not 0 <= label < CLASSES:
        raise UserError(
          f"{name!r} has the class {label}, which must be from 0 to {CLASSES - 1}; give images of "
          "known classes, numbered from 0 on."
        )
    records = np.zeros(len(labels), record_dtype(posterior.shape[3:]))
    records["label"], records["posterior"] = labels, posterior
    for record in records:
      self.writer.write(record.tobytes())
    self.labels.extend(labels)
    self.sums.append([moment.sum(0) for moment in moments(posterior)])

  def finish(self, skipped: list[str], turned: int = 0) -> None:
    """Writes the shard's JSON file, then gives the shard its name."""
    self.writer.close()
    first, second = np.sum(self.sums, axis=0).tolist() if self.sums else ([], [])
    part = {"labels": self.labels, "skipped": skipped, "turned": turned}
    write_json(self.json, {"job": self.job.metadata, **part, "sum": first, "square": second})
    commit(self.partial, self.records)


def encode_shard(
  encode: Callable,
  images: EncodedImages,
  batch: int,
  job: Job,
  out: Path,
  shard: int,
  progress: Callable,
) -> None:
  """Makes one shard, `batch` images a call; unreadable images are named and skipped.

  Raises:
    UserError: the autoencoder's output is not finite in float16, or an image has no class.
  """
  writer = ShardWriter(out, job, shard)
  skipped, turned = [], 0
  pending = None  # written while the devices encode the next batch
  with ThreadPoolExecutor(thread_name_prefix="decode") as pool:
    for items in read_batches(images, job.rows(shard), batch, job.metadata["image_size"], pool):
      for i, image in items:
        if image.pixels is None:
          skipped.append(images.name(i))
          logging.warning("skipped: cannot read the image %s (%s)", skipped[-1], image.why)
      turned += sum(image.turned for _, image in items)
      readable = [item for item in items if item[1].pixels is not None]
      if readable:
        pixels = [image.pixels for _, image in readable]
        posterior = encode(np.stack([pixels[min(i, len(pixels) - 1)] for i in range(batch)]))
        if pending:
          writer.write(*pending)
        names, labels = [images.name(i) for i, _ in readable], [read.label for _, read in readable]
        pending = posterior, names, labels
      progress(len(items))
  if pending:
    writer.write(*pending)
  writer.finish(skipped, turned)


def write_manifest(out: Path, job: Job, names: tuple[str, ...], shape: tuple[int, ...]) -> dict:
  """Writes the manifest of all shards; returns it.

  Raises:
    UserError: no image could be read.
  """
  parts = job.parts(out)
  count = sum(len(part["labels"]) for part in parts)
  if not count:
    raise UserError(f"none of the {job.size} images can be read; give whole image files.")
  mean, square = (np.sum([p[key] for p in parts if p[key]], 0) / count for key in ("sum", "square"))
  labels = np.concatenate([np.array(part["labels"], np.int32) for part in parts])
  classes = 1 + int(labels.max())
  manifest = {
    **job.metadata,
    "count": count,
    "skipped": sum(len(part["skipped"]) for part in parts),
    "turned": sum(part["turned"] for part in parts),
    "names": names or [str(i) for i in range(classes)],
    "labels_sha256": hashlib.sha256(labels.tobytes()).hexdigest(),
    "shape": shape,
    "scale": SCALE,
    "mean": mean.tolist(),
    "std": np.sqrt(square - mean**2).tolist(),
  }
  write_json(out / "manifest.json", manifest)
  return manifest


def make_job(images: EncodedImages, vae: str, image_size: int, shards: int) -> Job:
  """The job of `--images --vae --image_size --shards`; 0 shards chooses their number.

  Raises:
    UserError: a number is out of range, or the autoencoder's file is missing.
  """
  if image_size < 8 or image_size % 8:
    raise UserError(f"--image_size={image_size} must be a positive multiple of 8, such as 256.")
  flags = {"image_size": image_size, "vae": sha256(vae), "cut": CUT, "content": images.content}
  return shards_lib.make_job(KIND, VERSION, images, shards, flags)


def encode_images(images: EncodedImages, job: Job, load: Callable, out: Path) -> dict | None:
  """Makes the missing shards of this process.

  Args:
    load: () -> the autoencoder, see `autoencoder.load`; called only if a shard is missing.

  Returns:
    The manifest once every shard is there; None while other processes are at work.

  Raises:
    UserError: `out` holds latents of another job; the autoencoder is broken; no image is readable.
  """

  def prepare(missing: list[int]) -> Callable:
    devices = jax.local_device_count()
    largest = max(len(job.rows(shard)) for shard in missing)
    batch = min(PER_DEVICE * devices, -(-largest // devices) * devices)
    encode = make_encoder(load())
    return partial(encode_shard, encode, images, batch, job, out)

  if not make_missing(job, out, prepare):
    return None
  size = job.metadata["image_size"] // 8
  return write_manifest(out, job, images.names, (size, size, 4))


def encode(source: str, vae: str, image_size: int, shards: int, out: Path) -> None:
  """`encode_images` of the images `source` (see `images.find`), with a summary at the end.

  Args:
    vae: file of the autoencoder's weights.
    shards: files to make; 0 chooses their number.
  """
  images = find(source)
  job = make_job(images, vae, image_size, shards)
  manifest = encode_images(images, job, lambda: autoencoder.load(vae), out)
  if manifest:
    files = notes(images.left_out, manifest["turned"])
    print(
      f"latents:   {manifest['count']} images of {len(manifest['names'])} classes in {out}, "
      f"{manifest['skipped']} skipped{files and '; ' + files}\n"
      f"channels:  means {np.round(manifest['mean'], 3).tolist()}, "
      f"stds {np.round(manifest['std'], 3).tolist()} after scaling"
    )
