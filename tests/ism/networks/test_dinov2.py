"""DINOv2: transformers' outputs, its resizes by hand, both namings, mistakes.

Dimensions: b batch, h w image, l tokens, k width.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax.networks import dinov2
from tests.ism.named_weights import read_oracle, tensors_of, write
from train_jax.errors import UserError
from train_jax.storage.weights import Weights

OLD = {
  "attention.q_proj": "attention.attention.query",
  "attention.k_proj": "attention.attention.key",
  "attention.v_proj": "attention.attention.value",
  "attention.o_proj": "attention.output.dense",
}


def forward_of(path):
  """The file's parameters, and the network on normalised images."""
  weights = Weights(path)
  config = dinov2.read_config(weights)
  shapes, forward = dinov2.make_network(config)
  return config, dinov2.read_params(weights, shapes, config.depth), forward


@pytest.fixture(scope="module")
def oracle():
  return read_oracle("vit_tiny")


@pytest.fixture(scope="module")
def path(oracle, tmp_path_factory):
  return write(tmp_path_factory.mktemp("weights") / "vit.safetensors", tensors_of(oracle))


def test_vit_s_agrees_with_transformers(tmp_path):
  oracle = read_oracle("dinov2_small")
  path = write(tmp_path / "vit.safetensors", tensors_of(oracle))
  config, params, forward = forward_of(path)
  path.unlink()  # 88 MB
  assert (config.width, config.depth, config.patch, config.stored) == (384, 12, 14, 37)
  assert sum(a.size for a in jax.tree.leaves(params)) == 22_056_576 - 384  # all but mask_token
  cls = jax.jit(forward)(params, oracle["image_0"])
  np.testing.assert_allclose(cls, oracle["cls_0"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("grid", ["0", "1"])
def test_other_sizes_and_grids_agree_with_transformers(path, oracle, grid):
  _, params, forward = forward_of(path)
  image, cls = oracle[f"image_{grid}"], oracle[f"cls_{grid}"]
  np.testing.assert_allclose(jax.jit(forward)(params, image), cls, rtol=0, atol=1e-5)
  np.testing.assert_allclose(forward(params, image), cls, rtol=0, atol=1e-5)  # not jitted


def test_both_namings_are_the_same_network(path, oracle, tmp_path):
  renamed = {}
  for name, value in tensors_of(oracle).items():
    for new, old in OLD.items():
      name = name.replace(new, old)
    renamed[name] = value
  _, old, _ = forward_of(write(tmp_path / "old.safetensors", renamed))
  jax.tree.map(np.testing.assert_array_equal, forward_of(path)[1], old)


def keys(x, a):
  """Keys' cubic kernel."""
  x = abs(x)
  if x <= 1:
    return (a + 2) * x**3 - (a + 3) * x**2 + 1
  return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("size, out", [(37, 16), (3, 8), (5, 5)])
def test_positions_are_read_bicubically(size, out, offset):
  expected = np.zeros((out, size))
  for i in range(out):
    at = (i + 0.5) * size / (out + offset) - 0.5
    for j in range(int(np.floor(at)) - 1, int(np.floor(at)) + 3):
      expected[i, min(max(j, 0), size - 1)] += keys(at - j, -0.75)
  ours = dinov2.cubic_matrix(size, out, offset)
  np.testing.assert_allclose(ours, expected, atol=1e-12)
  np.testing.assert_allclose(ours.sum(1), 1, atol=1e-12)
  if (size, offset) == (out, 0.0):
    np.testing.assert_array_equal(ours, np.eye(size))


@pytest.mark.parametrize("h, w", [(40, 30), (300, 448)])
def test_images_are_resized_bicubically_with_antialiasing(h, w):
  images = np.random.default_rng(0).integers(0, 256, (1, h, w, 3), dtype=np.uint8)
  matrices = []
  for size in (h, w):
    stretch = max(size / 224, 1)
    matrix = np.zeros((224, size))
    for i, j in np.ndindex(224, size):
      matrix[i, j] = keys((j - ((i + 0.5) * size / 224 - 0.5)) / stretch, -0.5)
    matrices.append(matrix / matrix.sum(1, keepdims=True))
  pixels = np.einsum("ih,jw,hwc->ijc", *matrices, images[0] / 255, optimize=True)
  expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
  ours = dinov2.preprocess(jnp.asarray(images))
  np.testing.assert_allclose(ours[0], expected, atol=1e-4)


def test_apply_is_the_network_on_preprocessed_images(path):
  images = np.random.default_rng(0).integers(0, 256, (2, 50, 40, 3), dtype=np.uint8)
  params, apply = dinov2.load(path)
  _, _, forward = forward_of(path)
  cls = jax.jit(apply)(params, images)
  assert cls.shape == (2, 128)
  expected = forward(params, dinov2.preprocess(jnp.asarray(images)))
  np.testing.assert_allclose(cls, expected, atol=1e-4)
  shifted = jax.jit(dinov2.load(path, offset=0.1)[1])(params, images)
  assert 1e-5 < np.abs(shifted - cls).max() < 0.1


def test_mistakes_cost_a_sentence(path, oracle, tmp_path):
  tensors = tensors_of(oracle)
  registers = {"embeddings.register_tokens": np.zeros((1, 4, 128), np.float32)}
  with pytest.raises(UserError, match="register tokens"):
    dinov2.load(write(tmp_path / "w", tensors | registers))
  swiglu = {k: v for k, v in tensors.items() if ".mlp." not in k}
  with pytest.raises(UserError, match=r"no tensor 'encoder.layer.0.mlp.fc1.weight'.*ViT-S, B or L"):
    dinov2.load(write(tmp_path / "w", swiglu))
  del tensors["encoder.layer.1.layer_scale2.lambda1"]
  with pytest.raises(UserError, match=r"no tensor 'encoder.layer.1.layer_scale2.lambda1'"):
    dinov2.load(write(tmp_path / "w", tensors))
  params, apply = dinov2.load(path)
  with pytest.raises(AssertionError):
    apply(params, np.zeros((1, 8, 8, 3), np.float32))
