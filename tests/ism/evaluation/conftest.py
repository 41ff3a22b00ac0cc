"""The digits, and a stand-in for a model of them."""

from types import SimpleNamespace

import numpy as np
import pytest

from ism_jax.data import sources


@pytest.fixture(scope="session")
def source():
  return sources.digits()


@pytest.fixture
def asked():
  """What the stand-in was asked for, call by call."""
  return []


@pytest.fixture
def model(source, asked):
  """Its samples are real digits of the classes asked for, brighter with w."""

  def draw(params, seed, labels, w, nfe, batch=256, progress=None):
    asked.append((params, seed, len(labels), w, nfe))
    rows = [np.flatnonzero(source.labels == label)[seed + i] for i, label in enumerate(labels)]
    if progress is not None:
      progress(len(labels))
    return source.images(rows) * (1 + w)  # out of range for w > 0: callers clip

  return SimpleNamespace(names=source.names, params="params", sampler=draw)
