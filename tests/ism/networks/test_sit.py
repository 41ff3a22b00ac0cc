"""SiT's weights: our network with them, against SiT written out in NumPy in PyTorch's layout."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ism_digits
from ism_jax import dit, method
from ism_jax.model import make_network
from ism_jax.networks import sit
from train_jax import mesh as mesh_lib
from train_jax import warm_start
from train_jax.errors import UserError
from train_jax.state import flatten
from train_jax.storage import exported
from train_jax.storage.weights import Weights, save

K, HEADS, DEPTH, P, C, CLASSES, SIDE = 32, 2, 3, 2, 3, 5, 8
GRID = SIDE // P
SIZES = dit.DiTConfig(
  image_size=SIDE, channels=C, classes=CLASSES, patch=P, width=K, depth=DEPTH, heads=HEADS
)
CONFIG = SimpleNamespace(model=SimpleNamespace(heads=HEADS))


def positions():
  """SiT's pos_embed, entry by entry: sin then cos, of the column and then of the row."""
  table = np.zeros((GRID * GRID, K))
  for row, column in np.ndindex(GRID, GRID):
    for i in range(K // 4):
      omega = 10_000 ** (-i / (K // 4))
      waves = (np.sin(column * omega), np.cos(column * omega), np.sin(row * omega))
      table[row * GRID + column, i :: K // 4] = (*waves, np.cos(row * omega))
  return table


def published(out_channels=2 * C):
  """Random tensors under SiT's names, in PyTorch's shapes."""
  shapes = {
    "x_embedder.proj": (K, C, P, P),
    "t_embedder.mlp.0": (K, 256),
    "t_embedder.mlp.2": (K, K),
    "final_layer.linear": (P * P * out_channels, K),
    "final_layer.adaLN_modulation.1": (2 * K, K),
  }
  for i in range(DEPTH):
    sizes = {"attn.qkv": (3, 1), "attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
    sizes["adaLN_modulation.1"] = (6, 1)
    shapes |= {f"blocks.{i}.{name}": (a * K, b * K) for name, (a, b) in sizes.items()}
  rng = np.random.default_rng(0)
  tensors = {"pos_embed": positions()[None]}
  for name, shape in shapes.items():
    tensors[f"{name}.weight"] = rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
    tensors[f"{name}.bias"] = 0.3 * rng.normal(size=shape[0])
  tensors["y_embedder.embedding_table.weight"] = rng.normal(size=(CLASSES + 1, K))
  return {name: a.astype(np.float32) for name, a in tensors.items()}


def numpy_sit(tensors, x, t, label):
  """One image [c, h, w] at time t in [0, 1] -> its velocity [c, h, w], in float64."""
  tensors = {name: a.astype(np.float64) for name, a in tensors.items()}
  linear = lambda name, x: x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]  # noqa: E731
  silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731
  gelu = lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))  # noqa: E731

  def norm(x, shift, scale):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * (1 + scale) + shift

  angle = t * np.exp(-np.log(10_000) * np.arange(128) / 128)
  c = linear("t_embedder.mlp.0", np.concatenate([np.cos(angle), np.sin(angle)]))
  c = linear("t_embedder.mlp.2", silu(c)) + tensors["y_embedder.embedding_table.weight"][label]
  tokens = np.zeros((GRID * GRID, K))
  for i, j in np.ndindex(GRID, GRID):
    window = x[:, i * P : (i + 1) * P, j * P : (j + 1) * P]
    product = np.einsum("kcpq,cpq->k", tensors["x_embedder.proj.weight"], window)
    tokens[i * GRID + j] = product + tensors["x_embedder.proj.bias"]
  tokens += tensors["pos_embed"][0]
  for i in range(DEPTH):
    name = f"blocks.{i}"
    shift1, scale1, gate1, shift2, scale2, gate2 = np.split(
      linear(f"{name}.adaLN_modulation.1", silu(c)), 6
    )
    qkv = linear(f"{name}.attn.qkv", norm(tokens, shift1, scale1)).reshape(-1, 3, HEADS, K // HEADS)
    heads = []
    for h in range(HEADS):
      q, k, v = (qkv[:, part, h] for part in range(3))
      scores = np.exp(q @ k.T * (K // HEADS) ** -0.5)
      heads.append(scores / scores.sum(-1, keepdims=True) @ v)
    tokens = tokens + gate1 * linear(f"{name}.attn.proj", np.concatenate(heads, -1))
    hidden = gelu(linear(f"{name}.mlp.fc1", norm(tokens, shift2, scale2)))
    tokens = tokens + gate2 * linear(f"{name}.mlp.fc2", hidden)
  shift, scale = np.split(linear("final_layer.adaLN_modulation.1", silu(c)), 2)
  patches = linear("final_layer.linear", norm(tokens, shift, scale))
  image = np.zeros((patches.shape[1] // P**2, SIDE, SIDE))
  for i, j in np.ndindex(GRID, GRID):
    patch = patches[i * GRID + j].reshape(P, P, -1).transpose(2, 0, 1)
    image[:, i * P : (i + 1) * P, j * P : (j + 1) * P] = patch
  return image[:C]


def stored(tmp_path, tensors):
  save(tmp_path / "sit.safetensors", tensors, {})
  return Weights(tmp_path / "sit.safetensors")


def begin(weights):
  """(init, apply, abstract parameters, tensors given to step 0, the line that is printed)."""
  init, apply = dit.make_network(SIZES)
  abstract = jax.eval_shape(init, jax.random.key(0))
  trained = warm_start.Trained("SiT", sit.convert(weights, CONFIG), {})
  fresh = ("embed_class", "embed_guidance", "embed_step")
  return init, apply, abstract, *warm_start.choose(trained, abstract, fresh)


@pytest.mark.parametrize("out_channels", [C, 2 * C], ids=["velocity", "learn_sigma"])
def test_network_is_sit_at_every_time_step_size_and_strength(out_channels, tmp_path):
  tensors = published(out_channels)
  init, apply, abstract, given, line = begin(stored(tmp_path, tensors))
  assert line.endswith("; drawn afresh: embed_guidance is not there, embed_step is not there")
  params = flatten(jax.jit(init)(jax.random.key(1)))
  leaves = [given.get(name, drawn) for name, drawn in params.items()]
  params = jax.tree.unflatten(jax.tree.structure(abstract), leaves)

  t = np.array([0, 0.25, 0.5, 127 / 128, 0.1, 0.9], np.float32)
  x = np.random.default_rng(1).normal(size=(len(t), C, SIDE, SIDE)).astype(np.float32)
  label = np.array([0, 1, 2, 3, 4, 5])  # the last is the null class
  wanted = np.stack([numpy_sit(tensors, *row) for row in zip(x, t, label, strict=True)])
  assert wanted.std() > 0.3  # and neighbours in t differ:
  assert np.abs(numpy_sit(tensors, x[0], 0.3, 0) - wanted[0]).max() > 1e-2
  for d, w in ((0.0, 0.0), (0.5, 1.0)):  # both embedded at zero effect
    found = jax.jit(apply)(
      params, x.transpose(0, 2, 3, 1), t, jnp.full(len(t), d), label, jnp.full(len(t), w)
    )
    np.testing.assert_allclose(
      found.transpose(0, 3, 1, 2), wanted, atol=2e-5 * np.abs(wanted).max()
    )


def test_a_run_begins_with_a_file_of_weights(tmp_path, capsys):
  config, file = ism_digits.get_config(), stored(tmp_path, published()).path
  sizes = {"patch": P, "width": K, "depth": DEPTH, "heads": HEADS}
  config.update({"model": sizes, "init_from": str(file)})
  metadata = {"names": list("abcde"), "shape": [SIDE, SIDE, C]}
  rules = method.warm_start(config, metadata)
  args = make_network, config.to_dict(), metadata, mesh_lib.make_mesh()
  given = warm_start.make_init_params(rules, *args)
  np.testing.assert_array_equal(
    given["embed_class.embedding"], published()["y_embedder.embedding_table.weight"]
  )
  assert f"began from {file}: {len(given)} tensors taken" in capsys.readouterr().out


def test_slow_waves_are_exact_and_small():
  matrix, t = sit.slow_waves(), np.random.default_rng(0).uniform(size=999)
  wave = lambda x: np.array([[np.cos(x / 10 ** (i / 32)) for i in range(128)]])  # noqa: E731
  other = lambda x: np.array([[np.sin(x / 10 ** (i / 32)) for i in range(128)]])  # noqa: E731
  ours, theirs = (np.concatenate([wave(x), other(x)], 1)[0].T for x in (1000 * t, t))
  np.testing.assert_allclose(ours @ matrix, theirs, atol=1e-8)
  assert np.abs(matrix).max() < 1 and not matrix[:96].any()  # nothing is amplified


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"pos_embed": positions()[None, :, ::-1]}, "'pos_embed' is not SiT's fixed sinusoids"),
    ({"projector.weight": np.ones(3)}, "holds 'projector.weight', which no SiT has"),
    ({"x_embedder.proj.weight": None}, "has no tensor 'x_embedder.proj.weight'"),
    ({"blocks.1.mlp.fc2.bias": None}, "has no tensor 'blocks.1.mlp.fc2.bias'"),
  ],
)
def test_what_is_no_sit_is_refused(change, message, tmp_path):
  tensors = {name: a for name, a in {**published(), **change}.items() if a is not None}
  with pytest.raises(UserError, match=message):
    sit.convert(stored(tmp_path, tensors), CONFIG)


def test_heads_of_a_published_width_are_known(tmp_path):
  table = {"x_embedder.proj.weight": np.zeros((1152, 4, 2, 2), np.float32)}
  with pytest.raises(UserError, match=r"width 1152, which SiT publishes with 16 heads; set --conf"):
    sit._check(stored(tmp_path, table), 12, set(table))


def test_our_own_file_is_not_taken_for_one(tmp_path):
  exported.save(tmp_path, {"out": {"bias": jnp.ones(2)}}, {"method": "ism"})
  with pytest.raises(UserError, match="has no tensor 'x_embedder"):
    sit.convert(Weights(tmp_path / exported.MODEL), CONFIG)
