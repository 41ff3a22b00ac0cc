"""Tiny networks in the place of the pretrained ones, and samples that they can judge.

The stand-ins are linear maps of the image averaged to 2x2 pixels, so that every statistic can be
computed again in a line of NumPy.
"""

from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax.numpy as jnp
import numpy as np

from ism_jax import networks
from ism_jax.evaluation import fid, runner
from ism_jax.evaluation.spec import EvaluationSpec
from ism_jax.sample import make_sampler, to_uint8
from train_jax import mesh as mesh_lib

SIZES = {"pool": 6, "spatial": 5, "logits": 4}
SHAPE = (8, 8, 3)
PARAMS = {"gain": jnp.float32(-0.5)}
ALL = ("fid", "sfid", "fd_dinov2", "is", "pr")


def weights(path, f):
  """[12, f] from the number that the stand-in's file holds."""
  draw = np.random.default_rng(int(path.read_text()))
  return draw.normal(size=(12, f)).astype(np.float32)


def project(kernel, images):
  """Features [n, f] of uint8 images [n, h, w, 3], in JAX or NumPy."""
  n, h, w, c = images.shape
  small = images.reshape(n, 2, h // 2, 2, w // 2, c).astype("float32").mean((2, 4))
  return ((small.reshape(n, -1) - 128) / 16) @ kernel


def load_inception(path):
  params = {kind: jnp.asarray(weights(path, f)) for kind, f in SIZES.items()}
  return params, lambda p, images: {kind: project(kernel, images) for kind, kernel in p.items()}


def load_dinov2(path, offset=0.0):
  return {"kernel": jnp.asarray(weights(path, 7))}, lambda p, x: project(p["kernel"], x)


def load_autoencoder(path):
  """Latents [b, h, w, 4] -> images of eight times the side: the first three channels, repeated."""

  def decode(params, latents):
    return jnp.tanh(params["gain"] * latents[..., :3]).repeat(8, axis=1).repeat(8, axis=2)

  return SimpleNamespace(params={"gain": jnp.float32(0.5)}, encode=None, decode=decode)


def put_stand_ins(put_module, put_attribute):
  loads = {"inception": load_inception, "dinov2": load_dinov2, "autoencoder": load_autoencoder}
  for name, load in loads.items():
    module = ModuleType(f"ism_jax.networks.{name}")
    module.load = lambda path, *args, load=load, **kwargs: load(Path(path), *args, **kwargs)
    put_module(f"ism_jax.networks.{name}", module)
    put_attribute(networks, name, module, raising=False)


def network(params, x, t, d, c, w):
  """A network that knows its inputs: brighter with the class, flatter with w."""
  del t, d
  return params["gain"] * x + (c / 10 - 0.3 - 0.1 * w)[:, None, None, None]


def make(files, metrics=ALL, shape=SHAPE, mesh=None, encoder="", per_device=4, **changes):
  settings = {"nfe": (1,), "guidance": (0.0,), "samples": 400, "metrics": metrics}
  spec = EvaluationSpec(**{**settings, **files.flags, **changes})
  return runner.prepare(spec, network, shape, 10, mesh or mesh_lib.make_mesh(), encoder, per_device)


def samples(n, nfe, w, labels, seed=0, shape=SHAPE):
  """The samples as the ordinary sampler draws them, 8 bits."""
  return to_uint8(make_sampler(network, shape)(PARAMS, seed, labels, w, nfe))


def frechet(x, y):
  def moments(features):
    return features.mean(0), np.cov(features.T)

  x, y = (moments(np.asarray(features, np.float64)) for features in (x, y))
  return fid.frechet_distance(*x, *y)


def inception_score(logits, splits=10):
  """Mean and standard deviation of the score of all logits [n, c] at once."""
  scores = fid.no_scores(splits, np.shape(logits)[1])
  return fid.score(fid.update_scores(scores, fid.parts(len(logits), splits), logits))
