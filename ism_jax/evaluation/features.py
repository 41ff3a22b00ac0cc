"""Feature extractors for evaluation: what `fid.py` compares real and generated images by.

Small images have no pretrained network to judge them, so one is fitted to the real images: two
scikit-learn classifiers that anybody can refit in seconds from the same fixed recipe. On digits:

    distance: Fréchet distance on the 64 penultimate features of
              MLPClassifier((128, 64), random_state=0, max_iter=300, alpha=1e-3)
    class accuracy: agreement of SVC(gamma=0.02, C=10) with the requested class

both fitted on all of `load_digits` as x / 8 - 1. The distances have a floor: 1.3 ± 0.2 between two
halves of the digits, 0.29 ± 0.08 between the digits and 2000 of them drawn with replacement, and
0.15 ± 0.02 where these are 200 of each class, as samples are (30 draws).

Such numbers compare models of one data set. They are not FID and do not carry over to another one.

Dimensions: n samples, h w image, c channel, s side, f features.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike
from sklearn.neural_network import MLPClassifier
from sklearn.svm import SVC
from threadpoolctl import threadpool_limits

from train_jax.errors import UserError

MAX_SIDE = 16  # pixels; larger images are averaged down to this before they are classified


class FeatureExtractor(Protocol):
  """What evaluation needs of an extractor. Images are float [n, h, w, c] in [-1, 1]."""

  def features(self, images: ArrayLike) -> np.ndarray:
    """Features [n, f] float64 of images [n, h, w, c]."""

  def labels(self, images: ArrayLike) -> np.ndarray:
    """Predicted classes [n] int of images [n, h, w, c]."""


@dataclasses.dataclass(frozen=True)
class ClassifierFeatures:
  """Features and classes by two classifiers fitted to the real images; made by `fit_classifier`.

  It sees `image_size` x `image_size` pixels and is blind to detail finer than that.
  """

  mlp: MLPClassifier  # the features: its last hidden layer
  svc: SVC  # the classes
  image_size: int

  def features(self, images: ArrayLike) -> np.ndarray:
    """Features [n, 64] float64 of images [n, h, w, c]; UserError as in `labels`."""
    x = self._vectors(images)
    for weights, bias in zip(self.mlp.coefs_[:-1], self.mlp.intercepts_[:-1], strict=True):
      x = np.maximum(x @ weights + bias, 0)
    return x

  def labels(self, images: ArrayLike) -> np.ndarray:
    """Predicted classes [n] int of images [n, h, w, c].

    Raises:
      UserError: images are not float [n, h, w, c] in [-1, 1], or have other channels or fewer
        pixels than those fitted.
    """
    return self.svc.predict(self._vectors(images))

  def _vectors(self, images: ArrayLike) -> np.ndarray:
    images = _check_images(images)
    channels = self.mlp.n_features_in_ // self.image_size**2
    _, h, w, c = images.shape
    if c != channels or min(h, w) < self.image_size:
      raise UserError(
        f"Images of {h}x{w}x{c} do not fit this classifier, which takes {channels} channels and "
        f"sides of at least {self.image_size}; evaluate at the size of the images it was fitted to."
      )
    return _shrink(images, self.image_size)


def fit_classifier(images: ArrayLike, labels: ArrayLike) -> ClassifierFeatures:
  """Evaluator of a small data set: the digits recipe on images averaged down to at most 16x16.

  Deterministic, given the order of the images. It takes seconds for a few thousand images and about
  a minute for ten thousand; of more, pass a subset.

  Args:
    images: real images, float [n, h, w, c] in [-1, 1].
    labels: their classes, int [n]; at least two classes of at least two images.

  Raises:
    UserError: images or labels are not as above.
  """
  images = _check_images(images)
  labels = _check_labels(labels, len(images))
  image_size = min(MAX_SIDE, *images.shape[1:3])
  x = _shrink(images, image_size)  # [n, s s c]
  gamma = 0.02 * 64 / x.shape[1]  # 0.02 for the 64 pixels of a digit; the kernel sums over pixels
  mlp = MLPClassifier((128, 64), random_state=0, max_iter=300, alpha=1e-3)
  with threadpool_limits(1):  # on shared cores, threads make such small products 10 times slower
    mlp.fit(x, labels)
  return ClassifierFeatures(mlp, SVC(gamma=gamma, C=10).fit(x, labels), image_size)


def _shrink(images: np.ndarray, image_size: int) -> np.ndarray:
  """Images [n, h, w, c] averaged over a grid of side x side equal areas -> float64 [n, s s c]."""
  rows, columns = (_area_weights(size, image_size) for size in images.shape[1:3])
  blocks = []
  for i in range(0, len(images), 1024):  # so that only the small images are all float64 at once
    x = images[i : i + 1024].astype(np.float64)
    x = np.einsum("sh,nhwc->nswc", rows, x, optimize=True)  # [n, s, w, c]
    x = np.einsum("tw,nswc->nstc", columns, x, optimize=True)  # [n, s, s, c]
    blocks.append(x.reshape(len(x), -1))
  return np.concatenate(blocks)


def _area_weights(size: int, image_size: int) -> np.ndarray:
  """[side, size]: the share of each of `size` pixels in each of `image_size` equal intervals."""
  edges = np.linspace(0, size, image_size + 1)
  pixel = np.arange(size)
  overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
  return np.maximum(overlap, 0) * image_size / size


def _check_images(images: ArrayLike) -> np.ndarray:
  """images as a non-empty array [n, h, w, c] of floats in [-1, 1]."""
  images = np.asarray(images)
  if images.ndim != 4 or not images.size:
    raise UserError(
      f"images have shape {images.shape}, and must be [n, h, w, c] with none of them 0; "
      "add the axes that are missing."
    )
  if images.dtype.kind in "iub":
    raise UserError(
      f"images are {images.dtype}, and must be floats in [-1, 1]; divide 8-bit ones by 127.5 and "
      "subtract 1."
    )
  low, high = float(images.min()), float(images.max())
  if np.isnan(low):  # then so is high
    raise UserError(
      "images have NaN pixels, and must be numbers in [-1, 1]; if a model drew them, it has "
      "diverged: go back to an earlier checkpoint."
    )
  if low < -1.001 or high > 1.001:
    raise UserError(
      f"images range from {low:.4g} to {high:.4g}, and must be in [-1, 1]; clip samples, rescale "
      "data."
    )
  return images


def _check_labels(labels: ArrayLike, n: int) -> np.ndarray:
  """labels as an int array [n] with two or more classes of two or more images."""
  labels = np.asarray(labels)
  if labels.shape != (n,) or labels.dtype.kind not in "iu":
    raise UserError(
      f"labels are {labels.dtype} of shape {labels.shape}, and must be one int for each of the {n} "
      "images; pass class ids."
    )
  classes, counts = np.unique(labels, return_counts=True)
  if len(classes) < 2 or counts.min() < 2:
    raise UserError(
      f"labels hold {len(classes)} classes, the smallest of {counts.min()} images, and a "
      "classifier needs at least 2 classes of at least 2 images; add images or leave out the small "
      "classes."
    )
  return labels
