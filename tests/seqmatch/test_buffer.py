"""The replay buffer: a ring of rows that draws what it holds, and goes on as if never stopped."""

from collections import deque

import jax
import numpy as np
import pytest

from seqmatch_jax import buffer
from seqmatch_jax.tokens import PAD
from train_jax.errors import UserError

ROWS, PROMPT, ACTIONS = 6, 3, 4
insert = jax.jit(buffer.insert)
draw = jax.jit(buffer.draw, static_argnums=(2, 3))


def batch_of(first, n):
  """n rows that are told apart by their number, from `first` on: prompt, length, actions."""
  number = np.arange(first, first + n, dtype=np.int32)
  prompt, actions = (np.repeat(number[:, None], width, 1) for width in (PROMPT, ACTIONS))
  return prompt + 1000, number + 1, actions + 2000


def numbers(rows):
  """The numbers of drawn rows, which must be whole."""
  number = np.asarray(rows["length"]) - 1
  np.testing.assert_array_equal(rows["prompt"], np.repeat(number[:, None] + 1000, PROMPT, 1))
  np.testing.assert_array_equal(rows["actions"], np.repeat(number[:, None] + 2000, ACTIONS, 1))
  return number.tolist()


@pytest.mark.parametrize("n", [1, 4, 6])
def test_it_holds_the_newest_rows_and_draws_no_others(n):
  held, newest = buffer.create(ROWS, PROMPT, ACTIONS), deque(maxlen=ROWS)
  for i in range(7):
    held = insert(held, *batch_of(i * n, n))
    newest.extend(range(i * n, (i + 1) * n))
    rows = draw(held, jax.random.key(i), 200)
    assert set(numbers(rows)) == set(newest)
    assert held["filled"] == len(newest)


def test_rows_of_an_empty_buffer_have_no_actions():
  rows = draw(buffer.create(ROWS, PROMPT, ACTIONS), jax.random.key(0), 5)
  np.testing.assert_array_equal(rows["actions"], PAD)


def test_rows_are_filled_up_with_ones_that_say_nothing():
  held = insert(buffer.create(ROWS, PROMPT, ACTIONS), *batch_of(0, 4))
  plain, filled = (draw(held, jax.random.key(3), 5, multiple) for multiple in (1, 4))
  assert len(filled["length"]) == 8
  for name, values in plain.items():
    np.testing.assert_array_equal(filled[name][:5], values)
  np.testing.assert_array_equal(filled["actions"][5:], PAD)


def test_draws_are_uniform():
  held = insert(buffer.create(ROWS, PROMPT, ACTIONS), *batch_of(0, 5))
  count = np.bincount(numbers(draw(held, jax.random.key(0), 10_000)), minlength=5)
  assert np.abs(count - 2000).max() < 5 * np.sqrt(2000)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"size": 0}, r"buffer.size=0 must be at least 1"),
    ({"refresh": 0}, r"buffer.refresh=0 must be at least 1"),
    ({"rollouts": 0}, r"buffer.rollouts=0 must be at least 1"),
    ({"draw": 0}, r"buffer.draw=0 must be at least 1"),
    ({"rollouts": 7}, r"buffer.size=6 must be at least buffer.rollouts=7"),
  ],
)
def test_bad_sizes_are_refused_in_a_sentence(change, message):
  with pytest.raises(UserError, match=message):
    buffer.BufferConfig(**{"size": 6, "refresh": 1, "rollouts": 2, "draw": 1, **change})
