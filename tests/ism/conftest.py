"""Stand-ins for the pretrained networks of large-scale evaluation, and what they judge against."""

import functools
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from ism_jax.networks import autoencoder
from tests.ism.stand_ins import SHAPE, SIZES, project, put_stand_ins, weights


@pytest.fixture
def stand_ins(monkeypatch):
  put_stand_ins(functools.partial(monkeypatch.setitem, sys.modules), monkeypatch.setattr)


@pytest.fixture
def files(tmp_path, stand_ins):
  """Weights of the stand-ins, and a reference of 300 images."""
  for i, name in enumerate(("inception", "dinov2", "vae")):
    (tmp_path / name).write_text(str(i))
  images = np.random.default_rng(9).integers(0, 256, (300, *SHAPE), np.uint8)
  np.savez(tmp_path / "real.npz", arr_0=images)
  names = {"inception": "inception", "dinov2": "dinov2", "reference": "real.npz"}
  return SimpleNamespace(
    folder=tmp_path,
    images=images,
    real=tmp_path / "real.npz",
    flags={name: str(tmp_path / file) for name, file in names.items()},
    inception=lambda x, kind="pool": project(weights(tmp_path / "inception", SIZES[kind]), x),
    dinov2=lambda x: project(weights(tmp_path / "dinov2", 7), x),
  )


@pytest.fixture
def fake_autoencoder(monkeypatch):
  """A decoder that repeats each latent's first three channels 8 x 8; returns the sizes it saw."""
  sizes = []

  def decode(params, z):
    sizes.append(len(z))
    return params * np.float32(0.1) * z[..., :3].repeat(8, 1).repeat(8, 2)

  fake = SimpleNamespace(params=np.float32(2), decode=decode)
  monkeypatch.setattr(autoencoder, "load", lambda path: fake)
  return sizes
