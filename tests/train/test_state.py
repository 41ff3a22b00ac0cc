"""The state of step 0."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train_jax import state as state_lib

DECAYS = {"target": 0.5, "sample": 0.99}


@pytest.fixture(scope="module")
def create(method):
  """seed -> the state of step 0."""
  return lambda seed: jax.jit(state_lib.create(method, optax.adam(0.1), DECAYS, seed))()


@pytest.fixture(scope="module")
def state(create):
  return create(0)


def test_begins_at_step_0_with_every_average_at_the_parameters(state, differences):
  assert int(state.step) == int(state.skipped) == 0
  assert state.step.dtype == state.skipped.dtype == jnp.int32
  assert set(state.ema) == set(DECAYS)
  for average in state.ema.values():
    assert differences(average, state.params) == []


def test_is_a_function_of_the_seed(state, create, differences):
  assert differences(create(0), state) == []
  other = differences(create(1), state)
  assert ".rng" in other and ".params['layer']['kernel']" in other


def test_run_key_is_not_the_key_of_the_parameters(method, state):
  params, _ = method.init(jax.random.wrap_key_data(state.rng))
  assert not np.allclose(params["layer"]["kernel"], state.params["layer"]["kernel"])


def test_is_a_frozen_pytree_of_all_its_fields(state):
  with pytest.raises(dataclasses.FrozenInstanceError):
    state.step = 1
  paths = jax.tree_util.tree_leaves_with_path(state)
  assert {path[0].name for path, _ in paths} == {f.name for f in dataclasses.fields(state)}


def test_init_params_are_begun_with_and_averaged(method):
  """And every array has a buffer of its own: it is donated."""
  init_params = {"layer.kernel": np.full((4, 3), 7, np.float32)}
  init = jax.jit(state_lib.create(method, optax.adam(0.1), DECAYS, 0))
  drawn, state = init(), init(init_params)
  for params in (state.params, *state.ema.values()):
    np.testing.assert_array_equal(params["layer"]["kernel"], init_params["layer.kernel"])
    np.testing.assert_array_equal(params["layer"]["bias"], drawn.params["layer"]["bias"])
  np.testing.assert_array_equal(state.rng, drawn.rng)
  for leaves in map(jax.tree.leaves, (drawn, state)):
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
