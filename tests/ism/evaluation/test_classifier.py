"""Numbers, on images whose verdict is known: the data themselves, and noise."""

import numpy as np
import pytest

from ism_jax.evaluation import classifier, fid, registry, spec


@pytest.fixture(scope="module")
def reference(source):
  return registry.make_reference(source)


def test_precision_and_recall_are_of_three_neighbours(reference, source):
  noise = np.random.default_rng(0).normal(0, 0.5, (300, 8, 8, 1)).astype(np.float32)
  noisy = (source.images(np.arange(300)) + noise).clip(-1, 1)
  found = classifier.compare(reference, noisy, source.labels[:300])
  features = reference.extract.features(noisy)
  three, five = (fid.precision_recall(reference.features, features, k=k) for k in (3, 5))
  assert (found["precision"], found["recall"]) == three != five


def test_real_images_are_judged_real(reference, source):
  images = source.images(np.arange(1797))
  scores = classifier.compare(reference, images, source.labels)
  assert scores["fd"] < 1e-3 and scores["accuracy"] > 0.99
  assert scores["precision"] == scores["recall"] == 1
  half = classifier.compare(reference, images[::2], source.labels[::2])
  assert 1e-3 < half["fd"] < 1.2  # between two halves it is about 1


def test_noise_is_judged_noise(reference):
  images = np.random.default_rng(0).uniform(-1, 1, (500, 8, 8, 1))
  scores = classifier.compare(reference, images, spec.balanced_labels(500, 10))
  assert scores["fd"] > 20 and scores["accuracy"] < 0.3
  assert scores["precision"] < 0.3


def test_accuracy_is_about_the_class_that_was_asked_for(reference, source):
  images = source.images(np.arange(300))
  wrong = (source.labels[:300] + 1) % 10
  assert classifier.compare(reference, images, wrong)["accuracy"] < 0.02


def test_one_class_only_has_recall_of_a_tenth(reference, source):
  zeros = source.images(np.flatnonzero(source.labels == 0))
  scores = classifier.compare(reference, zeros, np.zeros(len(zeros), int))
  assert scores["precision"] > 0.99 and 0.08 < scores["recall"] < 0.2


def test_measure_names_every_number(reference, model, asked):
  settings = [(1, 0.0, 40), (4, 0.5, 20)]
  results = dict(classifier.measure(model, reference, settings, seed=3))
  picture = results.pop("spectrum")
  assert picture.ndim == 3
  names = ("fd", "accuracy", "precision", "recall")
  assert set(results) == {f"{name}/{at}" for name in names for at in ("nfe1_w0", "nfe4_w0.5")}
  assert asked == [("params", 3, 40, 0.0, 1), ("params", 3, 20, 0.5, 4)]
  assert results["accuracy/nfe1_w0"] > 0.97
