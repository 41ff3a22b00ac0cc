"""Both methods on a mesh: steps, samples and generations are those of one device."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import ism_digits, seqmatch_arithmetic
from ism_jax import dit
from ism_jax import method as ism
from ism_jax.sample import integrate
from seqmatch_jax import method as seqmatch
from seqmatch_jax import transformer
from seqmatch_jax.display.sample import make_stream
from seqmatch_jax.rollout import RolloutConfig, make_rollout
from seqmatch_jax.tokens import SPECIAL
from train_jax import mesh as mesh_lib
from train_jax.step import make_train_step


def ism_method(mesh):
  config = ism_digits.get_config("debug")
  config.pairing.pool = 0
  config.model.unroll = False
  return ism.make_method(config, mesh)[0], dict(config.ema)


def seqmatch_method(mesh):
  """Rollouts at the second step, the objective and the replay buffer from the first one on."""
  config = seqmatch_arithmetic.get_config("two_sum,debug")
  config.loss.warmup = 1
  config.model.unroll = False
  return seqmatch.make_method(config, mesh)[0], dict(config.ema)


@pytest.fixture(scope="module")
def run(make_state, make_mesh, perturb):
  """(make, mesh, parts) -> (state, losses) after twenty steps of a tiny network.

  Zeros are filled, and eps is large: Adam would blow a gradient that is zero but for rounding (of
  the keys' bias, say) up to a whole step.
  """
  tx = optax.adam(1e-2, eps=1e-3)

  @functools.cache
  def initial(make):
    method, decays = make(make_mesh(1, 1))
    quiet = method.init

    def init(key):
      params, aux_state = quiet(key)
      return perturb(params), aux_state

    return make_state(method._replace(init=init), tx, make_mesh(1, 1), decays)

  @functools.cache
  def train(make, mesh, parts):
    method, decays = make(mesh)
    shardings = mesh_lib.state_sharding(initial(make), mesh)
    state, losses = jax.device_put(initial(make), shardings), []
    step = mesh_lib.with_mesh(mesh, make_train_step(method, tx, decays, 1.0, parts))
    step = jax.jit(step, out_shardings=(shardings, None))
    stream = method.stream(0, 0)
    for batch in itertools.islice(stream, 20):
      state, metrics = step(state, mesh_lib.to_global(batch, mesh))
      losses.append(float(metrics["loss"]))
    stream.close()
    return state, losses

  return train


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 4, 2)], ids=str)
def test_sharded_samples_equal_unsharded(make_mesh, monkeypatch, perturb, shape):
  monkeypatch.setattr(mesh_lib, "SMALL", 64)
  sizes = dit.DiTConfig(8, 1, classes=3, patch=2, width=16, depth=2, heads=2)
  init, apply = dit.make_network(sizes)
  params = perturb(init(jax.random.key(0)))
  noise = np.random.default_rng(0).normal(size=(8, 8, 8, 1)).astype(np.float32)
  rows = {"x0": noise, "label": np.arange(8, dtype=np.int32) % 3, "w": np.ones(8, np.float32)}

  def sample(params, rows):
    return integrate(apply, params, rows["x0"], rows["label"], rows["w"], 4)

  mesh = make_mesh(*shape)
  split = jax.device_put(params, mesh_lib.state_sharding(params, mesh))
  found = jax.jit(mesh_lib.with_mesh(mesh, sample))(split, mesh_lib.to_global(rows, mesh))
  np.testing.assert_allclose(found, jax.jit(sample)(params, rows), atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 4, 2)], ids=str)
def test_sharded_generation_equals_unsharded(make_mesh, monkeypatch, shape):
  monkeypatch.setattr(mesh_lib, "SMALL", 64)
  sizes = transformer.TransformerConfig(vocab=21, width=16, depth=1, heads=2, hidden=32)
  network = transformer.make_network(sizes)
  generate = make_rollout(network, RolloutConfig(max_length=12, max_actions=6, max_backspaces=2))
  draw, shapes = np.random.default_rng(5), jax.eval_shape(network.init, jax.random.key(0))
  params = jax.tree.map(lambda a: (0.4 * draw.normal(size=a.shape)).astype(np.float32), shapes)
  token = draw.integers(SPECIAL, sizes.vocab, (8, 9)).astype(np.int32)

  def run(params, token):
    """Logits of tokens behind a prompt, fed one by one, that go back; the model's own actions."""
    prompt, row = token[:, :3], jnp.arange(8)

    def step(cache, i):
      one = jax.lax.dynamic_index_in_dim(token, i, 1, keepdims=False)
      return network.extend(params, cache, one, jnp.full(8, i))[::-1]

    cache = network.read(params, prompt, 9)
    forced = jax.lax.scan(step, cache, np.array([2, 3, 4, 5, 4, 5, 6, 7, 6]))[1]
    return forced, generate(params, prompt, 3 + 0 * row, jax.random.key(0), row).actions

  mesh = make_mesh(*shape)
  split = jax.device_put(params, mesh_lib.state_sharding(params, mesh))
  found = jax.jit(mesh_lib.with_mesh(mesh, run))(split, mesh_lib.to_global({"x": token}, mesh)["x"])
  for a, b in zip(found, jax.jit(run)(params, token), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("shape, n", [((2, 4, 1), 11), ((2, 4, 1), 3), ((1, 2, 4), 11)], ids=str)
def test_devices_share_a_generation_out(make_mesh, monkeypatch, shape, n):
  """Of n prompts, and of one typed into a terminal, by parameters that are split."""
  monkeypatch.setattr(mesh_lib, "SMALL", 64)
  sizes = transformer.TransformerConfig(vocab=21, width=32, depth=1, heads=4, hidden=64)
  network, limits = transformer.make_network(sizes), RolloutConfig(12, 9, 2)
  draw, shapes = np.random.default_rng(5), jax.eval_shape(network.init, jax.random.key(0))
  params = jax.tree.map(lambda a: (0.4 * draw.normal(size=a.shape)).astype(np.float32), shapes)
  prompt = draw.integers(SPECIAL, sizes.vocab, (n, 3)).astype(np.int32)
  rows = prompt, np.full(n, 3, np.int32), jax.random.key(0), np.arange(n)
  wanted = make_rollout(network, limits)(params, *rows)

  mesh, seen = make_mesh(*shape), []
  split = jax.device_put(params, mesh_lib.state_sharding(params, mesh))

  def extend(params, cache, token, start):
    jax.debug.inspect_array_sharding(cache[0][0], callback=lambda s: seen.append(s))
    return network.extend(params, cache, token, start)

  watched = network._replace(extend=extend)
  found = make_rollout(watched, limits, mesh)(split, *rows)
  parts = mesh_lib.batch_parts(mesh)
  whole = (-(-n // parts) * parts, 4, 12, 8)
  share = {s.shard_shape(whole) for s in seen}
  assert share == {(whole[0] // parts, 4 // shape[2], 12, 8)}, share
  for a, b in zip(found, wanted, strict=True):
    assert a.is_fully_replicated
    np.testing.assert_array_equal(a, b)

  one = (rows[0][:1], rows[1][:1], rows[2], rows[3][:1])
  typed = np.concatenate([*make_stream(network, limits, 4, mesh)(split, *one)], axis=1)
  np.testing.assert_array_equal(typed[0], wanted.actions[0, : typed.shape[1]])


@pytest.mark.parametrize("make", [ism_method, seqmatch_method])
@pytest.mark.parametrize(
  "shape, parts", [pytest.param((8, 1, 1), 1, marks=pytest.mark.slow), ((2, 2, 2), 2)], ids=str
)
def test_sharded_steps_equal_unsharded(run, make_mesh, monkeypatch, make, shape, parts):
  monkeypatch.setattr(mesh_lib, "SMALL", 64)
  alone, alone_losses = run(make, make_mesh(1, 1), parts)
  state, losses = run(make, make_mesh(*shape), parts)
  for tree in (state.params, state.opt_state, *state.ema.values()):
    kernels = [a for a in jax.tree.leaves(tree) if a.ndim > 1]
    split = [a.size / a.addressable_shards[0].data.size for a in kernels]
    assert np.mean(np.equal(split, shape[1] * shape[2])) >= 0.5
  np.testing.assert_allclose(losses, alone_losses, rtol=1e-5)
  moved = [float(jnp.abs(a).max()) for a in jax.tree.leaves(state.opt_state[0].mu)]
  assert max(moved) > 1e-3
  for name in ("params", "opt_state", "ema"):
    pairs = zip(*(jax.tree.leaves(getattr(s, name)) for s in (state, alone)), strict=True)
    for found, wanted in pairs:
      np.testing.assert_allclose(jax.device_get(found), jax.device_get(wanted), atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, *jax.device_get((state.aux_state, alone.aux_state)))
