"""Devices as a mesh, one rule that lays every array out on it, and batches from many processes.

Axes: `data` replicates the parameters, `fsdp` splits them; a batch is split over both. One device
is the mesh 1 x 1 and the same code.
"""

from __future__ import annotations

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from train_jax.errors import UserError

AXES = ("data", "fsdp")

# Below this many elements an array is cheaper to replicate than to gather.
SMALL = 2**14


def make_mesh(fsdp: int = 1) -> Mesh:
  """All devices of all processes as `(n / fsdp, fsdp)`.

  Raises:
    UserError: `fsdp` does not divide the number of devices.
  """
  n = jax.device_count()
  if fsdp < 1 or n % fsdp:
    raise UserError(f"mesh.fsdp={fsdp} does not divide the {n} devices; choose a divisor of {n}.")
  # Auto axes: the compiler places the collectives (jax.make_mesh defaults to Explicit ones).
  return jax.make_mesh((n // fsdp, fsdp), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def param_spec(shape: tuple[int, ...], fsdp: int) -> PartitionSpec:
  """The one rule: the largest dimension that `fsdp` divides is split, small arrays are not."""
  if fsdp == 1 or math.prod(shape) < SMALL:
    return PartitionSpec()
  divisible = [i for i, size in enumerate(shape) if size % fsdp == 0]
  if not divisible:
    return PartitionSpec()
  largest = max(divisible, key=lambda i: shape[i])
  return PartitionSpec(*("fsdp" if i == largest else None for i in range(largest + 1)))


def state_sharding(abstract, mesh: Mesh):
  """NamedSharding for each leaf; parameters, moments and averages alike: the rule sees shapes."""
  return jax.tree.map(
    lambda a: NamedSharding(mesh, param_spec(a.shape, mesh.shape["fsdp"])), abstract
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading dimension of every batch array is split over all devices."""
  return NamedSharding(mesh, PartitionSpec(AXES))


def check_batch(batch: int, mesh: Mesh) -> None:
  """Raises UserError unless the global batch divides over the devices."""
  n = mesh.size
  if batch < 1 or batch % n:
    raise UserError(
      f"batch={batch} is not divisible by the {n} devices; "
      f"choose a multiple of {n}, such as {max(n, batch // n * n)}."
    )


def process_rows(batch: int) -> slice:
  """The rows of a global batch that this process loads: a contiguous share, in process order."""
  share = batch // jax.process_count()
  return slice(jax.process_index() * share, (jax.process_index() + 1) * share)


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's rows -> global arrays on the mesh."""
  sharding = batch_sharding(mesh)
  return {
    name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()
  }


def place(arrays: dict[str, np.ndarray], shardings: dict[str, NamedSharding]) -> dict:
  """Arrays that every process holds -> global arrays, laid out as `shardings` says by name."""
  return {
    name: jax.make_array_from_callback(a.shape, shardings[name], a.__getitem__)
    for name, a in arrays.items()
  }


def to_local(array: jax.Array) -> np.ndarray:
  """This process's rows of a global array whose leading dimension is split over the devices."""
  if array.is_fully_addressable:
    return np.asarray(array)
  shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start or 0)
  return np.concatenate([np.asarray(shard.data) for shard in shards])


def replicate(tree, mesh: Mesh):
  """The same arrays on every device of the mesh."""
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))
