"""Weights that anyone can make again from a parameter's name alone.

The reference outputs in `oracles/` were computed by public PyTorch implementations whose parameters
were filled with `named_weight`. Filled the same way, ours must agree, and no weight file travels.
"""

import json
import zlib
from pathlib import Path

import numpy as np

from train_jax.storage.weights import save


def named_weight(name: str, shape: tuple[int, ...], seed: int = 0, gain: float = 1.0) -> np.ndarray:
  """Float32 values for the parameter `name` in the PyTorch layout `shape`.

  Matrices and kernels are gain N(0, 1 / fan_in) with fan_in = prod(shape[1:]); vectors named
  `*weight` or `*lambda1` are 1 + 0.1 N(0, 1); `*running_var` is uniform in [0.5, 1.5]; every other
  vector is 0.1 N(0, 1).
  """
  rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
  if name.endswith("running_var"):
    return rng.uniform(0.5, 1.5, shape).astype(np.float32)
  noise = rng.standard_normal(shape)
  if len(shape) >= 2:
    return (gain * noise / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
  if name.endswith(("weight", "lambda1")):
    return (1.0 + 0.1 * noise).astype(np.float32)
  return (0.1 * noise).astype(np.float32)


def read_oracle(name: str, beside: str = __file__) -> dict[str, np.ndarray]:
  """The arrays of `oracles/NAME.npz` beside a file."""
  with np.load(Path(beside).parent / "oracles" / f"{name}.npz") as arrays:
    return dict(arrays)


def tensors_of(oracle: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The parameters of an oracle's network: PyTorch name -> values in PyTorch's layout."""
  seed, gain = int(oracle["seed"]), float(oracle["gain"])
  shapes = json.loads(str(oracle["parameters"]))
  return {name: named_weight(name, tuple(shape), seed, gain) for name, shape in shapes.items()}


def write(path: Path, tensors: dict[str, np.ndarray]) -> Path:
  """Writes a safetensors file -> its path."""
  save(path, tensors, {})
  return path
