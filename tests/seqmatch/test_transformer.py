"""The decoder: against a float64 pass in numpy, against one pass per state, and with its cache."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import seqmatch_llama7b
from seqmatch_jax import transformer
from seqmatch_jax.actions import tree
from seqmatch_jax.tokens import BACKSPACE, BOS, SPECIAL
from seqmatch_jax.transformer import TransformerConfig
from tests.seqmatch.trajectories import pad, random_actions, texts_of
from train_jax.errors import UserError
from train_jax.lora import LoraConfig
from train_jax.state import flatten

VOCAB = 12
SMALL = TransformerConfig(vocab=VOCAB, width=16, depth=2, heads=2, hidden=24)
KEY = jax.random.key(0)


def make(config):
  """The network, jitted, and parameters large enough for every part to have an effect."""
  network = transformer.make_network(config)
  rng = np.random.default_rng(1)
  shapes = jax.eval_shape(network.init, KEY)
  params = jax.tree.map(lambda a: (0.4 * rng.normal(size=a.shape)).astype(np.float32), shapes)
  return network._replace(apply=jax.jit(network.apply), extend=jax.jit(network.extend)), params


@pytest.fixture(scope="module")
def small():
  return make(SMALL)


@pytest.fixture(scope="module", params=["llama", "grouped", "gpt2"])
def each(request):
  """As `small`, of each kind of positions and of heads."""
  kinds = {"grouped": {"kv_heads": 1}, "gpt2": {"family": "gpt2", "context": 60, "tied": True}}
  return make(replace(SMALL, **kinds.get(request.param, {})))


def plain(network, params, texts, length, batch=2048):
  """Logits at the last token of each text, each from a pass of its own -> [len(texts), v]."""
  outputs = []
  position = np.broadcast_to(np.arange(length), (batch, length))
  for start in range(0, len(texts), batch):
    some = texts[start : start + batch]
    token = pad(some + [[BOS]] * (batch - len(some)), length)
    # What comes after the last token is PAD, and later than all that is looked at.
    logits = network.apply(params, token, position, np.full_like(token, length))
    outputs.append(logits[np.arange(len(some)), [len(text) - 1 for text in some]])
  return np.concatenate(outputs)


# --- the same network once more, in float64 numpy -------------------------------------------------


def norm(p, x):
  return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-5) * p["scale"]


def turn(x, position):
  """Features i and i + f / 2 as one complex number, times exp(i position frequency)."""
  half = x.shape[-1] // 2
  z = x[..., :half] + 1j * x[..., half:]
  z = z * np.exp(1j * position[:, None] * 10_000.0 ** (-np.arange(half) / half))
  return np.concatenate([z.real, z.imag], -1)


def numpy_decoder(config, params, token, position, sees):
  """One row [s], head by head and layer by layer -> [s, v]; node j sees the nodes in sees[j]."""
  params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  x, f = params["embed"]["embedding"][token], config.width // config.heads
  for layer in range(config.depth):
    block = jax.tree.map(lambda a: a[layer], params["blocks"])  # noqa: B023
    q, key, value = np.split(norm(block["norm1"], x) @ block["qkv"]["kernel"], 3, -1)
    mixed = np.zeros_like(x)
    for h in range(config.heads):
      mine = slice(h * f, (h + 1) * f)
      scores = turn(q[:, mine], position) @ turn(key[:, mine], position).T / np.sqrt(f)
      for j, nodes in enumerate(sees):
        share = np.exp(scores[j, nodes])
        mixed[j, mine] = share / share.sum() @ value[nodes, mine]
    x = x + mixed @ block["out"]["kernel"]
    gate, up = np.split(norm(block["norm2"], x) @ block["gate_up"]["kernel"], 2, -1)
    x = x + gate / (1 + np.exp(-gate)) * up @ block["down"]["kernel"]
  return norm(params["norm"], x) @ params["out"]["kernel"]


# prompt, then a, b, <backspace>, c, <backspace>, <backspace>, d: nodes 0 1 | 2 3 4 5, and padding.
A, B, C, D = range(SPECIAL, SPECIAL + 4)
TRAJECTORY = [A, B, BACKSPACE, C, BACKSPACE, BACKSPACE, D]
SEES = [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 5], [6]]


@pytest.fixture(scope="module")
def by_hand():
  """token, position, end of the trajectory above, in which no token comes twice."""
  batch = tree(pad([[BOS, D + 1]]), np.array([2], np.int32), pad([TRAJECTORY]), len(SEES))
  return batch["token"], batch["position"], batch["end"]


def test_logits_are_those_of_a_naive_pass(small, by_hand):
  network, params = small
  token, position, end = by_hand
  expected = numpy_decoder(SMALL, params, token[0], position[0], SEES)
  logits = network.apply(params, token, position, end)
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits[0], expected, atol=2e-5)


def test_a_node_depends_on_the_nodes_it_sees_and_on_no_others(small, by_hand):
  network, params = small
  token, position, end = by_hand

  def directions(embedding):
    logits = network.apply({**params, "embed": {"embedding": embedding}}, token, position, end)
    return jnp.sin(jnp.arange(VOCAB)) @ logits[0].T  # one number a node

  slope = jax.jacobian(directions)(params["embed"]["embedding"])[:, token[0]]  # [j, k, width]
  expected = [[k in nodes for k in range(len(SEES))] for nodes in SEES]
  np.testing.assert_array_equal(np.any(slope != 0, axis=-1), expected)


@pytest.mark.parametrize("packed", [1, 3])
def test_one_pass_gives_every_state_as_a_pass_of_its_own_does(each, packed):
  """Random trajectories, and padding."""
  (network, params), rows = each, 50 // packed
  rng = np.random.default_rng(packed)
  prompts = [[BOS, *rng.integers(SPECIAL, VOCAB, rng.integers(0, 6))] for _ in range(rows)]
  made = [
    [random_actions(rng, rng.integers(1, 25), rng.uniform(0, 0.4), VOCAB) for _ in range(packed)]
    for _ in range(rows)
  ]
  longest = max(len(actions) for row in made for actions in row)
  actions = np.array([pad(row, longest) for row in made])
  lengths = np.array([len(prompt) for prompt in prompts], np.int32)
  nodes = int((lengths + (actions >= SPECIAL).sum((1, 2))).max())
  batch = tree(pad(prompts), lengths, actions, nodes)
  logits = network.apply(params, batch["token"], batch["position"], batch["end"])

  states = {}  # (row, node) -> the text that its logits belong to
  for row, (prompt, trajectories) in enumerate(zip(prompts, made, strict=True)):
    for g, trajectory in enumerate(trajectories):
      texts = texts_of(trajectory, prompt)
      for i, text in enumerate(texts[:-1]):
        states[row, int(batch["read"][row, g * longest + i])] = text
      states[row, int(batch["next"][row, g * longest + len(trajectory) - 1])] = texts[-1]
  where = tuple(np.array(list(states)).T)
  np.testing.assert_allclose(
    np.asarray(logits)[where], plain(network, params, list(states.values()), 30), rtol=0, atol=1e-5
  )


# --- the cache ------------------------------------------------------------------------------------


def test_a_cache_that_rewinds_is_a_pass_over_the_text(each):
  network, params = each
  rng = np.random.default_rng(3)
  rows, steps = 8, 24
  prompts = [[BOS, *rng.integers(SPECIAL, VOCAB, n)] for n in rng.integers(0, 5, rows)]
  walks = [texts_of(random_actions(rng, steps, 0.4, VOCAB), p) for p in prompts]
  length = max(len(text) for walk in walks for text in walk)

  # The prompts, of different lengths, in one pass; then the top of each text again and again.
  cache = network.read(params, pad(prompts), length)
  for texts in [prompts, *zip(*walks, strict=True)]:
    top, last = (np.array(x) for x in ([t[-1] for t in texts], [len(t) - 1 for t in texts]))
    logits, cache = network.extend(params, cache, top, last)
    expected = plain(network, params, list(texts), length, rows)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_what_lies_behind_in_the_cache_is_not_seen(small):
  network, params = small
  clean = network.read(params, np.array([[BOS, A, B]]), 6)
  dirty = jax.tree.map(lambda a: a.at[:, :, 2:].set(50.0), clean)
  clean, dirty = (
    network.extend(params, cache, np.array([B]), np.array([2]))[0] for cache in (clean, dirty)
  )
  np.testing.assert_array_equal(dirty, clean)


# --- the recipe -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gradient(by_hand):
  """config -> (gradient, logits) of the same parameters."""

  def run(config, params):
    apply = transformer.make_network(config).apply
    logits = lambda params: apply(params, *by_hand)  # noqa: E731
    return jax.jit(jax.grad(lambda p: jnp.mean(logits(p) ** 2)))(params), jax.jit(logits)(params)

  return run


@pytest.mark.parametrize(("unroll", "remat"), [(True, "block"), (False, "products")])
def test_unroll_and_remat_change_neither_logits_nor_gradient(small, gradient, unroll, remat):
  _, params = small
  expected = gradient(SMALL, params)
  got = gradient(replace(SMALL, unroll=unroll, remat=remat), params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)


def test_bfloat16_is_close_to_float32(small, by_hand):
  network, params = small
  half, _ = make(replace(SMALL, dtype="bfloat16"))
  assert {a.dtype for a in jax.tree.leaves(jax.eval_shape(half.init, KEY))} == {jnp.dtype("f4")}
  token, position, end = by_hand
  full = network.apply(params, token, position, end)
  cached, cache = half.extend(
    params, half.read(params, token[:, :2], 4), token[:, 1], np.array([1])
  )
  assert {a.dtype for a in jax.tree.leaves(cache)} == {jnp.dtype("bfloat16")}
  for logits, expected in (
    (half.apply(params, token, position, end), full),
    (cached, full[:, 1]),
  ):
    assert logits.dtype == jnp.float32
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.05  # it is another precision, but the same function


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_not_rounded_to_bfloat16(tied, by_hand):
  network, params = make(replace(SMALL, dtype="bfloat16", tied=tied, erase=True))
  x = network.features(params, *by_hand)
  assert x.dtype == jnp.float32
  x = np.asarray(x, np.float64)
  matrix = params["embed"]["embedding"].T if tied else params["out"]["kernel"]
  erase = params["erase"]["kernel"].astype(jnp.bfloat16).astype(np.float64)
  exact = x @ matrix.astype(jnp.bfloat16).astype(np.float64)
  exact[..., BACKSPACE] = (x @ erase)[..., 0] + params["erase"]["bias"]
  np.testing.assert_allclose(network.apply(params, *by_hand), exact, rtol=1e-5, atol=1e-5)


def test_each_layer_has_its_own_first_values():
  params = jax.jit(transformer.make_network(SMALL).init)(KEY)
  kernel = params["blocks"]["qkv"]["kernel"]
  assert kernel.shape == (2, 16, 48)
  assert not np.any(kernel[0] == kernel[1])
  # As GPT-2's: what is added to the sum of 2 x 2 of them is drawn smaller by the root of that.
  found = {
    name: np.std(layer["kernel"]) for name, layer in params["blocks"].items() if "kernel" in layer
  }
  expected = {"qkv": 0.02, "out": 0.01, "gate_up": 0.02, "down": 0.01}
  assert found == pytest.approx(expected, rel=0.1)


def test_adapters_and_erase_are_learned_and_the_rest_is_kept_as_the_base_says():
  lora = LoraConfig(2, 4.0, ("q",), "bfloat16")
  network = transformer.make_network(replace(SMALL, erase=True, lora=lora))
  learned, kept = (
    {name: a.dtype for name, a in flatten(jax.eval_shape(draw, KEY)).items()}
    for draw in (network.init, network.frozen)
  )
  names = ("blocks.qkv.q_a", "blocks.qkv.q_b", "erase.kernel", "erase.bias")
  assert learned == dict.fromkeys(names, "float32")
  assert kept["blocks.down.kernel"] == "bfloat16" and kept["norm.scale"] == "float32"
  assert kept["embed.embedding"] == kept["out.kernel"] == "bfloat16" and not kept.keys() & learned


def test_at_the_size_of_llama_2_it_has_the_parameters_of_llama_2():
  sizes = seqmatch_llama7b.get_config().model
  sizes = {name: sizes[name] for name in ("width", "depth", "heads", "hidden")}
  config = replace(SMALL, vocab=32_000, **sizes)
  shapes = jax.eval_shape(transformer.make_network(config).init, KEY)
  assert sum(a.size for a in jax.tree.leaves(shapes)) == 6_738_415_616


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"width": 20, "heads": 8}, r"model.width=20 must be a multiple of .*nearest is 16"),
    ({"vocab": 0}, "model.vocab=0 must be at least 1"),
    ({"width": 0}, "model.width=0 must be at least 1"),
    ({"depth": 0}, "model.depth=0 must be at least 1"),
    ({"heads": 0}, "model.heads=0 must be at least 1"),
    ({"hidden": 0}, "model.hidden=0 must be at least 1"),
    ({"dtype": "float16"}, r"model.dtype='float16'.* float32, bfloat16"),
    ({"family": "bert"}, r"model.family='bert' is unknown; choose from llama, gpt2"),
    ({"heads": 4, "kv_heads": 3}, r"model.kv_heads=3 must divide model.heads=4"),
    ({"family": "gpt2"}, r"model.context=0 must be at least 1"),
  ],
)
def test_bad_sizes_are_refused_in_a_sentence(change, message):
  with pytest.raises(UserError, match=message):
    replace(SMALL, **change)
