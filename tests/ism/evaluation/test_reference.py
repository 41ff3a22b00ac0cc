"""References: files as ADM writes them, folders, and statistics that are kept for the next time."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ism_jax.data import sources
from ism_jax.evaluation import adm, fid, reference, stream
from tests.ism.stand_ins import inception_score
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError

SIZES = {"pool": 3, "spatial": 2, "logits": 4}
ALL = np.arange(4000)


@pytest.fixture
def images():
  return np.random.default_rng(0).integers(0, 256, (70, 8, 8, 3), np.uint8)


@pytest.fixture
def calls():
  """The number of images that each call of the stand-in network saw."""
  return []


@pytest.fixture
def network(calls):
  """A stand-in for the Inception network: means of colours, of rows, and of four columns."""

  @jax.jit
  def run(images):
    x = images.astype(jnp.float32)
    halves = x.reshape(len(x), 2, -1).mean(2)
    return {"pool": x.mean((1, 2)), "spatial": halves, "logits": x[:, 0, :4, 0]}

  def features(images):
    calls.append(len(images))
    return run(images)

  return stream.FeatureNetwork("inception", "weights", "0123456789ab", SIZES, features)


def pool(images):
  return images.astype(np.float64).mean((1, 2))


def open_and_read(file, kinds, network, shape=(8, 8, 3)):
  found = reference.open_reference(str(file), kinds, SIZES, shape)
  return reference.read(found, kinds, [network], mesh_lib.make_mesh(), per_device=2)


# Files


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("batch", [1, 32, 100])
def test_images_are_read_batch_by_batch(save, batch, images, tmp_path):
  save(tmp_path / "a.npz", arr_0=images, mu=np.zeros(3))
  found = adm.npz_images(tmp_path / "a.npz")
  assert (found.n, found.shape) == (70, (8, 8, 3))
  parts = list(found.batches(batch, ALL))
  assert [len(part) for part in parts[:-1]] == [batch] * (len(parts) - 1)
  np.testing.assert_array_equal(np.concatenate(parts), images)
  last = list(found.batches(32, np.arange(8, 16)))
  np.testing.assert_array_equal(last[1], images[40:48])
  assert len(last[2]) == 0  # 6 images of 32: none for this process


def test_what_is_written_is_what_numpy_and_adm_read(images, tmp_path):
  path = tmp_path / "samples.npz"
  with adm.npz_writer(path, images.shape, {"labels": np.arange(70)}) as write:
    for part in np.split(images, [10, 11, 50]):
      write(part)
    assert not path.exists()
  with np.load(path) as saved:
    assert set(saved) == {"arr_0", "labels"} and saved["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(saved["arr_0"], images)
    np.testing.assert_array_equal(saved["labels"], np.arange(70))
  again = np.concatenate(list(adm.npz_images(path).batches(16, ALL)))
  np.testing.assert_array_equal(again, images)


def test_reading_and_writing_hold_a_batch_only(tmp_path):
  batch = np.zeros((100, 32, 32, 3), np.uint8)
  tracemalloc.start()
  with adm.npz_writer(tmp_path / "a.npz", (4000, 32, 32, 3), {}) as write:
    for _ in range(40):
      write(batch)
  assert sum(len(part) for part in adm.npz_images(tmp_path / "a.npz").batches(100, ALL)) == 4000
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 5 * batch.nbytes < 4000 * 32 * 32 * 3 / 2


def test_grey_images_become_three_channels(images, tmp_path):
  np.savez(tmp_path / "grey.npz", arr_0=images[..., :1])
  found = adm.npz_images(tmp_path / "grey.npz")
  assert found.shape == (8, 8, 3)
  np.testing.assert_array_equal(next(found.batches(70, ALL)), images[..., :1].repeat(3, axis=-1))


def test_a_folder_of_images_is_cropped_as_adm_does(tmp_path):
  """A square in the middle of a wide image, and one that is halved exactly once."""
  wide = np.zeros((16, 40, 3), np.uint8)
  wide[:, 12:28] = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
  (tmp_path / "b").mkdir()
  Image.fromarray(wide).save(tmp_path / "b" / "wide.png")
  Image.fromarray(wide[:, :16]).save(tmp_path / "a.png")
  files = adm.folder_files(tmp_path)
  assert [file.name for file in files] == ["a.png", "wide.png"]
  found = adm.folder_images(files, 16)
  (both,) = found.batches(4, ALL)
  np.testing.assert_array_equal(both, [wide[:, :16], wide[:, 12:28]])
  half = adm.read_square(files[1], 8)
  box = wide[:, 12:28].reshape(8, 2, 8, 2, 3).mean((1, 3))
  assert np.abs(half - box).max() <= 1  # the box rounds twice, along rows and columns


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_is_cut_as_what_a_model_of_pixels_is_trained_on(
  channels, network, tmp_path, caplog
):
  exif, rng = Image.Exif(), np.random.default_rng(0)
  exif[0x0112] = 6  # the camera was turned
  (tmp_path / "photos").mkdir()
  for i, size in enumerate([(40, 60), (33, 20), (8, 8), (90, 31)]):
    photo = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
    photo.save(tmp_path / "photos" / f"{i}.png", exif=exif)
  trained = sources.folder(str(tmp_path / "photos"), image_size=8, channels=channels).pixels
  asked = str(tmp_path / "photos"), ["pool"], SIZES, (8, 8, 3)
  found, as_adm = reference.open_reference(*asked, channels), reference.open_reference(*asked)
  (pixels,) = found.images.batches(4, ALL)
  np.testing.assert_array_equal(pixels, np.broadcast_to(trained, (4, 8, 8, 3)))
  assert "reference: 4 turned upright by their EXIF" in caplog.text
  for each in (found, as_adm):  # what is kept of one is not taken for the other
    real = reference.read(each, ["pool"], [network], mesh_lib.make_mesh(), per_device=2)
    (pixels,) = each.images.batches(4, ALL)
    np.testing.assert_allclose(real.moments["pool"][0], pool(pixels).mean(0), rtol=1e-5)


# Statistics


def test_moments_of_the_file_are_taken_as_they_are(images, network, calls, tmp_path):
  mu, sigma = np.arange(3.0), np.diag([1.0, 2, 3])
  np.savez(tmp_path / "adm.npz", arr_0=images, mu=mu, sigma=sigma, mu_s=mu[:2], sigma_s=np.eye(2))
  real = open_and_read(tmp_path / "adm.npz", ["pool", "spatial"], network)
  np.testing.assert_array_equal(real.moments["pool"][1], sigma)
  np.testing.assert_array_equal(real.moments["spatial"][0], mu[:2])
  assert real.features is None and not calls
  assert list(tmp_path.iterdir()) == [tmp_path / "adm.npz"]


def test_what_the_file_lacks_comes_from_its_images_once(images, network, calls, tmp_path):
  np.savez(tmp_path / "val.npz", arr_0=images, mu=np.zeros(3), sigma=np.eye(3))
  for _ in range(2):
    real = open_and_read(tmp_path / "val.npz", ["pool", "spatial", "features"], network)
    np.testing.assert_array_equal(real.moments["pool"][1], np.eye(3))  # the file's
    halves = images.reshape(70, 2, -1).mean(2)
    np.testing.assert_allclose(real.moments["spatial"][0], halves.mean(0), rtol=1e-5)
    np.testing.assert_allclose(real.moments["spatial"][1], np.cov(halves.T), rtol=1e-4)
    np.testing.assert_allclose(real.features, pool(images), rtol=1e-5)
    assert calls == [16] * 5  # of 70 images; nothing the second time


def test_kept_statistics_are_a_reference_themselves(images, network, calls, tmp_path):
  np.savez(tmp_path / "val.npz", arr_0=images)
  real = open_and_read(tmp_path / "val.npz", ["pool", "features"], network)
  (stored,) = tmp_path.glob("val.inception-0123456789ab-*-8.npz")
  (tmp_path / "val.npz").unlink()
  again = open_and_read(stored, ["pool", "features"], network)
  assert len(calls) == 5
  np.testing.assert_array_equal(again.moments["pool"][1], real.moments["pool"][1])
  np.testing.assert_allclose(again.moments["pool"][1], np.cov(pool(images).T), rtol=1e-4)
  np.testing.assert_array_equal(again.features, real.features)


def test_another_network_or_reference_is_computed_anew(images, network, calls, tmp_path):
  np.savez(tmp_path / "val.npz", arr_0=images)
  open_and_read(tmp_path / "val.npz", ["pool"], network)
  open_and_read(tmp_path / "val.npz", ["pool"], network._replace(digest="ba9876543210"))
  assert len(calls) == 10
  np.savez(tmp_path / "val.npz", arr_0=images[::-1])
  open_and_read(tmp_path / "val.npz", ["pool"], network)
  assert len(calls) == 15


def test_a_folder_whose_files_were_replaced_is_computed_anew(network, calls, tmp_path):
  (tmp_path / "val").mkdir()
  for value in (10, 20, 10):
    for i in range(4):
      Image.new("RGB", (8, 8), (value + i,) * 3).save(tmp_path / "val" / f"{i}.bmp")
    real = open_and_read(tmp_path / "val", ["pool"], network)
    np.testing.assert_allclose(real.moments["pool"][0], [value + 1.5] * 3)
  assert len(calls) == 2  # the first images came back


def test_a_folder_is_what_its_images_are_as_an_npz(images, network, tmp_path):
  (tmp_path / "val").mkdir()
  for i, image in enumerate(images):
    Image.fromarray(image).save(tmp_path / "val" / f"{i:03}.png")
  np.savez(tmp_path / "all.npz", arr_0=images)
  folder, npz = (open_and_read(tmp_path / name, ["pool"], network) for name in ("val", "all.npz"))
  np.testing.assert_array_equal(folder.moments["pool"][1], npz.moments["pool"][1])
  assert len(list(tmp_path.glob("val.inception-*.npz"))) == 1


def test_precision_and_recall_compare_with_a_random_part(images, network, tmp_path, monkeypatch):
  monkeypatch.setattr(reference, "MAX_FEATURES", 20)
  np.savez(tmp_path / "val.npz", arr_0=images)
  real = open_and_read(tmp_path / "val.npz", ["features", "pool"], network)
  rows = [int(np.abs(pool(images) - f).sum(1).argmin()) for f in real.features]
  assert len(set(rows)) == 20 and rows == sorted(rows) and rows != list(range(20))
  assert real.moments["pool"][0] == pytest.approx(pool(images).mean(0), rel=1e-5)  # of all


def test_a_folder_that_cannot_be_written_is_no_obstacle(images, network, tmp_path, monkeypatch):
  def full(*args, **kwargs):
    raise OSError("no space left")

  np.savez(tmp_path / "val.npz", arr_0=images)
  monkeypatch.setattr(reference.np, "savez", full)
  real = open_and_read(tmp_path / "val.npz", ["pool"], network)
  np.testing.assert_allclose(real.moments["pool"][0], pool(images).mean(0), rtol=1e-5)


def test_streamed_inception_score_is_that_of_all(images):
  logits = np.random.default_rng(1).normal(size=(70, 4))
  numbers = [np.arange(i, i + 16) for i in range(0, 70, 16)]
  batches = [
    (jnp.asarray(rows), {"logits": jnp.asarray(logits[np.minimum(rows, 69)])}) for rows in numbers
  ]
  request = stream.Request([], np.arange(0), splits=3)
  found = stream.collect(batches, 70, SIZES, request)
  logits = logits.astype(np.float32)
  assert fid.score(found.scores) == pytest.approx(inception_score(logits, splits=3), rel=1e-12)


# Errors


def save(path, **arrays):
  np.savez(path, **arrays)
  return path


@pytest.mark.parametrize(
  ("arrays", "kinds", "message"),
  [
    ({"mu": np.zeros(3)}, ["pool"], r"has no 'sigma', nor 4 images \('arr_0'\).*holds mu"),
    ({"mean": np.zeros(3)}, ["pool"], r"has no 'mu'.*holds mean"),
    ({"mu": np.zeros(3), "sigma": np.eye(3)}, ["dinov2"], r"has no 'mu_dinov2'"),
    ({"mu": np.zeros(3), "sigma": np.eye(3)}, ["features"], r"has no 'features'"),
    ({"mu": np.zeros(5), "sigma": np.eye(5)}, ["pool"], r"'mu' .* shape \(5,\), .* pool .* 3 num"),
    ({"mu": np.zeros(3), "sigma": np.eye(4)}, ["pool"], r"'sigma' .* has the shape \(4, 4\)"),
    ({"features": np.zeros((9, 5))}, ["features"], r"'features' .* has the shape \(9, 5\)"),
    ({"arr_0": np.zeros((9, 8, 8, 3))}, ["pool"], r"is float64 .*must be uint8 \[n, h, w, 3\]"),
    ({"arr_0": np.zeros((9, 3, 8, 8), "u1")}, ["pool"], r"is uint8 \(9, 3, 8, 8\), and must be"),
    ({"arr_0": np.zeros((2, 8, 8, 3), "u1")}, ["pool"], r"nor 4 images"),
    ({"arr_0": np.zeros((9, 16, 16, 3), "u1")}, ["pool"], r"images of 16x16 .* samples have 8x8"),
    ({"arr_0": np.array([None])}, ["pool"], r"is object \(1,\), and must be uint8"),
  ],
)
def test_a_reference_that_will_not_do_is_refused(arrays, kinds, message, tmp_path):
  path = save(tmp_path / "a.npz", **arrays)
  sizes = {**SIZES, "dinov2": 7}
  with pytest.raises(UserError, match=message) as error:
    reference.open_reference(str(path), kinds, sizes, (8, 8, 3))
  assert str(error.value).endswith(".")


def test_a_path_that_is_no_reference_is_refused(images, tmp_path):
  def look(path):
    reference.open_reference(str(path), ["pool"], SIZES, (8, 8, 3))

  with pytest.raises(UserError, match=r"gone.npz' is not there"):
    look(tmp_path / "gone.npz")
  with pytest.raises(UserError, match=r"has no images; expected files such as a.png"):
    look(tmp_path)
  (tmp_path / "text.npz").write_text("not an archive")
  with pytest.raises(UserError, match=r"text.npz' is not a whole .npz file"):
    look(tmp_path / "text.npz")
  whole = save(tmp_path / "whole.npz", arr_0=images).read_bytes()
  (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(UserError, match=r"half.npz' is not a whole .npz file"):
    look(tmp_path / "half.npz")


def test_statistics_that_are_not_finite_are_refused(network, tmp_path):
  path = save(tmp_path / "a.npz", mu=np.zeros(3), sigma=np.full((3, 3), np.nan))
  with pytest.raises(UserError, match=r"pool statistics of .* are not all finite"):
    open_and_read(path, ["pool"], network)


def test_an_image_that_cannot_be_read_is_named(tmp_path, network):
  (tmp_path / "bad.png").write_text("no image")
  for i in range(4):
    Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
  with pytest.raises(
    UserError, match=r"bad.png' cannot be read: it is no image that Pillow knows; repair"
  ):
    open_and_read(tmp_path, ["pool"], network)
