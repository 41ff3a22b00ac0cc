"""The real images' statistics: read, or computed once and stored.

A reference is an ADM .npz (moments, images or both; see `adm.py`) or a folder of images. Moments in
the file are used. Others are computed from the images and stored beside the reference, in a file
that can be a reference itself: `mu_dinov2` and `sigma_dinov2` are DINOv2's moments, `features` the
pooled features for precision and recall.

Dimensions: n images, b batch, h w image, f features, m images with stored features.
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
RULES = "upright"  # how files become pixels; statistics kept under other rules are not taken
MAX_FEATURES = 10_000  # images whose features precision and recall compare with


class OpenedReference(NamedTuple):
  """A reference that is checked but not read.

  Attributes:
    path: the .npz or folder.
    digest: 12 digits of the file's SHA-256, or that of the names and contents of a folder's files.
    arrays: names of the arrays in the .npz.
    images: its images; None if it has moments only.
  """

  path: Path
  digest: str
  arrays: Collection[str]
  images: adm.ImageBatches | None

  def has(self, kind: str) -> bool:
    """Whether the file holds the moments of a kind (or the features, for `features`)."""
    return all(key in self.arrays for key in keys(kind))


class Real(NamedTuple):
  """Statistics of a reference: kind -> (mean [f], covariance [f, f]), and features [m, f]."""

  moments: dict[str, tuple[np.ndarray, np.ndarray]]
  features: np.ndarray | None


def open_reference(
  file: str,
  kinds: Collection[str],
  sizes: Mapping[str, int],
  shape: tuple[int, int, int],
  channels: int | None = None,
) -> OpenedReference:
  """Opens a reference and checks it against the samples and networks.

  Args:
    kinds: the statistics to read later: moments `pool`, `spatial`, `dinov2`; `features`.
    sizes: kind -> number of features f of the network.
    shape: (h, w, c) of the samples.
    channels: of a model of pixels; None for a model of latents. It chooses the crop of a folder's
      images: that of the training data, see decode.py.

  Raises:
    UserError: the file is unreadable, lacks statistics and images, or has other sizes.
  """
  path = Path(file).expanduser().resolve()
  if not path.exists():
    raise UserError(f"reference={file!r} is not there; give an .npz or a folder of images.")
  if path.is_dir():
    files = adm.folder_files(path)
    listed = RULES.encode() + adm.folder_digest(path, files)
    digest = hashlib.sha256(listed).hexdigest()[: stream.DIGITS]
    arrays, images = {}, adm.folder_images(files, shape[0], channels)
  else:
    arrays, digest = adm.npz_arrays(path), sha256(path)[: stream.DIGITS]
    images = adm.npz_images(path) if "arr_0" in arrays else None
  for kind in kinds:
    _check_arrays(file, kind, arrays, sizes[_source(kind)], images)
  if images and images.shape[:2] != shape[:2]:
    raise UserError(
      f"reference={file!r} has images of {images.shape[0]}x{images.shape[1]} pixels and the "
      f"samples have {shape[0]}x{shape[1]}; give a reference of the samples' size."
    )
  return OpenedReference(path, digest, frozenset(arrays), images)


def _check_arrays(file: str, kind: str, arrays: dict, f: int, images) -> None:
  """Raises UserError unless `kind` is in the arrays, with f features, or can be computed."""
  missing = [key for key in keys(kind) if key not in arrays]
  if missing:
    if images is None or images.n < 4:
      raise UserError(
        f"reference={file!r} has no {missing[0]!r}, nor 4 images ('arr_0') to compute it from "
        f"(it holds {', '.join(arrays) or 'nothing'}); give a reference with either."
      )
    return
  for key, axes in zip(keys(kind), (1, 2), strict=False):
    shape = arrays[key][0]
    if (shape[1:] if kind == "features" else shape) != (f,) * axes:
      raise UserError(
        f"{key!r} of reference={file!r} has the shape {shape}, and the {kind} of this network are "
        f"{f} numbers an image; give a reference made with this network."
      )


def read(
  reference: OpenedReference,
  kinds: Collection[str],
  networks: Collection[stream.FeatureNetwork],
  mesh: jax.sharding.Mesh,
  per_device: int = stream.PER_DEVICE,
) -> Real:
  """The statistics of `kinds`: from the reference, from the file beside it, or computed now."""
  in_file = [kind for kind in kinds if reference.has(kind)]
  statistics = _load(reference.path, in_file) if in_file else {}
  for network in networks:
    missing = [kind for kind in kinds if kind not in in_file and _source(kind) in network.sizes]
    if not missing:
      continue
    cache = _cache_path(reference, network)
    if all_agree(cache.exists()):
      statistics |= _load(cache, missing)
    else:
      arrays = _compute(reference.images, network, mesh, per_device)
      _store(cache, arrays)
      statistics |= {kind: [arrays[key] for key in keys(kind)] for kind in missing}
  for kind, arrays in statistics.items():
    if not all(np.isfinite(array).all() for array in arrays):
      raise UserError(
        f"the {kind} statistics of reference={str(reference.path)!r} are not all finite; fetch it "
        "again."
      )
  features = statistics.pop("features", [None])[0]
  return Real({kind: tuple(moments) for kind, moments in statistics.items()}, features)


def keys(kind: str) -> tuple[str, ...]:
  """The names of a kind's arrays in an .npz."""
  return KEYS.get(kind, (kind,))


def _source(kind: str) -> str:
  """The kind of a network's features that a kind of statistics is computed from."""
  return "pool" if kind == "features" else kind


def _cache_path(reference: OpenedReference, network: stream.FeatureNetwork) -> Path:
  """The file beside the reference that stores the statistics by this network."""
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
  """Writes the arrays if the directory is writable; readers see the whole file or none."""
  if jax.process_index():
    return
  try:
    with whole_file(path) as file:
      np.savez(file, **arrays)
  except OSError as err:
    logging.warning("%s cannot be stored for later evaluations: %s", path, err)


def _compute(
  images: adm.ImageBatches, network: stream.FeatureNetwork, mesh, per_device: int
) -> dict:
  """All statistics of the images by this network, by name in the file."""
  kinds = [kind for kind in KEYS if kind in network.sizes]
  index = np.sort(np.random.default_rng(0).permutation(images.n)[:MAX_FEATURES])
  request = stream.Request(kinds, index if "pool" in kinds else index[:0])
  batches = _batches(images, network, mesh, per_device)
  with progress_bar(images.n, 0, jax.process_index() == 0, unit="img", desc="reference") as bar:
    statistics = stream.collect(batches, images.n, network.sizes, request, bar.update)
  arrays = {"features": statistics.features} if "pool" in kinds else {}
  for kind in kinds:
    mean, covariance = KEYS[kind]
    moments = statistics.moments[kind]
    arrays |= {mean: moments.mean, covariance: moments.covariance}
  return arrays


def _batches(
  images: adm.ImageBatches, network: stream.FeatureNetwork, mesh, per_device: int
) -> Iterator:
  """(numbers, features) of each batch of images; the last one is padded."""
  b = per_device * mesh_lib.batch_parts(mesh)
  rows = mesh_lib.process_rows(b, mesh)
  for i, pixels in enumerate(images.batches(b, rows)):
    numbers = np.arange(i * b, (i + 1) * b, dtype=np.int32)[rows]
    padded = np.zeros((len(numbers), *images.shape), np.uint8)
    padded[: len(pixels)] = pixels
    batch = mesh_lib.to_global({"numbers": numbers, "images": padded}, mesh)
    yield batch["numbers"], network.features(batch["images"])
