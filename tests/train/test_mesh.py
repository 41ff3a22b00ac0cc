"""The sharding rule, batches that do not fit the devices, sharded against unsharded steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from configs import ism_digits
from ism_jax.method import make_method
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.step import make_train_step


@pytest.mark.parametrize(
  "shape, fsdp, wanted",
  [
    ((128, 256), 8, P(None, "fsdp")),
    ((256, 128), 8, P("fsdp")),
    ((256, 256), 8, P("fsdp")),  # a tie: the first
    ((28, 1000, 36), 8, P(None, "fsdp")),  # 28 and 36 are not divisible by 8
    ((1001, 128), 8, P(None, "fsdp")),  # the largest is not divisible, the next is
    ((1001, 127), 8, P()),
    ((2**14,), 2, P("fsdp")),
    ((2**14 - 2,), 2, P()),  # small
    ((), 2, P()),
    ((256, 256), 1, P()),
  ],
)
def test_rule_splits_the_largest_divisible_dimension_unless_small(shape, fsdp, wanted):
  assert mesh_lib.param_spec(shape, fsdp) == wanted


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_mesh_has_all_devices(fsdp):
  assert dict(mesh_lib.make_mesh(fsdp).shape) == {"data": 8 // fsdp, "fsdp": fsdp}


@pytest.mark.parametrize("fsdp", [0, 3, 16, -1])
def test_mesh_that_does_not_fit_the_devices_is_refused(fsdp):
  with pytest.raises(UserError, match=rf"mesh.fsdp={fsdp} .* 8 devices; choose a divisor of 8"):
    mesh_lib.make_mesh(fsdp)


@pytest.mark.parametrize("batch, near", [(12, 8), (20, 16), (3, 8), (0, 8), (-8, 8)])
def test_batch_that_does_not_divide_is_refused(batch, near):
  wanted = rf"batch={batch} is not divisible by the 8 devices; .* multiple of 8, such as {near}\."
  with pytest.raises(UserError, match=wanted):
    mesh_lib.check_batch(batch, mesh_lib.make_mesh())


def test_batch_is_laid_out_over_all_devices():
  mesh = mesh_lib.make_mesh(2)
  mesh_lib.check_batch(16, mesh)
  assert mesh_lib.process_rows(16) == slice(0, 16)
  rows = np.arange(32).reshape(16, 2)
  placed = mesh_lib.to_global({"x": rows}, mesh)["x"]
  np.testing.assert_array_equal(placed, rows)
  assert [s.data.shape for s in placed.addressable_shards] == [(2, 2)] * 8


def test_local_rows_of_one_process_are_all_of_them_in_order():
  mesh = mesh_lib.make_mesh(2)
  rows = np.arange(32).reshape(16, 2)
  np.testing.assert_array_equal(mesh_lib.to_local(mesh_lib.to_global({"x": rows}, mesh)["x"]), rows)
  everywhere = mesh_lib.replicate({"x": rows}, mesh)["x"]
  assert [s.data.shape for s in everywhere.addressable_shards] == [(16, 2)] * 8


def test_rows_of_the_processes_are_the_batch_in_order(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 4)
  parts = []
  for i in range(4):
    monkeypatch.setattr(jax, "process_index", lambda i=i: i)
    parts.extend(range(16)[mesh_lib.process_rows(16)])
  assert parts == list(range(16))


@pytest.fixture(scope="module")
def run(make_state, make_mesh, perturb):
  """(data, fsdp) -> (state, losses) after three steps of iSM on a tiny DiT.

  Zeros are filled, and eps is large: Adam would blow a gradient that is zero but for rounding (of
  the keys' bias, say) up to a whole step.
  """
  config = ism_digits.get_config("debug")
  config.pairing.pool = 0
  tx = optax.adam(1e-2, eps=1e-3)
  decays = dict(config.ema)

  method, _ = make_method(config, make_mesh(1, 1))
  quiet = method.init
  method = method._replace(init=lambda key: (perturb(quiet(key)[0]), ()))
  initial = make_state(method, tx, make_mesh(1, 1), decays)

  @functools.cache
  def train(mesh):
    shardings = mesh_lib.state_sharding(initial, mesh)
    state, losses = jax.device_put(initial, shardings), []
    step = make_train_step(method, tx, decays, config.optim.clip)
    step = jax.jit(step, out_shardings=(shardings, None))
    stream = method.stream(0, 0)
    for _ in range(3):
      state, metrics = step(state, mesh_lib.to_global(next(stream), mesh))
      losses.append(float(metrics["loss"]))
    stream.close()
    return state, losses

  return train


@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (2, 4)], ids=["8x1", "4x2", "2x4"])
def test_sharded_step_equals_unsharded(run, make_mesh, monkeypatch, shape):
  monkeypatch.setattr(mesh_lib, "SMALL", 64)
  alone, alone_losses = run(make_mesh(1, 1))
  state, losses = run(make_mesh(*shape))
  for tree in (state.params, state.opt_state, *state.ema.values()):
    kernels = [a for a in jax.tree.leaves(tree) if a.ndim > 1]
    shares = [a.size / a.addressable_shards[0].data.size for a in kernels]
    assert np.mean(np.equal(shares, shape[1])) > 0.5
  np.testing.assert_allclose(losses, alone_losses, rtol=1e-5)
  moved = [float(jnp.abs(a).max()) for a in jax.tree.leaves(state.opt_state[0].mu)]
  assert max(moved) > 1e-3
  for name in ("params", "opt_state", "ema"):
    pairs = zip(*(jax.tree.leaves(getattr(s, name)) for s in (state, alone)), strict=True)
    for found, wanted in pairs:
      np.testing.assert_allclose(jax.device_get(found), jax.device_get(wanted), atol=1e-5)
