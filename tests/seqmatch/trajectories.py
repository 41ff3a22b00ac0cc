"""Random trajectories with <backspace>s, and the texts that they go through."""

import numpy as np

from seqmatch_jax.tokens import BACKSPACE, PAD, SPECIAL


def pad(rows, width=None) -> np.ndarray:
  """Lists as the rows of an int32 array."""
  width = width or max(map(len, rows))
  return np.array([[*row, *[PAD] * (width - len(row))] for row in rows], np.int32)


def random_actions(rng, steps: int, erase: float, vocab: int) -> list[int]:
  """Of `steps` actions a share `erase` are <backspace>s, as far as there is something to erase."""
  actions, depth = [], 0
  for _ in range(steps):
    back = depth > 0 and rng.random() < erase
    actions.append(BACKSPACE if back else int(rng.integers(SPECIAL, vocab)))
    depth += -1 if back else 1
  return actions


def texts_of(actions, prompt=()) -> list[tuple[int, ...]]:
  """The text before each action and after the last one, <eos> appended."""
  texts = [tuple(prompt)]
  for action in actions:
    texts.append(texts[-1][:-1] if action == BACKSPACE else (*texts[-1], int(action)))
  return texts
