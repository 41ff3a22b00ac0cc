"""FID-Inception: torch-fidelity's outputs, its resize, pools and folded norms by hand, mistakes.

Dimensions: b batch, h w image, c channel.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax.networks import inception
from tests.ism.named_weights import read_oracle, tensors_of, write
from train_jax.errors import UserError
from train_jax.storage.weights import Weights


@pytest.fixture(scope="module")
def oracle():
  return read_oracle("fid_inception")


@pytest.fixture(scope="module")
def path(oracle, tmp_path_factory):
  path = write(tmp_path_factory.mktemp("weights") / "inception.safetensors", tensors_of(oracle))
  yield path
  path.unlink()  # 96 MB


def distance(a, b):
  return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_features_agree_with_torch_fidelity(path, oracle):
  params, apply = inception.load(path)
  out = jax.jit(apply)(params, oracle["image"])
  sizes = {"pool": 2048, "spatial": 2023, "logits": 1008}
  assert {name: a.shape for name, a in out.items()} == {k: (2, n) for k, n in sizes.items()}
  for name in sizes:
    assert out[name].dtype == jnp.float32
    assert distance(out[name], oracle[name]) < 2e-6, name
  assert distance(out["logits"], oracle["logits_biased"]) > 1e-3  # the bias shows


@pytest.mark.parametrize("h, w", [(7, 5), (299, 299), (320, 401)])
def test_resize_reads_pixels_where_tensorflow_1_does(h, w):
  images = np.random.default_rng(0).integers(0, 256, (1, h, w, 2), dtype=np.uint8)
  ours = np.asarray(inception.resize(images))[0]
  x = images[0].astype(np.float64)
  for i, j in [(0, 0), (298, 298), (298, 0), *np.random.default_rng(1).integers(0, 299, (50, 2))]:
    y, z = i * h / 299, j * w / 299
    top, left = int(y), int(z)
    expected = 0
    for row, a in ((top, 1 - (y - top)), (top + 1, y - top)):
      for column, b in ((left, 1 - (z - left)), (left + 1, z - left)):
        expected = expected + a * b * x[min(row, h - 1), min(column, w - 1)]
    np.testing.assert_allclose(ours[i, j], expected, atol=0.02)  # the position is float32
  if (h, w) == (299, 299):
    np.testing.assert_array_equal(ours, x)


def test_pools_leave_the_padding_out():
  x = np.random.default_rng(0).normal(size=(1, 5, 6, 2)).astype(np.float32) - 3
  windows = {
    (i, j): x[0, max(0, i - 1) : i + 2, max(0, j - 1) : j + 2].reshape(-1, 2)
    for i, j in np.ndindex(5, 6)
  }
  mean = np.array([w.mean(0) for w in windows.values()]).reshape(5, 6, 2)
  np.testing.assert_allclose(inception.average(x)[0], mean, rtol=1e-5)
  inner = np.array([windows[i, j].max(0) for i in (1, 3) for j in (1, 3)]).reshape(2, 2, 2)
  np.testing.assert_array_equal(inception.halve(x)[0], inner)


def test_a_folded_norm_is_the_norm_after_the_convolution(tmp_path):
  rng = np.random.default_rng(0)
  tensors = {"c.conv.weight": rng.normal(size=(5, 4, 1, 1)).astype(np.float32)}
  for name in ("weight", "bias", "running_mean", "running_var"):
    tensors[f"c.bn.{name}"] = rng.uniform(0.5, 1.5, 5).astype(np.float32)
  folded = inception.fold(Weights(write(tmp_path / "w", tensors)), "c", (1, 1, 4, 5))
  x = rng.normal(size=(3, 4))
  y = x @ tensors["c.conv.weight"][:, :, 0, 0].T
  y = (y - tensors["c.bn.running_mean"]) / np.sqrt(tensors["c.bn.running_var"] + 1e-3)
  y = y * tensors["c.bn.weight"] + tensors["c.bn.bias"]
  np.testing.assert_allclose(x @ folded["kernel"][0, 0] + folded["bias"], y, atol=1e-5)


def test_mistakes_cost_a_sentence(path, oracle, tmp_path):
  tensors = tensors_of(oracle)
  del tensors["Mixed_7c.branch_pool.bn.running_var"]
  with pytest.raises(UserError, match=r"no tensor 'Mixed_7c.branch_pool.bn.running_var'"):
    inception.load(write(tmp_path / "part.safetensors", tensors))
  imagenet = {k: v[:1000] for k, v in tensors_of(oracle).items() if k.startswith("fc.")}
  with pytest.raises(UserError, match=r"'fc.weight' has the shape \(1000,"):
    inception.load(write(tmp_path / "part.safetensors", tensors_of(oracle) | imagenet))
  (tmp_path / "part.safetensors").unlink()
  params, apply = inception.load(path)
  for images in (np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 8, 8, 1), np.uint8)):
    with pytest.raises(AssertionError):
      apply(params, images)
