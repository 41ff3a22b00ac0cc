"""The schedule at its corners; Muon against singular values; what it moves, and what decays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ism_digits, seqmatch_arithmetic, seqmatch_gpt2
from ism_jax import method as ism
from seqmatch_jax import method as seqmatch
from train_jax import mesh as mesh_lib
from train_jax import optim
from train_jax.errors import UserError
from train_jax.optim import OptimConfig
from train_jax.state import flatten

CONSTANT = {"warmup": 0, "final": 1.0}


def settings(**changes) -> OptimConfig:
  common = {"name": "adamw", "lr": 1e-3, "muon_lr": 0.02, "warmup": 10, "final": 0.1, "b1": 0.9}
  common |= {"b2": 0.99, "weight_decay": 0.0, "mu_dtype": "float32"}
  return OptimConfig(**{**common, "clip": 1.0, "grad_accum_steps": 1, **changes})


def make(steps=100, **changes):
  return optim.make_optimizer(settings(**changes), steps)


def first_update(tx, params, gradients=None):
  zeros = jax.tree.map(jnp.zeros_like, params)
  gradients = zeros if gradients is None else gradients
  return jax.jit(lambda p, g: tx.update(g, tx.init(p), p))(params, gradients)[0]


@pytest.mark.parametrize(
  "changes, steps, wanted",
  [
    # Warms up, then follows a cosine.
    ({}, 100, {0: 1e-4, 5: 5.5e-4, 10: 1e-3, 55: 5.5e-4, 100: 1e-4, 500: 1e-4}),
    ({"final": 1.0}, 100, dict.fromkeys((10, 40, 99, 100, 1000), 1e-3)),
    ({"warmup": 0}, 100, {0: 1e-3}),
    ({"warmup": 100}, 2, {0: 1e-5, 1: 1.99e-5}),  # a run that is shorter than its warm-up
  ],
)
def test_schedule(changes, steps, wanted):
  rate = optim.schedule(settings(**changes), steps)
  np.testing.assert_allclose([rate(i) for i in wanted], [*wanted.values()], rtol=1e-5)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_matrices_decay_by_adamws_rate_and_nothing_else_does(name):
  params = {
    "blocks": {"dense": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))}},
    "norm": {"scale": jnp.ones(2)},
    "embed": {"embedding": jnp.ones((5, 2))},
    "adapted": {"q_a": jnp.ones((2, 3)), "q_b": jnp.ones((3, 2)), "scale": jnp.ones(2)},
    "kernel": jnp.ones((2, 2)),
  }
  tx = make(name=name, lr=0.1, muon_lr=7.0, weight_decay=0.5, **CONSTANT)
  for path, update in flatten(first_update(tx, params)).items():
    matrix = any(part in path for part in ("kernel", "q_a", "q_b"))
    np.testing.assert_allclose(update, -0.1 * 0.5 if matrix else 0, rtol=1e-6, err_msg=path)


def test_adamw_takes_its_moments_from_the_arguments():
  tx = make(lr=1.0, b1=0.8, b2=0.6, **CONSTANT)
  params, state = jnp.zeros(1), tx.init(jnp.zeros(1))
  for gradient in (1.0, 3.0):
    update, state = tx.update(jnp.full(1, gradient), state, params)
  m = (0.8 * 0.2 * 1 + 0.2 * 3) / (1 - 0.8**2)
  v = (0.6 * 0.4 * 1 + 0.4 * 9) / (1 - 0.6**2)
  np.testing.assert_allclose(update, -m / np.sqrt(v), rtol=1e-5)


def orthogonalized(matrix: np.ndarray) -> np.ndarray:
  """U p(S) V^T in float64, p being four times Jordan's quintic.

  U S V^T is the matrix with row i divided by sqrt(sum_j |x_i . x_j|), so that S <= 1 (Boissin et
  al., arXiv 2512.04632); its columns, where there are more rows.
  """
  if matrix.shape[0] > matrix.shape[1]:
    return orthogonalized(matrix.T).T
  x = matrix.astype(np.float64)
  u, s, v = np.linalg.svd(x / np.sqrt(np.abs(x @ x.T).sum(1))[:, None], full_matrices=False)
  for _ in range(4):
    s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
  return u * s @ v


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (8, 8), (3, 5, 7), (2, 7, 5), (4, 1, 6)])
def test_muon_moves_by_the_singular_vectors_of_its_momentum(shape):
  """Two steps, so that the momentum is none of the gradients; of each matrix of a stack alone."""
  tx = make(name="muon", lr=1e-3, muon_lr=0.5, **CONSTANT)
  params = {"blocks": {"kernel": jnp.zeros(shape)}}
  state, (first, second) = tx.init(params), np.random.default_rng(0).normal(size=(2, *shape))
  for gradient in (first, second):
    update, state = tx.update({"blocks": {"kernel": jnp.array(gradient)}}, state, params)
  b = optim.MOMENTUM  # Nesterov's momentum, its bias corrected as that of the step that follows
  momentum = b * (b * first + second) * (1 - b) / (1 - b**3) + second * (1 - b) / (1 - b**2)
  scale = max(1, shape[-1] / shape[-2]) ** 0.5
  matrices = momentum.reshape(-1, *shape[-2:])
  wanted = -0.5 * scale * np.stack([orthogonalized(m) for m in matrices]).reshape(shape)
  np.testing.assert_allclose(update["blocks"]["kernel"], wanted, atol=2e-5)


def test_muon_brings_singular_values_near_1():
  rng = np.random.default_rng(1)
  u, v = (np.linalg.qr(rng.normal(size=(40, 40)))[0] for _ in range(2))
  gradient = {"blocks": {"kernel": jnp.array(u * np.geomspace(1, 0.05, 40) @ v)}}
  tx = make(name="muon", muon_lr=1.0, **CONSTANT)
  update = first_update(tx, jax.tree.map(jnp.zeros_like, gradient), gradient)
  values = np.linalg.svd(np.array(update["blocks"]["kernel"], np.float64), compute_uv=False)
  assert 0.6 < values.min() < values.max() < 1.25


def test_muon_follows_the_schedule_of_adamw_at_its_own_rate():
  gradient = {"blocks": {"kernel": jnp.eye(4)}, "bias": jnp.ones(4)}
  tx = make(name="muon", lr=1e-3, muon_lr=0.04, warmup=4, final=1.0)
  state, sizes = tx.init(gradient), []
  for _ in range(6):
    update, state = tx.update(gradient, state, gradient)
    sizes.append([float(-update["bias"][0]), float(-update["blocks"]["kernel"][0, 0])])
  adam, muon = np.array(sizes).T
  np.testing.assert_allclose(adam, 1e-3 * np.array([1, 1.75, 2.5, 3.25, 4, 4]) / 4, rtol=1e-4)
  np.testing.assert_allclose(muon / adam, muon[0] / adam[0], rtol=1e-4)
  assert 0.6 < muon[-1] / 0.04 < 1.25


def by_muon(config, module) -> set[str]:
  _, metadata = module.make_method(config, mesh_lib.make_mesh())
  params = jax.eval_shape(module.make_network(config, metadata)[0], jax.random.key(0))
  return {name for name, yes in optim.by_muon(params).items() if yes}


def test_muon_takes_the_matrices_inside_the_blocks_by_name():
  layers = ("attention.qkv", "attention.out", "mlp.inner", "mlp.outer", "modulation")
  wanted = {f"blocks.{layer}.kernel" for layer in layers}
  assert by_muon(ism_digits.get_config("debug"), ism) == wanted
  wanted = {f"blocks.{layer}.kernel" for layer in ("qkv", "out", "gate_up", "down")}
  assert by_muon(seqmatch_arithmetic.get_config("debug"), seqmatch) == wanted
  adapters = seqmatch_gpt2.get_config("debug")
  assert by_muon(adapters, seqmatch) == set()


def test_muon_without_a_matrix_to_move_is_refused():
  with pytest.raises(UserError, match=r"optim.name='muon' moves the matrices inside .* none"):
    make(name="muon").init(
      {"blocks": {"q_a": jnp.ones((2, 3))}, "out": {"kernel": jnp.ones((2, 3))}}
    )
  with pytest.raises(UserError, match=r"takes matrices.*blocks.gate.kernel has the shape \(3,\)"):
    make(name="muon").init({"blocks": {"gate": {"kernel": jnp.ones(3)}}})


@pytest.mark.parametrize("layout", [(8, 1), (2, 2), (1, 4)])
def test_muon_on_a_mesh_moves_as_on_one_device(layout, monkeypatch):
  monkeypatch.setattr(mesh_lib, "SMALL", 64)
  draw = np.random.default_rng(0).normal(size=(3, 2, 3, 16, 32)).astype(np.float32)
  tx, moved = make(name="muon", weight_decay=0.1), []
  for mesh in (mesh_lib.make_mesh(devices=jax.devices()[:1]), mesh_lib.make_mesh(*layout)):
    params = {"blocks": {"kernel": draw[0, 0]}, "out": {"kernel": draw[0, 1, 0]}}

    def place(tree, mesh=mesh):
      return jax.device_put(tree, mesh_lib.state_sharding(tree, mesh))

    params = place(jax.tree.map(jnp.array, params))
    state = place(tx.init(params))
    for step in (1, 2):
      gradient = place({"blocks": {"kernel": draw[step, 0]}, "out": {"kernel": draw[step, 1, 0]}})
      update, state = jax.jit(mesh_lib.with_mesh(mesh, tx.update))(gradient, state, params)
    moved.append(flatten(update))
  for name, alone in moved[0].items():
    np.testing.assert_allclose(moved[1][name], alone, rtol=1e-4, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_first_moments_may_be_kept_in_bfloat16(name):
  full, half = (make(name=name, mu_dtype=kind, **CONSTANT) for kind in ("float32", "bfloat16"))
  params = {"blocks": {"kernel": jnp.zeros((1, 20, 50))}, "kernel": jnp.zeros((20, 50))}
  states, updates = [full.init(params), half.init(params)], [None, None]
  for draw in np.random.default_rng(0).normal(size=(3, 1, 20, 50)).astype(np.float32):
    gradient = {"blocks": {"kernel": jnp.array(draw)}, "kernel": jnp.array(draw[0])}
    for i, tx in enumerate((full, half)):
      updates[i], states[i] = tx.update(gradient, states[i], params)
  kinds = [[a.dtype.name for a in jax.tree.leaves(s) if a.size == 1000] for s in states]
  # First and second moments of each matrix that AdamW moves; Muon has the first only.
  count = 4 if name == "adamw" else 3
  assert kinds[0] == ["float32"] * count and sorted(kinds[1]) == ["bfloat16"] * 2 + ["float32"] * (
    count - 2
  )
  for update, wanted in zip(*map(jax.tree.leaves, reversed(updates)), strict=True):
    assert update.dtype == jnp.float32
    error = np.abs(update - wanted) / np.abs(wanted).mean()
    # Roundings to 8 bits, of moments that may cancel.
    assert 0 < error.max() < 0.1


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"name": "sgd"}, "optim.name='sgd' is unknown; choose from adamw, muon"),
    ({"lr": 0.0}, "optim.lr=0.0 must be above 0"),
    ({"lr": float("nan")}, "optim.lr=nan must be above 0"),
    ({"muon_lr": -0.02}, "optim.muon_lr=-0.02 must be above 0"),
    ({"warmup": -50}, "optim.warmup=-50 must be at least 0"),
    ({"final": -0.1}, "optim.final=-0.1 must be at least 0"),
    ({"weight_decay": -1.0}, "optim.weight_decay=-1.0 must be at least 0"),
    ({"b1": 1.5}, "optim.b1=1.5 must be between 0 and 1, below 1"),
    ({"b2": 1.0}, "optim.b2=1.0 must be between 0 and 1, below 1"),
    ({"clip": 0.0}, "optim.clip=0.0 must be above 0"),
    ({"grad_accum_steps": 0}, "optim.grad_accum_steps=0 must be at least 1"),
    ({"mu_dtype": "float8"}, "optim.mu_dtype='float8' is unknown; choose"),
  ],
)
def test_settings_that_cannot_be_are_refused_in_a_sentence(changes, message):
  with pytest.raises(UserError, match=message):
    settings(**changes)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_numbers_that_may_change_when_a_run_goes_on_do_not_shape_the_state(name):
  params = {"blocks": {"kernel": jnp.ones((2, 2))}, "bias": jnp.ones(2)}

  def state(steps, **changes):
    return jax.eval_shape(make(steps, name=name, **changes).init, params)

  others = {"lr": 1e-4, "muon_lr": 1.0, "warmup": 0, "final": 1.0, "weight_decay": 0.1}
  assert state(900, b1=0.0, b2=0.0, **others) == state(100)
