"""FLOPs and traffic against counts by hand; the traffic of compiled programs against shapes."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tools.plan import cost
from train_jax import mesh as mesh_lib


def count(fn, *shapes) -> float:
  return cost.flops(jax.make_jaxpr(fn)(*(jnp.ones(shape) for shape in shapes)))


def product(a, b):
  return a @ b


def scanned(x, stack):
  return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]


SQUARE, PRODUCT = [(4, 8), (8, 8)], 2 * 4 * 8 * 8


@pytest.mark.parametrize(
  "fn, shapes, wanted",
  [
    (product, [(4, 8), (8, 16)], 2 * 4 * 8 * 16),
    (product, [(3, 4, 8), (3, 8, 16)], 3 * 2 * 4 * 8 * 16),
    (jax.jit(product), SQUARE, PRODUCT),
    (scanned, [(4, 8), (5, 8, 8)], 5 * PRODUCT),
    # Backward: the input's gradient and the weights'.
    (jax.grad(lambda x, s: scanned(x, s).sum(), (0, 1)), [(4, 8), (5, 8, 8)], 15 * PRODUCT),
    # ... and the forward pass again.
    (
      jax.grad(
        lambda x, s: jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, s)[
          0
        ].sum(),
        (0, 1),
      ),
      [(4, 8), (5, 8, 8)],
      20 * PRODUCT,
    ),
    (
      lambda x, w: jax.lax.cond(x[0, 0] > 0, product, lambda x, w: x, x, w),
      [(4, 8), (8, 8)],
      PRODUCT,
    ),
    (lambda x, w: jax.lax.fori_loop(0, 3, lambda _, x: x @ w, x), SQUARE, 3 * PRODUCT),
    (
      lambda x, w: jax.lax.conv(x, w, (1, 1), "VALID"),
      [(2, 3, 8, 8), (5, 3, 3, 3)],
      2 * 2 * 5 * 6 * 6 * 3 * 3 * 3,
    ),
  ],
)
def test_flops_are_those_counted_by_hand(fn, shapes, wanted):
  assert count(fn, *shapes) == wanted


def test_groups_are_read_in_every_notation():
  read = functools.partial(cost._group, chips=64)
  assert read("replica_groups={{0,1,2},{3,4,5}}, x") == 3
  assert read("replica_groups=[4,16]<=[64]") == 16
  assert read("replica_groups=mesh['a'=4,'b'=16] {'b'}") == 16
  assert read("replica_groups=mesh['a'=4,'b'=16] {'a','b'}, use") == 64
  assert read("replica_groups=mesh['a'=4,'b'=16] {'a','b':(4)2}") == 8
  assert read("replica_groups={}") == read("channel_id=3") == 64


HLO = """HloModule jit_f, is_scheduled=true

%condition.1 (p: (f32[8], s32[])) -> pred[] {
  %limit = s32[]{:T(128)} constant(15), metadata={}
  %i = s32[] get-tuple-element(%p), index=1
  ROOT %compare = pred[] compare(%i, %limit), direction=LT
}

%body.1 (p: (f32[8], s32[])) -> (f32[8], s32[]) {
  %r = (f32[16], /*index=1*/bf16[8,2]{1,0}) all-reduce(%a), channel_id=1, replica_groups=[2,4]<=[8]
  %i = s32[] get-tuple-element(%p), index=1
  %step = s32[] constant(2)
  %add = s32[] add(%i, %step)
  %copy = s32[] copy(%add)
  ROOT %tuple = (f32[8], s32[]) tuple(%x, /*index=1*/%copy)
}

%fusion.a (p: f32[8]) -> f32[64] {
  ROOT %g = f32[64]{0} all-gather(%p), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}
}

%fusion.b (p: f32[8]) -> f32[64] {
  ROOT %g = f32[64]{0} all-gather(%p), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}
}

%small (p: f32[8]) -> f32[8] {
  ROOT %s = f32[8]{0} collective-permute(%p), channel_id=5, source_target_pairs={{0,1}}
}

%large (p: f32[8]) -> f32[8] {
  ROOT %s = f32[8]{0} reduce-scatter(%p), channel_id=6, replica_groups=[1,8]<=[8]
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %while = (f32[8], s32[]) while(%t), condition=%condition.1, body=%body.1
  %one = f32[64]{0} fusion(%p), kind=kCustom, calls=%fusion.a
  %two = f32[64]{0} fusion(%p), kind=kCustom, calls=%fusion.b
  %start = (f32[8]{0}, f32[64]{0}) all-gather-start(%p), channel_id=3, replica_groups=[1,8]<=[8]
  %done = f32[64]{0} all-gather-done(%start)
  %cond = f32[8] conditional(%i, %p, %p), branch_computations={%small, %large}
  %hop = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%p), channel_id=7
  %send = (f32[4,2]{1,0:T(8,128)}, u32[], token[]) send(%q, %after), channel_id=2, HOSTS
  %recv = (f32[4,2]{1,0:T(8,128)}, u32[], token[]) recv(%after), channel_id=3, HOSTS
  %from = (f32[4,2]{1,0:T(8,128)}, token[]) recv-done(%recv), channel_id=3, HOSTS
  %scatter = f32[1]{0} reduce-scatter(%p), channel_id=1, replica_groups=[2,4]<=[8]
}
"""


# As TPU's compiler writes it where an all-reduce goes over two slices.
HOSTS = '{_xla_host_transfer_handler_name="xla_megascale_runtime"}'
HLO = HLO.replace("HOSTS", f"is_host_transfer=true, frontend_attributes={HOSTS}")


def test_loops_of_unknown_length_count_once():
  computations, entry = cost.parse(HLO)
  condition, body = computations["condition.1"], computations["body.1"]
  (loop,) = (o for o in computations[entry].values() if o.opcode == "while")
  assert cost.trips(loop, condition, body) == 7
  known = loop._replace(rest=loop.rest + ', backend_config={"known_trip_count":{"n":"9"}}')
  assert cost.trips(known, condition, body) == 9
  condition["limit"] = condition["limit"]._replace(opcode="get-tuple-element", rest="%p), index=3")
  assert cost.trips(loop, condition, body) == 1


def test_traffic_of_a_program_is_that_counted_by_hand():
  found = cost.collectives(HLO, 8)
  assert (
    found["all-reduce"] == 7 * 2 * (16 * 4 + 16 * 2) * 3 / 4
  )  # in a loop that counts to 15 by 2
  assert found["all-gather"] == 2 * 64 * 4 * 7 / 8  # the fused one once, the started one
  # The dearer branch; another collective may have the number of one of another kind.
  assert found["reduce-scatter"] == 8 * 4 * 7 + 1 * 4 * 3
  assert found["collective-permute"] == pytest.approx(8 * 4, abs=8)
  assert found[cost.BETWEEN] == 4 * 2 * 4  # received once
  assert set(found) <= {*cost.KINDS, cost.BETWEEN}


@pytest.mark.parametrize("layers", [1, 5])
def test_traffic_of_a_compiled_program_is_that_of_its_shapes(layers):
  mesh = mesh_lib.make_mesh(8)
  x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=mesh_lib.batch_sharding(mesh))
  split = NamedSharding(mesh, P(None, None, "fsdp"))
  stack = jax.ShapeDtypeStruct((layers, 64, 64), jnp.float32, sharding=split)

  def fn(x, stack):
    return jax.lax.scan(lambda x, w: (mesh_lib.shard_batch(jnp.tanh(x @ w)), None), x, stack)[
      0
    ].sum()

  text = jax.jit(mesh_lib.with_mesh(mesh, fn)).lower(x, stack).compile().as_text()
  found = cost.collectives(text, 8)
  assert found["all-gather"] == layers * 64 * 64 * 4 * 7 / 8
  assert found["all-reduce"] == 2 * 4 * 7 / 8
