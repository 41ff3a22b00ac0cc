"""Metrics of samples by a classifier that is fitted to small images.

Each NFE and guidance scale w has a Fréchet distance (fd), a class accuracy (accuracy), and
k-nearest-neighbour precision and recall.

Dimensions: n samples, h w image, c channel, f features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ism_jax.evaluation import fid, pictures
from ism_jax.evaluation.features import FeatureExtractor
from ism_jax.evaluation.spec import balanced_labels
from ism_jax.model import Model


@dataclass(frozen=True)
class ClassifierReference:
  """Real images, their features [n, f], and the features' moments.

  `held_out` are the moments of images that are not trained on, if there are any.
  """

  images: np.ndarray
  extract: FeatureExtractor
  features: np.ndarray
  moments: fid.Moments
  held_out: fid.Moments | None = None

  @classmethod
  def of(cls, extract: FeatureExtractor, images: np.ndarray, held_out=None) -> ClassifierReference:
    """The reference of real images [n, h, w, c] in [-1, 1], and of held-out ones, if any."""
    features = extract.features(images)
    held_out = None if held_out is None else _moments(extract.features(held_out))
    return cls(images, extract, features, _moments(features), held_out)


def _moments(features: np.ndarray) -> fid.Moments:
  return fid.update(fid.no_moments(features.shape[1]), features)


def _distance(a: fid.Moments, b: fid.Moments) -> float:
  return fid.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def compare(
  reference: ClassifierReference, images: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
  """The metrics of samples [n, h, w, c] in [-1, 1] that were drawn for the classes `labels` [n]."""
  extract = reference.extract
  features = extract.features(images)
  precision, recall = fid.precision_recall(reference.features, features, k=3)
  fake = _moments(features)
  metrics = {"fd": _distance(reference.moments, fake)}
  if reference.held_out is not None:
    metrics["fd_held_out"] = _distance(reference.held_out, fake)
  accuracy = float(np.mean(extract.labels(images) == labels))
  return {**metrics, "accuracy": accuracy, "precision": precision, "recall": recall}


def measure(
  model: Model,
  reference: ClassifierReference,
  settings: Sequence[tuple[int, float, int]],
  seed: int,
) -> Iterator[tuple[str, float | np.ndarray]]:
  """Yields ("fd/nfe1_w0.5", value) and so on, for each (nfe, w, n samples) of `settings`.

  `fd_held_out/data` is the distance between held-out and training images, if any are held out.
  The last item is ("spectrum", picture) of the samples at the lowest w.
  """
  lowest, unguided = min(w for _, w, _ in settings), {}
  if reference.held_out is not None:
    yield "fd_held_out/data", _distance(reference.held_out, reference.moments)
  for nfe, w, n in settings:
    labels = balanced_labels(n, len(model.names))
    images = np.clip(model.sampler(model.params, seed, labels, w, nfe), -1, 1)
    if w == lowest:
      unguided[pictures.row_name(nfe, w)] = images
    for name, value in compare(reference, images, labels).items():
      yield f"{name}/nfe{nfe}_w{w:g}", value
  yield "spectrum", pictures.spectrum_figure(reference.images, unguided)
