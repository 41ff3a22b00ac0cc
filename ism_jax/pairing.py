"""Scaling optimal transport, sOT (arXiv 2510.21250, section 4): which noise goes with which image.

K batches are pooled, one optimal transport plan between their images and as many noise samples is
solved on the squared Euclidean cost, and the pairs are dealt back to the K batches. Images and
labels stay where they are; the noise moves, as int32 indices into `path.draw_noise`.

The plan must be a pairing: taking each row's best column uses only a part of the noise, whose
marginal is then no longer Gaussian. So the Sinkhorn plan (ott-jax) is rounded to a permutation.

A pairing that is blind to the labels writes the class into the noise, and a model trained on it is
wrong on fresh noise ("the curse of conditions", arXiv 2503.10636). So by default pairs are made
within each class: a noise sample keeps the class of the row that it was drawn for.

Dimensions: n pool, g groups (classes), m rows of a group, h w image, c channel, k = h w c.
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

PAIR_BYTES = 8  # of a pair in a problem while it is solved: XLA holds two float32 matrices


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
  """Raises UserError if one problem of a pool takes over half of the first device's memory.

  The other half is for the step, beside which it is solved. 16 GiB where the size is not known.

  Args:
    largest: share of the images that the most frequent class has.
  """
  share = largest if config.condition == "class" else 1.0
  n = math.ceil(share * config.pool * batch)
  size = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 2**34) // 2
  if PAIR_BYTES * n**2 > size:
    most = int(math.isqrt(size // PAIR_BYTES) / (share * batch))
    other = ", or pairing.condition=class where there are classes" if share == 1 else ""
    raise UserError(
      f"pairing.pool={config.pool} batches of {batch} rows have a problem of {n} with "
      f"pairing.condition={config.condition!r}, which takes {PAIR_BYTES * n**2 / 2**30:.0f} GiB on "
      f"one device and may take {size / 2**30:.0f}; choose pairing.pool={most} or less (0 is "
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

  Until none is free: each free row proposes to its best free column, each column takes its best
  proposer. Every round settles at least the best pair left, so at most m are needed; a few dozen
  are usual.

  Returns:
    int32 [m], the column of each row; rows that are not valid keep their own.
  """
  m = len(valid)
  rows = jnp.arange(m)
  score = jnp.nan_to_num(score)  # a row of NaN (a broken image) would propose for ever

  def propose(carry):
    column, free_row, free_column = carry
    open_score = jnp.where(free_row[:, None] & free_column[None], score, -jnp.inf)
    best = jnp.argmax(open_score, axis=1)  # each row's column
    value = jnp.where(free_row, open_score[rows, best], -jnp.inf)
    highest = jnp.full(m, -jnp.inf).at[best].max(value)
    # Equal scores: the lowest row wins, so that a column never takes two.
    proposer = jnp.full(m, m).at[best].min(jnp.where(free_row & (value == highest[best]), rows, m))
    wins = free_row & (proposer[best] == rows)
    column = jnp.where(wins, best, column)
    taken = jnp.zeros(m, bool).at[best].max(wins)
    return column, free_row & ~wins, free_column & ~taken

  column, _, _ = jax.lax.while_loop(lambda carry: jnp.any(carry[1]), propose, (rows, valid, valid))
  return column.astype(jnp.int32)


def _solve(config: PairingConfig, together: int, x, z, label, table):
  """Pairs x and z [n, ...] in every group of `table` [g, m] (rows, -1 where a group has fewer).

  As many groups are solved at once as have `together` numbers; at least one.

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
  count = min(together // (m * max(m, x.shape[1])), len(table))
  return jax.lax.map(group, table, batch_size=count if count > 1 else None)


@cache
def _solver(config: PairingConfig, devices: int) -> Callable:
  """`_solve`, jitted, the groups shared out over the first `devices` of this process.

  A group is solved whole on one device, so that the pairs do not depend on their number.
  """
  mesh = Mesh(np.array(jax.local_devices()[:devices]), ("group",))
  specs = (P(), P(), P(), P("group"))
  # A thousand small classes one by one are a thousand loops over small arrays: on a GPU 3.7 s for
  # 8192 rows of 1000 classes, together 0.11 s. A CPU takes twice as long for them together.
  solve = partial(_solve, config, 0 if mesh.devices[0].platform == "cpu" else 2**25)
  # check_vma: the loops inside start from constants, which are the same on every device.
  return jax.jit(
    jax.shard_map(solve, mesh=mesh, in_specs=specs, out_specs=P("group"), check_vma=False)
  )


def _groups(label: np.ndarray, classes: int) -> np.ndarray:
  """Rows of each class -> int32 [classes, m], filled up with -1.

  m is rounded up to a power of two, so that pools of about the same make-up share a compilation.
  """
  order = np.argsort(label, kind="stable").astype(np.int32)
  size = np.bincount(label, minlength=classes)
  m = 2 ** int(size.max() - 1).bit_length()
  members = np.split(order, np.cumsum(size)[:-1])
  return np.stack([np.pad(rows, (0, m - len(rows)), constant_values=-1) for rows in members])


def match(
  config: PairingConfig,
  x: np.ndarray | jax.Array,
  z: np.ndarray | jax.Array,
  label: np.ndarray | None = None,
  classes: int = 1,
  devices: int | None = None,
) -> np.ndarray:
  """Which noise goes with which image, for any of both.

  Args:
    x, z: float32 [n, ...], images and noise of one shape.
    label: int32 [n], the class of a row of both; None where there are none.
    classes: how many there are, if more than in `label`: pools then share a compilation.
    devices: how many of this process's devices to use; None for all of them.

  Returns:
    int32 [n], a permutation: x[i] goes with z[result[i]].

  Raises:
    UserError: the arrays are not of one shape.
  """
  label = np.zeros(len(x), np.int32) if label is None else np.asarray(label)
  if np.shape(x) != np.shape(z) or label.shape != (len(x),):
    raise UserError(
      f"images {np.shape(x)}, noise {np.shape(z)} and labels {label.shape} do not go together; "
      "give as much noise as images, of their shape, and a label for each."
    )
  blind = config.condition != "class"
  table = np.arange(len(label), dtype=np.int32)[None] if blind else _groups(label, classes)
  devices = min(devices or jax.local_device_count(), len(table))
  idle = np.full((-len(table) % devices, table.shape[1]), -1, np.int32)  # an equal share for each
  shares = np.concatenate([table, idle])
  column, reduced = jax.device_get(_solver(config, devices)(x, z, label, shares))
  order = np.arange(len(label), dtype=np.int32)
  for i, rows in enumerate(table):
    size = int(np.sum(rows >= 0))
    mine = column[i, :size]
    if config.solver == "exact":
      _, mine = linear_sum_assignment(reduced[i, :size, :size])
    order[rows[:size]] = rows[mine]
  return order


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
  """Re-deals the noise of one pool, see `match`.

  Every process solves the pool for itself, its groups in parallel on its own devices: the answer is
  the same everywhere, and nothing is sent.

  Args:
    rng: key of `path.draw_noise`.
    pixels: float32 [n, h, w, c].
    label: int32 [n], below `classes`.
    noise: int32 [n], the noise index that each row was drawn with.
    devices: how many of this process's devices to use; None for all of them.

  Returns:
    int32 [n], a permutation of `noise`.
  """
  z = _draw(rng, noise, pixels.shape[1:])
  return noise[match(config, pixels, z, label, classes, devices)]


def class_leak(noise: np.ndarray, label: np.ndarray) -> float:
  """How well the class can be read from the paired noise: a number that should be at chance.

  Two-fold cross-validated accuracy of a logistic regression from noise [n, k] to label [n]; NaN
  where there are no two classes with two rows, of which alone it is taken.
  """
  from sklearn.linear_model import LogisticRegression
  from sklearn.model_selection import cross_val_score

  kept = np.isin(label, np.flatnonzero(np.bincount(label) > 1))
  noise, label = noise[kept], label[kept]
  if len(np.unique(label)) < 2:
    return math.nan
  return float(np.mean(cross_val_score(LogisticRegression(max_iter=300), noise, label, cv=2)))


def relative_cost(x0: jax.Array, x1: jax.Array) -> jax.Array:
  """Mean |x1_i - x0_i|^2 over the mean for random pairs: 1 without pairing, lower is straighter.

  The denominator pairs each image with its neighbours' noise: every pair (i, j) of the batch.
  """
  flat0, flat1 = x0.reshape(len(x0), -1), x1.reshape(len(x1), -1)
  paired = jnp.mean(jnp.sum((flat1 - flat0) ** 2, -1))
  norms = jnp.mean(jnp.sum(flat0**2 + flat1**2, -1))
  # Of all pairs the mean of 2 x_i z_j is that of the means.
  return paired / (norms - 2 * jnp.mean(flat0, 0) @ jnp.mean(flat1, 0))
