"""Exponential moving averages of the parameters, any number of them, by name.

iSM keeps two (arXiv 2510.21250, "twin EMA"). A fast one, `target`, makes the consistency targets.
A slow one, `sample`, is used for inference only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def warmed_decay(decay: float, step: jax.Array) -> jax.Array:
  """min(decay, (1 + n) / (10 + n)) after n updates: the average forgets the initialisation."""
  n = step.astype(jnp.float32)
  return jnp.minimum(decay, (1 + n) / (10 + n))


def update(ema: dict, params, decays: dict[str, float], step: jax.Array) -> dict:
  """One step of every average: `e <- e + (1 - decay)(p - e)`, in float32."""

  def average(old, decay: float):
    rate = 1 - warmed_decay(decay, step)
    return jax.tree.map(lambda e, p: e + rate * (p - e), old, params)

  return {name: average(old, decays[name]) for name, old in ema.items()}
