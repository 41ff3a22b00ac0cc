"""Spectra against waves and noise; what a grid and the files of `--mode=sample` show."""

import numpy as np
from PIL import Image

from ism_jax.evaluation import pictures, spec
from ism_jax.sample import to_uint8


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
