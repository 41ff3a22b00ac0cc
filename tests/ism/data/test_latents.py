"""Stored latents as training data: reading, drawing, resuming, and sets that are refused."""

import itertools
import json
import shutil
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from configs import ism_imagenet256
from ism_jax import method as ism
from ism_jax.data import encode, latents, sources
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError

SHAPE, COUNT, SHARDS = (4, 4, 4), 300, 3
BATCH = 16


def write_set(out, gain=1.0, shift=0.0, seed=0):
  """A latent set of random posteriors, in encode's own hand; returns its posteriors."""
  rng = np.random.default_rng(seed)
  posterior = np.empty((COUNT, 2, 2, *SHAPE), np.float16)
  posterior[:, 0, 0] = (rng.normal(shift, gain, (COUNT, *SHAPE))) / latents.SCALE
  posterior[:, 1, 0] = posterior[:, 0, 0, :, ::-1]
  posterior[:, :, 1] = rng.uniform(0.05, 0.2, (COUNT, 2, *SHAPE))
  metadata = {"version": latents.VERSION, "vae": "vae hash", "shards": SHARDS}
  job = encode.Job(*encode.KIND, COUNT, SHARDS, metadata)
  out.mkdir(exist_ok=True)
  for shard in range(SHARDS):
    writer = encode.ShardWriter(out, job, shard)
    rows = job.rows(shard)
    writer.write(posterior[rows.start : rows.stop], ["?"] * len(rows), [i % 7 for i in rows])
    writer.finish([])
  encode.write_manifest(out, job, tuple("abcdefg"), SHAPE)
  return posterior


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
  """(directory, posteriors) of a good set."""
  out = tmp_path_factory.mktemp("set")
  return out, write_set(out)


@pytest.fixture(scope="module")
def source(stored):
  return latents.open_set(str(stored[0]))


def test_every_image_is_two_examples(stored, source):
  posterior = stored[1]
  assert source.labels.dtype == np.int32 and len(source.labels) == 2 * COUNT
  assert source.names == tuple("abcdefg") and source.shape == SHAPE and source.vae == "vae hash"
  index = np.random.default_rng(1).permutation(2 * COUNT)
  rows, means = source.rows(index), source.images(index)
  assert means.dtype == np.float32 and rows["mean"].dtype == rows["std"].dtype == np.float16
  for at, example in enumerate(index):
    image, view = example // 2, example % 2
    assert source.labels[example] == image % 7
    np.testing.assert_array_equal(rows["mean"][at], posterior[image, view, 0])
    np.testing.assert_array_equal(rows["std"][at], posterior[image, view, 1])
    expected = np.float32(0.18215) * posterior[image, view, 0].astype(np.float32)
    np.testing.assert_allclose(means[at], expected, rtol=1e-6)


def test_a_draw_has_the_posteriors_moments(source):
  rows = source.rows(np.arange(8))
  n = 4000
  batch = {name: np.tile(value, (n, 1, 1, 1)) for name, value in rows.items()}
  batch["label"] = np.tile(source.labels[:8], n)
  aux_state, drawn = latents.draw(
    SimpleNamespace(aux_state=("side-car",)), batch, jax.random.key(0)
  )
  assert aux_state == ("side-car",) and drawn.keys() == {"image", "label"}
  assert drawn["image"].dtype == np.float32 and batch.keys() == {"mean", "std", "label"}
  values = np.asarray(drawn["image"]).reshape(n, 8, *SHAPE)
  mean, std = (rows[name].astype(np.float64) for name in ("mean", "std"))
  error = 0.18215 * std / np.sqrt(n)
  assert np.all(np.abs(values.mean(0) - 0.18215 * mean) < 6 * error + 1e-6)
  np.testing.assert_allclose(values.std(0), 0.18215 * std, rtol=0.08)
  again = latents.draw(SimpleNamespace(aux_state=()), batch, jax.random.key(0))[1]["image"]
  np.testing.assert_array_equal(again, drawn["image"])
  other = latents.draw(SimpleNamespace(aux_state=()), batch, jax.random.key(1))[1]["image"]
  assert np.mean(np.asarray(other) == drawn["image"]) < 0.01


def take(count, source, position=0, rows=slice(0, BATCH)):
  noise = lambda number: np.arange(2 * BATCH, dtype=np.int32) + 2 * BATCH * number  # noqa: E731
  return list(
    itertools.islice(sources.stream(source, BATCH, rows, 0, position, noise, pool=2), count)
  )


@pytest.mark.parametrize("position", [1, 7, 38])
def test_a_stream_resumes_anywhere(position, stored, source):
  # 600 examples are 37.5 batches: position 38 is in the second epoch.
  whole = take(position + 3, source)[position:]
  again = take(3, latents.open_set(str(stored[0])), position)
  for batch, expected in zip(again, whole, strict=True):
    assert batch.keys() == {"mean", "std", "label", "noise"}
    for name, value in batch.items():
      np.testing.assert_array_equal(value, expected[name])


def copy(stored, tmp_path):
  return shutil.copytree(stored[0], tmp_path / "copy")


def change(path, **values):
  path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_statistics_that_are_not_the_records_own_are_refused(stored, tmp_path):
  top = copy(stored, tmp_path)
  manifest = json.loads((top / "manifest.json").read_text())
  for name, values in (
    ("std", [s * 1.1 for s in manifest["std"]]),
    ("mean", [m + 0.3 for m in manifest["mean"]]),
  ):
    change(top / "manifest.json", **{**manifest, name: values})
    with pytest.raises(UserError, match=r"do not have the statistics of its manifest.json"):
      latents.open_set(str(top))
  change(top / "manifest.json", **manifest)
  latents.open_set(str(top))
  write_set(tmp_path / "shifted", shift=0.8)  # a mean that is not about 0
  latents.open_set(str(tmp_path / "shifted"))
  whole = latents.open_set(str(stored[0])).read
  doubled = lambda image, view: whole(image, view) * np.float16(1 + view.max())  # noqa: E731
  with pytest.raises(UserError, match="do not have the statistics"):  # of mirror images only
    latents._check_statistics("set", manifest, doubled, latents.STD_RANGE)
  # Records of another set beside this manifest.
  write_set(tmp_path / "other", gain=0.8, seed=1)
  for path in (tmp_path / "other").glob("*.array_record"):
    shutil.copy(path, top)
  with pytest.raises(UserError, match=r"do not have the statistics of its manifest.json"):
    latents.open_set(str(top))


@pytest.mark.parametrize(
  "gain, shift", [(0.18215, 0.0), (1 / 0.18215, 0.0), (1.0, 1.2), (1.0, -1.2)]
)
def test_latents_of_an_insane_scale_are_refused(gain, shift, tmp_path):
  write_set(tmp_path, gain, shift)
  with pytest.raises(UserError, match=r"must be within 1 of 0 and in data.std=\(0.5, 2.0\)"):
    latents.open_set(str(tmp_path))
  if not shift:  # a way out for another autoencoder
    assert len(latents.open_set(str(tmp_path), std=(0.01, 100.0)).labels) == 2 * COUNT


def test_sets_that_are_not_whole_are_refused(stored, tmp_path):
  with pytest.raises(UserError, match=r"nowhere/manifest.json is missing.*--mode=encode"):
    latents.open_set("nowhere")
  top = copy(stored, tmp_path)
  shard = top / "latents-00001-of-00003.array_record"
  content = shard.read_bytes()
  for broken in (content[:100_000], b"", b"x" * len(content)):
    shard.write_bytes(broken)
    with pytest.raises(UserError, match=r"00001-of-00003.array_record holds 0 whole records.*100"):
      latents.open_set(str(top))
  shard.write_bytes(content)
  part = top / "latents-00001-of-00003.json"
  labels = json.loads(part.read_text())["labels"]
  change(part, labels=labels[:-1])
  with pytest.raises(UserError, match=r"array_record holds 100 whole records .* says 99"):
    latents.open_set(str(top))
  change(part, labels=labels)
  change(top / "manifest.json", count=299)
  with pytest.raises(UserError, match=r"labels of 300 images and its manifest.json says 299"):
    latents.open_set(str(top))
  change(top / "manifest.json", version=2)
  with pytest.raises(UserError, match=r"has the layout version 2, and this program reads 1"):
    latents.open_set(str(top))
  for broken in (b"[]", b"\xff\xfe"):
    (top / "manifest.json").write_bytes(broken)
    with pytest.raises(UserError, match=r"manifest.json is missing or damaged"):
      latents.open_set(str(top))


def spoil(top, posterior, images, how):
  """Damages the records of `images` on the disk."""
  for image in images:
    shard = top / f"latents-{image // 100:05d}-of-00003.array_record"
    content = bytearray(shard.read_bytes())
    at = content.index(posterior[image].tobytes())
    how(content, at)
    shard.write_bytes(content)


def flip(content, at):
  content[at + 100] ^= 4


def zero(content, at):
  content[at - 8 : at + 64] = bytes(72)


@pytest.mark.parametrize("how", [flip, zero])
def test_damaged_records_are_named_and_others_of_their_class_stand_in(
  stored, tmp_path, how, monkeypatch, caplog
):
  """The same ones in any order of reading, so for any number of processes and after a resume."""
  pauses = []
  monkeypatch.setattr(latents.time, "sleep", pauses.append)
  top, posterior = copy(stored, tmp_path), stored[1]
  bad, stand_in = (3, 10, 294, 298), {3: 17, 10: 17, 294: 0, 298: 4}  # i % 7 is the class
  spoil(top, posterior, bad, how)
  order = np.arange(2 * COUNT)
  for index in (order, order[::-1]):
    caplog.clear()
    mean = latents.open_set(str(top)).rows(index)["mean"]
    for example, row in zip(index, mean, strict=True):
      image = stand_in.get(example // 2, example // 2)
      np.testing.assert_array_equal(row, posterior[image, example % 2, 0])
    assert len(pauses) == 2 * len(bad)  # none is waited for again
    pauses.clear()
    for image in bad:
      assert sum(f"cannot read image {image} (" in text for text in caplog.messages) == 1
  latents.open_set(str(top), max_faults=4).rows(order)
  with pytest.raises(UserError, match=r"more than data.max_faults=3 records of data.path="):
    latents.open_set(str(top), max_faults=3).rows(order)
  opened = latents.open_set(str(top), max_faults=COUNT)
  spoil(top, posterior, range(24, COUNT, 7), how)  # of the class of 3 and 10 only 17 is left
  for row in opened.rows(2 * np.arange(3, COUNT, 7))["mean"]:
    np.testing.assert_array_equal(row, posterior[17, 0, 0])


def test_a_record_of_other_numbers_or_length_is_damaged(stored, tmp_path, monkeypatch, caplog):
  """What the file's own checksums let pass, because it was written so."""
  monkeypatch.setattr(latents.time, "sleep", lambda seconds: None)
  top, posterior = copy(stored, tmp_path), stored[1]
  records = np.zeros(100, latents.record_dtype(SHAPE))
  records["posterior"], records["label"] = posterior[:100], np.arange(100) % 7
  records["posterior"][1, 1, 0, 2, 2, 2] = np.nan  # in one view, of two
  records["label"][2] = 5
  rows = [row.tobytes() for row in records]
  rows[3], rows[5] = rows[3][:-2], 2 * rows[5]
  writer = ArrayRecordWriter(str(top / "latents-00000-of-00003.array_record"), "group_size:1")
  for row in rows:
    writer.write(row)
  writer.close()
  found = latents.open_set(str(top)).rows(2 * np.arange(6))["mean"]
  np.testing.assert_array_equal(found, posterior[[0, 8, 9, 10, 4, 12], 0, 0])
  assert len(caplog.messages) == 4


def test_a_read_that_fails_once_is_tried_again(stored, monkeypatch, caplog):
  pauses, source = [], latents.open_set(str(stored[0]))
  expected = source.rows(np.arange(4))["mean"]
  frombuffer = np.frombuffer

  def fail(*args, **kwargs):
    if len(pauses) < 2:
      raise OSError("the network is away")
    return frombuffer(*args, **kwargs)

  monkeypatch.setattr(latents.time, "sleep", pauses.append)
  monkeypatch.setattr(latents.np, "frombuffer", fail)
  np.testing.assert_array_equal(source.rows(np.arange(4))["mean"], expected)
  assert pauses == [0.1, 1.0] and not caplog.messages


def test_the_records_of_a_call_are_read_by_threads(source, monkeypatch):
  """Four at a time wait for each other: read one after the other, none would come."""
  expected, frombuffer = source.rows(np.arange(32))["mean"], np.frombuffer
  meeting = threading.Barrier(4)

  def meet(*args):
    meeting.wait(timeout=30)
    return frombuffer(*args)

  monkeypatch.setattr(latents.time, "sleep", lambda seconds: None)
  monkeypatch.setattr(latents.np, "frombuffer", meet)
  np.testing.assert_array_equal(source.rows(np.arange(32))["mean"], expected)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_an_epoch_comes_once_from_any_number_of_processes(source, processes):
  """75 batches of 16 are two epochs of 600 examples: read by the streams, and enumerated."""
  places = {row.tobytes(): i for i, row in enumerate(source.rows(np.arange(2 * COUNT))["mean"])}
  share = BATCH // processes
  seen = np.empty((75, BATCH), np.int64)
  for process in range(processes):
    rows = slice(process * share, (process + 1) * share)
    for number, batch in enumerate(take(75, source, rows=rows)):
      seen[number, rows] = [places[row.tobytes()] for row in batch["mean"]]
  for epoch in seen.reshape(2, 2 * COUNT):
    np.testing.assert_array_equal(np.sort(epoch), np.arange(2 * COUNT))


# --- as a method ----------------------------------------------------------------------------------


def get_config(path, **changes):
  config = ism_imagenet256.get_config("debug")
  config.data.path, config.data.image_size, config.loss.wavelet_levels = str(path), 4, 2
  config.model.depth, config.pairing.pool = 1, 2
  for name, value in changes.items():
    section, _, key = name.partition("__")
    config[section][key] = value
  return config


@pytest.fixture(scope="module")
def made(stored):
  return ism.make_method(get_config(stored[0]), mesh_lib.make_mesh())


def test_a_method_on_latents_knows_its_autoencoder(made):
  method, metadata = made
  assert metadata.pop("examples") == 2 * COUNT
  assert len(metadata.pop("manifest_sha256")) == 64
  assert metadata == {"names": list("abcdefg"), "shape": list(SHAPE), "vae": "vae hash"}
  assert method.augment is latents.draw
  assert list(method.evaluate(None, 1, True)) == []  # nothing to draw with


def test_a_set_is_known_by_its_manifest_wherever_it_lies(stored, source, tmp_path):
  copied = shutil.copytree(stored[0], tmp_path / "copied")
  assert latents.open_set(f"{copied}/").manifest == source.manifest
  write_set(tmp_path / "other", seed=1)
  assert latents.open_set(str(tmp_path / "other")).manifest != source.manifest


def test_noise_is_paired_with_the_latents_that_are_trained_on(made, source):
  batches = list(itertools.islice(made[0].stream(0, 0), 2))
  noise = np.concatenate([batch["noise"] for batch in batches])
  label = np.concatenate([batch["label"] for batch in batches])
  np.testing.assert_array_equal(np.sort(noise), np.arange(2 * BATCH))
  np.testing.assert_array_equal(label[noise], label)  # within the class
  mean = latents.SCALE * np.concatenate([b["mean"] for b in batches]).astype(np.float32)
  x0 = ism.path.draw_noise(jax.random.fold_in(jax.random.key(0), 2), noise, SHAPE)
  unpaired = ism.path.draw_noise(
    jax.random.fold_in(jax.random.key(0), 2), np.arange(2 * BATCH), SHAPE
  )
  cost = [np.sum((np.asarray(x) - mean) ** 2) for x in (x0, unpaired)]
  assert cost[0] < 0.97 * cost[1]


def test_another_shape_is_refused(stored):
  with pytest.raises(UserError, match=r"data.image_size=8 but for the images of latents it is 4"):
    ism.make_method(get_config(stored[0], data__image_size=8), mesh_lib.make_mesh())
  with pytest.raises(UserError, match=r"data.path is empty; give --config.data.path"):
    ism.make_method(get_config("", data__synthetic=0), mesh_lib.make_mesh())


def test_synthetic_latents_are_like_real_ones():
  source = latents.synthetic(64, (32, 32, 4))
  rows = source.rows(np.arange(128))
  scaled = latents.SCALE * rows["mean"].astype(np.float64)
  np.testing.assert_allclose(scaled.std(), 1, atol=0.05)
  assert np.all(rows["std"] > 0) and np.all(rows["std"] < 0.5)  # small beside the means' own 5.5
  np.testing.assert_array_equal(rows["mean"][0::2], rows["mean"][1::2, :, ::-1])
  assert set(source.labels.tolist()) == set(range(10))
