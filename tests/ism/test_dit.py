"""The network: against a float64 forward pass in numpy, and what it is before any training."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax import dit
from train_jax.errors import UserError

SMALL = dit.DiTConfig(image_size=8, channels=2, classes=3, patch=2, width=16, depth=2, heads=2)
SIZES = ("patch", "width", "depth", "heads", "mlp_ratio")
B = 4
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def inputs():
  x = np.random.default_rng(0).normal(size=(B, 8, 8, 2)).astype(np.float32)
  t = jnp.array([0.0, 0.25, 0.5, 0.75])
  d = jnp.array([1.0, 0.0, 0.5, 1 / 64])
  return x, t, d, jnp.array([0, 1, 3, 2]), jnp.array([0.0, 0.5, 1.0, 3.5])


def make(config):
  """apply, and parameters away from their first values, so that nothing is zero."""
  init, apply = dit.make_network(config)
  shapes = jax.eval_shape(init, KEY)
  rng = np.random.default_rng(1)
  params = jax.tree.map(lambda a: (0.2 * rng.normal(size=a.shape)).astype(np.float32), shapes)
  return jax.jit(apply), params


@pytest.fixture(scope="module")
def small():
  return make(SMALL)


@pytest.fixture(scope="module")
def first():
  """Parameters as initialised, except that the blocks and the output have some effect."""
  init, _ = dit.make_network(SMALL)
  params = jax.jit(init)(KEY)
  noise = lambda a: a + 0.1 * np.random.default_rng(2).normal(size=a.shape)  # noqa: E731
  opened = {name: jax.tree.map(noise, params[name]) for name in ("blocks", "modulation", "out")}
  return params, {**params, **opened}


# --- the same network once more, in float64 numpy -------------------------------------------------


def dense(p, x):
  return x @ p["kernel"] + p["bias"]


def silu(x):
  return x / (1 + np.exp(-x))


def gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def layer_norm(x):
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def rms_norm(p, x):
  return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-6) * p["scale"]


def waves(value, features):
  angle = value / 10_000 ** (np.arange(features // 2) / (features // 2))
  return np.concatenate([np.cos(angle), np.sin(angle)])


def numpy_dit(config, params, x, t, d, label, w):
  """One image [h, w, c], patch by patch, head by head, layer by layer."""
  grid, p, k = config.image_size // config.patch, config.patch, config.width
  level = np.log2(d * 128) + 1 if d else 0
  c = params["embed_class"]["embedding"][label]
  scalars = {"embed_time": config.time_scale * t, "embed_step": level, "embed_guidance": 4 * w}
  for name, value in scalars.items():
    c = c + dense(params[name]["outer"], silu(dense(params[name]["inner"], waves(value, 256))))
  c = silu(c)

  tokens = np.zeros((grid**2, k))
  for i, j in np.ndindex(grid, grid):
    patch = x[i * p : (i + 1) * p, j * p : (j + 1) * p].reshape(-1)
    position = np.concatenate([waves(j, k // 2), waves(i, k // 2)])
    tokens[i * grid + j] = dense(params["embed_patch"], patch) + position

  for layer in range(config.depth):
    block = jax.tree.map(lambda a: a[layer], params["blocks"])  # noqa: B023
    shift1, scale1, gate1, shift2, scale2, gate2 = np.split(dense(block["modulation"], c), 6)
    attention, mlp = block["attention"], block["mlp"]
    q, key, value = np.split(
      dense(attention["qkv"], layer_norm(tokens) * (1 + scale1) + shift1), 3, axis=-1
    )
    heads = []
    for h in range(config.heads):
      mine = slice(h * k // config.heads, (h + 1) * k // config.heads)
      qh, kh = q[:, mine], key[:, mine]
      if config.qk_norm:
        qh, kh = rms_norm(attention["norm_query"], qh), rms_norm(attention["norm_key"], kh)
      scores = np.exp(qh @ kh.T / np.sqrt(k // config.heads))
      heads.append(scores / scores.sum(-1, keepdims=True) @ value[:, mine])
    tokens = tokens + gate1 * dense(attention["out"], np.concatenate(heads, axis=-1))
    hidden = gelu(dense(mlp["inner"], layer_norm(tokens) * (1 + scale2) + shift2))
    tokens = tokens + gate2 * dense(mlp["outer"], hidden)

  shift, scale = np.split(dense(params["modulation"], c), 2)
  tokens = dense(params["out"], layer_norm(tokens) * (1 + scale) + shift)
  image = np.zeros(x.shape)
  for i, j in np.ndindex(grid, grid):
    image[i * p : (i + 1) * p, j * p : (j + 1) * p] = tokens[i * grid + j].reshape(p, p, -1)
  return image


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
def test_output_is_that_of_a_naive_forward_pass(qk_norm, inputs):
  config = replace(SMALL, qk_norm=qk_norm)
  apply, params = make(config)
  params64 = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  rows = zip(*(np.asarray(a, np.float64) for a in inputs[:3]), *map(np.asarray, inputs[3:]))  # noqa: B905
  expected = [numpy_dit(config, params64, *row) for row in rows]
  np.testing.assert_allclose(apply(params, *inputs), expected, atol=2e-4)


def test_output_is_zero_at_first(first, small, inputs):
  params, _ = first
  apply, _ = small
  output = apply(params, *inputs)
  assert output.shape == inputs[0].shape and output.dtype == jnp.float32
  np.testing.assert_array_equal(output, 0)
  gates = params["blocks"]["modulation"], params["modulation"]  # so blocks change nothing
  assert not any(np.any(a) for a in jax.tree.leaves(gates))


def test_step_and_guidance_have_no_effect_at_first(first, small, inputs):
  apply, _ = small
  _, opened = first
  x, t, d, label, w = inputs
  output = apply(opened, *inputs)
  assert np.abs(output).max() > 0.01
  np.testing.assert_array_equal(apply(opened, x, t, 0 * d, label, 0 * w), output)
  assert not np.allclose(apply(opened, x, t[::-1], d, label, w), output, atol=1e-4)
  assert not np.allclose(apply(opened, x, t, d, label[::-1], w), output, atol=1e-4)


def cost_of(apply, inputs):
  """params -> (mean square of the output, the output)."""

  def cost(params):
    output = apply(params, *inputs)
    return jnp.mean(output**2), output

  return cost


@pytest.fixture(scope="module")
def gradient(inputs):
  """params -> (gradient, output) of SMALL."""
  _, apply = dit.make_network(SMALL)
  return jax.jit(jax.grad(cost_of(apply, inputs), has_aux=True))


def test_step_and_guidance_can_be_learned_from_the_start(first, gradient):
  _, opened = first
  slope, _ = gradient(opened)
  for name in ("embed_step", "embed_guidance"):
    assert np.abs(slope[name]["outer"]["kernel"]).max() > 1e-5


def test_each_layer_has_its_own_first_values(first):
  params, _ = first
  kernel = params["blocks"]["mlp"]["inner"]["kernel"]
  assert kernel.shape == (2, 16, 64)
  assert not np.any(kernel[0] == kernel[1])

  # As in DiT: Xavier's limit of one layer (a fan-in that counted the layers would be smaller), and
  # what is no layer of the blocks or the patches by a normal distribution.
  attention, mlp = params["blocks"]["attention"], params["blocks"]["mlp"]
  for layer in (attention["qkv"], attention["out"], *mlp.values(), params["embed_patch"]):
    limit = np.sqrt(6 / sum(layer["kernel"].shape[-2:]))
    assert 0.95 * limit < np.abs(layer["kernel"]).max() <= limit
  for drawn in (*jax.tree.leaves(params["embed_class"]), params["embed_time"]["inner"]["kernel"]):
    np.testing.assert_allclose(np.std(drawn), 0.02, rtol=0.2)


def test_every_step_size_and_strength_is_told_apart(small, inputs):
  apply, params = small
  x, t, _, label, w = (a[:1] for a in inputs)
  steps = [0.0, *(2.0**-k for k in range(7))]
  strengths = [0.0, 0.25, 0.5, 3.25, 3.5]
  by_step = [apply(params, x, t, jnp.array([d]), label, w) for d in steps]
  by_strength = [apply(params, x, t, 0 * w, label, jnp.array([v])) for v in strengths]
  for outputs in (by_step, by_strength):
    gaps = [np.abs(a - b).max() for i, a in enumerate(outputs) for b in outputs[:i]]
    assert min(gaps) > 1e-2


def test_without_shortcuts_every_step_is_an_euler_step(small, inputs):
  apply, params = small
  x, t, d, label, w = inputs
  plain = make(replace(SMALL, shortcuts=False))[0](params, x, t, d, label, w)
  np.testing.assert_array_equal(plain, apply(params, x, t, 0 * d, label, w))
  assert np.abs(plain - apply(params, x, t, d, label, w))[0].max() > 1e-3


def test_rows_do_not_mix(small, inputs):
  apply, params = small
  output = apply(params, *inputs)
  order = np.array([2, 0, 3, 1])
  np.testing.assert_allclose(apply(params, *(a[order] for a in inputs)), output[order], atol=1e-5)


@pytest.mark.parametrize(("unroll", "remat"), [(True, "block"), (False, "products")])
def test_unroll_and_remat_change_neither_output_nor_gradient(
  small, inputs, gradient, unroll, remat
):
  _, params = small
  expected, output = gradient(params)
  _, apply = dit.make_network(replace(SMALL, unroll=unroll, remat=remat))
  got, output_again = jax.jit(jax.grad(cost_of(apply, inputs), has_aux=True))(params)
  np.testing.assert_allclose(output_again, output, atol=1e-4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, expected)


def test_remat_recomputes_what_it_names(inputs):
  def count(remat):
    """Matrix products of the linear layers and of attention, and all else, in the gradient."""
    init, apply = dit.make_network(replace(SMALL, remat=remat))
    params = jax.eval_shape(init, KEY)
    text = str(jax.make_jaxpr(jax.grad(lambda p: jnp.sum(apply(p, *inputs))))(params))
    products = text.count("dot_general[")
    batched = len(re.findall(r"dimension_numbers=\(\(\[\d\], \[\d\]\), \(\[0", text))
    return products - batched, batched, text.count("exp ")

  none, products, block = map(count, ("none", "products", "block"))
  assert none[0] == products[0] < block[0]
  assert none[1] < products[1] == block[1]
  assert none[2] < products[2] <= block[2]


def test_bfloat16_is_close_to_float32(small, inputs):
  apply, params = small
  config = replace(SMALL, dtype="bfloat16")
  init, apply_half = dit.make_network(config)
  half, full = jax.jit(apply_half)(params, *inputs), apply(params, *inputs)
  assert half.dtype == jnp.float32
  assert {a.dtype for a in jax.tree.leaves(jax.eval_shape(init, KEY))} == {jnp.dtype("float32")}
  error = np.linalg.norm(half - full) / np.linalg.norm(full)
  assert 1e-4 < error < 0.05  # it is another precision, but the same function
  assert np.mean(half == half.astype(jnp.bfloat16)) < 0.1  # and its sums are not rounded


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"patch": 3}, r"model.patch=3 does not divide data.image_size=8"),
    ({"width": 20, "heads": 4}, r"model.width=20 must be a multiple of .*nearest is 16"),
    *(({name: 0}, f"model.{name}=0 must be at least 1") for name in SIZES),
    ({"attention": "flash"}, r"model.attention='flash' is unknown"),
    ({"attention": "cudnn"}, r"model.attention='cudnn' needs .*'bfloat16', .*'float32'"),
    ({"remat": "True"}, r"model.remat='True' is unknown; .* none, products, block"),
    *(({"dtype": kind}, f"model.dtype='{kind}' is ") for kind in ("fp32", "int8", "float16")),
  ],
)
def test_bad_sizes_are_refused_in_a_sentence(changes, message):
  with pytest.raises(UserError, match=message):
    replace(SMALL, **changes)


# --- forward mode ---------------------------------------------------------------------------------


def slope(config, params, inputs):
  """d/dh of the network at (x + h u, t + h, d - h), by forward mode, and u."""
  _, apply = dit.make_network(config)
  x, t, d, label, w = inputs
  u = np.random.default_rng(5).normal(size=x.shape).astype(np.float32)

  def step(h):
    return apply(params, x + h * u, t + h, jnp.maximum(d, 1 / 16) - h, label, w)

  _, found = jax.jit(lambda h: jax.jvp(step, (h,), (1.0,)))(0.0)
  return np.asarray(found), u


def test_forward_mode_is_the_finite_difference_of_the_float64_network(small, inputs):
  smooth = replace(SMALL, time_scale=16.0)
  found, u = slope(smooth, small[1], inputs)
  params = jax.tree.map(lambda a: np.asarray(a, np.float64), small[1])
  x, t, d, label, w = (np.asarray(a, np.float64) for a in inputs)
  for i, c in enumerate(label.astype(int)):
    ahead, behind = (
      numpy_dit(smooth, params, x[i] + h * u[i], t[i] + h, max(d[i], 1 / 16) - h, c, w[i])
      for h in (1e-6, -1e-6)
    )
    expected = (ahead - behind) / 2e-6
    np.testing.assert_allclose(found[i], expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
  "changes, tolerance",
  [
    ({"remat": "block"}, 1e-6),
    ({"remat": "products", "unroll": True}, 1e-6),
    ({"dtype": "bfloat16"}, 0.1),
  ],
)
def test_forward_mode_knows_remat_and_bfloat16(changes, tolerance, small, inputs):
  smooth = replace(SMALL, time_scale=16.0)
  exact, found = (slope(c, small[1], inputs)[0] for c in (smooth, replace(smooth, **changes)))
  assert np.linalg.norm(found - exact) < tolerance * np.linalg.norm(exact)
