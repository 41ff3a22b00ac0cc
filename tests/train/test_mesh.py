"""The mesh, the rule that lays arrays out on it, and batches from many processes."""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from train_jax import mesh as mesh_lib
from train_jax.errors import UserError


@pytest.mark.parametrize(
  "shape, fsdp, tensor, wanted",
  [
    ((128, 256), 8, 1, P(None, "fsdp")),
    ((256, 128), 8, 1, P("fsdp")),
    ((256, 256), 8, 1, P("fsdp")),  # a tie: the first
    ((28, 1000, 36), 8, 1, P(None, "fsdp")),  # 28 and 36 are not divisible by 8
    ((1001, 128), 8, 1, P(None, "fsdp")),  # the largest is not divisible, the next is
    ((1001, 127), 8, 1, P()),
    ((2**14,), 2, 1, P("fsdp")),
    ((2**14 - 2,), 2, 1, P()),  # small
    ((), 2, 1, P()),
    ((256, 256), 1, 1, P()),
    ((28, 256, 1024), 2, 4, P(None, "fsdp", "tensor")),  # up: columns
    ((28, 1024, 256), 2, 4, P(None, "tensor", "fsdp")),  # down: rows
    ((28, 256, 256), 2, 4, P(None, "tensor", "fsdp")),
    ((28, 256, 1024), 1, 4, P(None, None, "tensor")),
    ((256, 1022), 2, 4, P("tensor", "fsdp")),  # tensor does not divide the largest
    ((255, 1023), 2, 4, P()),
    ((2**14,), 2, 4, P("tensor")),
    ((64, 64), 2, 4, P()),  # small
  ],
)
def test_rule_splits_the_largest_dimension_over_tensor_and_the_next_over_fsdp(
  shape, fsdp, tensor, wanted
):
  assert mesh_lib.param_spec(shape, fsdp, tensor) == wanted


@pytest.mark.parametrize("fsdp, tensor", [(1, 1), (2, 1), (8, 1), (2, 2), (4, 2), (1, 8)])
def test_mesh_has_all_devices(fsdp, tensor):
  mesh = mesh_lib.make_mesh(fsdp, tensor)
  assert dict(mesh.shape) == {"data": 8 // (fsdp * tensor), "fsdp": fsdp, "tensor": tensor}
  assert set(mesh.devices.flat) == set(jax.devices())


def sliced(slices: int, each: int) -> list[SimpleNamespace]:
  """Devices of several slices, as JAX describes them, out of order."""
  make = functools.partial(SimpleNamespace, device_kind="cpu", platform="cpu", process_index=0)
  found = [make(id=i, slice_index=i // each) for i in range(slices * each)]
  return found[1::2] + found[::2]


def refusals():
  """(what is refused, its message)."""
  make, check = mesh_lib.make_mesh, mesh_lib.check_batch
  for n in (0, 3, 16, -1):
    yield lambda n=n: make(n), rf"mesh.fsdp={n} .* 8 devices; choose a divisor of 8"
    yield lambda n=n: make(1, n), rf"mesh.tensor={n} .* 8 devices; choose a divisor of 8"
  yield lambda: make(4, 4), r"mesh.fsdp=4 times mesh.tensor=4 .* 8 devices"
  few = r"mesh.tensor=8 does not divide the 4 devices of one of 6"
  yield lambda: mesh_lib.arrange(sliced(6, 4), 1, 8), few
  for batch, near in ((12, 8), (20, 16), (3, 8)):
    words = rf"batch={batch} is not .* by the 8 devices; .* multiple of 8, such as {near}\."
    yield lambda batch=batch: check(batch, make()), words
  yield lambda: check(6, make(2, 2)), "batch=6 is not divisible by the 4 groups of 2 devices"
  words = r"batch=8 is not .* 8 devices times optim.grad_accum_steps=2; .* of 16, such as 16\."
  yield lambda: check(8, make(), 2), words
  for batch in (0, -8):
    yield lambda batch=batch: check(batch, make()), f"batch={batch} must be at least 1"


@pytest.mark.parametrize("make, message", refusals())
def test_what_does_not_fit_the_devices_is_refused(make, message):
  with pytest.raises(UserError, match=message):
    make()


@pytest.mark.parametrize(
  "slices, each, fsdp, tensor",
  [
    (2, 4, 4, 1),
    (2, 4, 2, 2),
    (4, 2, 2, 1),
    (2, 4, 8, 1),
    (4, 4, 4, 2),
    (2, 4, 4, 2),
    (2, 4, 1, 4),
  ],
)
def test_slices_are_crossed_by_data_first_and_by_tensor_never(slices, each, fsdp, tensor):
  mesh = mesh_lib.arrange(sliced(slices, each), fsdp, tensor)
  where = np.vectorize(lambda d: d.slice_index)(mesh)
  assert mesh.shape == (fsdp, slices * each // (fsdp * tensor), tensor)
  assert len({d.id for d in mesh.flat}) == slices * each
  assert (where == where[..., :1]).all()  # one slice along tensor
  crossed = max(len(set(column)) for column in where[..., 0].T)
  assert crossed == max(1, fsdp * tensor // each)  # along fsdp as few as can be


@pytest.mark.parametrize(
  "axis, asked, n, found",
  [
    ("fsdp", (1, 1), 8, (1, 8, 1)),
    ("fsdp", (2, 2), 8, (4, 2, 1)),
    ("tensor", (2, 2), 8, (1, 2, 4)),
    ("fsdp", (16, 4), 8, (8, 1, 1)),
    ("tensor", (4, 2), 6, (1, 3, 2)),
    ("fsdp", (3, 5), 8, (1, 8, 1)),
    ("tensor", (4, 2), 1, (1, 1, 1)),
    ("tensor", (4,), 8, (1, 2, 4)),  # a run of a version that had no tensor
  ],
)
def test_a_run_is_used_on_what_devices_there_are(axis, asked, n, found):
  assert mesh_lib.mesh_for_inference(axis, *asked, devices=jax.devices()[:n]).devices.shape == found


@pytest.mark.parametrize("axis, found", [("tensor", (1, 2, 4)), ("fsdp", (8, 1, 1))])
def test_tensor_alone_fits_into_a_slice(axis, found, monkeypatch):
  """Two slices of four, for a run whose slices had eight."""
  arrange = mesh_lib.arrange

  def make_mesh(devices, fsdp=1, tensor=1):
    return arrange(devices, fsdp, tensor)

  monkeypatch.setattr(mesh_lib, "make_mesh", make_mesh)
  assert mesh_lib.mesh_for_inference(axis, 8, devices=sliced(2, 4)).shape == found


def test_batch_of_a_mesh_with_tensor_divides_over_its_groups():
  mesh = mesh_lib.make_mesh(2, 2)
  mesh_lib.check_batch(12, mesh)
  placed = mesh_lib.to_global({"x": np.arange(12)}, mesh)["x"]
  assert sorted(s.data.tolist() for s in placed.addressable_shards)[:2] == [[0, 1, 2]] * 2


@pytest.mark.parametrize("names", [(), ("tensor",), (None, "fsdp"), ("fsdp", "tensor")])
def test_what_is_placed_is_read_once_a_share(names):
  whole, read = np.arange(24, dtype=np.float32).reshape(4, 6), []

  class Stored:
    shape = whole.shape

    def __getitem__(self, index):
      read.append(index)
      return whole[index]

  sharding = NamedSharding(mesh_lib.make_mesh(2, 2), P(*names))
  placed = mesh_lib.to_device(Stored(), sharding, jnp.bfloat16)
  assert len(read) == 2 ** len([name for name in names if name])
  again = mesh_lib.to_device(placed, NamedSharding(mesh_lib.make_mesh(4), P("fsdp")), np.float32)
  for found, dtype in ((placed, jnp.bfloat16), (again, np.float32)):
    np.testing.assert_array_equal(np.asarray(found, np.float32), whole)
    assert found.dtype == dtype
  assert placed.sharding == sharding and again.sharding.spec == P("fsdp")


def test_batch_is_laid_out_over_all_devices_and_comes_back_in_order():
  mesh, rows = mesh_lib.make_mesh(2), np.arange(32).reshape(16, 2)
  mesh_lib.check_batch(16, mesh)
  assert mesh_lib.process_rows(16, mesh).tolist() == list(range(16))
  placed = mesh_lib.to_global({"x": rows}, mesh)["x"]
  assert [s.data.shape for s in placed.addressable_shards] == [(2, 2)] * 8
  copies = mesh_lib.replicate({"x": rows}, mesh)["x"]
  assert [s.data.shape for s in copies.addressable_shards] == [(16, 2)] * 8
  for found in (placed, mesh_lib.to_local(placed), mesh_lib.to_host(placed), copies):
    np.testing.assert_array_equal(found, rows)


@pytest.mark.parametrize(
  "owners, tensor, wanted",
  [
    ([0, 0, 1, 1, 2, 2, 3, 3], 1, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]]),
    ([0, 1, 0, 1, 0, 1, 0, 1], 1, [[0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]]),
    ([0, 0, 0, 0, 1, 1, 1, 1], 2, [[*range(8)], [*range(8, 16)]]),
    ([0, 1, 0, 1, 0, 1, 0, 1], 2, [[*range(16)], [*range(16)]]),  # each part on both
  ],
)
def test_processes_load_the_rows_of_their_devices(monkeypatch, owners, tensor, wanted):
  devices = np.array([SimpleNamespace(process_index=i) for i in owners]).reshape(1, -1, tensor)
  shape = {"data": 8 // tensor, "fsdp": 1, "tensor": tensor}
  mesh = SimpleNamespace(devices=devices, shape=shape)
  for i, rows in enumerate(wanted):
    monkeypatch.setattr(jax, "process_index", lambda i=i: i)
    assert mesh_lib.process_rows(16, mesh).tolist() == rows


def test_shard_batch_splits_rows_where_a_mesh_is_known():
  mesh = mesh_lib.make_mesh(2, 2)
  plain = jnp.ones((8, 4))
  assert mesh_lib.shard_batch(plain) is plain
  # The operand is split by columns; without `shard_batch` the result would be, too.
  columns = jax.device_put(plain, NamedSharding(mesh, P(None, "fsdp")))
  split = jax.jit(mesh_lib.with_mesh(mesh, lambda x: mesh_lib.shard_batch(x) + 1))(columns)
  assert split.sharding.is_equivalent_to(mesh_lib.batch_sharding(mesh), 2)
  np.testing.assert_array_equal(split, plain + 1)
  few = jax.jit(mesh_lib.with_mesh(mesh, lambda x: mesh_lib.shard_batch(x) + 1))(columns[:4])
  assert few.sharding.is_equivalent_to(mesh_lib.batch_sharding(mesh), 2)  # a row for each part
  odd = jax.jit(mesh_lib.with_mesh(mesh, lambda x: mesh_lib.shard_batch(x) + 1))(columns[:6])
  np.testing.assert_array_equal(odd, plain[:6] + 1)


def test_rows_are_filled_until_they_can_be_split():
  mesh, x = mesh_lib.make_mesh(2), jnp.arange(22).reshape(11, 2)
  filled = mesh_lib.jit(lambda x: mesh_lib.fill_rows({"x": x}), mesh)
  found = filled(x)["x"]
  assert found.is_fully_replicated and len(found.addressable_shards) == 8
  np.testing.assert_array_equal(found, [*x, *[x[-1]] * 5])
  np.testing.assert_array_equal(filled(x[:8])["x"], x[:8])
  np.testing.assert_array_equal(filled(x[:3])["x"], [*x[:3], *[x[2]] * 5])  # a row for each
  np.testing.assert_array_equal(mesh_lib.jit(mesh_lib.fill_rows, None)(x), x)


@pytest.mark.parametrize("split", [("tensor", "fsdp"), ("fsdp", "tensor"), ("tensor",)], ids=str)
def test_products_are_right_in_every_layout(split):
  """What XLA gets wrong with rows split over (data, fsdp): this order may be next."""
  mesh = mesh_lib.make_mesh(2, 2)
  (rows,), ways = mesh_lib.ROWS, (None, "fsdp", "tensor", *mesh_lib.ROWS)
  pairs = [P(a, b) for a, b in itertools.product(ways, ways) if a != b or a is None]
  pairs = [pair for pair in pairs if not {rows, "fsdp"} <= {*pair}]
  x, w = np.random.default_rng(0).normal(size=(2, 16, 16)).astype(np.float32)

  def products(x, w):
    hold = jax.lax.with_sharding_constraint
    return [hold((i + 1) * x @ w, NamedSharding(mesh, pair)) for i, pair in enumerate(pairs)]

  placed = (jax.device_put(a, NamedSharding(mesh, P(*s))) for a, s in ((x, (rows,)), (w, split)))
  for i, found in enumerate(jax.jit(products)(*placed)):
    np.testing.assert_allclose(found / (i + 1), x @ w, atol=1e-5, err_msg=str(pairs[i]))
