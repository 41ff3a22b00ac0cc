"""The large-scale metrics by command line and by config: from a checkpoint, and in training."""

import json

import jax
import numpy as np
import pytest

import main
from configs import ism_imagenet256
from ism_jax import method as ism
from ism_jax.data import sources
from ism_jax.evaluation import registry
from ism_jax.model import Model
from tests.ism.stand_ins import frechet
from train_jax import mesh as mesh_lib
from train_jax.checkpointing.checkpoint import Checkpoints
from train_jax.errors import UserError
from train_jax.storage.weights import sha256


@pytest.fixture
def call(digits_run, files, tmp_path):
  """(*flags) -> exit code of an evaluation of the run by stand-ins."""

  def run(*flags):
    where = (f"--workdir={digits_run}", f"--out={tmp_path / 'out'}", "--num=40", "--seed=3")
    weights = [f"--{name}={file}" for name, file in files.flags.items()]
    return main.run(["main.py", "--mode=evaluate", *where, *weights, *flags])

  return run


def test_evaluation_by_the_command_line(call, files, digits_run, tmp_path, capsys):
  flags = ("--metrics=fid,is,pr,fd_dinov2", "--nfe=1,2", "--guidance=0.5", "--save_samples")
  assert call(*flags) == 0, capsys.readouterr().err
  record = json.loads((tmp_path / "out" / "benchmark.json").read_text())
  assert (record["step"], record["samples"], record["seed"]) == (2, 40, "3")
  assert record["vae"] == "none: pixels" and record["classes"] == "balanced (i mod 10)"
  assert f"real.npz sha256:{sha256(files.real)[:12]}" in record["reference"]
  columns = ("fid", "is", "precision", "recall", "fd_dinov2")
  settings = ("nfe1_w0.5", "nfe2_w0.5")
  results = record["results"]
  assert results.keys() == {f"{c}@40/{s}" for c in columns for s in settings}
  assert all(np.isfinite(value) for value in results.values())
  printed = capsys.readouterr().out
  assert "fid@40" in printed and "real.npz sha256:" in printed and "50k" not in printed

  with np.load(tmp_path / "out" / "samples_nfe2_w0.5.npz") as saved:
    assert saved["arr_0"].shape == (40, 8, 8, 3) and saved["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(saved["labels"], np.arange(40) % 10)
    distance = frechet(files.inception(files.images), files.inception(saved["arr_0"]))
  assert results["fid@40/nfe2_w0.5"] == pytest.approx(distance, rel=1e-4)
  chosen = {"metrics": ("fid",), "nfe": (2,), "guidance": (0.5,), "samples": 40, **files.flags}
  numbers = Model.from_run(digits_run).evaluate(seed=3, **chosen)
  assert numbers == {"fid@40/nfe2_w0.5": pytest.approx(results["fid@40/nfe2_w0.5"], rel=1e-6)}


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--metrics=fid,fdi"], "eval.metrics='fdi' is unknown; choose from fid, sfid"),
    (["--metrics=fid", "--num=1"], "0 samples are too few"),
    (["--metrics=fid", "--nfe=0"], "nfe=0 must be a whole number from 1 to 128"),
    (["--metrics=fid", "--reference=gone"], "reference='gone' is not there"),
    (["--metrics=fid", "--vae=gone"], "vae='gone'"),
  ],
)
def test_bad_requests_are_refused_before_anything_is_read(
  flags, message, call, tmp_path, monkeypatch, capsys
):
  def restore(*args):
    raise AssertionError("parameters were read for a request that cannot be met")

  monkeypatch.setattr(Checkpoints, "restore_ema", restore)
  assert call(*flags) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ") and message in error and not list(tmp_path.rglob("*.json"))


def build(config, metrics, files):
  config.eval.update(metrics=metrics, **{name: files.flags[name] for name in files.flags})
  method, _ = ism.make_method(config, mesh_lib.make_mesh())
  return method, jax.jit(method.init)(jax.random.key(0))[0]


def test_training_evaluates_by_config(files, small_config, capsys):
  method, params = build(small_config(), ("fid", "pr"), files)
  quick = dict(method.evaluate(params, 1, False))
  assert {"fid@16/nfe1_w0", "precision@16/nfe2_w1", "grid"} <= quick.keys()
  assert quick["grid"].ndim == 3 and "class_leak" not in quick
  final = dict(method.evaluate(params, 2, True))
  assert {"fid@64/nfe1_w0", "recall@64/nfe1_w0.5", "class_leak"} <= final.keys()
  assert "sha256" in capsys.readouterr().out
  with pytest.raises(UserError, match=r"--dinov2=FILE"):
    files.flags["dinov2"] = ""
    build(small_config(), ("fd_dinov2",), files)


def test_images_of_one_class_are_measured_by_the_metrics(files, small_config):
  config = small_config(data__source="folder", data__channels=3)
  with config.unlocked():
    config.data.update(synthetic=64, classes=1)
  method, params = build(config, ("fid",), files)
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
  (tmp_path / "vae").touch()
  method, metadata = ism.make_method(config, mesh_lib.make_mesh())
  params = jax.jit(method.init)(jax.random.key(0))[0]
  ((name, picture),) = method.evaluate(params, 2, True)
  assert name == "grid" and picture.dtype == np.uint8 and metadata["vae"] == ""
