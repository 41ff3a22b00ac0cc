"""The wavelet loss with its gradient against the MSE with its own, and against PyWavelets.

    python benchmarks/wavelet.py [--batch=256] [--image_size=32] [--channels=4]

`bytes` are what the compiled program reads and writes, by the compiler's count, in images of the
batch: a loss that is one fused pass reads the batch and writes the gradient. "bands formed" is the
same loss through the pyramid itself, which the L2 loss never forms (Parseval; see
ism_jax/wavelet.py). PyWavelets makes the bands of the same images, without a gradient.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pywt
from timing import in_turn, show

from ism_jax import wavelet

REPEATS = 20  # in one turn


def mse(error):
  return jnp.mean(error**2)


def haar(levels: int):
  weights = wavelet.level_weights(levels, 0.5)
  return lambda error: jnp.mean(wavelet.l2_distance(error, weights))


def bands_formed(levels: int):
  weights = wavelet.level_weights(levels, 0.5)

  def value(error):
    low, details = wavelet.analyse(error, levels)
    bands = [*details, low]
    return sum(w * jnp.sum(b**2) for w, b in zip(weights, bands, strict=True)) / error.size

  return value


def charbonnier(levels: int):
  weights = wavelet.level_weights(levels, 0.5)
  return lambda error: jnp.mean(wavelet.charbonnier_distance(error, weights))


def repeat(job):
  """The last of `REPEATS` results; of those before nothing is kept, so that memory is not new."""
  for _ in range(REPEATS):
    result = job()
  return result


def main(args) -> None:
  shape = (args.batch, args.image_size, args.image_size, args.channels)
  error = jax.random.normal(jax.random.key(0), shape)
  levels = int(np.log2(args.image_size & -args.image_size))
  losses = {
    "MSE": mse,
    "Haar": haar(levels),
    "Haar, bands formed": bands_formed(levels),
    "Haar, Charbonnier": charbonnier(levels),
  }
  steps = {
    name: jax.jit(jax.value_and_grad(loss)).lower(error).compile() for name, loss in losses.items()
  }
  jobs = {name: partial(repeat, partial(step, error)) for name, step in steps.items()}
  host = np.asarray(error)
  pyramid = partial(pywt.wavedec2, host, "haar", level=levels, axes=(1, 2))
  jobs["PyWavelets"] = partial(repeat, pyramid)
  seconds = in_turn(jobs, args.rounds)
  rows = {}
  for name, value in seconds.items():
    rows[f"ms/{name}"] = value / REPEATS * 1e3
    rows[f"ratio/{name}"] = value / seconds["MSE"]
    if name in steps:
      rows[f"bytes/{name}"] = steps[name].cost_analysis()["bytes accessed"] / error.nbytes
  show("wavelet", {f"{'x'.join(map(str, shape))}, {levels} levels": rows})


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--batch", type=int, default=256)
  parser.add_argument("--image_size", type=int, default=32)
  parser.add_argument("--channels", type=int, default=4)
  parser.add_argument("--rounds", type=int, default=10)
  main(parser.parse_args())
