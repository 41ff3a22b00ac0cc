"""The real images' side of a benchmark: their moments, read or computed once and kept.

A reference is an ADM .npz (moments, images or both; see `adm.py`) or a folder of images. Moments in
the file are taken as they are. What has to come from the images is stored beside the reference, in
a file that can be a reference itself: `mu_dinov2` and `sigma_dinov2` are DINOv2's moments there and
`features` the pooled features for precision and recall.

Dimensions: n images, b batch, h w image, f features, m kept images.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from ism_jax.evaluation import adm, stream
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.files import whole_file
from train_jax.metrics import progress_bar
from train_jax.multihost.distributed import all_agree
from train_jax.storage.weights import sha256

KEYS = {
  "pool": ("mu", "sigma"),
  "spatial": ("mu_s", "sigma_s"),
  "dinov2": ("mu_dinov2", "sigma_dinov2"),
}
KEPT = 10_000  # images whose features precision and recall compare with, at most


class OpenedReference(NamedTuple):
  """A reference that was looked at but not read.

  Attributes:
    path: the .npz or folder.
    digest: 12 digits of the SHA-256 of the file; of a folder, of the names and sizes of its images.
    arrays: names of the arrays of the .npz.
    images: its images, None if it has moments only.
  """

  path: Path
  digest: str
  arrays: Collection[str]
  images: adm.ImageBatches | None

  def has(self, kind: str) -> bool:
    """Whether the moments of this kind (`features`: the kept features) are in the file."""
    return all(key in self.arrays for key in keys(kind))


class Real(NamedTuple):
  """What a benchmark compares with: kind -> (mean [f], covariance [f, f]), and features [m, f]."""

  moments: dict[str, tuple[np.ndarray, np.ndarray]]
  features: np.ndarray | None


def open_reference(
  file: str,
  kinds: Collection[str],
  sizes: Mapping[str, int],
  shape: tuple[int, int, int],
  channels: int | None = None,
) -> OpenedReference:
  """Looks at a reference, and at whether it will do.

  Args:
    kinds: what is needed of it: `pool`, `spatial`, `dinov2` (moments), `features`.
    sizes: kind -> number of features f of the network given.
    shape: (h, w, c) of the samples.
    channels: of a model of pixels, whose training data the images of a folder are cut like; None
      for one of latents: as in ADM, like what is encoded.

  Raises:
    UserError: it cannot be read, lacks what is needed, or has other sizes.
  """
  path = Path(file).expanduser().resolve()
  if not path.exists():
    raise UserError(f"reference={file!r} is not there; give an .npz or a folder of images.")
  if path.is_dir():
    files = adm.folder_files(path)
    listed = "".join(f"{p.relative_to(path)} {p.stat().st_size}\n" for p in files)
    digest = hashlib.sha256(listed.encode()).hexdigest()[: stream.DIGITS]
    arrays, images = {}, adm.folder_images(files, shape[0], channels)
  else:
    arrays, digest = adm.npz_arrays(path), sha256(path)[: stream.DIGITS]
    images = adm.npz_images(path) if "arr_0" in arrays else None
  for kind in kinds:
    _check_arrays(file, kind, arrays, sizes["pool" if kind == "features" else kind], images)
  if images and images.shape[:2] != shape[:2]:
    raise UserError(
      f"reference={file!r} has images of {images.shape[0]}x{images.shape[1]} pixels and the "
      f"samples have {shape[0]}x{shape[1]}; give a reference of the samples' size."
    )
  return OpenedReference(path, digest, frozenset(arrays), images)


def _check_arrays(file: str, kind: str, arrays: dict, f: int, images) -> None:
  """Raises UserError unless `kind`, of f features, is in the arrays or can come from the images."""
  missing = [key for key in keys(kind) if key not in arrays]
  if missing:
    if images is None or images.n < 4:
      raise UserError(
        f"reference={file!r} has no {missing[0]!r}, nor 4 images ('arr_0') to compute it from "
        f"(it holds {', '.join(arrays) or 'nothing'}); give one that has."
      )
    return
  for key, axes in zip(keys(kind), (1, 2), strict=False):
    found = arrays[key][0]
    if (found[1:] if kind == "features" else found) != (f,) * axes:
      raise UserError(
        f"{key!r} of reference={file!r} has the shape {found}, and the {kind} of this network are "
        f"{f} numbers an image; give a reference made with this network."
      )


def read(
  reference: OpenedReference,
  kinds: Collection[str],
  networks: Collection[stream.FeatureNetwork],
  mesh: jax.sharding.Mesh,
  per_device: int = stream.PER_DEVICE,
) -> Real:
  """The moments and features of `kinds`, from the file, from what was stored, or computed now."""
  given = [kind for kind in kinds if reference.has(kind)]
  found = _load(reference.path, given) if given else {}
  for network in networks:
    mine = [kind for kind in kinds if kind not in given and _of(kind) in network.sizes]
    if not mine:
      continue
    stored = _stored(reference, network)
    if all_agree(stored.exists()):
      found |= _load(stored, mine)
    else:
      computed = _compute(reference.images, network, mesh, per_device)
      _store(stored, computed)
      found |= {kind: [computed[key] for key in keys(kind)] for kind in mine}
  for kind, arrays in found.items():
    if not all(np.isfinite(array).all() for array in arrays):
      raise UserError(
        f"the {kind} statistics of reference={str(reference.path)!r} are not all finite; fetch it "
        "again."
      )
  features = found.pop("features", [None])[0]
  return Real({kind: (mean, covariance) for kind, (mean, covariance) in found.items()}, features)


def keys(kind: str) -> tuple[str, ...]:
  """The arrays of an .npz that hold the moments of a kind, or the kept features."""
  return KEYS.get(kind, (kind,))


def _of(kind: str) -> str:
  return "pool" if kind == "features" else kind


def _stored(reference: OpenedReference, network: stream.FeatureNetwork) -> Path:
  """Where what this network says of the images is kept: beside the reference."""
  images, digests = reference.images, (network.digest, reference.digest)
  names = filter(None, (network.name, *digests, str(images.shape[0]), images.cut))
  return reference.path.with_name(
    f"{reference.path.name.removesuffix('.npz')}.{'-'.join(names)}.npz"
  )


def _load(path: Path, kinds: list[str]) -> dict[str, list[np.ndarray]]:
  """kind -> [mean, covariance], or [features]."""
  with np.load(path) as arrays:
    return {kind: [arrays[key] for key in keys(kind)] for kind in kinds}


def _store(path: Path, arrays: dict[str, np.ndarray]) -> None:
  """Writes the arrays if it can; a reader sees the whole file or none."""
  if jax.process_index():
    return
  try:
    with whole_file(path) as file:
      np.savez(file, **arrays)
  except OSError as err:
    logging.warning("%s cannot be kept for the next time: %s", path, err)


def _compute(
  images: adm.ImageBatches, network: stream.FeatureNetwork, mesh, per_device: int
) -> dict:
  """All that is ever needed of the images with this network, by name in the file."""
  bar = progress_bar(images.n, 0, jax.process_index() == 0, unit="img", desc="reference")
  kinds = [kind for kind in KEYS if kind in network.sizes]
  kept = np.sort(np.random.default_rng(0).permutation(images.n)[:KEPT])
  wanted = stream.Wanted(kinds, kept if "pool" in kinds else kept[:0])
  batches = _batches(images, network, mesh, per_device)
  found = stream.collect(batches, images.n, network.sizes, wanted, bar.update)
  bar.close()
  arrays = {"features": found.kept} if "pool" in kinds else {}
  for kind in kinds:
    mean, covariance = KEYS[kind]
    arrays |= {mean: found.moments[kind].mean, covariance: found.moments[kind].covariance}
  return arrays


def _batches(
  images: adm.ImageBatches, network: stream.FeatureNetwork, mesh, per_device: int
) -> Iterator:
  """(numbers, features) of the images, batch by batch, the last one filled up."""
  b = per_device * mesh_lib.batch_parts(mesh)
  rows = mesh_lib.process_rows(b, mesh)
  for i, pixels in enumerate(images.batches(b, rows)):
    numbers = np.arange(i * b, (i + 1) * b, dtype=np.int32)[rows]
    filled = np.zeros((len(numbers), *images.shape), np.uint8)
    filled[: len(pixels)] = pixels
    batch = mesh_lib.to_global({"numbers": numbers, "images": filled}, mesh)
    yield batch["numbers"], network.features(batch["images"])
