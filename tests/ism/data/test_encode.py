"""Images to a latent set, with a stand-in for the autoencoder: layout, restarts, refusals."""

import dataclasses
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader
from PIL import Image

import main
from ism_jax.data import encode, images, latents
from train_jax.errors import UserError
from train_jax.storage.weights import sha256

SIDE = 16
SHAPE = (2, 2, 4)
SUFFIXES = (".array_record", ".json")


class Fake(NamedTuple):
  """What autoencoder.load gives, of means of 8 x 8 blocks."""

  params: dict
  encode: object


def blocks(x):
  """[b, h, w, 3] -> means of 8 x 8 blocks and of all three colours [b, h/8, w/8, 4]."""
  b, h, w, _ = x.shape
  mean = x.reshape(b, h // 8, 8, w // 8, 8, 3).mean((2, 4))
  return jnp.concatenate([mean, mean.mean(-1, keepdims=True)], -1)


def load(gain=5.0):
  def run(params, x):
    mean = params["gain"] * blocks(x)
    return mean, 0.1 + jnp.abs(mean) / 100

  return Fake({"gain": jnp.float32(gain)}, run)


def write_images(top: Path, count: int) -> images.EncodedImages:
  rng = np.random.default_rng(0)
  for i in range(count):
    name = ("a", "b", "c")[i % 3]
    (top / name).mkdir(exist_ok=True, parents=True)
    pixels = rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(top / name / f"{i:03d}.png")
  return images.folder(str(top))


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> str:
  path = tmp_path_factory.mktemp("vae") / "vae.safetensors"
  path.write_bytes(b"weights")
  return str(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> images.EncodedImages:
  return write_images(tmp_path_factory.mktemp("photos"), 23)


@pytest.fixture(scope="module")
def whole(photos, vae, tmp_path_factory):
  """(manifest, directory) of a run that nobody disturbed."""
  out = tmp_path_factory.mktemp("whole")
  return encode.encode_images(photos, encode.make_job(photos, vae, SIDE, 4), load, out), out


def records_of(out: Path) -> np.ndarray:
  found = []
  for path in sorted(out.glob("*.array_record")):
    reader = ArrayRecordReader(str(path))
    found += reader.read_all()
  return np.frombuffer(b"".join(found), latents.record_dtype(SHAPE))


def test_a_record_is_the_posterior_of_the_image_and_its_mirror_image(photos, whole):
  records = records_of(whole[1])
  assert len(records) == 23
  for i, record in enumerate(records):
    pixels, label, *_ = images.read_image(photos, i, SIDE)
    assert record["label"] == label
    for view, turned in enumerate((pixels, pixels[:, ::-1])):
      mean, std = load().encode(load().params, turned[None] / np.float32(127.5) - 1)
      np.testing.assert_allclose(record["posterior"][view, 0], mean[0], atol=2e-3)
      np.testing.assert_allclose(record["posterior"][view, 1], std[0], atol=2e-4)


def test_the_layout_is_what_the_documentation_says(whole):
  reader = ArrayRecordReader(str(sorted(whole[1].glob("*.array_record"))[0]))
  record = reader.read([0])[0]
  assert len(record) == 4 + 4 * 2 * 2 * 2 * 4
  label = int.from_bytes(record[:4], "little", signed=True)
  arrays = np.frombuffer(record[4:], "<f2").reshape(4, *SHAPE)
  first = records_of(whole[1])[0]
  assert label == first["label"]
  np.testing.assert_array_equal(arrays, first["posterior"].reshape(4, *SHAPE))


def test_the_manifest_says_what_the_set_is(photos, vae, whole):
  manifest, out = whole
  assert json.loads((out / "manifest.json").read_text()) == json.loads(json.dumps(manifest))
  assert (manifest["count"], manifest["skipped"], manifest["image_size"]) == (23, 0, SIDE)
  assert tuple(manifest["names"]) == ("a", "b", "c") and tuple(manifest["shape"]) == SHAPE
  assert manifest["vae"] == sha256(vae) and manifest["version"] == 1
  posterior = records_of(out)["posterior"].astype(np.float64)
  draws = np.random.default_rng(0).normal(size=(200, *posterior[:, :, 0].shape))
  scaled = 0.18215 * (posterior[:, :, 0] + posterior[:, :, 1] * draws)
  np.testing.assert_allclose(manifest["mean"], scaled.mean((0, 1, 2, 3, 4)), atol=1e-3)
  np.testing.assert_allclose(manifest["std"], scaled.std((0, 1, 2, 3, 4)), rtol=1e-2)
  names = [f"latents-{i:05d}-of-00004" for i in range(4)]
  expected = {"manifest.json", *(f"{name}{end}" for name in names for end in SUFFIXES)}
  assert {path.name for path in out.iterdir()} == expected
  parts = [json.loads((out / f"{name}.json").read_text()) for name in names]
  job = {"version", "image_size", "vae", "cut", "content", "images", "size", "shards"}
  assert {*parts[0]["job"]} == job
  assert [len(part["labels"]) for part in parts] == [5, 6, 6, 6]
  labels = np.concatenate([part["labels"] for part in parts])
  np.testing.assert_array_equal(labels, records_of(out)["label"])


def files_of(out: Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_a_run_that_broke_off_goes_on_with_what_is_done(photos, vae, whole, tmp_path):
  job, opened = encode.make_job(photos, vae, SIDE, 4), []

  def fail_at(number):
    def read(i):
      opened.append(i)
      if i == number:
        raise KeyboardInterrupt
      return photos.read(i)

    return images.EncodedImages(photos.size, photos.names, read, photos.name)

  with pytest.raises(KeyboardInterrupt):
    encode.encode_images(fail_at(14), job, load, tmp_path)
  assert len(list(tmp_path.glob("*.array_record"))) == 2
  assert not (tmp_path / "manifest.json").exists()
  times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.array_record")}
  opened.clear()
  encode.encode_images(fail_at(-1), job, load, tmp_path)
  assert sorted(opened) == list(range(11, 23))  # only the images of the shards that were missing
  assert {path: path.stat().st_mtime_ns for path in times} == times
  assert files_of(tmp_path) == files_of(whole[1])


CHILD = """
import sys, time
sys.path[:0] = [{root!r}, {here!r}]
import test_encode as t
from pathlib import Path
photos = t.images.folder({photos!r})
def read(i):
  time.sleep(0.05)
  return photos.read(i)
slow = t.images.EncodedImages(photos.size, photos.names, read, photos.name)
t.encode.encode_images(slow, t.encode.make_job(photos, {vae!r}, t.SIDE, 4), t.load, Path({out!r}))
"""


def test_sigkill_loses_nothing_that_was_done(vae, whole, tmp_path):
  photos = write_images(tmp_path / "photos", 23)
  out = tmp_path / "out"
  root, here = str(Path(__file__).parents[3]), str(Path(__file__).parent)
  code = CHILD.format(root=root, here=here, photos=str(tmp_path / "photos"), vae=vae, out=str(out))
  process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ})
  deadline = time.monotonic() + 60
  while not list(out.glob("latents-00000*.array_record")):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.005)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL
  done = {path: path.stat().st_mtime_ns for path in out.glob("*.array_record")}
  assert 1 <= len(done) < 4
  encode.encode_images(photos, encode.make_job(photos, vae, SIDE, 4), load, out)
  assert {path: path.stat().st_mtime_ns for path in done} == done
  assert files_of(out) == files_of(whole[1])


def test_unreadable_images_are_named_skipped_and_counted(vae, tmp_path, caplog):
  write_images(tmp_path / "photos", 8)
  (tmp_path / "photos" / "b" / "004.png").write_text("not an image")
  photos = images.folder(str(tmp_path / "photos"))
  with caplog.at_level(logging.WARNING):
    manifest = encode.encode_images(
      photos, encode.make_job(photos, vae, SIDE, 2), load, tmp_path / "out"
    )
  assert "cannot read the image b/004.png" in caplog.text
  assert (manifest["count"], manifest["skipped"]) == (7, 1)
  assert sorted(records_of(tmp_path / "out")["label"].tolist()) == [0, 0, 0, 1, 1, 2, 2]


def test_the_summary_says_what_was_turned_and_left_out(vae, tmp_path, capsys, monkeypatch):
  write_images(tmp_path / "photos", 6)
  exif = Image.Exif()
  exif[0x0112] = 6
  half = np.zeros((SIDE, SIDE, 3), np.uint8)
  half[:, :8] = 255  # the scene is white above black
  Image.fromarray(half).save(tmp_path / "photos" / "a" / "000.png", exif=exif)
  (tmp_path / "photos" / "a" / "1.heic").touch()
  monkeypatch.setattr(encode.autoencoder, "load", lambda path: load())
  encode.encode(str(tmp_path / "photos"), vae, SIDE, 2, tmp_path / "out")
  line = (
    "6 images of 3 classes in .*, 0 skipped; 1 turned upright by their EXIF; no images, left out: "
  )
  assert re.search(line + "1 .heic\n", capsys.readouterr().out)
  np.testing.assert_array_equal(
    records_of(tmp_path / "out")["posterior"][0, 0, 0, :, 0, 0], [5, -5]
  )
  assert json.loads((tmp_path / "out" / "manifest.json").read_text())["turned"] == 1


def test_another_job_in_the_same_directory_is_refused(photos, vae, whole, tmp_path):
  _, out = whole
  other = tmp_path / "other.safetensors"
  other.write_bytes(b"other weights")
  jobs = {
    "--vae": encode.make_job(photos, str(other), SIDE, 4),
    "--image_size": encode.make_job(photos, vae, 2 * SIDE, 4),
  }
  job = encode.make_job(photos, vae, SIDE, 4)
  jobs["cut of the images"] = dataclasses.replace(job, metadata={**job.metadata, "cut": "adm"})
  before = files_of(out)
  for words, job in jobs.items():
    with pytest.raises(UserError, match=rf"holds latents of another {words} \("):
      encode.encode_images(photos, job, load, out)
  assert files_of(out) == before


def test_a_finished_set_needs_no_autoencoder(photos, vae, whole):
  def fail():
    raise AssertionError("loaded for nothing")

  again = encode.encode_images(photos, encode.make_job(photos, vae, SIDE, 4), fail, whole[1])
  assert again == whole[0]


def test_broken_inputs_are_refused_in_a_sentence(photos, vae, tmp_path):
  with pytest.raises(UserError, match=r"--image_size=20 must be a positive multiple of 8"):
    encode.make_job(photos, vae, 20, 4)
  with pytest.raises(UserError, match=r"--shards=24 must be between 1 and the 23 images"):
    encode.make_job(photos, vae, SIDE, 24)
  with pytest.raises(UserError, match=r"'nowhere' cannot be read"):
    encode.make_job(photos, "nowhere", SIDE, 4)
  job = encode.make_job(photos, vae, SIDE, 4)
  with pytest.raises(UserError, match=r"--vae gives latents that are not finite \(near 'a/000"):
    encode.encode_images(photos, job, lambda: load(gain=np.inf), tmp_path / "inf")
  unread = images.EncodedImages(23, (), lambda i: (b"no image", 0), photos.name)
  with pytest.raises(UserError, match=r"none of the 23 images can be read"):
    encode.encode_images(unread, job, load, tmp_path / "none")
  unknown = images.EncodedImages(23, (), lambda i: (photos.read(i)[0], -1), photos.name)
  with pytest.raises(UserError, match=r"'a/000.png' has the class -1"):
    encode.encode_images(unknown, job, load, tmp_path / "unknown")


def test_sources_without_names_number_their_classes(photos, vae, tmp_path):
  nameless = images.EncodedImages(5, (), lambda i: (photos.read(i)[0], i), photos.name)
  job = encode.make_job(nameless, vae, SIDE, 0)
  assert job.shards == 1
  assert encode.encode_images(nameless, job, load, tmp_path)["names"] == list("01234")


def test_the_mode_asks_for_its_flags(capsys):
  for given, missing in (("--out=y", "vae"), ("--vae=v", "out")):
    assert main.run(["main.py", "--mode=encode", "--images=x", given]) == 2
    assert f"--{missing} is missing; --mode=encode needs" in capsys.readouterr().err
