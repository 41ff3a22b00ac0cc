"""The mesh of devices, one rule that lays every array out on it, and batches of many processes.

Axes: `data` replicates the parameters. `fsdp` splits them, and each layer gathers its own. `tensor`
splits them and the work on them. A batch is split over `fsdp` and `data`. One device is the mesh
1 x 1 x 1 and runs the same code.

A batch is split over `fsdp` first, and the mesh has its axes in that order. With `data` first,
XLA's partitioner (jaxlib 0.10.2) makes wrong products if all three axes are above 1: in a product
with a matrix laid out over (tensor, fsdp) it reorders the batch as the matrix is laid out, and
never puts it back. tests/train/test_mesh.py tries every layout.

Devices may be in several slices: TPU pods joined by a data-centre network, or GPU hosts. Then
`data` crosses that network first, `fsdp` only where it must, `tensor` never.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from train_jax.errors import UserError, check_at_least

AXES = ("fsdp", "data", "tensor")
ROWS = PartitionSpec(("fsdp", "data"))  # the layout of a batch

# An array of fewer elements is cheaper to replicate than to gather.
SMALL = 2**14


def _count_slices(devices: list) -> int:
  return len({getattr(d, "slice_index", 0) for d in devices})


def arrange(devices: list, fsdp: int, tensor: int) -> np.ndarray:
  """Devices as an array `(fsdp, n / (fsdp tensor), tensor)` with neighbours close to each other.

  UserError if the sizes do not fit the number of devices, or the slices.
  """
  n, slices = len(devices), _count_slices(devices)
  for name, size in (("fsdp", fsdp), ("tensor", tensor)):
    if size < 1 or n % size:
      raise UserError(
        f"mesh.{name}={size} does not divide the {n} devices; choose a divisor of {n}."
      )
  if n % (fsdp * tensor):
    raise UserError(
      f"mesh.fsdp={fsdp} times mesh.tensor={tensor} does not divide the {n} devices; "
      f"choose a product that divides {n}."
    )
  each = n // slices
  if each % tensor:
    raise UserError(
      f"mesh.tensor={tensor} does not divide the {each} devices of one of {slices} slices; "
      f"choose a divisor of {each}."
    )
  near = math.gcd(fsdp, each // tensor)  # the part of fsdp inside a slice
  inside = (each // (near * tensor), near, tensor)
  if slices == 1:
    array = mesh_utils.create_device_mesh(inside, devices, allow_split_physical_axes=True)
  else:
    across = (slices // (fsdp // near), fsdp // near, 1)
    array = mesh_utils.create_hybrid_device_mesh(
      inside, across, devices, allow_split_physical_axes=True
    )
  return array.swapaxes(0, 1)


def make_mesh(fsdp: int = 1, tensor: int = 1, devices: list | None = None) -> Mesh:
  """The mesh of `devices`, all devices of all processes by default; raises as `arrange` does."""
  kinds = (AxisType.Auto,) * len(AXES)  # the compiler places the collectives
  return Mesh(arrange(devices or jax.devices(), fsdp, tensor), AXES, axis_types=kinds)


def mesh_for_inference(axis: str, fsdp: int, tensor: int = 1, devices: list | None = None) -> Mesh:
  """The mesh on which a trained network is used, with any number of devices.

  All devices that shared the parameters in training, or as many as fit, share them along `axis`
  (fsdp, or tensor inside a slice). So a network that could be trained can be used.

  Args:
    fsdp, tensor: sizes of the run's own mesh.
  """
  devices = devices or jax.devices()
  slices = _count_slices(devices) if axis == "tensor" else 1
  return make_mesh(**{axis: math.gcd(fsdp * tensor, len(devices) // slices)}, devices=devices)


def param_spec(shape: tuple[int, ...], fsdp: int, tensor: int = 1) -> PartitionSpec:
  """The one rule: `tensor` splits the largest dimension that it divides, `fsdp` the next one.

  Without tensor, fsdp splits the largest. Small arrays are not split. The largest dimension of a
  block's matrices is the hidden one. So up-projections are split by columns, and down-projections
  by rows (Megatron-LM, arXiv 1909.08053, section 3).
  """
  names: list[str | None] = [None] * len(shape)
  if math.prod(shape) >= SMALL:
    for axis, size in (("tensor", tensor), ("fsdp", fsdp)):
      free = [i for i, n in enumerate(shape) if names[i] is None and n % size == 0]
      if size > 1 and free:
        names[max(free, key=lambda i: shape[i])] = axis
  while names and names[-1] is None:
    names.pop()
  return PartitionSpec(*names)


def state_sharding(abstract, mesh: Mesh):
  """NamedSharding for each leaf; the rule sees only shapes, so moments are split as parameters."""
  fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
  return jax.tree.map(lambda a: NamedSharding(mesh, param_spec(a.shape, fsdp, tensor)), abstract)


def abstract_state(abstract, mesh: Mesh):
  """Shapes of a state or of parameters, with the shardings that they have on `mesh`."""
  shardings = state_sharding(abstract, mesh)
  return jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole of an array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading dimension of every batch array is split over `fsdp` and `data`."""
  return NamedSharding(mesh, ROWS)


def with_mesh(mesh: Mesh, fn: Callable) -> Callable:
  """`fn`, traced with `mesh`, which `shard_batch`, `by_heads` and `by_rule` inside it need."""

  @functools.wraps(fn)
  def run(*args):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return fn(*args)

  return run


def jit(fn: Callable, mesh: Mesh | None) -> Callable:
  """`fn` compiled; with a mesh, every device gets all outputs."""
  if mesh is None:
    return jax.jit(fn)
  return jax.jit(with_mesh(mesh, fn), out_shardings=replicated(mesh))


def shard_batch(x: jax.Array, rest=None) -> jax.Array:
  """Constrains x [b, ...] to be split as the batch is; does nothing outside `with_mesh`.

  Without it the compiler might split activations as the next layer's parameters are, and move
  activations where it should gather parameters.

  Args:
    rest: of the other dimensions: None, not split; PartitionSpec.UNCONSTRAINED, free to choose.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or x.shape[0] % batch_parts(mesh):
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*ROWS, *(rest,) * (x.ndim - 1)))


def by_heads(*arrays: jax.Array) -> list[jax.Array]:
  """Constrains arrays [b, l, n, f] to be split alike: b as a batch, n by `tensor`.

  A kernel that XLA cannot look into then works on each device's share. Does nothing outside
  `with_mesh`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return list(arrays)
  batch = None if any(len(a) % batch_parts(mesh) for a in arrays) else ROWS[0]
  heads = None if any(a.shape[2] % mesh.shape["tensor"] for a in arrays) else "tensor"
  spec = PartitionSpec(batch, None, heads, None)
  return [jax.lax.with_sharding_constraint(a, spec) for a in arrays]


def by_rule(tree):
  """Constrains arrays of the parameters' shapes to a state's layout, inside `with_mesh`."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return tree
  return jax.lax.with_sharding_constraint(tree, state_sharding(tree, mesh))


def fill_rows(tree):
  """Arrays [n, ...], with the last row repeated until `shard_batch` can split them."""
  mesh = jax.sharding.get_abstract_mesh()
  parts = 1 if mesh.empty else batch_parts(mesh)

  def fill(x: jax.Array) -> jax.Array:
    return jnp.pad(x, ((0, -len(x) % parts), *((0, 0),) * (x.ndim - 1)), mode="edge")

  return jax.tree.map(lambda x: shard_batch(fill(x)), tree)


def batch_parts(mesh: Mesh) -> int:
  """The number of parts that a batch is split into."""
  return mesh.shape["data"] * mesh.shape["fsdp"]


def parts_in_words(mesh: Mesh) -> str:
  """The devices, or groups of devices, that have one part of a batch each, for messages."""
  n = batch_parts(mesh)
  return f"{n} devices" if n == mesh.size else f"{n} groups of {mesh.shape['tensor']} devices"


def check_batch(batch: int, mesh: Mesh, grad_accum_steps: int = 1) -> None:
  """Raises UserError unless each of `grad_accum_steps` parts of a batch divides over devices."""
  check_at_least("optim.grad_accum_steps", grad_accum_steps, 1)
  check_at_least("batch", batch, 1)
  n = batch_parts(mesh) * grad_accum_steps
  if batch % n:
    times = f" times optim.grad_accum_steps={grad_accum_steps}" if grad_accum_steps > 1 else ""
    raise UserError(
      f"batch={batch} is not divisible by the {parts_in_words(mesh)}{times}; "
      f"choose a multiple of {n}, such as {max(n, batch // n * n)}."
    )


def process_rows(batch: int, mesh: Mesh) -> np.ndarray:
  """Indices of the examples of a global batch that this process's devices need, ascending.

  Processes whose devices share a part over `tensor` load the same examples.
  """
  groups = mesh.devices.reshape(batch_parts(mesh), -1)
  is_local = [any(d.process_index == jax.process_index() for d in group) for group in groups]
  return np.arange(batch).reshape(len(groups), -1)[is_local].reshape(-1)


def to_global(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """This process's examples -> global arrays on the mesh."""
  return jax.make_array_from_process_local_data(batch_sharding(mesh), batch)


def to_host(array: jax.Array) -> np.ndarray:
  """All of a global array, on every process; all of them must call it."""
  if array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def to_device(array, sharding: NamedSharding, dtype) -> jax.Array:
  """An array as a global one of another layout and dtype; all processes must call it.

  Args:
    array: global, or one that every process can read, such as `lazy.Lazy`. Each process reads its
      devices' shares one after the other, and equal shares once.
  """
  if isinstance(array, jax.Array):
    return jax.device_put(array.astype(dtype), sharding)
  owners: dict[tuple, list] = {}
  for device, index in sharding.addressable_devices_indices_map(array.shape).items():
    owners.setdefault(tuple((s.start, s.stop) for s in index), []).append(device)
  parts = []
  for bounds, devices in owners.items():
    share = np.asarray(array[tuple(slice(*ends) for ends in bounds)], dtype)
    parts += [jax.device_put(share, device) for device in devices]
  return jax.make_array_from_single_device_arrays(array.shape, sharding, parts)


def to_local(array: jax.Array) -> np.ndarray:
  """This process's rows of a global array whose leading dimension is split over the devices.

  A row that several processes hold is returned by one of them.
  """
  if array.is_fully_addressable:
    return np.asarray(array)
  shards = {s.index[0].start or 0: s.data for s in array.addressable_shards if s.replica_id == 0}
  empty = np.empty((0, *array.shape[1:]), array.dtype)  # a process may have no row of its own
  return np.concatenate([empty, *(np.asarray(shards[start]) for start in sorted(shards))])


def donated(*arguments: int) -> tuple[int, ...]:
  """`arguments` as `donate_argnums` of jax.jit; () on a CPU.

  There memory is not scarce, and programs that overwrite their arguments take half as long again
  (the digits' step: 44 ms instead of 31 on one core).
  """
  return () if jax.default_backend() == "cpu" else arguments


def replicate(tree, mesh: Mesh):
  """Arrays, copied to every device of the mesh."""
  return jax.device_put(tree, replicated(mesh))
