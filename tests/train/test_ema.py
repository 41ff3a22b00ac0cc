"""The averages against their closed forms."""

import jax.numpy as jnp
import numpy as np
import pytest

from train_jax import ema

LATE = 10**6  # a step by which the warm-up is over


def run(decay, parameters, start, first_step):
  average = {"a": {"w": jnp.float32(start)}}
  for i, value in enumerate(parameters):
    step = jnp.int32(first_step + i)
    average = ema.update(average, {"w": jnp.float32(value)}, {"a": decay}, step)
  return average["a"]["w"]


@pytest.mark.parametrize(
  "decay, step, wanted",
  [
    (0.999, 0, 1 / 10),
    (0.999, 1, 2 / 11),
    (0.999, 90, 91 / 100),
    (0.999, 10**5, 0.999),
    (0.05, 0, 0.05),
  ],
)
def test_decay_warms_up(decay, step, wanted):
  np.testing.assert_allclose(ema.warmed_decay(decay, jnp.int32(step)), wanted, rtol=1e-6)


@pytest.mark.parametrize(
  "decay, values, start, wanted",
  [
    (0.9, [3.0] * 20, 1.0, 3 - 2 * 0.9**20),  # of a constant: a geometric approach
    (0.8, range(1, 31), 0.0, 30 - 0.8 / 0.2 * (1 - 0.8**30)),  # of a line: it lags behind
  ],
)
def test_average_has_its_closed_form(decay, values, start, wanted):
  np.testing.assert_allclose(run(decay, values, start, LATE), wanted, rtol=1e-5)


def test_warm_up_forgets_the_initialisation():
  n = 50
  left = np.prod([(1 + i) / (10 + i) for i in range(n)])
  assert left < 1e-6 < 0.999**n
  np.testing.assert_allclose(run(0.999, [0.0] * n, start=1.0, first_step=0), left, rtol=1e-4)


def test_is_float32_whatever_the_parameters_are():
  average = {"a": {"w": jnp.float32(1)}}
  for _ in range(10):
    params = {"w": jnp.bfloat16(1.0625)}
    average = ema.update(average, params, {"a": 0.999}, jnp.int32(LATE))
  assert average["a"]["w"].dtype == jnp.float32
  # In bfloat16 a step of 0.001 * 0.0625 from 1 would be rounded away.
  np.testing.assert_allclose(average["a"]["w"] - 1, 0.0625 * (1 - 0.999**10), rtol=1e-3)
