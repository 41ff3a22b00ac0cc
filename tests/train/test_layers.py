"""Layers against plain formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from train_jax import layers


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("leading", [(), (2,), (2, 5), (2, 3, 5)])
def test_dense_is_a_matrix_product_over_the_last_axis(leading):
  dense = layers.Dense(4, 6, rngs=nnx.Rngs(0))
  dense.bias[...] = jnp.arange(6.0)
  x = normal(0, *leading, 4)
  wanted = x @ np.asarray(dense.kernel[...]) + np.arange(6)
  found = dense(jnp.asarray(x))
  assert found.shape == (*leading, 6)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_dense_names_its_matrix_kernel():
  """Weight decay goes by that name."""
  state = nnx.to_pure_dict(nnx.state(layers.Dense(4, 6, rngs=nnx.Rngs(0))))
  assert {name: a.shape for name, a in state.items()} == {"kernel": (4, 6), "bias": (6,)}


def test_dense_computes_in_its_dtype_and_keeps_float32_parameters():
  dense = layers.Dense(4, 6, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
  assert dense(jnp.ones((2, 3, 4))).dtype == jnp.bfloat16
  assert dense.kernel[...].dtype == jnp.float32


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.02)])
def test_gradient_of_the_output_layer(dtype, tolerance):
  rng = np.random.default_rng(0)
  shapes = (2, 3, 8), (8, 5), (2, 3, 5)
  x, matrix, weight = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)

  def gradient(product):
    return jax.grad(lambda pair: jnp.sum(jnp.sin(product(*pair)) * weight))((x, matrix))

  exact = gradient(lambda x, matrix: x.astype("float32") @ matrix.astype("float32"))
  for found, wanted in zip(gradient(layers.output), exact, strict=True):
    assert found.dtype == dtype
    error = np.linalg.norm((found - wanted).astype("float32")) / np.linalg.norm(wanted.astype("f4"))
    assert error < tolerance


def test_embed_adds_the_gradient_of_a_row_in_float32():
  """In bfloat16 a sum of ones stays at 256."""
  embed = layers.Embed(5, 4, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
  graphdef, state = nnx.split(embed)
  index = jnp.array([3] * 1000 + [1])

  def total(state):
    rows = nnx.merge(graphdef, state)(index)
    assert rows.dtype == jnp.bfloat16
    return jnp.sum(rows.astype(jnp.float32))

  (gradient,) = jax.tree.leaves(jax.grad(total)(state))
  np.testing.assert_array_equal(gradient, np.outer([0, 1, 0, 1000, 0], np.ones(4)))
  table = embed.embedding[...]
  np.testing.assert_array_equal(embed(index), table[index].astype(jnp.bfloat16))


def test_mlp_is_dense_activation_dense():
  mlp = layers.Mlp(4, 8, 3, jnp.tanh, rngs=nnx.Rngs(1), dtype=jnp.float32)
  x = normal(1, 2, 5, 4)
  hidden = np.tanh(x @ np.asarray(mlp.inner.kernel[...]))
  wanted = hidden @ np.asarray(mlp.outer.kernel[...])
  np.testing.assert_allclose(mlp(jnp.asarray(x)), wanted, rtol=1e-4, atol=1e-5)


def test_sinusoids_are_cos_then_sin_from_frequency_1_down():
  x = np.array([0.0, 0.5, 3.0])
  found = layers.sinusoidal(jnp.asarray(x), 6, longest=1000.0)
  angle = x[:, None] * np.array([1, 0.1, 0.01])
  wanted = np.concatenate([np.cos(angle), np.sin(angle)], 1)
  np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_sinusoids_tell_neighbouring_steps_apart():
  codes = layers.sinusoidal(jnp.arange(1000.0), 64)
  distance = np.linalg.norm(codes[1:] - codes[:-1], axis=1)
  assert distance.min() > 0.5


def test_grid_holds_the_column_then_the_row_of_each_place():
  found = np.asarray(layers.sinusoidal_grid(3, 5, 8)).reshape(3, 5, 8)
  rows, columns = (np.asarray(layers.sinusoidal(jnp.arange(float(n)), 4)) for n in (3, 5))
  for i in range(3):
    for j in range(5):
      np.testing.assert_allclose(found[i, j], [*columns[j], *rows[i]], atol=1e-6)
  places = found.reshape(15, 8)
  apart = np.linalg.norm(places[:, None] - places[None], axis=-1) + np.eye(15)
  assert apart.min() > 0.1


def test_dense_has_the_gradient_of_a_batched_product():
  x, kernel = normal(2, 2, 5, 4), normal(3, 4, 6)
  graphdef = nnx.graphdef(layers.Dense(4, 6, use_bias=False, rngs=nnx.Rngs(0)))

  def flat(kernel):
    return jnp.sum(nnx.merge(graphdef, nnx.State({"kernel": kernel}))(jnp.asarray(x)) ** 2)

  def batched(kernel):
    return jnp.sum(jnp.einsum("blk,km->blm", x, kernel) ** 2)

  np.testing.assert_allclose(jax.grad(flat)(kernel), jax.grad(batched)(kernel), rtol=1e-4)
