"""Double precision, and batches of a few trajectories with the text of every node."""

import jax
import numpy as np
import pytest

from seqmatch_jax.actions import replay, tree
from seqmatch_jax.tokens import BACKSPACE, BOS, PAD


@pytest.fixture
def float64():
  """Double precision for one test."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope="session")
def make_batch():
  """(rows of trajectories of actions, prompt) -> the batch, and the text of each node [b][s]."""

  def make(rows, prompt=(BOS, 6, 8)):
    """rows of trajectories of actions -> the batch, and the text of each node [b][s]."""
    group, length = max(map(len, rows)), max(len(t) for row in rows for t in row)
    actions = np.full((len(rows), group, length), PAD, np.int32)
    texts = []
    for i, row in enumerate(rows):
      nodes = [None] * (len(prompt) - 1) + [()]
      for j, trajectory in enumerate(row):
        actions[i, j, : len(trajectory)] = trajectory
        typed = [n for n, action in enumerate(trajectory, 1) if action > BACKSPACE]
        nodes += [tuple(replay([], trajectory[:n])) for n in typed]
      texts.append(nodes)
    size = max(map(len, texts)) + 1
    prompts = np.tile(np.int32(prompt), (len(rows), 1))
    batch = tree(prompts, np.full(len(rows), len(prompt), np.int32), actions, size)
    return batch, [nodes + [None] * (size - len(nodes)) for nodes in texts]

  return make
