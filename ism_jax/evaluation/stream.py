"""Images -> features of a pretrained network -> statistics, over all devices and processes.

Features are streamed: only moments stay of 50 000 images, and the features of the images that
precision and recall compare. `fid.py` computes the statistics.

Kinds of features: of the FID Inception network `pool` (FID, precision and recall), `spatial` (sFID,
Nash et al., arXiv 2103.03841) and `logits` (inception score); of DINOv2 `dinov2` (Stein et al.,
arXiv 2306.04675).

Dimensions: n images, b batch, h w image, f features, m images with stored features, s parts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from ism_jax.evaluation import fid
from train_jax import mesh as mesh_lib
from train_jax.storage.weights import sha256

BLOCK = 1024  # images added to the moments at once, as each merge of moments costs 0.1 s
DIGITS = 12  # of a file's SHA-256 in names and messages
PER_DEVICE = 32  # images of a batch; the autoencoder's decoder needs about 0.2 GB for each


class FeatureNetwork(NamedTuple):
  """A pretrained network on a mesh.

  Attributes:
    name: inception or dinov2.
    file: of its weights.
    digest: the first 12 digits of the file's SHA-256.
    sizes: kind -> number of features.
    features: global images uint8 [b, h, w, 3] -> kind -> features [b, f], split over the devices.
  """

  name: str
  file: str
  digest: str
  sizes: dict[str, int]
  features: Callable[[jax.Array], dict[str, jax.Array]]


def load_network(name: str, file: str, mesh: jax.sharding.Mesh) -> FeatureNetwork:
  """The network `name` with the weights of `file`; computes nothing.

  Raises:
    UserError: the file does not hold such a network.
  """
  if name == "inception":
    from ism_jax.networks import inception

    params, apply = inception.load(file)
  else:
    from ism_jax.networks import dinov2

    # Published distances use the authors' position grid, which is 0.1 larger than Hugging Face's.
    params, apply = dinov2.load(file, offset=0.1)

  def features(params, images):
    outputs = apply(params, images)
    return outputs if isinstance(outputs, dict) else {name: outputs}

  probe = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8)
  sizes = {k: x.shape[1] for k, x in jax.eval_shape(features, params, probe).items()}
  params = mesh_lib.replicate(params, mesh)
  jitted = jax.jit(features, out_shardings=mesh_lib.batch_sharding(mesh))
  return FeatureNetwork(
    name, file, sha256(file)[:DIGITS], sizes, lambda images: jitted(params, images)
  )


class Request(NamedTuple):
  """The statistics to compute.

  Attributes:
    moments: kinds of features.
    features: int [m], increasing: the images whose `pool` features are stored.
    splits: s, parts of the inception score; 0 for no score.
  """

  moments: Sequence[str]
  features: np.ndarray
  splits: int = 0


class Statistics(NamedTuple):
  """The statistics of a `Request`.

  Attributes:
    moments: kind -> moments.
    features: float32 [m, f], `pool` features.
    scores: sums for the inception score.
  """

  moments: dict[str, fid.Moments]
  features: np.ndarray
  scores: fid.Scores


def collect(
  batches: Iterable[tuple[jax.Array, dict[str, jax.Array]]],
  n: int,
  sizes: dict[str, int],
  request: Request,
  progress: Callable[[int], Any] = lambda images: None,
) -> Statistics:
  """Statistics of n images from batches of (number of each image [b], kind -> features [b, f]).

  Numbers of n or more are padding. The arrays are global. Each process reads its own part, and all
  return the statistics of all images.

  Args:
    sizes: kind -> f.
    progress: called with the number of images in each global batch.
  """
  index, splits = request.features, request.splits
  moments = {kind: fid.no_moments(sizes[kind]) for kind in request.moments}
  stored = np.zeros((len(index), sizes["pool"] if len(index) else 0), np.float32)
  part = fid.parts(n, splits) if splits else None
  scores = fid.no_scores(splits, sizes["logits"] if splits else 0)
  kinds = {*request.moments, *["pool"] * bool(len(index)), *["logits"] * bool(splits)}
  for numbers, features in _blocks(batches, n, kinds, progress):
    for kind in moments:
      moments[kind] = fid.update(moments[kind], features[kind])
    if len(index):
      member = np.isin(numbers, index)
      stored[np.searchsorted(index, numbers[member])] = features["pool"][member]
    if splits:
      scores = fid.update_scores(scores, part[numbers], features["logits"])
  return _over_processes(Statistics(moments, stored, scores))


def _blocks(batches, n: int, kinds: Collection[str], progress) -> Iterator[tuple[np.ndarray, dict]]:
  """This process's images, BLOCK or more at a time: (numbers [b], kind -> features [b, f])."""
  pending: list[dict[str, np.ndarray]] = []
  done = 0

  def block():
    arrays = {name: np.concatenate([x[name] for x in pending]) for name in pending[0]}
    pending.clear()
    return arrays.pop("numbers"), arrays

  for global_numbers, features in _delayed(batches):
    numbers = mesh_lib.to_local(global_numbers)
    local = {kind: mesh_lib.to_local(features[kind])[numbers < n] for kind in kinds}
    pending.append({"numbers": numbers[numbers < n], **local})
    count = min(n - done, len(global_numbers))
    done += count
    progress(count)
    if sum(len(x["numbers"]) for x in pending) >= BLOCK:
      yield block()
  if pending:
    yield block()


def _delayed(items: Iterable) -> Iterator:
  """Yields each item after requesting the next, so the device and the host work in parallel."""
  pending = []
  for item in items:
    pending.append(item)
    if len(pending) > 1:
      yield pending.pop(0)
  yield from pending


def _over_processes(local: Statistics) -> Statistics:
  """The statistics of all processes' images from those of each process."""
  if jax.process_count() == 1:
    return local
  leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, local))
  # As bytes, because JAX would round float64.
  data = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in leaves]
  total = None
  for process in range(jax.process_count()):  # one at a time, because moments are large
    is_source = process == jax.process_index()
    received = multihost_utils.broadcast_one_to_all(data, is_source=is_source)
    pairs = zip(received, leaves, strict=True)
    values = [np.asarray(bits).view(x.dtype).reshape(x.shape) for bits, x in pairs]
    other = jax.tree.unflatten(structure, values)
    total = other if total is None else _merge(total, other)
  return total


def _merge(a: Statistics, b: Statistics) -> Statistics:
  return Statistics(
    {kind: fid.merge(a.moments[kind], b.moments[kind]) for kind in a.moments},
    a.features + b.features,  # each row is zero in all processes but one
    fid.Scores(*(x + y for x, y in zip(a.scores, b.scores, strict=True))),
  )
