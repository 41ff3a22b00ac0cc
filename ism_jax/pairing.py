"""Scaling optimal transport, sOT (arXiv 2510.21250, section 4): pairs noise with images.

K batches form a pool. Its images are paired with as many noise samples by an optimal transport plan
for the squared Euclidean cost. Then the pairs return to the K batches: images and labels stay where
they are, and the noise moves, as int32 indices into `path.draw_noise`.

The plan must be a pairing. If each image took its best noise, some noise would be unused, and the
rest would not be Gaussian. So the Sinkhorn plan (ott-jax) is rounded to a permutation.

A pairing across classes makes the noise tell the class, and a model trained on it is wrong on fresh
noise ("the curse of conditions", arXiv 2503.10636). So by default pairs are within classes: a noise
sample keeps the class of the image that it was drawn for.

Dimensions: n pool, g groups (classes), m members of a group, h w image, c channel, k = h w c.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from ott.geometry import geometry
from ott.problems.linear import linear_problem
from ott.solvers.linear import sinkhorn
from scipy.optimize import linear_sum_assignment

from ism_jax.path import draw_noise
from train_jax.errors import UserError, check_at_least, check_one_of

PAIR_BYTES = 8  # memory of a solver for each pair: XLA holds two float32 matrices


@dataclass(frozen=True)
class PairingConfig:
  """How pools are paired.

  Attributes:
    pool: K, batches in a pool; 0 leaves the pairing random.
    condition: 'class' pairs within each class; 'none' ignores classes (the paper).
    solver: 'sinkhorn', rounded; or 'exact', SciPy's assignment on the costs reduced by Sinkhorn's
      duals.
  """

  pool: int
  condition: str = "class"
  solver: str = "sinkhorn"

  def __post_init__(self):
    check_one_of("pairing.condition", self.condition, ("class", "none"))
    check_one_of("pairing.solver", self.solver, ("sinkhorn", "exact"))
    check_at_least("pairing.pool", self.pool, 0)


def check_size(config: PairingConfig, batch: int, largest: float) -> None:
  """Raises UserError if one group of a pool needs over half of the first device's memory.

  The other half is for the train step, which runs at the same time. Without a known size, the
  memory counts as 16 GiB.

  Args:
    largest: the share of the images in the most frequent class.
  """
  share = largest if config.condition == "class" else 1.0
  n = math.ceil(share * config.pool * batch)
  size = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 2**34) // 2
  if PAIR_BYTES * n**2 > size:
    limit = int(math.isqrt(size // PAIR_BYTES) / (share * batch))
    other = ", or pairing.condition=class where there are classes" if share == 1 else ""
    raise UserError(
      f"pairing.pool={config.pool} batches of {batch} examples have a problem of {n} with "
      f"pairing.condition={config.condition!r}, which takes {PAIR_BYTES * n**2 / 2**30:.0f} GiB on "
      f"one device and may take {size / 2**30:.0f}; choose pairing.pool={limit} or less (0 is "
      f"random pairing){other}."
    )


def squared_distances(x: jax.Array, z: jax.Array) -> jax.Array:
  """|x_i - z_j|^2 for x [m, k] and z [m, k] -> [m, m]."""
  return jnp.sum(x**2, -1)[:, None] + jnp.sum(z**2, -1)[None] - 2 * x @ z.T


def duals(cost: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Entropic potentials (f, g), each [m], of the plan between the valid rows and columns of cost.

  epsilon is 0.05 std(cost): at 0.05 mean(cost) the plan is almost independent.
  """
  count = jnp.maximum(jnp.sum(valid), 1)
  both = valid[:, None] & valid[None]
  mean = jnp.sum(jnp.where(both, cost, 0)) / count**2
  std = jnp.sqrt(jnp.sum(jnp.where(both, (cost - mean) ** 2, 0)) / count**2)
  geom = geometry.Geometry(cost_matrix=cost, epsilon=jnp.maximum(0.05 * std, 1e-6))
  weight = valid / count
  out = sinkhorn.Sinkhorn()(linear_problem.LinearProblem(geom, a=weight, b=weight))
  return jnp.where(valid, out.f, 0.0), jnp.where(valid, out.g, 0.0)


def round_to_permutation(score: jax.Array, valid: jax.Array) -> jax.Array:
  """A permutation that follows the largest scores [m, m], in parallel.

  In each round, every free row proposes to its best free column, and every column takes its best
  proposer. A round settles at least the best remaining pair, so at most m rounds are needed; a few
  dozen are usual.

  Returns:
    int32 [m], the column of each row; invalid rows keep their own.
  """
  m = len(valid)
  rows = jnp.arange(m)
  score = jnp.nan_to_num(score)  # a row of NaN (a broken image) would propose forever

  def propose(carry):
    column, free_row, free_column = carry
    open_score = jnp.where(free_row[:, None] & free_column[None], score, -jnp.inf)
    best = jnp.argmax(open_score, axis=1)  # each row's column
    value = jnp.where(free_row, open_score[rows, best], -jnp.inf)
    highest = jnp.full(m, -jnp.inf).at[best].max(value)
    # The lowest of equal rows wins: a column never takes two.
    proposer = jnp.full(m, m).at[best].min(jnp.where(free_row & (value == highest[best]), rows, m))
    wins = free_row & (proposer[best] == rows)
    column = jnp.where(wins, best, column)
    occupied = jnp.zeros(m, bool).at[best].max(wins)
    return column, free_row & ~wins, free_column & ~occupied

  column, _, _ = jax.lax.while_loop(lambda carry: jnp.any(carry[1]), propose, (rows, valid, valid))
  return column.astype(jnp.int32)


def _solve(config: PairingConfig, elements: int, x, z, table):
  """Pairs x and z [n, ...] in every group of `table` [g, m] (indices, padded with -1).

  Groups are solved together as long as their arrays have at most `elements` elements.

  Returns the column of each row [g, m] and the reduced costs [g, m, m].
  """
  x, z = (a.reshape(len(a), -1) for a in (x, z))  # [n, k]

  def group(rows):
    valid = rows >= 0
    cost = squared_distances(x[rows], z[rows])
    f, g = duals(cost, valid)
    reduced = cost - f[:, None] - g[None]
    if config.solver == "exact":
      return jnp.arange(len(rows)), reduced
    return round_to_permutation(-reduced, valid), jnp.zeros(())

  m = table.shape[1]
  count = min(elements // (m * max(m, x.shape[1])), len(table))
  return jax.lax.map(group, table, batch_size=count if count > 1 else None)


@cache
def _solver(config: PairingConfig, devices: int) -> Callable:
  """`_solve`, jitted, with the groups spread over the first `devices` of this process.

  One device solves a whole group, so the pairs do not depend on the number of devices.
  """
  mesh = Mesh(np.array(jax.local_devices()[:devices]), ("group",))
  specs = (P(), P(), P("group"))
  # On a GPU 1000 small classes take 3.7 s one by one (8192 images in all), and 0.11 s together. A
  # CPU takes twice as long for them together.
  solve = partial(_solve, config, 0 if mesh.devices[0].platform == "cpu" else 2**25)
  # check_vma: the loops inside start from constants, which do not vary over devices.
  return jax.jit(
    jax.shard_map(solve, mesh=mesh, in_specs=specs, out_specs=P("group"), check_vma=False)
  )


def _groups(label: np.ndarray, classes: int) -> np.ndarray:
  """The indices of each class -> int32 [classes, m], padded with -1.

  m is a power of two, so pools with similar class sizes share a compilation.
  """
  order = np.argsort(label, kind="stable").astype(np.int32)
  size = np.bincount(label, minlength=classes)
  m = 2 ** int(size.max() - 1).bit_length()
  groups = np.split(order, np.cumsum(size)[:-1])
  return np.stack([np.pad(group, (0, m - len(group)), constant_values=-1) for group in groups])


def match(
  config: PairingConfig,
  x: np.ndarray | jax.Array,
  z: np.ndarray | jax.Array,
  label: np.ndarray | None = None,
  classes: int = 1,
  devices: int | None = None,
) -> np.ndarray:
  """Pairs images with noise.

  Args:
    x, z: float32 [n, ...], images and noise of one shape.
    label: int32 [n], the class of x[i] and z[i]; None for no classes.
    classes: the number of classes, if `label` may lack some: pools then share a compilation.
    devices: the number of this process's devices to use; None for all.

  Returns:
    int32 [n], a permutation: x[i] goes with z[result[i]].

  Raises:
    UserError: the arrays do not have the same shape.
  """
  label = np.zeros(len(x), np.int32) if label is None else np.asarray(label)
  if np.shape(x) != np.shape(z) or label.shape != (len(x),):
    raise UserError(
      f"images {np.shape(x)}, noise {np.shape(z)} and labels {label.shape} do not go together; "
      "give as much noise as images, of their shape, and a label for each."
    )
  order = np.arange(len(label), dtype=np.int32)
  table = _groups(label, classes) if config.condition == "class" else order[None]
  devices = min(devices or jax.local_device_count(), len(table))
  padding = np.full((-len(table) % devices, table.shape[1]), -1, np.int32)
  columns, reduced = jax.device_get(
    _solver(config, devices)(x, z, np.concatenate([table, padding]))
  )
  pairs = order.copy()
  for i, group in enumerate(table):
    size = int(np.sum(group >= 0))
    column = columns[i, :size]
    if config.solver == "exact":
      _, column = linear_sum_assignment(reduced[i, :size, :size])
    pairs[group[:size]] = group[column]
  return pairs


_draw = jax.jit(draw_noise, static_argnums=2)


def pair(
  config: PairingConfig,
  rng: jax.Array,
  pixels: np.ndarray,
  label: np.ndarray,
  noise: np.ndarray,
  classes: int,
  devices: int | None = None,
) -> np.ndarray:
  """Permutes the noise of one pool, see `match`.

  Every process solves the pool on its own devices. The result is the same everywhere, and nothing
  is sent.

  Args:
    rng: key of `path.draw_noise`.
    pixels: float32 [n, h, w, c].
    label: int32 [n], below `classes`.
    noise: int32 [n], the noise index that each image was drawn with.
    devices: the number of this process's devices to use; None for all.

  Returns:
    int32 [n], a permutation of `noise`.
  """
  z = _draw(rng, noise, pixels.shape[1:])
  return noise[match(config, pixels, z, label, classes, devices)]


def class_leak(noise: np.ndarray, label: np.ndarray) -> float:
  """How well paired noise tells the class: an accuracy that should be at chance.

  This is the two-fold cross-validated accuracy of a logistic regression from noise [n, k] to label
  [n], over classes of at least two examples; NaN if there are fewer than two such classes.
  """
  from sklearn.linear_model import LogisticRegression
  from sklearn.model_selection import cross_val_score

  mask = np.isin(label, np.flatnonzero(np.bincount(label) > 1))
  noise, label = noise[mask], label[mask]
  if len(np.unique(label)) < 2:
    return math.nan
  return float(np.mean(cross_val_score(LogisticRegression(max_iter=300), noise, label, cv=2)))


def relative_cost(x0: jax.Array, x1: jax.Array) -> jax.Array:
  """Mean |x1_i - x0_i|^2 over the mean for random pairs: 1 without pairing, lower is straighter.

  The denominator is the mean over all pairs (i, j) of the batch.
  """
  flat0, flat1 = x0.reshape(len(x0), -1), x1.reshape(len(x1), -1)
  paired = jnp.mean(jnp.sum((flat1 - flat0) ** 2, -1))
  norms = jnp.mean(jnp.sum(flat0**2 + flat1**2, -1))
  # The mean of x_i z_j over all pairs is the product of the means.
  return paired / (norms - 2 * jnp.mean(flat0, 0) @ jnp.mean(flat1, 0))
