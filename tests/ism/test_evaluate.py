"""Numbers and pictures, on images whose verdict is known: the data themselves, and noise."""

import numpy as np
import pytest
from PIL import Image

from ism_jax.data import sources
from ism_jax.evaluation import classifier, fid, pictures, registry, spec
from ism_jax.sample import to_uint8


@pytest.fixture(scope="module")
def source():
  return sources.digits()


@pytest.fixture(scope="module")
def reference(source):
  return registry.make_reference(source)


def test_labels_are_balanced():
  labels = spec.balanced_labels(23, 10)
  assert labels.dtype == np.int32 and labels[13] == 3
  counts = np.bincount(labels)
  assert len(counts) == 10 and counts.max() - counts.min() <= 1


def test_random_labels_are_uniform_by_the_seed_and_begin_alike():
  labels = spec.random_labels(20_000, 10, seed=1)
  assert labels.dtype == np.int32 and set(labels.tolist()) == set(range(10))
  assert np.abs(np.bincount(labels) - 2000).max() < 6 * np.sqrt(2000)
  np.testing.assert_array_equal(spec.random_labels(77, 10, seed=1), labels[:77])
  assert np.any(spec.random_labels(77, 10, seed=2) != labels[:77])


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


@pytest.fixture
def asked():
  """What the stand-in sampler was asked for, call by call."""
  return []


@pytest.fixture
def sample(source, asked):
  """A sampler that returns real digits of the classes asked for, brighter with w."""

  def draw(params, seed, labels, w, nfe, batch=256, progress=None):
    asked.append((params, seed, len(labels), w, nfe))
    rows = [np.flatnonzero(source.labels == label)[seed + i] for i, label in enumerate(labels)]
    if progress is not None:
      progress(len(labels))
    return source.images(rows) * (1 + w)  # out of range for w > 0: callers clip

  return draw


def test_measure_names_every_number(reference, sample, asked):
  settings = [(1, 0.0, 40), (4, 0.5, 20)]
  results = dict(classifier.measure(sample, "params", reference, 10, settings, seed=3))
  picture = results.pop("spectrum")
  assert picture.ndim == 3
  names = ("fd", "accuracy", "precision", "recall")
  assert set(results) == {f"{name}/{at}" for name in names for at in ("nfe1_w0", "nfe4_w0.5")}
  assert asked == [("params", 3, 40, 0.0, 1), ("params", 3, 20, 0.5, 4)]
  assert results["accuracy/nfe1_w0"] > 0.97


def test_a_wave_shows_in_its_own_ring():
  row, column = np.mgrid[:16, :16] * 2 * np.pi / 16
  for k in (1, 3, 8):
    for wave in (np.cos(k * row), np.cos(k * column)):
      power = pictures.radial_power(wave[None, :, :, None] + 5)
      assert power.argmax() == k
      np.testing.assert_allclose(np.delete(power, k), 0, atol=1e-12)


def test_white_noise_has_a_flat_spectrum():
  noise = np.random.default_rng(0).normal(size=(4000, 8, 8, 1))
  np.testing.assert_allclose(pictures.radial_power(2 * noise), 4 / 64, rtol=0.1)


def test_a_grid_shows_every_image_once(source):
  images = to_uint8(source.images(np.arange(6))).reshape(2, 3, 8, 8, 1)
  picture = pictures.grid(images, ["1 step, w=0", "4 steps, w=0"], ["0", "1", "2"], title="seed 0")
  height, width, channels = picture.shape
  assert picture.dtype == np.uint8 and channels == 3
  assert 100 < height < 400 and 150 < width < 600
  # An 8x8 image is drawn with sharp pixels: among them is a column of its darkest and lightest.
  assert picture.min() == 0 and picture.max() == 255
  other = pictures.grid(images[:, ::-1], ["", ""], ["0", "1", "2"])
  assert other.shape != picture.shape or np.any(other != picture)


def test_a_grid_of_colour(source):
  images = np.zeros((1, 2, 8, 8, 3), np.uint8)
  images[0, 1, ..., 0] = 255
  picture = pictures.grid(images, ["row"], ["black", "red"]).reshape(-1, 3)
  assert np.sum(np.all(picture == (255, 0, 0), axis=1)) > 500
  assert np.sum(np.all(picture == (0, 0, 0), axis=1)) > 500


def test_rows_are_named_in_english():
  assert pictures.row_name(1, 0.0) == "1 step, w=0"
  assert pictures.row_name(4, 0.25) == "4 steps, w=0.25"


def test_written_samples(sample, asked, source, tmp_path, capsys):
  labels = np.array([3, 1, 2, 3, 1], np.int32)
  settings = [(1, 0.0), (2, 0.0), (4, 0.5)]
  out = tmp_path / "new" / "folder"
  pictures.write_samples(sample, None, source.names, settings, labels, 7, out)

  assert asked[0] == (None, 7, 5, 0.0, 1)  # compiles what the speeds are of
  with np.load(out / "samples.npz") as saved:
    assert set(saved) == {"arr_0", "labels", "nfe", "guidance", "seed"}
    assert saved["arr_0"].shape == (15, 8, 8, 1) and saved["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(saved["labels"], [3, 1, 2, 3, 1] * 3)
    np.testing.assert_array_equal(saved["nfe"], [1] * 5 + [2] * 5 + [4] * 5)
    np.testing.assert_array_equal(saved["guidance"], [0.0] * 10 + [0.5] * 5)
    assert saved["seed"] == 7
    images = sample(None, 7, labels, 0.5, 4)
    np.testing.assert_array_equal(saved["arr_0"][10:], to_uint8(images))

  with Image.open(out / "grid.png") as picture:
    assert picture.mode == "RGB"
    assert 200 < picture.width < 700 and 150 < picture.height < 500
  printed = capsys.readouterr().out
  assert printed.count("images/s") == 3
  assert str(out / "grid.png") in printed and str(out / "samples.npz") in printed


def test_a_grid_has_sixteen_columns_at_most(sample, source, tmp_path):
  widths = []
  for n in (16, 60):
    labels = spec.balanced_labels(n, 10)
    pictures.write_samples(sample, None, source.names, [(1, 0.0)], labels, 0, tmp_path)
    with Image.open(tmp_path / "grid.png") as picture:
      widths.append(picture.width)
  assert widths[0] == widths[1]
