"""One-, few- and many-step sampling from the same network (arXiv 2510.21250, section 2).

Guidance is an input of the network, so each step is one forward pass for any w. A plain flow model
has not learned this input and takes two passes for w > 0.

Dimensions: b batch, h w image, c channel, n samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ism_jax.path import both_fields, draw_noise, min_step_is_zero, step_start
from train_jax import mesh as mesh_lib

BATCH = 256  # images at a time at most


def batch_size(n: int, limit: int) -> int:
  """The batch size for n images: the next power of two, or `limit` if that is less.

  So few images are cheap, and all numbers share few compilations.
  """
  return min(limit, 1 << (n - 1).bit_length())


def integrate(apply: Callable, params, x0: jax.Array, label, w, nfe) -> jax.Array:
  """x0 [b, h, w, c] noise -> images, in `nfe` steps x <- x + d s(x, t, d, c, w).

  The steps are those of `path.step_start`, equal where `nfe` is a power of two. `nfe` may be
  traced: one compilation serves every number of steps. w and label are [b].
  """

  def step(i, x):
    start = step_start(i, nfe)
    d = step_start(i + 1, nfe) - start
    t, size = (jnp.full(x.shape[:1], value, jnp.float32) for value in (start, min_step_is_zero(d)))
    return x + d * apply(params, x, t, size, label, w)

  return jax.lax.fori_loop(0, nfe, step, x0)


def classifier_free(apply: Callable, null: int) -> Callable:
  """A flow model's `apply` for sampling: w is classifier-free guidance (arXiv 2207.12598).

  A step is s(c) + w (s(c) - s(null)): two passes in one call of twice the batch, or one pass if no
  w in the batch is above 0. Other authors call 1 + w the scale.
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

  Image i depends only on (seed, i, label, w, nfe), and up to rounding on nothing else. It starts
  from the same noise at every nfe and w.

  Args:
    mesh: the devices that share the images; None for one device.
  """

  def chunk(params, rng, index, label, w, nfe):
    n, (index, label, w) = len(index), mesh_lib.fill_rows((index, label, w))
    x0 = mesh_lib.shard_batch(draw_noise(rng, index, shape))
    return integrate(apply, params, x0, label, w, nfe)[:n]

  chunk = mesh_lib.jit(chunk, mesh)

  def sample(
    params, seed: int, labels, w, nfe: int, batch: int = BATCH, progress=None
  ) -> np.ndarray:
    """labels int [n], w a number or [n] -> float32 images [n, h, w, c], around [-1, 1].

    They are drawn in batches of at most `batch`, see `batch_size`.
    """
    labels = np.asarray(labels, np.int32)
    batch = batch_size(len(labels), batch)
    w = np.broadcast_to(np.asarray(w, np.float32), labels.shape)
    rng, images = jax.random.key(seed), []
    for start in range(0, len(labels), batch):
      index = np.arange(start, start + batch, dtype=np.int32)
      rows = np.minimum(index, len(labels) - 1)  # pads the last batch
      x = chunk(params, rng, index, labels[rows], w[rows], nfe)
      images.append(np.asarray(x)[: len(labels) - start])
      if progress is not None:
        progress(len(images[-1]))
    return np.concatenate(images)

  return sample


def make_image_sampler(
  apply: Callable, shape: tuple[int, int, int], mesh: Mesh, seed: int, decoder=None
) -> Callable:
  """Returns `draw(params, labels, w, nfe, first)`: samples first, first + 1, ... as 8-bit images.

  The samples are those of `make_sampler`, spread over the devices of all processes. `draw` returns
  their numbers int32 [b], the images uint8 [b, h, w, 3] (grey ones have three equal channels), and
  whether each was finite before rounding, bool [b].

  Args:
    shape: (h, w, c) of the network's output.
    decoder: (parameters, decode) from latents to images in [-1, 1]; None for a model of images.
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
  """[-1, 1] -> uint8, clipped and rounded to nearest (not truncated); NumPy or JAX arrays."""
  return ((images.clip(-1, 1) + 1) * 127.5).round().astype("uint8")
