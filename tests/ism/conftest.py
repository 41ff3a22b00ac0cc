"""A run to open, and stand-ins for the pretrained networks of large-scale evaluation."""

import functools
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import main
from configs import ism_digits
from ism_jax.model import Model, make_network, make_record
from ism_jax.networks import autoencoder
from tests.ism.stand_ins import SHAPE, SIZES, project, put_stand_ins, weights

DIGITS = {"names": [str(i) for i in range(10)], "shape": [8, 8, 1], "examples": 1797}


@pytest.fixture(scope="session")
def small_config():
  """(option, **changes) -> a small config of digits; `section__key=value` changes a value."""

  def make(option="", **changes):
    config = ism_digits.get_config(f"{option},debug")
    config.batch, config.model.depth, config.eval.samples = 16, 1, 64
    for name, value in changes.items():
      config.update_from_flattened_dict({name.replace("__", "."): value})
    return config

  return make


@pytest.fixture(scope="session")
def make_model(perturb):
  """(config, metadata) -> a model of step 7 in memory, whose every input matters."""

  def make(config, metadata=DIGITS, **changes):
    init, _ = make_network(config, metadata)
    params = jax.jit(lambda key: perturb(init(key)))(jax.random.key(0))
    return Model.make(make_record(config.to_dict(), metadata, 7), lambda: params, **changes)

  return make


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory, small_config, make_model):
  """Directory of a run of two steps, which begins with the parameters of `make_model`."""
  workdir = tmp_path_factory.mktemp("run")
  config = small_config(seed=5, mesh__fsdp=2, init_from=str(workdir / "begin"))
  make_model(config).save_pretrained(workdir / "begin")
  assert main.train(config, workdir)
  return workdir


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
