"""features.py: the digits protocol's own numbers, scikit-learn's forward pass, and honesty.

Dimensions: n samples, h w image, c channel, f features.
"""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.datasets import load_digits

from ism_jax.evaluation import features, fid
from train_jax.errors import UserError

DATA = load_digits()
IMAGES, LABELS = (DATA.images[..., None] / 8 - 1).astype(np.float32), DATA.target


def coloured(seed, n, image_size, classes=(3, 7, 11)):
  """Noisy images [n, side, side, 3] whose class is their brightest channel."""
  rng = np.random.default_rng(seed)
  channel = np.arange(n) % 3
  images = rng.uniform(-1, 0.2, (n, image_size, image_size, 3))
  images[np.arange(n), :, :, channel] += 0.8
  return images, np.array(classes)[channel]


@pytest.fixture(scope="module")
def digits():
  return features.fit_classifier(IMAGES, LABELS)


@pytest.fixture(scope="module")
def small():
  return features.fit_classifier(*coloured(0, 60, 16))


def distance(x, y):
  a, b = (fid.update(fid.no_moments(x.shape[1]), z) for z in (x, y))
  return fid.frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def test_digits_floors(digits):
  """The published ones: means over draws of 2000, of any class and of 200 of each."""
  f, rng = digits.features(IMAGES), np.random.default_rng(0)
  rows = [np.flatnonzero(label == LABELS) for label in range(10)]
  drawn = [distance(f, f[rng.integers(0, len(f), 2000)]) for _ in range(20)]
  of_each = [
    distance(f, f[np.concatenate([rng.choice(own, 200) for own in rows])]) for _ in range(20)
  ]
  assert np.mean(drawn) == pytest.approx(0.29, abs=0.06)
  assert np.mean(of_each) == pytest.approx(0.15, abs=0.02)


def test_digits_class_accuracy_on_held_out_images():
  order = np.random.default_rng(0).permutation(len(IMAGES))
  fit, rest = order[:1297], order[1297:]
  extract = features.fit_classifier(IMAGES[fit], LABELS[fit])
  assert np.mean(extract.labels(IMAGES[rest]) == LABELS[rest]) == pytest.approx(0.994, abs=0.003)


def test_features_are_the_input_of_scikit_learns_last_layer(digits):
  mlp = digits.mlp
  f = digits.features(IMAGES[:100])
  p = softmax(f @ mlp.coefs_[-1] + mlp.intercepts_[-1], axis=1)
  np.testing.assert_allclose(p, mlp.predict_proba(DATA.data[:100] / 8 - 1), rtol=1e-9, atol=1e-12)
  assert f.dtype == np.float64 and (f >= 0).all() and (f > 0).any()


def test_any_labelled_images_can_be_fitted(small):
  images, labels = coloured(1, 30, 16)
  found = small.labels(images)
  np.testing.assert_array_equal(found, labels)  # the classes' own ids
  assert found.dtype.kind == "i" and small.image_size == 16
  assert small.features(images).shape == (30, 64)


def test_the_fit_is_deterministic(small):
  images, labels = coloured(0, 60, 16)
  again = features.fit_classifier(images, labels)
  np.testing.assert_array_equal(again.features(images), small.features(images))


def test_larger_images_are_seen_as_their_area_averages(small):
  fine = coloured(2, 4, 48)[0]
  blocks = fine.reshape(4, 16, 3, 16, 3, 3).mean((2, 4))  # [n, 16, 16, c]
  np.testing.assert_allclose(small.features(fine), small.features(blocks), rtol=1e-10)
  # 24 pixels to 16: what 48 would give, with each pixel drawn twice.
  uneven = coloured(3, 4, 24)[0]
  twice = uneven.repeat(2, axis=1).repeat(2, axis=2)
  np.testing.assert_allclose(small.features(uneven), small.features(twice), rtol=1e-10)
  assert not np.allclose(small.features(fine), small.features(fine[:, ::3, ::3]))
  flipped = small.features(fine.swapaxes(1, 2))
  assert not np.allclose(small.features(fine), flipped)  # rows and columns are not confused


def test_images_of_a_diverged_model_are_refused(small):
  images, labels = coloured(0, 60, 16)
  images[3, 2, 1, 0] = np.nan
  for call in (small.features, small.labels, lambda x: features.fit_classifier(x, labels)):
    with pytest.raises(UserError, match=r"NaN pixels.*go back to an earlier checkpoint"):
      call(images)
