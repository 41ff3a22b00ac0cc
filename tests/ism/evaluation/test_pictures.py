"""Spectra against waves and noise; what a grid and the files of `--mode=sample` show."""

import numpy as np
import pytest
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


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_every_image_once_in_its_place(channels):
  shades = np.array([[30, 60, 90], [120, 150, 180]], np.uint8)
  images = np.broadcast_to(shades[:, :, None, None, None], (2, 3, 8, 8, channels)).copy()
  if channels == 3:
    images[..., 1:] = 0  # red
  wanted = [(shade, *(2 * [shade] if channels == 1 else [0, 0])) for shade in shades.ravel()]
  picture = pictures.grid(images, ["1 step, w=0", "4 steps, w=0"], ["0", "1", "2"], title="seed 0")
  assert picture.dtype == np.uint8 and picture.shape[2] == 3
  where = [np.argwhere(np.all(np.abs(picture - np.float32(c)) <= 1, axis=2)) for c in wanted]
  assert min(len(pixels) for pixels in where) > 0.9 * max(len(pixels) for pixels in where) > 500
  centres = np.array([np.median(pixels, 0) for pixels in where]).reshape(2, 3, 2)
  assert np.all(np.diff(centres[..., 0], axis=0) > 40) and np.all(np.diff(centres[..., 1]) > 40)
  np.testing.assert_allclose(np.ptp(centres[..., 0], axis=1), 0, atol=1)


def test_rows_are_named_in_english():
  assert pictures.row_name(1, 0.0) == "1 step, w=0"
  assert pictures.row_name(4, 0.25) == "4 steps, w=0.25"


@pytest.mark.parametrize(
  ("name", "shown"),
  [
    ("cat", "cat"),
    ("$x", "$x"),
    (r"$_$\y^{", r"$_$\y^{"),
    ("_a", "_a"),
    ("naïve", "naïve"),
    ("猫", "class 7"),
    ("🐈cat", "class 7"),
    ("a\nb", "class 7"),
    (" ", "class 7"),
    ("n01440764", "n0144076\n4"),
    ("german_shepherd_a", "german_s\n…pherd_a"),
    ("a class of many more words, number 12", "a class of\n…ber 12"),
    ("W" * 30, "WWWWW\n…WWWW"),
  ],
)
def test_names_of_classes_are_drawn_literally_and_fit(name, shown):
  assert pictures.column_name(name, 7) == shown
  picture = pictures.grid(np.zeros((1, 2, 8, 8, 1), np.uint8), ["1 step"], [shown, shown])
  assert picture.shape[1] == 234  # of two columns; tight_layout warns if they do not fit


def test_names_that_end_differently_are_told_apart():
  names = [f"the_same_long_beginning_{i}" for i in range(3)]
  assert len({pictures.column_name(name, 0) for name in names}) == 3


def test_written_samples(model, asked, tmp_path, capsys):
  labels = np.array([3, 1, 2, 3, 1], np.int32)
  settings = [(1, 0.0), (2, 0.0), (4, 0.5)]
  out = tmp_path / "new" / "folder"
  pictures.write_samples(model, settings, labels, 7, out)

  assert asked[0] == ("params", 7, 5, 0.0, 1)  # compiles what the speeds are of
  with np.load(out / "samples.npz") as saved:
    assert set(saved) == {"arr_0", "labels", "nfe", "guidance", "seed"}
    assert saved["arr_0"].shape == (15, 8, 8, 1) and saved["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(saved["labels"], [3, 1, 2, 3, 1] * 3)
    np.testing.assert_array_equal(saved["nfe"], [1] * 5 + [2] * 5 + [4] * 5)
    np.testing.assert_array_equal(saved["guidance"], [0.0] * 10 + [0.5] * 5)
    assert saved["seed"] == 7
    images = model.sampler(None, 7, labels, 0.5, 4)
    np.testing.assert_array_equal(saved["arr_0"][10:], to_uint8(images))

  with Image.open(out / "grid.png") as picture:
    assert picture.mode == "RGB"
    assert 200 < picture.width < 700 and 150 < picture.height < 500
  printed = capsys.readouterr().out
  assert printed.count("images/s") == 3
  assert str(out / "grid.png") in printed and str(out / "samples.npz") in printed


def test_a_grid_has_sixteen_columns_at_most(model, tmp_path):
  widths = []
  for n in (16, 60):
    labels = spec.balanced_labels(n, 10)
    pictures.write_samples(model, [(1, 0.0)], labels, 0, tmp_path)
    with Image.open(tmp_path / "grid.png") as picture:
      widths.append(picture.width)
  assert widths[0] == widths[1]
