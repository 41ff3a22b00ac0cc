"""Exported models: they sample as the run did, and without what the run was trained with."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import ism_jax
from configs import ism_digits
from ism_jax import method as ism
from ism_jax import path, sample
from ism_jax.networks import autoencoder
from tests.light import heavy_imports
from train_jax.errors import UserError

FACTS = {"names": ["cat", "dog", "owl"], "shape": [8, 8, 1]}


@pytest.fixture(scope="module")
def config():
  return ism_digits.get_config("debug")


@pytest.fixture(scope="module")
def params(config, perturb):
  init, _ = ism.make_network(config, FACTS)
  return jax.jit(lambda key: perturb(init(key)))(jax.random.key(0))


@pytest.fixture(scope="module")
def directory(config, params, tmp_path_factory):
  """Where `--mode=export` wrote the parameters."""
  out = tmp_path_factory.mktemp("exported")
  ism.export_mode(config, FACTS, lambda mesh: (params, 7), SimpleNamespace(), out)
  return out


@pytest.fixture(scope="module")
def model(directory):
  return ism_jax.load_pretrained(directory)


def test_samples_are_those_of_the_run_bit_for_bit(config, params, model, tmp_path):
  flags = SimpleNamespace(nfe=["4"], guidance=["1"], labels=["0", "2"], num=6, seed=3, vae=None)
  ism.sample_mode(config, FACTS, lambda mesh: (params, 7), flags, tmp_path)
  images = model.sample(labels=[0, 2, 0, 2, 0, 2], nfe=4, guidance=1.0, seed=3)
  with np.load(tmp_path / "samples.npz") as saved:
    np.testing.assert_array_equal(sample.to_uint8(images), saved["arr_0"])
    assert len(np.unique(saved["arr_0"])) > 20
  sampler = sample.make_sampler(ism.make_network(config, FACTS)[1], (8, 8, 1))
  exact = sampler(params, 3, [0, 2, 0, 2, 0, 2], 1.0, 4)
  assert images.dtype == np.float32 and images.tobytes() == exact.tobytes()


def test_a_flow_model_is_guided_without_a_classifier(perturb, tmp_path):
  config = ism_digits.get_config("flow,debug")
  init, apply = ism.make_network(config, FACTS)
  params = jax.jit(lambda key: perturb(init(key)))(jax.random.key(0))
  flags = SimpleNamespace(nfe=["2"], guidance=["20"], labels=["0", "2"], num=4, seed=3, vae=None)
  ism.sample_mode(config, FACTS, lambda mesh: (params, 7), flags, tmp_path)
  ism.export_mode(config, FACTS, lambda mesh: (params, 7), flags, tmp_path)
  model = ism_jax.load_pretrained(tmp_path)
  images = model.sample([0, 2, 0, 2], nfe=2, guidance=20.0, seed=3)
  with np.load(tmp_path / "samples.npz") as saved:
    np.testing.assert_allclose(sample.to_uint8(images), saved["arr_0"].astype(float), atol=1)

  x, zero = path.draw_noise(jax.random.key(3), np.arange(4), (8, 8, 1)), np.zeros(4)
  for t in (0.0, 0.5):
    of_class, of_null = (
      apply(params, x, zero + t, zero, np.array(label), zero) for label in ([0, 2] * 2, [3] * 4)
    )
    x = x + (of_null + 21 * (of_class - of_null)) / 2
  np.testing.assert_allclose(images, x, atol=1e-3)
  assert np.abs(images - model.sample([0, 2, 0, 2], nfe=2, seed=3)).max() > 0.05


def test_says_what_it_is(config, params, model, differences):
  assert model.names == ("cat", "dog", "owl") and model.shape == (8, 8, 1) and model.w_max == 2
  assert differences(model.params, params) == []
  record = model.record
  assert (record["method"], record["step"]) == ("ism", 7)
  assert record["run"] == json.loads(json.dumps({"config": config.to_dict(), "metadata": FACTS}))
  assert len(repr(model)) < 200


def test_images_do_not_depend_on_how_many_there_are_or_go_together(model):
  images = model.sample([1, 0, 2, 1, 0], nfe=2)
  np.testing.assert_allclose(model.sample([1, 0], nfe=2), images[:2], atol=1e-4)
  np.testing.assert_allclose(model.sample([1, 0, 2, 1, 0], nfe=2, batch=2), images, atol=1e-4)


def test_sampling_imports_nothing_of_training(directory):
  use = f"""
images = ism_jax.load_pretrained({str(directory)!r}).sample([0, 1], nfe=2, guidance=0.5, batch=2)
assert images.shape == (2, 8, 8, 1)
"""
  assert heavy_imports("ism_jax", use) == []


@pytest.mark.parametrize(
  ("request_", "message"),
  [
    ({"labels": []}, r"labels=\[\] must be whole numbers, at least one; the classes are 0 to 2\."),
    ({"labels": [1.5]}, r"labels=\[1.5\] must be whole numbers"),
    ({"labels": [3]}, r"label 3 is out of range: the classes are 0 to 2\."),
    ({"labels": [0], "nfe": 3}, r"nfe=3 was not trained"),
    ({"labels": [0], "guidance": 2.5}, r"guidance=2.5 is outside the trained range 0 to 2"),
  ],
)
def test_what_was_not_trained_is_refused(request_, message, model):
  with pytest.raises(UserError, match=message):
    model.sample(**request_)


def test_a_model_trained_with_cudnn_samples_without_it(params, tmp_path):
  config = ism_digits.get_config("debug")
  config.model.attention, config.model.dtype = "cudnn", "bfloat16"
  flags = SimpleNamespace(nfe=["1"], guidance=None, labels=None, num=3, seed=3, vae=None)
  ism.sample_mode(config, FACTS, lambda mesh: (params, 7), flags, tmp_path)
  ism.export_mode(config, FACTS, lambda mesh: (params, 7), flags, tmp_path)
  images = ism_jax.load_pretrained(tmp_path).sample([0, 1, 2], nfe=1, seed=3)
  with np.load(tmp_path / "samples.npz") as saved:  # rounded as eight devices do
    np.testing.assert_allclose(sample.to_uint8(images), saved["arr_0"].astype(float), atol=2)


def test_latents_are_decoded_by_their_autoencoder(config, params, directory, tmp_path, monkeypatch):
  with pytest.raises(UserError, match=r"vae='v.safetensors' decodes latents, but .* makes images"):
    ism_jax.load_pretrained(directory, vae="v.safetensors")
  metadata = {**FACTS, "vae": "its hash"}
  ism.export_mode(config, metadata, lambda mesh: (params, 7), SimpleNamespace(), tmp_path)

  def decoding(sampler, path, expected):
    assert (path, expected) == ("v.safetensors", "its hash")
    return lambda *args: np.repeat(sampler(*args), 8, axis=1)

  monkeypatch.setattr(autoencoder, "decoding", decoding)
  images = ism_jax.load_pretrained(tmp_path, vae="v.safetensors").sample([0], nfe=1)
  raw = ism_jax.load_pretrained(tmp_path).sample([0], nfe=1)
  np.testing.assert_array_equal(images[:, ::8], raw)
