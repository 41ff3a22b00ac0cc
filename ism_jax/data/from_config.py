"""The data that a config names, and their metadata, which a run saves."""

from __future__ import annotations

import jax
import numpy as np

from ism_jax.data import latents, sources
from train_jax.errors import UserError, check_one_of

SOURCES = ("digits", "folder", "npz", "tfds", "latents")


def make_source(config) -> tuple[sources.Source | latents.Latents, sources.Source | None]:
  """(the training data of `config.data`, the images that are held out, if any).

  With `data.flip` the training images have their mirror images beside them.

  Raises:
    UserError: the config does not fit itself or the data.
  """
  data = config.data
  source, held_out = _open(data), None
  if data.held_out:
    source, held_out = sources.hold_out(source, data.held_out)
  for name, size in (("image_size", source.shape[0]), ("channels", source.shape[2])):
    if data[name] != size:
      raise UserError(f"data.{name}={data[name]} but for the images of {data.source} it is {size}.")
  return sources.with_mirror_images(source) if data.flip else source, held_out


def _open(data) -> sources.Source | latents.Latents:
  kind, where = data.source, data.path
  check_one_of("data.source", kind, SOURCES)
  if kind == "digits":
    if where:
      raise UserError(
        f"data.path={where!r} is not read where data.source='digits'; choose data.source=folder, "
        "npz, tfds or latents, or leave the path empty."
      )
    return sources.digits()
  if kind == "latents":
    for name in ("flip", "held_out"):
      if data[name]:
        raise UserError(
          f"data.{name}={data[name]} is for images; latents have their mirror images, and none are "
          "held out: leave it out."
        )
  if data.synthetic and not where:
    make = latents.synthetic if kind == "latents" else sources.synthetic
    shape = (data.image_size, data.image_size, data.channels)
    return make(data.synthetic, shape, data.classes)
  if not where:
    raise UserError(
      f"data.path is empty; give --config.data.path=PATH, which data.source={kind!r} reads."
    )
  if kind == "npz":
    return sources.npz(where)
  if kind == "latents":
    return latents.open_set(where, data.std, data.max_faults)
  read = sources.folder if kind == "folder" else sources.tfds
  return read(where, data.image_size, data.channels, data.max_faults)


def make_metadata(source: sources.Source | latents.Latents) -> dict:
  """The facts about the data that sampling and a resumed run need, as JSON."""
  metadata = {"names": list(source.names), "shape": list(source.shape)}
  metadata["examples"] = len(source.labels)
  if isinstance(source, latents.Latents):
    metadata |= {"vae": source.vae, "manifest_sha256": source.manifest}
  elif source.sha256:
    metadata["sha256"] = source.sha256
  return metadata


def describe(config, source: sources.Source | latents.Latents, held_out: int) -> None:
  """Prints the size of the data, and which files are not in it."""
  if jax.process_index():
    return
  count, names = len(source.labels), source.names
  mirrored = ", half of them mirrored" if config.data.flip else ""
  mirrored += f", {held_out} more held out" if held_out else ""
  some = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
  size = "x".join(map(str, source.shape))
  notes = f"; {source.notes}" if getattr(source, "notes", "") else ""
  print(
    f"data: {count} images of {size}{mirrored}; {len(names)} class(es): {some}{notes}", flush=True
  )


def share_of_largest_class(source: sources.Source | latents.Latents) -> float:
  """The share of all examples that the most frequent class has."""
  return float(np.bincount(source.labels).max() / len(source.labels))
