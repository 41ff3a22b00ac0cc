"""Features of small images, by which `fid.py` compares real and generated ones.

There is no pretrained network for small images. So two scikit-learn classifiers are fitted to the
real images, by a fixed recipe that anybody can repeat in seconds. On digits:

    distance: Fréchet distance on the 64 penultimate features of
              MLPClassifier((128, 64), random_state=0, max_iter=300, alpha=1e-3)
    class accuracy: agreement of SVC(gamma=0.02, C=10) with the requested class

both fitted to all of `load_digits` as x / 8 - 1. The distances have a floor: 1.3 ± 0.2 between two
halves of the digits, 0.29 ± 0.08 between the digits and 2000 of them drawn with replacement, and
0.15 ± 0.02 if these are 200 of each class, as samples are (30 draws).

Such numbers compare models of one data set only. They are not FID.

Dimensions: n samples, h w image, c channel, s image_size, f features.
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
  """An extractor for evaluation. Images are float [n, h, w, c] in [-1, 1]."""

  def features(self, images: ArrayLike) -> np.ndarray:
    """Features [n, f] float64 of images [n, h, w, c]."""

  def labels(self, images: ArrayLike) -> np.ndarray:
    """Predicted classes [n] int of images [n, h, w, c]."""


@dataclasses.dataclass(frozen=True)
class ClassifierFeatures:
  """Features and classes by two classifiers of real images; made by `fit_classifier`.

  It sees `image_size` x `image_size` pixels and no finer detail.
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
    """Predicted classes [n] int of images [n, h, w, c]; UserError for NaN pixels."""
    return self.svc.predict(self._vectors(images))

  def _vectors(self, images: ArrayLike) -> np.ndarray:
    images = _check_images(images)
    _, h, w, c = images.shape
    assert c * self.image_size**2 == self.mlp.n_features_in_ and min(h, w) >= self.image_size
    return _shrink(images, self.image_size)


def fit_classifier(images: ArrayLike, labels: ArrayLike) -> ClassifierFeatures:
  """Fits the digits' recipe to a small data set, averaged down to at most 16x16 pixels.

  The result depends on the order of the images. It takes seconds for a few thousand images and
  about a minute for ten thousand; pass a subset of more.

  Args:
    images: real images, float [n, h, w, c] in [-1, 1].
    labels: their classes, int [n]; at least two classes of at least two images.
  """
  images, labels = _check_images(images), np.asarray(labels)
  assert labels.shape == (len(images),), labels.shape
  image_size = min(MAX_SIDE, *images.shape[1:3])
  x = _shrink(images, image_size)  # [n, s s c]
  gamma = 0.02 * 64 / x.shape[1]  # 0.02 for the 64 pixels of a digit; the kernel sums over pixels
  mlp = MLPClassifier((128, 64), random_state=0, max_iter=300, alpha=1e-3)
  with threadpool_limits(1):  # on shared cores, threads make such small products 10 times slower
    mlp.fit(x, labels)
  return ClassifierFeatures(mlp, SVC(gamma=gamma, C=10).fit(x, labels), image_size)


def _shrink(images: np.ndarray, image_size: int) -> np.ndarray:
  """Images [n, h, w, c] averaged over a grid of s x s equal areas -> float64 [n, s s c]."""
  rows, columns = (_area_weights(size, image_size) for size in images.shape[1:3])
  blocks = []
  for i in range(0, len(images), 1024):  # in blocks, because float64 takes 8 bytes a pixel
    x = images[i : i + 1024].astype(np.float64)
    x = np.einsum("sh,nhwc->nswc", rows, x, optimize=True)  # [n, s, w, c]
    x = np.einsum("tw,nswc->nstc", columns, x, optimize=True)  # [n, s, s, c]
    blocks.append(x.reshape(len(x), -1))
  return np.concatenate(blocks)


def _area_weights(size: int, image_size: int) -> np.ndarray:
  """[s, size]: the share of each of `size` pixels in each of s equal intervals."""
  edges = np.linspace(0, size, image_size + 1)
  pixel = np.arange(size)
  overlap = np.minimum(edges[1:, None], pixel + 1) - np.maximum(edges[:-1, None], pixel)
  return np.maximum(overlap, 0) * image_size / size


def _check_images(images: ArrayLike) -> np.ndarray:
  """images as a non-empty array [n, h, w, c] of floats in [-1, 1]; UserError for NaN."""
  images = np.asarray(images)
  assert images.ndim == 4 and images.size and images.dtype.kind == "f", images.shape
  low, high = float(images.min()), float(images.max())
  if np.isnan(low):
    raise UserError(
      "images have NaN pixels, and must be numbers in [-1, 1]; if a model drew them, it has "
      "diverged: go back to an earlier checkpoint."
    )
  assert low >= -1.001 and high <= 1.001, (low, high)
  return images
