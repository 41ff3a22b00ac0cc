"""Images -> features of a pretrained network -> statistics, over all devices and processes.

Features are streamed: of 50 000 images only the moments stay, and the features of those images that
precision and recall ask for. What the statistics are is the business of `fid.py`.

Kinds of features: of the FID Inception network `pool` (FID, precision and recall), `spatial` (sFID,
Nash et al., arXiv 2103.03841) and `logits` (inception score); of DINOv2 `dinov2` (Stein et al.,
arXiv 2306.04675).

Dimensions: n images, b batch, h w image, f features, m kept images, s parts.
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
from train_jax.multihost.signals import pause
from train_jax.storage.weights import sha256

BLOCK = 1024  # images added to the moments at once: a merge of moments costs 0.1 s, however few
DIGITS = 12  # of a file's SHA-256, where it is named
PER_DEVICE = 32  # images of a batch: the decoder of a latent needs about 0.2 GB for each


class FeatureNetwork(NamedTuple):
  """A pretrained network laid out on a mesh.

  Attributes:
    name: inception or dinov2.
    file: of its weights.
    digest: the file's SHA-256, its first 12 digits.
    sizes: kind -> number of features.
    features: global images uint8 [b, h, w, 3] -> kind -> features [b, f], split over the devices.
  """

  name: str
  file: str
  digest: str
  sizes: dict[str, int]
  features: Callable[[jax.Array], dict[str, jax.Array]]


def load_network(name: str, file: str, mesh: jax.sharding.Mesh) -> FeatureNetwork:
  """The network `name` (inception or dinov2) with the weights of `file`; computes nothing.

  Raises:
    UserError: the file does not hold such a network.
  """
  if name == "inception":
    from ism_jax.networks import inception

    params, apply = inception.load(file)
  else:
    from ism_jax.networks import dinov2

    # Published distances are of the authors' position grid, 0.1 larger than Hugging Face's.
    params, apply = dinov2.load(file, offset=0.1)

  def features(params, images):
    out = apply(params, images)
    return out if isinstance(out, dict) else {name: out}

  probe = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.uint8)
  sizes = {k: x.shape[1] for k, x in jax.eval_shape(features, params, probe).items()}
  params = mesh_lib.replicate(params, mesh)
  rows = mesh_lib.batch_sharding(mesh)
  jitted = jax.jit(features, out_shardings=rows)
  return FeatureNetwork(
    name, file, sha256(file)[:DIGITS], sizes, lambda images: jitted(params, images)
  )


class Wanted(NamedTuple):
  """Which statistics to take.

  Attributes:
    moments: kinds of features.
    kept: int [m], increasing: the images whose `pool` features are kept; none of them if empty.
    splits: s, parts of the inception score; 0 for none.
  """

  moments: Sequence[str]
  kept: np.ndarray
  splits: int = 0


class Statistics(NamedTuple):
  """What was `Wanted` of n images.

  Attributes:
    moments: kind -> moments.
    kept: float32 [m, f], `pool` features.
    scores: sums for the inception score.
  """

  moments: dict[str, fid.Moments]
  kept: np.ndarray
  scores: fid.Scores


def collect(
  batches: Iterable[tuple[jax.Array, dict[str, jax.Array]]],
  n: int,
  sizes: dict[str, int],
  wanted: Wanted,
  progress: Callable[[int], Any] = lambda images: None,
) -> Statistics:
  """Statistics of n images from batches of (number of each image [b], kind -> features [b, f]).

  Rows numbered n or more are padding. The arrays are global ones; each process looks at its own
  rows, and all get the statistics of all.

  Args:
    sizes: kind -> f.
    progress: called with the number of images of each batch, all processes' together.
  """
  moments = {kind: fid.no_moments(sizes[kind]) for kind in wanted.moments}
  kept = np.zeros((len(wanted.kept), sizes["pool"] if len(wanted.kept) else 0), np.float32)
  part = fid.parts(n, wanted.splits) if wanted.splits else None
  scores = fid.no_scores(wanted.splits, sizes["logits"] if wanted.splits else 0)
  kinds = {*wanted.moments, *["pool"] * bool(len(kept)), *["logits"] * bool(wanted.splits)}
  for rows, features in _blocks(batches, n, kinds, progress):
    for kind in moments:
      moments[kind] = fid.update(moments[kind], features[kind])
    if len(kept):
      member = np.isin(rows, wanted.kept)
      kept[np.searchsorted(wanted.kept, rows[member])] = features["pool"][member]
    if wanted.splits:
      scores = fid.update_scores(scores, part[rows], features["logits"])
  return _over_processes(Statistics(moments, kept, scores))


def _blocks(batches, n: int, kinds: Collection[str], progress) -> Iterator[tuple[np.ndarray, dict]]:
  """This process's images, BLOCK or more at a time: (numbers [b], kind -> features [b, f])."""
  waiting: list[dict[str, np.ndarray]] = []
  held, done = 0, 0

  def block():
    whole = {name: np.concatenate([x[name] for x in waiting]) for name in waiting[0]}
    waiting.clear()
    return whole.pop("numbers"), whole

  for numbers, features in _one_late(batches):
    rows = mesh_lib.to_local(numbers)
    found = {kind: mesh_lib.to_local(features[kind])[rows < n] for kind in kinds}
    waiting.append({"numbers": rows[rows < n], **found})
    held += len(waiting[-1]["numbers"])
    count = min(n - done, len(numbers))
    done += count
    progress(count)
    pause()
    if held >= BLOCK:
      held = 0
      yield block()
  if waiting:
    yield block()


def _one_late(items: Iterable) -> Iterator:
  """The items, each after the next was asked for: the device works on one, the host on another."""
  waiting = []
  for item in items:
    waiting.append(item)
    if len(waiting) > 1:
      yield waiting.pop(0)
  yield from waiting


def _over_processes(mine: Statistics) -> Statistics:
  """The statistics of all processes' images, given each one's own."""
  if jax.process_count() == 1:
    return mine
  leaves, structure = jax.tree.flatten(jax.tree.map(np.asarray, mine))
  whole = None
  for process in range(jax.process_count()):
    # As bytes, since JAX would round float64; one process at a time, since moments are large.
    here = process == jax.process_index()
    sent = multihost_utils.broadcast_one_to_all([_bytes(x) for x in leaves], is_source=here)
    values = [
      np.asarray(bits).view(x.dtype).reshape(x.shape) for bits, x in zip(sent, leaves, strict=True)
    ]
    other = jax.tree.unflatten(structure, values)
    whole = other if whole is None else _merge(whole, other)
  return whole


def _bytes(array: np.ndarray) -> np.ndarray:
  return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _merge(a: Statistics, b: Statistics) -> Statistics:
  return Statistics(
    {kind: fid.merge(a.moments[kind], b.moments[kind]) for kind in a.moments},
    a.kept + b.kept,  # each row is zero but in one of them
    fid.Scores(*(x + y for x, y in zip(a.scores, b.scores, strict=True))),
  )
