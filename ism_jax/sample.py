"""One-, few- and many-step sampling from the same network (arXiv 2510.21250, section 2).

Guidance is an input: each step is one forward pass, whatever w. Only a plain flow model, which has
not learned that input, takes two for w > 0.

Dimensions: b batch, h w image, c channel, n samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ism_jax.path import both_fields, draw_noise, min_step_is_zero
from train_jax import mesh as mesh_lib
from train_jax.multihost.signals import pause

BATCH = 256  # images at a time, at most


def batch_size(n: int, most: int) -> int:
  """How many of n to make at a time: the power of two that holds them, if it is not above `most`.

  So a few cost little, and all numbers share few compilations.
  """
  return min(most, 1 << (n - 1).bit_length())


def integrate(apply: Callable, params, x0: jax.Array, label, w, nfe) -> jax.Array:
  """x0 [b, h, w, c] noise -> images, in `nfe` equal steps x <- x + d s(x, t, d, c, w).

  `nfe` may be traced (one compilation serves every number of steps); w and label are [b].
  """
  d = 1.0 / nfe

  def step(i, x):
    t, seen = (jnp.full(x.shape[:1], value, jnp.float32) for value in (i * d, min_step_is_zero(d)))
    return x + d * apply(params, x, t, seen, label, w)

  return jax.lax.fori_loop(0, nfe, step, x0)


def classifier_free(apply: Callable, null: int) -> Callable:
  """A flow model's `apply` for sampling: w is classifier-free guidance (arXiv 2207.12598).

  Its steps are s(c) + w (s(c) - s(null)), two passes in one call over twice the rows; one pass
  where no w of a batch is above 0. Others write the scale 1 + w.
  """

  def guided(params, x, t, d, label, w):
    del d
    of_class, of_null = both_fields(apply, params, x, t, label, null)
    return of_class + w[:, None, None, None] * (of_class - of_null)

  def step(params, x, t, d, label, w):
    return jax.lax.cond(jnp.any(w > 0), guided, apply, params, x, t, d, label, w)

  return step


def make_sampler(
  apply: Callable, shape: tuple[int, int, int], mesh: Mesh | None = None
) -> Callable:
  """Returns `sample(params, seed, labels, w, nfe, batch, progress)` for images of `shape`.

  Image i depends on (seed, i, label, w, nfe) only: but for rounding, not on the batch size nor on
  how many are asked for. The same i starts from the same noise at every nfe and w.

  Args:
    mesh: of the devices that share the images out; None for one.
  """

  def chunk(params, rng, index, label, w, nfe):
    n, (index, label, w) = len(index), mesh_lib.fill_rows((index, label, w))
    x0 = mesh_lib.shard_batch(draw_noise(rng, index, shape))
    return integrate(apply, params, x0, label, w, nfe)[:n]

  chunk = mesh_lib.jit(chunk, mesh)

  def sample(
    params, seed: int, labels, w, nfe: int, batch: int = BATCH, progress=None
  ) -> np.ndarray:
    """labels [n] int, w a number or [n] -> float32 images [n, h, w, c], in [-1, 1] by training.

    They are made `batch` at a time; fewer, at once, see `batch_size`.
    """
    labels = np.asarray(labels, np.int32)
    batch = batch_size(len(labels), batch)
    w = np.broadcast_to(np.asarray(w, np.float32), labels.shape)
    rng, images = jax.random.key(seed), []
    for start in range(0, len(labels), batch):
      index = np.arange(start, start + batch, dtype=np.int32)
      rows = np.minimum(index, len(labels) - 1)  # the last batch is filled up
      out = chunk(params, rng, index, labels[rows], w[rows], nfe)
      images.append(np.asarray(out)[: len(labels) - start])
      if progress is not None:
        progress(len(images[-1]))
      pause()
    return np.concatenate(images)

  return sample


def make_image_sampler(
  apply: Callable, shape: tuple[int, int, int], mesh: Mesh, seed: int, decoder=None
) -> Callable:
  """Returns `draw(params, labels, w, nfe, first)`: samples first, first + 1, ... as 8-bit images.

  They are those of `make_sampler`, spread over the devices of all processes: arrays of the samples'
  numbers int32 [b], the images uint8 [b, h, w, 3] (grey is three equal channels), and which of them
  were finite before the rounding, bool [b].

  Args:
    shape: of what the network makes.
    decoder: (parameters, decode) of what makes images in [-1, 1] of it; None where it does itself.
  """
  rows = mesh_lib.batch_sharding(mesh)
  split = functools.partial(jax.lax.with_sharding_constraint, shardings=rows)
  weights, decode = decoder or ((), None)

  def run(params, weights, label, w, nfe, first):
    numbers = split(first + jnp.arange(len(label), dtype=jnp.int32))
    x0 = split(draw_noise(jax.random.key(seed), numbers, shape))
    x = integrate(apply, params, x0, split(label), jnp.full(len(label), w), nfe)
    finite = jnp.isfinite(x).all(axis=(1, 2, 3))
    if decode:
      x = decode(weights, x)
    images = to_uint8(x)
    return numbers, jnp.broadcast_to(images, (*images.shape[:3], 3)), finite

  run = jax.jit(mesh_lib.with_mesh(mesh, run), out_shardings=rows)
  return lambda params, labels, w, nfe, first: run(
    params, weights, labels, np.float32(w), np.int32(nfe), np.int32(first)
  )


def to_uint8(images):
  """[-1, 1] -> uint8, rounded to nearest (not truncated) after clipping; NumPy or JAX arrays."""
  return ((images.clip(-1, 1) + 1) * 127.5).round().astype("uint8")
