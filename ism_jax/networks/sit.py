"""SiT's published weights (arXiv 2401.08740, as safetensors) converted to those of dit.py.

SiT is our network with d = 0 and w = 0. It has the same path x_t = (1 - t) x0 + t x1 from noise to
data (the linear path, ICPlan in its code) and the same velocity x1 - x0. The differences:

    position  SiT's sinusoids have sin before cos. So the residual stream's features have another
              order, and every matrix that reads or writes it is permuted.
    t         SiT's t is in [0, 1], ours in [0, 1000]. On [0, 1] SiT's waves are combinations of our
              slow ones, to 1e-8 with coefficients below 1; our fast ones begin with no effect.
    output    SiT has twice the channels if built with learn_sigma; the second half is unused.

The converted network equals SiT up to rounding. d and w get new embeddings of zero effect. DiT's
weights have the same names and shapes, but predict noise along another path. Nothing in a file
shows this, and they would only be a warm start.

Dimensions: k width, p patch, c channel, f features.
"""

from __future__ import annotations

import numpy as np

from train_jax.errors import UserError
from train_jax.storage.weights import Weights

HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of the published S, B, L and XL, by width
OURS = {
  "embed_time.inner": "t_embedder.mlp.0",
  "embed_time.outer": "t_embedder.mlp.2",
  "modulation": "final_layer.adaLN_modulation.1",
  "out": "final_layer.linear",
}
BLOCK = {
  "attention.qkv": "attn.qkv",
  "attention.out": "attn.proj",
  "mlp.inner": "mlp.fc1",
  "mlp.outer": "mlp.fc2",
  "modulation": "adaLN_modulation.1",
}
# The matrices that read the residual stream, and those that write or scale it.
READ = ("blocks.attention.qkv", "blocks.mlp.inner", "out")
WRITE = (
  "embed_patch",
  "blocks.attention.out",
  "blocks.mlp.outer",
  "blocks.modulation",
  "modulation",
)


def _waves(t: np.ndarray, features: int) -> np.ndarray:
  """layers.sinusoidal in float64: t [n] -> [n, f]."""
  angle = t[:, None] * 10_000.0 ** (-np.arange(features // 2) / (features // 2))
  return np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)


def slow_waves(features: int = 256) -> np.ndarray:
  """The matrix m [f, f] with _waves(1000 t) m = _waves(t) for t in [0, 1]."""
  t = np.linspace(0, 1, 1001)
  ours, theirs = _waves(1000 * t, features), _waves(t, features)
  slow = np.tile(np.arange(features // 2) >= features * 3 // 8, 2)  # at most one radian
  matrix = np.zeros((features, features))
  matrix[slow] = np.linalg.lstsq(ours[:, slow], theirs, rcond=1e-9)[0]
  return matrix


def reorder(a: np.ndarray, width: int, axis: int) -> np.ndarray:
  """Exchanges sin and cos of both position axes in each group of `width` features."""
  a = np.moveaxis(a, axis, -1)
  quarters = a.reshape(*a.shape[:-1], -1, 2, 2, width // 4)
  return np.moveaxis(quarters[..., ::-1, :].reshape(a.shape), -1, axis)


def _check(weights: Weights, heads: int, used: set[str]) -> None:
  width = weights.shapes["x_embedder.proj.weight"][0]
  if HEADS.get(width, heads) != heads:
    raise UserError(
      f"{weights.path} has width {width}, which SiT publishes with {HEADS[width]} heads; set "
      f"--config.model.heads={HEADS[width]}, not {heads}."
    )
  if extra := sorted(set(weights.shapes) - used - {"pos_embed"}):
    raise UserError(f"{weights.path} holds {extra[0]!r}, which no SiT has; give SiT's own weights.")
  if "pos_embed" not in weights:
    return
  length = weights.shapes["pos_embed"][1]
  rows, columns = np.divmod(np.arange(length), round(length**0.5))
  position = np.concatenate([_waves(axis, width // 2) for axis in (columns, rows)], axis=-1)
  stored = weights.get("pos_embed", (1, length, width))[0]
  if not np.allclose(reorder(stored, width, -1), position, atol=1e-3):
    raise UserError(
      f"{weights.path}: 'pos_embed' is not SiT's fixed sinusoids, and this network has no other "
      "positions; give weights that were trained with those."
    )


def convert(weights: Weights, config) -> dict[str, np.ndarray]:
  """SiT's tensors as parameters of dit.py, float32 by dotted name.

  Args:
    config: the run's; its model.heads must be SiT's, which no shape shows.

  Raises:
    UserError: the file is no SiT, or was trained with other heads or positions.
  """
  used: set[str] = set()

  def get(name: str) -> np.ndarray:
    used.add(name)
    return np.asarray(weights.get(name, weights.shapes.get(name, ())), np.float32)

  def linear(name: str) -> dict[str, np.ndarray]:
    return {"kernel": get(f"{name}.weight").T, "bias": get(f"{name}.bias")}

  patch = get("x_embedder.proj.weight")  # [k, c, p, p]
  width, channels, side, _ = patch.shape
  layers = {ours: linear(theirs) for ours, theirs in OURS.items()}
  layers["embed_patch"] = {
    "kernel": patch.transpose(2, 3, 1, 0).reshape(-1, width),
    "bias": get("x_embedder.proj.bias"),
  }
  depth = len({name.split(".")[1] for name in weights.shapes if name.startswith("blocks.")})
  for ours, theirs in BLOCK.items():
    stack = [linear(f"blocks.{i}.{theirs}") for i in range(depth)]
    layers[f"blocks.{ours}"] = {key: np.stack([x[key] for x in stack]) for key in stack[0]}
  table = get("y_embedder.embedding_table.weight")
  _check(weights, config.model.heads, used)

  for name in READ:
    layers[name]["kernel"] = reorder(layers[name]["kernel"], width, -2)
  for name in WRITE:
    layers[name] = {key: reorder(a, width, -1) for key, a in layers[name].items()}
  layers["out"] = {
    key: a.reshape(*a.shape[:-1], side**2, -1)[..., :channels].reshape(*a.shape[:-1], -1)
    for key, a in layers["out"].items()
  }
  inner = layers["embed_time.inner"]
  inner["kernel"] = (slow_waves(len(inner["kernel"])) @ inner["kernel"]).astype(np.float32)
  tensors = {f"{name}.{key}": a for name, layer in layers.items() for key, a in layer.items()}
  return {**tensors, "embed_class.embedding": table}
