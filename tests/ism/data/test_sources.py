"""Sources, epochs and positions: what a batch holds depends on its number and nothing else."""

import dataclasses
import io
import itertools
import logging
import re
import threading

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from ism_jax.data import from_config, images, sources
from train_jax.errors import UserError

BATCH = 16


def numbered(n):
  """A source whose image i is the number i."""
  pixels = np.arange(n, dtype=np.float32).reshape(n, 1, 1, 1)
  return sources.Source(pixels, np.arange(n, dtype=np.int32) % 5, tuple("abcde"), lambda p: p)


def reversed_pools(pool, calls=None):
  """A stand-in for the pairing: within its pool, noise runs backwards."""

  def noise_of_pool(number):
    if calls is not None:
      calls.append(number)
    size = pool * BATCH
    return np.arange(number * size, (number + 1) * size, dtype=np.int32)[::-1]

  return noise_of_pool


def take(count, source, position=0, pool=1, rows=slice(0, BATCH), seed=0):
  batches = sources.stream(source, BATCH, rows, seed, position, reversed_pools(pool), pool)
  return list(itertools.islice(batches, count))


def assert_same(batches, others):
  for batch, other in zip(batches, others, strict=True):
    assert batch.keys() == other.keys() == {"image", "label", "noise"}
    for name, value in batch.items():
      np.testing.assert_array_equal(value, other[name])


def test_digits():
  source = sources.digits()
  assert source.shape == (8, 8, 1) and len(source.names) == 10
  images = source.images(np.arange(1797))
  assert images.shape == (1797, 8, 8, 1) and images.dtype == np.float32
  assert images.min() == -1 and images.max() == 1
  assert source.labels.dtype == np.int32 and set(source.labels.tolist()) == set(range(10))
  np.testing.assert_array_equal(source.images([3])[0], source.pixels[3] / 8 - 1)


def test_mirror_images_are_examples_of_their_own():
  source = sources.synthetic(6, (4, 3, 3), classes=2)
  both = sources.with_mirror_images(source)
  images = source.images(np.arange(6))
  assert both.shape == source.shape and both.pixels is source.pixels
  np.testing.assert_array_equal(both.labels, np.repeat(source.labels, 2))
  np.testing.assert_array_equal(both.images(np.arange(0, 12, 2)), images)
  np.testing.assert_array_equal(both.images(np.arange(1, 12, 2)), images[:, :, ::-1])
  np.testing.assert_array_equal(both.rows([5, 2])["image"], [images[2, :, ::-1], images[1]])


def test_synthetic_images_show_their_class_as_their_grey():
  source = sources.synthetic(40, (8, 8, 3), classes=4)
  np.testing.assert_array_equal(source.labels, np.arange(40) % 4)
  grey = source.images(np.arange(40)).mean((1, 2, 3))
  np.testing.assert_allclose(grey, (63.5 + 32 * source.labels) / 127.5 - 1, atol=0.1)


def test_each_epoch_has_every_image_once():
  n = 100  # not a multiple of the batch: a batch spans two epochs
  index = sources.batches(numbered(n), BATCH, seed=0)
  order = np.concatenate([index(i) for i in range(25)])  # four epochs
  epochs = order.reshape(4, n)
  for epoch in epochs:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(n))
  for one, other in itertools.combinations([np.arange(n), *epochs], 2):
    assert np.mean(one == other) < 0.1  # each in another order


def test_the_seed_names_the_order():
  source = numbered(1000)
  first = sources.batches(source, 100, seed=0)(3)
  np.testing.assert_array_equal(sources.batches(source, 100, seed=0)(3), first)
  assert np.mean(sources.batches(source, 100, seed=1)(3) == first) < 0.1
  second_epoch = sources.batches(source, 100, seed=0)(13)
  assert np.mean(sources.batches(source, 100, seed=1)(3) == second_epoch) < 0.1


def test_image_and_label_stay_together():
  source = numbered(100)
  for batch in take(5, source, pool=2):
    np.testing.assert_array_equal(batch["image"].ravel().astype(int) % 5, batch["label"])
    assert batch["image"].dtype == np.float32
    assert batch["label"].dtype == batch["noise"].dtype == np.int32


@pytest.mark.parametrize("pool", [1, 3])
def test_processes_share_out_the_same_global_batch(pool):
  source = numbered(100)
  whole = take(5, source, pool=pool)
  split = [take(5, source, pool=pool, rows=slice(start, start + 4)) for start in range(0, BATCH, 4)]
  joined = [
    {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for parts in zip(*split, strict=True)
  ]
  assert_same(joined, whole)


@pytest.mark.parametrize("position", [1, 4, 6])
def test_a_stream_can_begin_anywhere(position):
  # With pools of 3: in the middle of one, in the middle of the next, and at the border.
  source = numbered(100)
  from_start = take(position + 5, source, pool=3)
  assert_same(take(5, source, position=position, pool=3), from_start[position:])


def test_noise_comes_from_its_pool_and_each_once():
  noise = np.stack([batch["noise"] for batch in take(6, numbered(100), pool=3)])
  np.testing.assert_array_equal(noise[:3].ravel(), np.arange(3 * BATCH)[::-1])
  np.testing.assert_array_equal(np.sort(noise.ravel()), np.arange(6 * BATCH))


def test_a_pool_is_paired_once():
  calls = []
  batches = sources.stream(
    numbered(100), BATCH, slice(0, BATCH), 0, 4, reversed_pools(3, calls), pool=3
  )
  for _ in range(6):  # batches 4 to 9, of pools 1 to 3
    next(batches)
  batches.close()
  assert calls[:3] == [1, 2, 3] and len(calls) == len(set(calls)) <= 4


def test_a_failed_pairing_is_not_silent():
  def fail(number):
    raise RuntimeError("no pairing today")

  with pytest.raises(RuntimeError, match="no pairing today"):
    next(sources.stream(numbered(100), BATCH, slice(0, BATCH), 0, 0, fail, 1))


def test_a_batch_is_read_ahead_and_its_error_comes_in_its_turn():
  source, calls, second = numbered(100), [], threading.Event()

  class Failing(sources.Source):
    def rows(self, index):
      calls.append(index)
      if len(calls) == 2:
        second.set()
      if len(calls) == 3:
        raise UserError("no third batch")
      return super().rows(index)

  failing = Failing(**vars(source))
  batches = sources.stream(failing, BATCH, slice(0, BATCH), 0, 0, reversed_pools(3), pool=3)
  first = next(batches)
  assert second.wait(60)  # nobody asked for it yet
  assert_same([first, next(batches)], take(2, source, pool=3))
  with pytest.raises(UserError, match="no third batch"):
    next(batches)


# --- folders --------------------------------------------------------------------------------------

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def save(path, pixels, **kwargs):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **kwargs)


def plain(colour, height=6, width=6):
  return np.broadcast_to(np.array(colour, np.uint8), (height, width, 3))


@pytest.fixture
def photos(tmp_path):
  save(tmp_path / "cats" / "a.png", plain(RED))
  save(tmp_path / "cats" / "deep" / "b.JPG", plain(RED), quality=100)
  save(tmp_path / "dogs" / "c.png", plain(BLUE))
  (tmp_path / "dogs" / "notes.txt").write_text("not an image, and not called one")
  (tmp_path / ".hidden").mkdir()
  return tmp_path


def test_folders_are_classes(photos, caplog):
  source = sources.folder(str(photos), image_size=4, channels=3)
  assert source.names == ("cats", "dogs") and source.shape == (4, 4, 3)
  np.testing.assert_array_equal(source.labels, [0, 0, 1])
  images = source.images(np.arange(3))
  assert images.dtype == np.float32
  np.testing.assert_array_equal(images[0], np.broadcast_to([1.0, -1.0, -1.0], (4, 4, 3)))
  np.testing.assert_allclose(images[1], images[0], atol=0.02)
  np.testing.assert_array_equal(images[2], np.broadcast_to([-1.0, -1.0, 1.0], (4, 4, 3)))
  assert "skipped" not in caplog.text


def test_the_centre_square_is_taken(tmp_path):
  wide = np.concatenate([plain(RED, 6, 3), plain(GREEN, 6, 6), plain(BLUE, 6, 3)], axis=1)
  save(tmp_path / "c" / "1.png", wide)
  save(tmp_path / "c" / "2.png", wide.transpose(1, 0, 2))
  source = sources.folder(str(tmp_path), image_size=3, channels=3)
  np.testing.assert_array_equal(source.pixels, np.broadcast_to(np.uint8(GREEN), (2, 3, 3, 3)))


def test_shrinking_is_a_mean_over_areas(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (8, 8))
  save(tmp_path / "c" / "1.png", pixels)
  source = sources.folder(str(tmp_path), image_size=2, channels=1)
  blocks = pixels.reshape(2, 4, 2, 4).mean((1, 3))
  np.testing.assert_allclose(source.pixels[0, :, :, 0], blocks, atol=1)


def test_grey_and_colour_are_converted_to_the_channels_asked_for(tmp_path):
  save(tmp_path / "c" / "1.png", np.full((4, 4), 100))
  save(tmp_path / "c" / "2.png", plain((10, 200, 30)))
  colour = sources.folder(str(tmp_path), image_size=4, channels=3)
  grey = sources.folder(str(tmp_path), image_size=4, channels=1)
  assert colour.shape == (4, 4, 3) and grey.shape == (4, 4, 1)
  np.testing.assert_array_equal(colour.pixels[0], 100)
  luma = 0.299 * 10 + 0.587 * 200 + 0.114 * 30  # ITU-R 601
  np.testing.assert_allclose(grey.pixels[1], round(luma), atol=1)


def test_photos_are_turned_as_the_camera_was_held(tmp_path):
  exif = Image.Exif()
  exif[0x0112] = 6  # the top of the scene is on the right
  half = np.concatenate([plain(RED, 4, 2), plain(BLUE, 4, 2)], axis=1)
  save(tmp_path / "c" / "1.png", half, exif=exif)
  source = sources.folder(str(tmp_path), image_size=4, channels=3)
  np.testing.assert_array_equal(source.pixels[0, :2], np.broadcast_to(np.uint8(RED), (2, 4, 3)))
  np.testing.assert_array_equal(source.pixels[0, 2:], np.broadcast_to(np.uint8(BLUE), (2, 4, 3)))


def test_the_line_of_the_data_says_what_was_turned_and_left_out(photos, capsys):
  exif = Image.Exif()
  exif[0x0112] = 6
  save(photos / "cats" / "turned.jpg", plain(RED), exif=exif)
  source = sources.folder(str(photos), image_size=4, channels=3)
  from_config.describe(ConfigDict({"data": {"flip": False}}), source, 0)
  assert capsys.readouterr().out == (
    "data: 4 images of 4x4x3; 2 class(es): cats, dogs; 1 turned upright by their EXIF; "
    "no images, left out: 1 .txt\n"
  )


def test_unreadable_images_are_named_skipped_and_counted(photos, caplog):
  whole = io.BytesIO()
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  Image.fromarray(noise).save(whole, "jpeg")
  (photos / "cats" / "truncated.jpg").write_bytes(whole.getvalue()[:2000])
  (photos / "dogs" / "text.png").write_text("this is not a picture")
  (photos / "dogs" / "empty.webp").touch()
  with caplog.at_level(logging.WARNING):
    source = sources.folder(str(photos), image_size=4, channels=3)
  np.testing.assert_array_equal(source.labels, [0, 0, 1])
  for name in ("truncated.jpg", "text.png", "empty.webp"):
    assert re.search(rf"skipped.*{re.escape(name)}", caplog.text)
  assert "skipped 3 of 6 images" in caplog.text
  with pytest.raises(UserError, match=r"more than data.max_faults=2 records of data.path="):
    sources.folder(str(photos), image_size=4, channels=3, max_faults=2)


def test_an_image_without_a_label_is_refused(photos):
  found = images.folder(str(photos), "data.path")
  one = lambda i: (found.read(i)[0], found.read(i)[1] if i else -1)  # noqa: E731
  with pytest.raises(UserError, match="'set': an image has the label -1; choose a split with"):
    sources._in_memory(dataclasses.replace(found, read=one), "set", 4, 3, 1)


def test_a_class_without_images_is_refused(photos):
  (photos / "birds").mkdir()
  with pytest.raises(UserError, match="class 'birds' has no readable image"):
    sources.folder(str(photos), image_size=4, channels=3)
  (photos / "birds" / "x.png").write_text("nor is this one")
  with pytest.raises(UserError, match="class 'birds' has no readable image"):
    sources.folder(str(photos), image_size=4, channels=3)


def test_bad_folders_are_refused_in_a_sentence(photos, tmp_path_factory):
  with pytest.raises(UserError, match=r"data.path='no/such/place' is not a folder"):
    sources.folder("no/such/place", image_size=4, channels=3)
  empty = tmp_path_factory.mktemp("empty")
  with pytest.raises(UserError, match=r"has no images; expected .*<class name>"):
    sources.folder(str(empty), image_size=4, channels=3)
  with pytest.raises(UserError, match=r"data.channels=2 must be 1"):
    sources.folder(str(photos), image_size=4, channels=2)
