"""The large-scale metrics by command line and by config: from a checkpoint, and in training."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import ism_digits, ism_imagenet256
from ism_jax import method as ism
from ism_jax.data import sources
from ism_jax.evaluation import registry
from tests.ism.stand_ins import frechet
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.storage.weights import sha256

FLAGS = {"nfe": ["1", "2"], "guidance": ["0.5"], "labels": None, "num": 40, "seed": 3}

NONE = dict.fromkeys(("metrics", "reference", "inception", "dinov2"))


def get_config():
  config = ism_digits.get_config("debug")
  config.batch = 16
  config.model.depth = 1
  config.eval.samples = 64
  return config


@pytest.fixture
def digits(files):
  """As flags: weights, and a reference of the digits' size."""
  return {**files.flags, "metrics": ["fid", "is", "pr", "fd_dinov2"], "classes": None, "vae": None}


def test_evaluate_mode_by_the_command_line(digits, files, tmp_path, capsys):
  metadata = {"names": [str(i) for i in range(10)], "shape": [8, 8, 1]}
  params = ism.make_network(get_config(), metadata)[0](jax.random.key(0))
  flags = SimpleNamespace(**FLAGS, **digits, save_samples=True)
  out = tmp_path / "out"
  ism.evaluate_mode(get_config(), metadata, lambda mesh: (params, 7), flags, out)

  record = json.loads((out / "benchmark.json").read_text())
  assert (record["step"], record["samples"], record["seed"]) == (7, 40, "3")
  assert record["vae"] == "none: pixels" and record["classes"] == "balanced (i mod 10)"
  assert f"real.npz sha256:{sha256(files.real)[:12]}" in record["reference"]
  columns = ("fid", "is", "precision", "recall", "fd_dinov2")
  settings = ("nfe1_w0.5", "nfe2_w0.5")
  assert set(record["results"]) == {f"{c}@40/{s}" for c in columns for s in settings}
  assert all(np.isfinite(value) for value in record["results"].values())
  printed = capsys.readouterr().out
  assert "fid@40" in printed and "real.npz sha256:" in printed and "50k" not in printed

  with np.load(out / "samples_nfe2_w0.5.npz") as saved:
    assert saved["arr_0"].shape == (40, 8, 8, 3) and saved["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(saved["labels"], np.arange(40) % 10)
    distance = frechet(files.inception(files.images), files.inception(saved["arr_0"]))
  assert record["results"]["fid@40/nfe2_w0.5"] == pytest.approx(distance, rel=1e-4)


def test_evaluate_mode_by_the_config(digits, tmp_path):
  config = get_config()
  config.eval.nfe, config.eval.guidance, config.eval.metrics = (2,), (0.5,), ("fid",)
  metadata = {"names": [str(i) for i in range(10)], "shape": [8, 8, 1]}
  params = ism.make_network(config, metadata)[0](jax.random.key(0))
  changes = {"nfe": None, "guidance": None, "metrics": None, "save_samples": False}
  flags = SimpleNamespace(**{**FLAGS, **digits, **changes})
  ism.evaluate_mode(config, metadata, lambda mesh: (params, 7), flags, tmp_path)
  record = json.loads((tmp_path / "benchmark.json").read_text())
  assert set(record["results"]) == {"fid@40/nfe2_w0.5"}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"metrics": ["fid", "fdi"]}, r"metric 'fdi' is unknown"),
    ({"metrics": None}, r"--reference=.* is for --metrics; add --metrics=fid, or leave it out"),
    ({**NONE, "num": 5}, r"--num=5 is for --metrics"),
    ({**NONE, "num": None, "save_samples": True}, r"--save_samples=True is for --metrics"),
    ({"num": 1}, r"1 samples are too few"),
    ({"nfe": ["3"]}, r"nfe=3 was not trained"),
    ({"reference": "gone"}, r"reference='gone' is not there"),
  ],
)
def test_evaluate_mode_refuses_before_anything_is_loaded(changes, message, digits, tmp_path):
  def load(mesh):
    raise AssertionError("loaded a checkpoint for a request that cannot be met")

  metadata = {"names": [str(i) for i in range(10)], "shape": [8, 8, 1]}
  flags = SimpleNamespace(**{**FLAGS, **digits, "save_samples": False, **changes})
  with pytest.raises(UserError, match=message):
    ism.evaluate_mode(get_config(), metadata, load, flags, tmp_path)


def test_training_evaluates_by_config(digits, capsys):
  config = get_config()
  config.eval.metrics = ("fid", "pr")
  config.eval.reference, config.eval.inception = digits["reference"], digits["inception"]
  method, _ = ism.make_method(config, mesh_lib.make_mesh())
  params, _ = jax.jit(method.init)(jax.random.key(0))
  quick = dict(method.evaluate(params, 1, False))
  assert {"fid@16/nfe1_w0", "precision@16/nfe2_w1", "grid"} <= set(quick)
  assert quick["grid"].ndim == 3 and "class_leak" not in quick
  final = dict(method.evaluate(params, 2, True))
  assert {"fid@64/nfe1_w0", "recall@64/nfe1_w0.5", "class_leak"} <= set(final)
  assert "sha256" in capsys.readouterr().out
  config.eval.metrics = ("fd_dinov2",)
  with pytest.raises(UserError, match=r"--dinov2=FILE"):
    ism.make_method(config, mesh_lib.make_mesh())


def test_images_of_one_class_are_measured_by_the_metrics(digits):
  config = get_config()
  with config.unlocked():
    config.data.update(source="folder", channels=3, synthetic=64, classes=1)
  config.eval.metrics = ("fid",)
  config.eval.reference, config.eval.inception = digits["reference"], digits["inception"]
  method, _ = ism.make_method(config, mesh_lib.make_mesh())
  params, _ = jax.jit(method.init)(jax.random.key(0))
  final = dict(method.evaluate(params, 2, True))
  assert "fid@64/nfe1_w0" in final and "class_leak" not in final


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("limit", [10, 50, 4])
def test_a_rare_class_is_in_the_reference(limit):
  labels = np.repeat(np.arange(3), (30, 2, 40)).astype(np.int32)
  pixels = np.arange(len(labels), dtype=np.float32).reshape(-1, 1, 1, 1)
  source = sources.Source(pixels, labels, tuple("abc"), lambda pixels: pixels / 100)
  images = registry.make_reference(source, limit=limit).images.ravel()
  assert len(set(images)) == len(images) == max(limit, 6)
  assert np.bincount(labels[np.rint(100 * images).astype(int)]).min() >= 2


def test_evaluation_draws_a_grid_where_there_is_a_decoder(fake_autoencoder, tmp_path):
  config = ism_imagenet256.get_config("debug")
  config.model.depth, config.eval.vae, config.eval.nfe = 1, str(tmp_path / "vae"), (1,)
  method, metadata = ism.make_method(config, mesh_lib.make_mesh())
  params = jax.jit(method.init)(jax.random.key(0))[0]
  ((name, picture),) = method.evaluate(params, 2, True)
  assert name == "grid" and picture.dtype == np.uint8 and metadata["vae"] == ""
