"""Layers against plain formulas."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from train_jax import layers
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError


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


def test_dense_computes_in_its_dtype_and_keeps_float32_parameters():
  """Weight decay and Muon go by the name `kernel`."""
  dense = layers.Dense(4, 6, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
  assert dense(jnp.ones((2, 3, 4))).dtype == jnp.bfloat16
  found = {name: (a.shape, a.dtype) for name, a in nnx.to_pure_dict(nnx.state(dense)).items()}
  assert found == {"kernel": ((4, 6), jnp.float32), "bias": ((6,), jnp.float32)}


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
  found = layers.sinusoidal(jnp.asarray(x), 6)
  angle = x[:, None] * 10_000.0 ** (-np.arange(3) / 3)
  np.testing.assert_allclose(found, np.concatenate([np.cos(angle), np.sin(angle)], 1), atol=1e-6)


def test_grid_holds_the_column_then_the_row_of_each_place():
  found = np.asarray(layers.sinusoidal_grid(3, 5, 8)).reshape(3, 5, 8)
  rows, columns = (np.asarray(layers.sinusoidal(jnp.arange(float(n)), 4)) for n in (3, 5))
  for i, j in np.ndindex(3, 5):
    np.testing.assert_allclose(found[i, j], [*columns[j], *rows[i]], atol=1e-6)


def test_dense_has_the_gradient_of_a_batched_product():
  x, kernel = normal(2, 2, 5, 4), normal(3, 4, 6)
  graphdef = nnx.graphdef(layers.Dense(4, 6, use_bias=False, rngs=nnx.Rngs(0)))

  def flat(kernel):
    return jnp.sum(nnx.merge(graphdef, nnx.State({"kernel": kernel}))(jnp.asarray(x)) ** 2)

  def batched(kernel):
    return jnp.sum(jnp.einsum("blk,km->blm", x, kernel) ** 2)

  np.testing.assert_allclose(jax.grad(flat)(kernel), jax.grad(batched)(kernel), rtol=1e-4)


def softly(q, key, value, mask):
  """Attention in float64, head by head; heads of q share those of key and value in groups."""
  found, share = np.zeros(q.shape), q.shape[2] // key.shape[2]
  for b, n in np.ndindex(q.shape[0], q.shape[2]):
    scores = q[b, :, n] @ key[b, :, n // share].T / np.sqrt(q.shape[-1])
    scores = np.where(mask[b, 0], scores, -np.inf)
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    found[b, :, n] = weight / weight.sum(-1, keepdims=True) @ value[b, :, n // share]
  return found


@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("length", [6, 7])
@pytest.mark.parametrize("kind", layers.ATTENTION)
def test_attention_is_a_softmax_over_what_is_seen(kind, length, heads):
  q, *rest = (normal(i, 2, length, n, 8) for i, n in enumerate((4, heads, heads)))
  mask = np.random.default_rng(3).random((2, 1, length, length)) < 0.5
  mask |= np.eye(length, dtype=bool)
  found = layers.attend(q, *rest, kind, mask)
  np.testing.assert_allclose(found, softly(q, *rest, mask), rtol=1e-5, atol=1e-6)
  everything = layers.attend(q, *rest, kind)
  np.testing.assert_allclose(everything, softly(q, *rest, mask | True), rtol=1e-5, atol=1e-6)


@pytest.fixture
def fused(monkeypatch):
  """What cuDNN's attention is asked for, on a GPU that is not there: XLA answers."""
  asked, real = [], jax.nn.dot_product_attention

  def attention(q, key, value, *, mask, implementation):
    asked.append((implementation, q.shape[1], key.shape[1]))
    return real(q, key, value, mask=mask)

  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
  return asked


def test_cudnns_attention_gets_even_lengths(fused):
  """Its backward pass takes no others where there is a mask; what is added changes nothing."""

  def gradient(kind, length):
    arrays = [jnp.asarray(normal(i, 2, length, 4, 8)) for i in range(3)]
    mask = jnp.tril(jnp.ones((2, 1, length, length), bool))
    value = lambda arrays: jnp.sum(jnp.sin(layers.attend(*arrays, kind, mask)))  # noqa: E731
    return jax.value_and_grad(value)(arrays)

  for length, taken in ((6, 6), (7, 8)):
    found, wanted = gradient("cudnn", length), gradient("xla", length)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    assert fused == [("cudnn", taken, taken), ("xla", length, length)]
    fused.clear()
  layers.attend(*(normal(i, 2, 7, 4, 8) for i in range(3)), "cudnn")
  assert fused == [("cudnn", 7, 7)]


@pytest.mark.parametrize(("heads", "shared", "split"), [(4, 4, "tensor"), (4, 1, None)])
def test_cudnns_attention_is_shared_out_by_rows_and_heads(heads, shared, split, monkeypatch):
  """Its kernel takes no other layout on several devices, whatever that of its arguments is."""
  mesh, found, real = mesh_lib.make_mesh(2, 2), {}, jax.nn.dot_product_attention

  def look(name, a):
    jax.debug.inspect_array_sharding(a, callback=lambda sharding: found.update({name: sharding}))

  @jax.custom_vjp
  def watched(x):
    return x

  def backward(_, gradient):
    look("gradient", gradient)
    return (gradient,)

  watched.defvjp(lambda x: (x, None), backward)

  def attention(*arrays, mask, implementation):
    assert implementation == "cudnn"
    for name, a in zip(("q", "key", "value", "mask"), (*arrays, mask), strict=True):
      look(name, a)
    return watched(real(*arrays, mask=mask))

  def value(arrays, mask, kind):
    return jnp.sum(jnp.sin(layers.attend(*arrays, kind, mask)))

  arrays = [jnp.asarray(normal(i, 8, 5, n, 8)) for i, n in enumerate((heads, shared, shared))]
  mask = jnp.tril(jnp.ones((8, 1, 5, 5), bool))
  wanted = jax.grad(value)(arrays, mask, "xla")
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
  arrays = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec(None, None, None, "fsdp")))
  gradient = jax.jit(mesh_lib.with_mesh(mesh, partial(jax.grad(value), kind="cudnn")))
  for got, exact in zip(gradient(arrays, mask), wanted, strict=True):
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-6)
  whole = NamedSharding(mesh, PartitionSpec(*mesh_lib.ROWS, None, split))
  for name in ("q", "key", "value", "gradient"):
    assert found[name].is_equivalent_to(whole, 4), name
  assert found["mask"].is_equivalent_to(NamedSharding(mesh, mesh_lib.ROWS), 4)


@pytest.mark.parametrize("features", [4, 12, 264])
def test_cudnns_attention_takes_no_other_heads(fused, features):
  with pytest.raises(UserError, match=f"heads of 8, 16, .* model.heads is {features}; choose"):
    layers.attend(*(normal(i, 1, 2, 1, features) for i in range(3)), "cudnn")
  assert not fused
