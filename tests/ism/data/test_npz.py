"""Images in an .npz, under the names that others give them; and what is held out of a set."""

from types import SimpleNamespace

import numpy as np
import pytest

from configs import ism_mnist
from ism_jax import method as ism
from ism_jax.data import sources
from ism_jax.evaluation import classifier, fid, registry
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError

BYTES = np.random.default_rng(0).integers(0, 256, (6, 4, 4), dtype=np.uint8)
LABELS = np.array([7, 3, 3, 7, 9, 9])


@pytest.fixture
def write(tmp_path):
  """{name: array} -> the path of an .npz."""

  def make(**arrays) -> str:
    np.savez(tmp_path / "set.npz", **arrays)
    return str(tmp_path / "set.npz")

  return make


@pytest.mark.parametrize("images", ["image", "images", "x_train", "arr_0"])
@pytest.mark.parametrize("labels", ["label", "labels", "y_train"])
def test_images_and_labels_are_read_under_the_usual_names(write, images, labels):
  source = sources.npz(write(**{images: BYTES, labels: LABELS, "x_test": BYTES[:2]}))
  assert source.shape == (4, 4, 1) and source.names == ("3", "7", "9")
  assert source.labels.dtype == np.int32
  np.testing.assert_array_equal(source.labels, [1, 0, 0, 1, 2, 2])
  np.testing.assert_allclose(source.images(np.arange(6))[..., 0], BYTES / 127.5 - 1, atol=1e-6)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16])
def test_floats_from_0_to_1_and_from_minus_1_to_1_are_the_same_images(write, kind):
  unit = (BYTES / 255).astype(kind)
  for given in (unit, (2 * unit - 1)):
    source = sources.npz(write(image=given, label=LABELS))
    found = source.images(np.arange(6))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[..., 0], BYTES / 127.5 - 1, atol=2e-3)


def test_colour_and_a_column_of_labels_will_do(write):
  colour = np.stack([BYTES, BYTES // 2, BYTES // 3], axis=-1)
  source = sources.npz(write(arr_0=colour, labels=LABELS[:, None]))
  assert source.shape == (4, 4, 3)
  np.testing.assert_array_equal(source.labels, [1, 0, 0, 1, 2, 2])
  np.testing.assert_array_equal(source.pixels, colour)


@pytest.mark.parametrize(
  "arrays, message",
  [
    (
      {"pictures": BYTES, "label": LABELS},
      r"no images under .*; it has pictures \(6, 4, 4\), label",
    ),
    (
      {"image": BYTES, "y": LABELS},
      r"no labels under any of .*; it has image \(6, 4, 4\), y \(6,\)",
    ),
    ({"image": BYTES, "arr_0": BYTES, "label": LABELS}, r"images under image and arr_0; leave one"),
    ({"image": BYTES.reshape(6, 16), "label": LABELS}, r"the shape \(6, 16\), and must be \[n, h"),
    ({"image": np.zeros((6, 4, 4, 4), np.uint8), "label": LABELS}, r"the shape \(6, 4, 4, 4\)"),
    ({"image": BYTES[:0], "label": LABELS[:0]}, r"the shape \(0, 4, 4\)"),
    ({"image": BYTES.astype(int), "label": LABELS}, r"int64 from \d+ to \d+, and must be uint8"),
    (
      {"image": BYTES.astype(np.float32), "label": LABELS},
      r"float32 from .*, and must be uint8",
    ),
    ({"image": np.full((6, 4, 4), np.nan), "label": LABELS}, r"float64 from nan to nan"),
    ({"image": BYTES, "label": LABELS[:5]}, r"labels are int64 \(5,\), .* each of the 6 images"),
    ({"image": BYTES, "label": np.eye(6)}, r"labels are float64 \(6, 6\), and must be one whole"),
    ({"image": BYTES, "label": LABELS.astype(object)}, r"cannot be read as an .npz of arrays"),
  ],
)
def test_arrays_that_are_no_images_with_labels_are_refused(write, arrays, message):
  with pytest.raises(UserError, match=message):
    sources.npz(write(**arrays))


def test_a_file_that_is_no_npz_is_refused(tmp_path):
  for name, content in (("text", b"hello"), ("empty", b""), ("cut", b"PK\x03\x04")):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}' cannot be read as an .npz of arrays"):
      sources.npz(str(tmp_path / name))
  np.save(tmp_path / "array.npy", BYTES)
  for name in ("array.npy", "nothing"):
    with pytest.raises(UserError, match=rf"{name}' cannot be read as an .npz of arrays"):
      sources.npz(str(tmp_path / name))


def test_a_share_of_each_class_is_held_out_and_always_the_same():
  source = sources.digits()
  train, kept = sources.hold_out(source, 0.2)
  counts = np.bincount(source.labels)
  np.testing.assert_array_equal(np.bincount(kept.labels), [round(0.2 * n) for n in counts])
  np.testing.assert_array_equal(np.bincount(train.labels) + np.bincount(kept.labels), counts)
  both = np.concatenate([train.pixels, kept.pixels]).reshape(len(source.labels), -1)
  np.testing.assert_array_equal(
    np.sort(both, axis=0), np.sort(source.pixels.reshape(both.shape), 0)
  )
  again = sources.hold_out(source, 0.2)[1]
  np.testing.assert_array_equal(again.pixels, kept.pixels)
  threes = {image.tobytes() for image in source.pixels[source.labels == 3]}
  assert {image.tobytes() for image in kept.pixels[kept.labels == 3]} <= threes


@pytest.mark.parametrize("share, message", [(1.0, "between 0 and 1"), (0.01, "'a' is 0; choose")])
def test_a_share_that_leaves_nothing_is_refused(share, message):
  pixels = np.zeros((8, 2, 2, 1), np.uint8)
  source = sources.Source(pixels, np.array([0, 1] * 4, np.int32), ("a", "b"), lambda x: x)
  with pytest.raises(UserError, match=message):
    sources.hold_out(source, share)


def test_samples_are_compared_with_what_was_held_out():
  train, kept = sources.hold_out(sources.digits(), 0.2)
  reference = registry.make_reference(train, kept)
  np.testing.assert_array_equal(reference.images, train.images(np.arange(len(train.labels))))
  images = kept.images(np.arange(len(kept.labels)))
  found = classifier.compare(reference, images, kept.labels)
  assert found["fd_held_out"] < 1e-3 < found["fd"] and found["accuracy"] > 0.95
  real, other = (reference.extract.features(x) for x in (reference.images, images))
  wanted = fid.frechet_distance(real.mean(0), np.cov(real.T), other.mean(0), np.cov(other.T))
  assert found["fd"] == pytest.approx(wanted)

  def sample(params, seed, labels, w, nfe):
    return images[:16]

  model = SimpleNamespace(sampler=sample, params=None, names=range(10))
  numbers = dict(classifier.measure(model, reference, [(1, 0.0, 16)], seed=0))
  assert numbers["fd_held_out/data"] == pytest.approx(wanted)
  assert {"fd/nfe1_w0", "fd_held_out/nfe1_w0"} < set(numbers)


def test_mnist_trains_on_an_npz_without_what_is_held_out(write):
  config = ism_mnist.get_config("debug")
  digits = np.repeat(np.arange(10), 20)
  pixels = np.random.default_rng(0).integers(0, 256, (200, 28, 28), dtype=np.uint8)
  config.data.path = write(x_train=pixels, y_train=digits)
  method, metadata = ism.make_method(config, mesh_lib.make_mesh())
  assert metadata["examples"] == 180 and metadata["shape"] == [28, 28, 1]
  batch = next(method.stream(0, 0))
  assert batch["image"].shape == (config.batch, 28, 28, 1)
  kept = sources.hold_out(sources.npz(config.data.path), 0.1)[1].images(np.arange(20))
  seen = {image.tobytes() for image in batch["image"]}
  assert not seen & {image.tobytes() for image in kept}
  config.data.image_size = 32
  with pytest.raises(UserError, match=r"data.image_size=32 but for the images of npz it is 28"):
    ism.make_method(config, mesh_lib.make_mesh())
