"""The autoencoder: diffusers' outputs, its padding and attention by hand, both namings, mistakes.

Dimensions: b batch, h w image, c channel.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import softmax

from ism_jax.networks import autoencoder
from ism_jax.networks.autoencoder import SCALE, AutoencoderConfig
from tests.ism.named_weights import read_oracle, tensors_of, write
from train_jax.errors import UserError
from train_jax.storage.weights import sha256

SMALL = AutoencoderConfig(widths=(8, 16, 16), depth=1, groups=4)
OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.fixture(scope="module")
def oracle():
  return read_oracle("vae_small")


@pytest.fixture
def load(oracle, tmp_path):
  """Change of the tensors -> the small autoencoder."""

  def run(change=lambda tensors: tensors):
    path = write(tmp_path / "vae.safetensors", change(tensors_of(oracle)))
    return autoencoder.load(path, SMALL)

  return run


def agrees(model, oracle, atol):
  mean, std = jax.jit(model.encode)(model.params, oracle["image"])
  np.testing.assert_allclose(mean, oracle["mean"], rtol=0, atol=atol)
  np.testing.assert_allclose(std, oracle["std"], rtol=0, atol=atol)
  images = jax.jit(model.decode)(model.params, SCALE * oracle["latent"])
  np.testing.assert_allclose(images, oracle["decoded"], rtol=0, atol=atol)
  assert {a.dtype.name for a in (mean, std, images)} == {"float32"}


def test_stable_diffusions_size_agrees_with_diffusers(tmp_path):
  oracle = read_oracle("sd_vae")
  path = write(tmp_path / "vae.safetensors", tensors_of(oracle))
  model = autoencoder.load(path)
  path.unlink()  # 335 MB
  assert sum(a.size for a in jax.tree.leaves(model.params)) == 83_653_863
  agrees(model, oracle, atol=1e-4)


@pytest.mark.slow
def test_other_sizes_agree_with_diffusers(load, oracle):
  model = load()
  agrees(model, oracle, atol=1e-5)
  eager, _ = model.encode(model.params, oracle["image"])  # not jitted: the dicts' own order
  np.testing.assert_allclose(eager, oracle["mean"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", ["linear", "convolution"])
def test_both_namings_are_the_same_network(load, shape):
  def rename(tensors):
    renamed = {}
    for name, value in tensors.items():
      inside = ".attentions." in name and value.ndim == 2 and shape == "convolution"
      for new, old in OLD.items():
        name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
      renamed[name] = value[:, :, None, None] if inside else value
    assert not renamed.keys() >= tensors.keys()
    return renamed

  jax.tree.map(np.testing.assert_array_equal, load().params, load(rename).params)


def test_halving_pads_below_and_to_the_right_only():
  x = np.random.default_rng(0).normal(size=(1, 4, 6, 4)).astype(np.float32)
  level = autoencoder.Level(4, 4, 0, 2, "halve", rngs=nnx.Rngs(0), dtype=jnp.float32)
  padded = np.zeros((5, 7, 4))
  padded[:4, :6] = x[0]
  expected = np.zeros((2, 3, 4))
  for i, j in np.ndindex(2, 3):
    window = padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
    expected[i, j] = np.einsum("hwc,hwco->o", window, level.downsample.kernel[...])
  np.testing.assert_allclose(level(x)[0], expected, atol=1e-5)


def test_doubling_repeats_pixels_before_it_convolves():
  x = np.random.default_rng(0).normal(size=(1, 2, 3, 4)).astype(np.float32)
  level = autoencoder.Level(4, 4, 0, 2, "double", rngs=nnx.Rngs(0), dtype=jnp.float32)
  padded = np.zeros((6, 8, 4))
  for i, j in np.ndindex(4, 6):
    padded[i + 1, j + 1] = x[0, i // 2, j // 2]
  expected = np.zeros((4, 6, 4))
  for i, j in np.ndindex(4, 6):
    window = padded[i : i + 3, j : j + 3]
    expected[i, j] = np.einsum("hwc,hwco->o", window, level.upsample.kernel[...])
  np.testing.assert_allclose(level(x)[0], expected, atol=1e-5)


def test_attention_by_hand():
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 2, 3, 8)).astype(np.float32)
  module = autoencoder.PixelAttention(8, 2, rngs=nnx.Rngs(1), dtype=jnp.float32)
  groups = x.astype(np.float64).reshape(2, 6, 2, 4)
  centred = groups - groups.mean((1, 3), keepdims=True)
  y = centred / np.sqrt((centred**2).mean((1, 3), keepdims=True) + 1e-6)
  y = y.reshape(2, 6, 8)
  layers = (module.to_q, module.to_k, module.to_v)
  q, k, v = (y @ np.asarray(layer.kernel[...], np.float64) for layer in layers)
  mixed = softmax(q @ k.swapaxes(1, 2) / np.sqrt(8), axis=-1) @ v
  expected = x + (mixed @ np.asarray(module.to_out.kernel[...], np.float64)).reshape(x.shape)
  np.testing.assert_allclose(module(x), expected, atol=1e-5)


def test_log_variances_are_clamped(load, oracle):
  def shift(tensors):
    bias = np.array([0, 0, 0, 0, 1e3, -1e3, 0, 0], np.float32)
    return tensors | {"quant_conv.bias": tensors["quant_conv.bias"] + bias}

  model = load(shift)
  _, std = model.encode(model.params, oracle["image"])
  np.testing.assert_allclose(std[..., 0], np.exp(10), rtol=1e-6)
  np.testing.assert_allclose(std[..., 1], np.exp(-15), rtol=1e-6)


def test_samples_are_scaled_draws_from_the_posterior():
  mean, std = jnp.full((1, 64, 64, 4), 2.0), jnp.full((1, 64, 64, 4), 0.5)
  draw = autoencoder.sample(mean, std, jax.random.key(0))
  assert float(draw.mean()) == pytest.approx(0.18215 * 2, abs=0.003)
  assert float(draw.std()) == pytest.approx(0.18215 * 0.5, rel=0.03)
  mode = autoencoder.sample(mean, 0 * std, jax.random.key(0))
  np.testing.assert_allclose(mode, 0.18215 * 2, rtol=1e-6)


def test_mistakes_cost_a_sentence(load):
  def without(tensors):
    del tensors["decoder.mid_block.attentions.0.to_v.bias"]
    return tensors

  def narrow(tensors):
    return tensors | {"encoder.conv_in.weight": np.zeros((7, 3, 3, 3), np.float32)}

  with pytest.raises(UserError, match=r"no tensor 'decoder.mid_block.attentions.0.to_v.bias'"):
    load(without)
  with pytest.raises(UserError, match=r"'encoder.conv_in.weight' has the shape \(7, 3, 3, 3\)"):
    load(narrow)
  model = load()
  for shape in ((1, 10, 8, 3), (1, 8, 10, 3), (1, 8, 8, 4), (8, 8, 3)):
    with pytest.raises(AssertionError):
      model.encode(model.params, np.zeros(shape, np.float32))
  with pytest.raises(AssertionError):
    model.decode(model.params, np.zeros((1, 4, 4, 8), np.float32))
  with pytest.raises(AssertionError):
    model.encode(model.params, np.zeros((1, 8, 8, 3), np.uint8))


def test_samples_are_decoded_in_pieces(fake_autoencoder, tmp_path):
  z = np.random.default_rng(0).normal(size=(37, 2, 2, 4)).astype(np.float32)
  sampler = autoencoder.with_decoder(lambda n: z[:n], str(tmp_path / "any"), "")
  for n in (1, 16, 37):
    out = sampler(n)
    assert out.shape == (n, 16, 16, 3)
    np.testing.assert_allclose(out[:, ::8, ::8], 0.2 * z[:n, :, :, :3], rtol=1e-6)
  assert fake_autoencoder == [1, 16]


def test_another_autoencoder_is_refused(fake_autoencoder, tmp_path):
  path = tmp_path / "vae.safetensors"
  path.write_bytes(b"weights")
  autoencoder.with_decoder(None, str(path), sha256(path))
  with pytest.raises(UserError, match=r"is not the autoencoder that the latents were encoded with"):
    autoencoder.with_decoder(None, str(path), "0" * 64)
