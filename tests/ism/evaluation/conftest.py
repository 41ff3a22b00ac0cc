"""The digits, and a stand-in for a sampler of them."""

import numpy as np
import pytest

from ism_jax.data import sources


@pytest.fixture(scope="session")
def source():
  return sources.digits()


@pytest.fixture
def asked():
  """What the stand-in sampler was asked for, call by call."""
  return []


@pytest.fixture
def sample(source, asked):
  """A sampler that returns real digits of the classes asked for, brighter with w."""

  def draw(params, seed, labels, w, nfe, batch=256, progress=None):
    asked.append((params, seed, len(labels), w, nfe))
    rows = [np.flatnonzero(source.labels == label)[seed + i] for i, label in enumerate(labels)]
    if progress is not None:
      progress(len(labels))
    return source.images(rows) * (1 + w)  # out of range for w > 0: callers clip

  return draw
