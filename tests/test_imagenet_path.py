"""From JPEGs to FID through the program, on stand-ins: synthetic photographs, name-seeded weights.

Every link is the real one (the full autoencoder and Inception, the real commands); only the images
are small and the networks untrained.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ism_jax
from ism_jax.sample import to_uint8

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
CLASSES, EACH, SIZE = 10, 20, 32

pytestmark = pytest.mark.slow


def call(*args) -> str:
  """What `python main.py args` prints."""
  command = [sys.executable, "main.py", *map(str, args)]
  done = subprocess.run(
    command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=900
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def named_weights():
  spec = importlib.util.spec_from_file_location("named", ROOT / "tests/ism/named_weights.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="module")
def files(tmp_path_factory):
  """(folder of 200 JPEGs in class folders, autoencoder, Inception)."""
  top = tmp_path_factory.mktemp("files")
  rng = np.random.default_rng(0)
  for label in range(CLASSES):
    folder = top / "images" / f"class{label}"
    folder.mkdir(parents=True)
    for i in range(EACH):
      coarse = rng.integers(0, 256, (4, 5, 3), np.uint8)
      image = Image.fromarray(coarse).resize((50 + 3 * label, 40), Image.Resampling.BICUBIC)
      image.save(folder / f"{i}.jpg", quality=90)
  named = named_weights()
  networks = {}
  for name in ("sd_vae", "fid_inception"):
    tensors = named.tensors_of(named.read_oracle(name))
    networks[name] = named.write(top / f"{name}.safetensors", tensors)
  return top / "images", networks["sd_vae"], networks["fid_inception"]


def test_images_to_latents_to_a_model_to_samples_to_numbers(files, tmp_path):
  images, vae, inception = files
  latents, run = tmp_path / "latents", tmp_path / "run"
  encode = ("--mode=encode", f"--images={images}", f"--vae={vae}", f"--out={latents}")
  out = call(*encode, f"--image_size={SIZE}", "--shards=3")
  assert f"{CLASSES * EACH} images of {CLASSES} classes" in out
  manifest = json.loads((latents / "manifest.json").read_text())
  assert manifest["count"] == 200 and manifest["skipped"] == 0
  # Again: every shard is kept.
  before = {path: path.stat().st_mtime_ns for path in latents.glob("*.array_record")}
  call(*encode, f"--image_size={SIZE}", "--shards=3")
  assert before == {path: path.stat().st_mtime_ns for path in latents.glob("*.array_record")}

  config = "--config=configs/ism_imagenet256.py:S/2,debug"
  small = (f"--config.data.image_size={SIZE // 8}", "--config.loss.wavelet_levels=1")
  call(config, *small, f"--config.data.path={latents}", f"--workdir={run}")

  out = call("--mode=sample", f"--workdir={run}", f"--vae={vae}", "--num=4", "--nfe=1,2")
  with np.load(run / "generated" / "samples.npz") as saved:
    pictures = saved["arr_0"].astype(int)
    assert saved["arr_0"].shape == (8, SIZE, SIZE, 3) and saved["arr_0"].dtype == np.uint8

  # The exported model, without the training stack, makes the same images.
  call("--mode=export", f"--workdir={run}", f"--out={tmp_path / 'exported'}")
  model = ism_jax.Model.from_pretrained(tmp_path / "exported", vae=vae)
  alike = to_uint8(model.sample(labels=[0, 1, 2, 3], steps=2, seed=0))
  assert np.abs(alike.astype(int) - pictures[4:]).mean() < 1  # XLA's flags are others here

  found = tmp_path / "found"
  out = call(
    *("--mode=evaluate", f"--workdir={run}", "--metrics=fid,sfid,is,pr", "--nfe=1", "--num=24"),
    *(f"--vae={vae}", f"--inception={inception}", f"--reference={images}", f"--out={found}"),
    "--save_samples",
  )
  assert "fid@24" in out and "fid-50k" not in out
  for word in ("vae", "rounding", "resize", "classes", "seed", "reference", "sha256"):
    assert word in out
  record = json.loads((found / "benchmark.json").read_text())
  assert record["results"]["fid@24/nfe1_w0"] > 0
  with np.load(found / "samples_nfe1_w0.npz") as saved:
    assert saved["arr_0"].shape == (24, SIZE, SIZE, 3)
