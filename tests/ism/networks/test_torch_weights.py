"""PyTorch's layouts, turned: against the formulas of a convolution and a linear layer."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ism_jax.networks import torch_weights
from train_jax.errors import UserError
from train_jax.storage.weights import Weights, save

RNG = np.random.default_rng(0)
CONV = RNG.normal(size=(5, 4, 3, 2)).astype(np.float32)  # out, in, h, w
LINEAR = RNG.normal(size=(5, 4)).astype(np.float32)  # out, in


@pytest.fixture
def weights(tmp_path):
  tensors = {
    "a.first.weight": CONV,
    "a.first.bias": CONV[:, 0, 0, 0],
    "a.list.1.to_out.0.weight": LINEAR,
    "a.pixel.weight": LINEAR[:, :, None, None],
    "a.norm.weight": LINEAR[0].astype(ml_dtypes.bfloat16),
    "a.token": LINEAR[None],
  }
  save(tmp_path / "w.safetensors", tensors, {})
  return Weights(tmp_path / "w.safetensors")


def test_a_convolution_slides_as_pytorchs(weights):
  x = RNG.normal(size=(1, 6, 7, 4)).astype(np.float32)
  kernel = torch_weights.kernel(weights, "a.first.weight", (3, 2, 4, 5))
  ours = jax.lax.conv_general_dilated(
    x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  theirs = np.zeros((4, 6, 5))
  for i, j in np.ndindex(4, 6):
    theirs[i, j] = np.einsum("ochw,hwc->o", CONV, x[0, i : i + 3, j : j + 2])
  np.testing.assert_allclose(ours[0], theirs, atol=1e-5)


@pytest.mark.parametrize("name", ["a.list.1.to_out.0.weight", "a.pixel.weight"])
def test_linear_layers_and_pixel_convolutions_stand_for_each_other(weights, name):
  np.testing.assert_array_equal(torch_weights.kernel(weights, name, (4, 5)), LINEAR.T)
  np.testing.assert_array_equal(torch_weights.kernel(weights, name, (1, 1, 4, 5))[0, 0], LINEAR.T)


def test_a_tree_is_read_by_its_paths(weights):
  def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)

  shapes = {
    "first": {"kernel": shape(3, 2, 4, 5), "bias": shape(5)},
    "list": {1: {"to_out": {"kernel": shape(4, 5)}}},
    "middle": {"scale": shape(4)},
    "own": shape(1, 5, 4),
  }
  names = {"to_out": "to_out.0", "middle": "norm", "own": "token"}
  params = torch_weights.read(weights, shapes, names, "a.")
  assert jax.tree.map(lambda a: a.shape, params) == jax.tree.map(lambda a: a.shape, shapes)
  assert {a.dtype.name for a in jax.tree.leaves(params)} == {"float32"}
  np.testing.assert_array_equal(params["list"][1]["to_out"]["kernel"], LINEAR.T)
  np.testing.assert_array_equal(params["first"]["bias"], CONV[:, 0, 0, 0])
  np.testing.assert_allclose(params["middle"]["scale"], LINEAR[0], rtol=1e-2)
  np.testing.assert_array_equal(params["own"], LINEAR[None])


@pytest.mark.parametrize(
  "name, shape, words",
  [
    ("a.none.weight", (4, 5), "no tensor 'a.none.weight'"),
    ("a.first.weight", (2, 3, 4, 5), r"'a.first.weight' has the shape \(5, 4, 3, 2\).*4, 2, 3\)"),
    ("a.pixel.weight", (5, 4), r"'a.pixel.weight' has the shape \(5, 4, 1, 1\)"),
    ("a.first.weight", (4, 5), r"'a.first.weight' has the shape"),
  ],
)
def test_what_does_not_fit_is_named(weights, name, shape, words):
  with pytest.raises(UserError, match=words):
    torch_weights.kernel(weights, name, shape)


def test_full_precision_reaches_every_product():
  def product(x, y):
    return x @ y

  x = jnp.ones((2, 2))
  assert "HIGHEST" not in str(jax.make_jaxpr(product)(x, x))
  assert "HIGHEST" in str(jax.make_jaxpr(torch_weights.full_precision(product))(x, x))
