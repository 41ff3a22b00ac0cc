"""The noise of each example: optimal transport over pools of batches."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from ism_jax import pairing, path
from ism_jax.data import latents, sources


@dataclass(frozen=True)
class Pairs:
  """The noise of each pool: a function of (seed, number of the pool) that keeps no results.

  Attributes:
    config: how pools are paired; if config.pool is 0, a pool is one batch with random pairs.
    batch: global batch size.
    rng: key of `path.draw_noise`.
  """

  config: pairing.PairingConfig
  source: sources.Source | latents.Latents
  batch: int
  rng: jax.Array

  @property
  def pool(self) -> int:
    """Batches in a pool."""
    return max(self.config.pool, 1)

  def examples_of_pool(self, seed: int, number: int) -> np.ndarray:
    """int64 [pool * batch]: the examples of a pool."""
    index = sources.batches(self.source, self.batch, seed)
    return np.concatenate([index(number * self.pool + i) for i in range(self.pool)])

  def noise_of_pool(self, seed: int, number: int) -> np.ndarray:
    """int32 [pool * batch]: the noise index of each example of a pool."""
    size = self.pool * self.batch
    # Past 2^31 examples the numbers become negative, which are valid noise indices, too.
    noise = (number * size + np.arange(size)).astype(np.int32)
    if not self.config.pool:
      return noise
    examples = self.examples_of_pool(seed, number)
    images, labels = self.source.images(examples), self.source.labels[examples]
    return pairing.pair(self.config, self.rng, images, labels, noise, len(self.source.names))

  def class_leak(self, seed: int) -> float:
    """`pairing.class_leak` of the first pool: at chance if the noise does not tell the class."""
    x0 = path.draw_noise(self.rng, self.noise_of_pool(seed, 0), self.source.shape)
    labels = self.source.labels[self.examples_of_pool(seed, 0)]
    return pairing.class_leak(np.asarray(x0).reshape(len(x0), -1), labels)
