"""The large-scale numbers: those of all samples at once, and what they depend on."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ism_jax.evaluation import fid
from ism_jax.sample import make_sampler, to_uint8
from tests.ism.stand_ins import PARAMS, frechet, inception_score, make, network, samples
from train_jax.errors import UserError
from train_jax.storage.weights import sha256


@pytest.mark.parametrize("classes", ["balanced", "random"])
def test_every_number_is_that_of_all_samples_at_once(classes, files):
  """70 samples in batches of 32, the last one of 6."""
  found = make(files, classes=classes, seed=5)
  results = dict(found.measure(PARAMS, [(1, 0.0), (4, 0.5)], 70))
  columns = ("fid", "sfid", "fd_dinov2", "is", "precision", "recall")
  assert set(results) == {f"{c}@70/{s}" for c in columns for s in ("nfe1_w0", "nfe4_w0.5")}

  labels = np.arange(70) % 10
  if classes == "random":
    labels = np.random.default_rng(5).integers(10, size=70)
  images = samples(70, 4, 0.5, labels, seed=5)
  drawn = found.pictures(PARAMS, [(4, 0.5)], labels[:20].astype(np.int32))[0]
  np.testing.assert_array_equal(drawn, images[:20])
  real, at = files.images, "@70/nfe4_w0.5"
  for name, f in (
    ("fid", files.inception),
    ("sfid", lambda x: files.inception(x, "spatial")),
    ("fd_dinov2", files.dinov2),
  ):
    assert results[name + at] == pytest.approx(frechet(f(real), f(images)), rel=1e-4)
  score = inception_score(files.inception(images, "logits"))[0]
  assert results["is" + at] == pytest.approx(score, rel=1e-5) and score > 1.01
  expected = fid.precision_recall(files.inception(real), files.inception(images))
  assert (results["precision" + at], results["recall" + at]) == expected


def test_the_mesh_does_not_matter(files, make_mesh):
  results = []
  for mesh in (make_mesh(1, 1), make_mesh(8, 1), make_mesh(2, 4)):
    found = make(files, mesh=mesh, per_device=16 // mesh.size)
    results.append(dict(found.measure(PARAMS, [(2, 0.5)], 50)))
    for stored in files.folder.glob("real.*-*.npz"):
      stored.unlink()  # so that the reference's side is computed on each mesh
  for other in results[1:]:
    assert other == pytest.approx(results[0], rel=1e-5)


def test_no_device_has_more_samples_where_several_share_a_row(files, make_mesh):
  """Of `per_device` samples at a time there is room for a decoder's activations."""
  found, split = make(files, ("is",), reference="", mesh=make_mesh(1, 2, 4), per_device=4), []

  def draw(*args):
    drawn = found.draw(*args)
    split.extend(len(shard.data) for shard in drawn[1].addressable_shards)
    return drawn

  watched = dataclasses.replace(found, draw=draw)
  list(watched.measure(PARAMS, [(1, 0.0)], 20))
  watched.pictures(PARAMS, [(1, 0.0)], np.arange(8))
  assert set(split) == {4}


def test_the_metadata_say_what_the_number_depends_on(files):
  metrics = ("fid", "fd_dinov2", "pr")
  metadata = make(files, metrics, classes="random", seed=3).metadata()
  digest = sha256(files.real)[:12]
  assert metadata["vae"] == "none: pixels" and metadata["seed"] == "3"
  assert "nearest" in metadata["rounding"] and "clipped" in metadata["rounding"]
  assert metadata["classes"] == "random (uniform, by the seed)"
  assert metadata["inception"] == f"inception sha256:{sha256(files.flags['inception'])[:12]}"
  assert metadata["reference"].startswith(
    f"real.npz sha256:{digest}; fid, fd_dinov2, pr against 300 of its 300 images"
  )
  assert "299x299" in metadata["resize"] and "samples none (8x8)" in metadata["resize"]
  assert make(files).metadata()["classes"] == "balanced (i mod 10)"


def test_latents_are_decoded(files, tmp_path):
  real = tmp_path / "large.npz"
  np.savez(real, arr_0=np.random.default_rng(1).integers(0, 256, (40, 32, 32, 3), np.uint8))
  vae = str(tmp_path / "vae")
  found = make(files, ("fid",), shape=(4, 4, 4), reference=str(real), vae=vae)
  assert found.shape == (32, 32, 3)
  assert found.metadata()["vae"] == f"vae sha256:{sha256(vae)[:12]}"
  results = dict(found.measure(PARAMS, [(1, 0.0)], 30))
  latents = make_sampler(network, (4, 4, 4))(PARAMS, 0, np.arange(30) % 10, 0.0, 1)
  images = to_uint8(np.tanh(0.5 * latents[..., :3])).repeat(8, 1).repeat(8, 2)
  with np.load(real) as saved:
    expected = frechet(files.inception(saved["arr_0"]), files.inception(images))
  assert results["fid@30/nfe1_w0"] == pytest.approx(expected, rel=1e-3)


def test_a_folder_is_cut_like_the_training_data(files, tmp_path):
  (tmp_path / "photos").mkdir()
  for i in range(4):
    pixels = np.random.default_rng(i).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
  photos = {"reference": str(tmp_path / "photos")}
  for shape, vae, cut in (
    ((8, 8, 3), "", "area3"),
    ((8, 8, 1), "", "area1"),
    ((4, 4, 4), str(tmp_path / "vae"), "adm"),
  ):
    found = make(files, ("fid",), shape=shape, vae=vae, **photos)
    assert found.reference.images.cut == cut
    assert f", cut by {cut}; fid against 4 of its 4 images" in found.metadata()["reference"]


def test_grey_samples_are_three_equal_channels(files):
  found = make(files, ("fid",), shape=(8, 8, 1))
  images = found.pictures(PARAMS, [(1, 0.0)], np.arange(9, dtype=np.int32))[0]
  assert images.shape == (9, 8, 8, 3)
  np.testing.assert_array_equal(images[..., 0], images[..., 2])


def test_the_inception_score_needs_no_reference(files):
  found = make(files, ("is",), reference="")
  assert found.metadata()["reference"] == "none"
  assert set(dict(found.measure(PARAMS, [(1, 0.0)], 20))) == {"is@20/nfe1_w0"}


def test_samples_that_are_not_finite_are_refused(files):
  found = make(files, ("fid",))
  with pytest.raises(UserError, match=r"nfe=1, guidance=0 are not finite.*earlier checkpoint"):
    list(found.measure({"gain": jnp.float32(np.nan)}, [(1, 0.0)], 20))


PROGRAM = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
import jax
address, process, folder, tensor = sys.argv[1:]
jax.distributed.initialize(address, 2, int(process))
from tests.ism import stand_ins
from train_jax.mesh import make_mesh
stand_ins.put_stand_ins(sys.modules.__setitem__, lambda *args, raising: setattr(*args))
out, mesh = Path(folder), make_mesh(1, int(tensor))
files = SimpleNamespace(flags=json.loads((out / "flags").read_text()))
found = stand_ins.make(files, mesh=mesh, per_device=8)
results = dict(found.measure(stand_ins.PARAMS, [(2, 0.5)], 50, out))
(out / f"results{process}").write_text(json.dumps(results))
"""


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 4])  # 4: both processes have all rows
def test_two_processes_measure_what_one_does(files, tensor):
  expected = dict(make(files).measure(PARAMS, [(2, 0.5)], 50))
  for stored in files.folder.glob("real.*-*.npz"):
    stored.unlink()
  (files.folder / "flags").write_text(json.dumps(files.flags))
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  # Of two such flags the last counts.
  flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
  environment = {**os.environ, "XLA_FLAGS": flags}
  root = str(Path(__file__).parents[3])
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", PROGRAM, address, str(i), str(files.folder), str(tensor)],
      cwd=root,
      env={**environment, "PYTHONPATH": root},
    )
    for i in range(2)
  ]
  try:
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
  finally:
    for process in processes:
      process.kill()
  results = [json.loads((files.folder / f"results{i}").read_text()) for i in range(2)]
  assert results[0] == results[1] == pytest.approx(expected, rel=1e-5)
  with np.load(files.folder / "samples_nfe2_w0.5.npz") as saved:
    np.testing.assert_array_equal(saved["arr_0"], samples(50, 2, 0.5, np.arange(50) % 10))
