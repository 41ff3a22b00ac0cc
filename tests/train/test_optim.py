"""The schedule at its corners, and what weight decay touches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train_jax import optim
from train_jax.errors import UserError


@pytest.mark.parametrize(
  "step, wanted", [(0, 1e-4), (5, 5.5e-4), (10, 1e-3), (55, 5.5e-4), (100, 1e-4), (500, 1e-4)]
)
def test_schedule_warms_up_then_follows_a_cosine(step, wanted):
  rate = optim.schedule(lr=1e-3, warmup=10, steps=100, final=0.1)
  np.testing.assert_allclose(rate(step), wanted, rtol=1e-5)


def test_schedule_with_final_1_is_constant_after_the_warm_up():
  rate = optim.schedule(lr=1e-3, warmup=10, steps=100, final=1.0)
  np.testing.assert_allclose([rate(i) for i in (10, 40, 99, 100, 1000)], 1e-3, rtol=1e-6)


def test_schedule_without_warm_up_begins_at_the_top():
  np.testing.assert_allclose(optim.schedule(1e-3, 0, 100, 0.1)(0), 1e-3, rtol=1e-6)


def test_schedule_of_a_run_shorter_than_its_warm_up():
  rate = optim.schedule(lr=1e-3, warmup=100, steps=2, final=0.1)
  assert 0 < rate(0) < rate(1) < 1e-3


def test_decay_touches_matrices_only():
  params = {
    "blocks": {"dense": {"kernel": jnp.ones((3, 2, 2)), "bias": jnp.ones((3, 2))}},
    "norm": {"scale": jnp.ones(2)},
    "embed": {"embedding": jnp.ones((5, 2))},
    "adapted": {"q_a": jnp.ones((2, 3)), "q_b": jnp.ones((3, 2)), "scale": jnp.ones(2)},
    "kernel": jnp.ones((2, 2)),
  }
  tx = optim.adamw(optim.schedule(0.1, 0, 10, 1.0), b1=0.9, b2=0.99, weight_decay=0.5)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = jax.jit(lambda p: tx.update(zeros, tx.init(p), p))(params)
  for path, update in jax.tree_util.tree_leaves_with_path(updates):
    matrix = any(name in jax.tree_util.keystr(path) for name in ("kernel", "q_a", "q_b"))
    wanted = -0.1 * 0.5 if matrix else 0
    np.testing.assert_allclose(update, wanted, rtol=1e-6, err_msg=str(path))


def test_adamw_takes_its_moments_from_the_arguments():
  tx = optim.adamw(lambda _: 1.0, b1=0.8, b2=0.6, weight_decay=0.0)
  params, state = jnp.zeros(1), tx.init(jnp.zeros(1))
  for gradient in (1.0, 3.0):
    update, state = tx.update(jnp.full(1, gradient), state, params)
  m = (0.8 * 0.2 * 1 + 0.2 * 3) / (1 - 0.8**2)
  v = (0.6 * 0.4 * 1 + 0.4 * 9) / (1 - 0.6**2)
  np.testing.assert_allclose(update, -m / np.sqrt(v), rtol=1e-5)


def test_first_moments_may_be_kept_in_bfloat16():
  full, half = (
    optim.adamw(lambda _: 1.0, 0.9, 0.99, 0.0, mu_dtype) for mu_dtype in ("float32", "bfloat16")
  )
  params = {"kernel": jnp.zeros(1000)}
  states, updates = [full.init(params), half.init(params)], [None, None]
  for gradient in np.random.default_rng(0).normal(size=(3, 1000)).astype(np.float32):
    for i, tx in enumerate((full, half)):
      updates[i], states[i] = tx.update({"kernel": jnp.array(gradient)}, states[i], params)
  kept = {str(leaf.dtype) for leaf in jax.tree.leaves(states[1][0].mu)}
  assert kept == {"bfloat16"} and states[1][0].nu["kernel"].dtype == jnp.float32
  assert updates[1]["kernel"].dtype == jnp.float32
  # Two roundings to 8 bits, of moments that may cancel.
  error = np.abs(updates[1]["kernel"] - updates[0]["kernel"])
  assert 0 < error.max() < 0.03


def test_settings_that_cannot_be_are_refused_in_a_sentence():
  for name, value in (("warmup", -50), ("final", -0.1)):
    with pytest.raises(UserError, match=f"optim.{name}={value} must be at least 0"):
      optim.schedule(**{"lr": 1.0, "warmup": 1, "steps": 10, "final": 1.0, name: value})
  for name in ("b1", "b2"):
    with pytest.raises(UserError, match=f"optim.{name}=1.5 must be at least 0 and below 1"):
      optim.adamw(lambda _: 1.0, **{"b1": 0.9, "b2": 0.99, "weight_decay": 0.0, name: 1.5})
  with pytest.raises(UserError, match=r"optim.mu_dtype='float8' is unknown; choose"):
    optim.adamw(lambda _: 1.0, 0.9, 0.99, 0.0, "float8")


def test_numbers_that_may_change_when_a_run_goes_on_do_not_shape_the_state():
  params = {"kernel": jnp.ones((2, 2))}

  def state(b1, b2, decay, **kwargs):
    return jax.eval_shape(optim.adamw(optim.schedule(**kwargs), b1, b2, decay).init, params)

  before = state(0.9, 0.99, 0.0, lr=1e-3, warmup=10, steps=100, final=0.1)
  assert state(0.0, 0.0, 0.1, lr=1e-4, warmup=0, steps=900, final=1.0) == before
