"""`--mode=compile`: compiles a run's programs ahead of time, for other accelerators.

XLA's compiler for TPUs is in the package libtpu and needs no TPU. It reports the memory. Bytes
between chips are read from the compiled program (`cost.py`), and time is estimated from peaks.
"""

from __future__ import annotations

import math
import os
import re
import time
from dataclasses import dataclass
from importlib.metadata import version

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from tools.plan import cost
from train_jax import mesh as mesh_lib
from train_jax import state as state_lib
from train_jax.errors import UserError
from train_jax.optim import OptimConfig
from train_jax.step import AbstractCall, Method, make_train_step

GIB = 2**30


@dataclass(frozen=True)
class Chip:
  """One chip: memory in bytes, its bandwidth in bytes/s, bfloat16 FLOP/s, bytes/s from others."""

  memory: float
  bandwidth: float
  flops: float
  network: float


# docs.cloud.google.com/tpu/docs/{v5e,v5p-training,v6e}; `network` is half of their bidirectional
# inter-chip bandwidth.
CHIPS = {
  "v5e": Chip(16 * GIB, 819e9, 197e12, 200e9),
  "v5p": Chip(95 * GIB, 2765e9, 459e12, 600e9),
  "v6e": Chip(32 * GIB, 1638e9, 918e12, 400e9),
}

EFFICIENCY = 0.5  # of peak FLOP/s in matrix products, as good training runs reach
ASSUMPTIONS = (
  f"Estimated time: the larger of FLOPs at {EFFICIENCY:.0%} of the bfloat16 peak and one pass over "
  "the memory in use, plus the collectives over all links of a chip; nothing overlaps, a loop "
  "whose length is not known (sampling steps, rollouts) counts once, and what comes from other "
  "slices takes no time."
)


def find_devices(topology: str) -> list:
  """Devices of `v5e:16x16`, `v5p:2x2x2`, `v6e:4x4` (`*2`: two slices of that) or `cpu:8`.

  UserError if there is no such topology, or libtpu is not installed.
  """
  kind, _, shape = topology.partition(":")
  if not re.fullmatch(rf"cpu:[1-9]\d*|({'|'.join(CHIPS)}):\d+(x\d+)+(\*[1-9]\d*)?", topology):
    raise UserError(
      f"--topology={topology} is unknown; write v5e:16x16, v5p:2x2x2, v6e:4x4 (with *2 for two "
      "slices) or cpu:8."
    )
  if kind == "cpu":
    return _fake_devices(int(shape))
  shape, _, slices = shape.partition("*")
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU machine to ask
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor a TPU to reserve for this process
  jax.config.update("jax_platforms", "cpu")
  extra = {"num_slices": int(slices)} if slices else {}
  try:
    return topologies.get_topology_desc(f"{kind}:{shape}", "tpu", **extra).devices
  except Exception as err:  # of many kinds, from the plug-in
    try:
      import libtpu  # noqa: F401
    except ImportError:
      raise UserError(
        f"--topology={topology} needs TPU's compiler, which needs no TPU; pip install 'jax[tpu]'."
      ) from err
    raise UserError(f"--topology={topology} is refused by libtpu: {str(err)[:200]}") from err


def _fake_devices(n: int) -> list:
  try:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", n)
  except RuntimeError:  # JAX has started already, with devices of its own
    pass
  if len(jax.devices()) < n:
    raise UserError(f"--topology=cpu:{n} is more than the {len(jax.devices())} devices here.")
  return jax.devices()[:n]


@dataclass(frozen=True)
class Program:
  """A compiled program; bytes and FLOPs are of one chip.

  Attributes:
    arguments: bytes of each group of arguments: parameters, optimiser, averages, ...
    peak: bytes of memory, or bytes that the compiler asked for if the program does not fit.
    fits: whether it fits by the compiler and by CHIPS; None for an unknown chip.
    flops: of matrix products.
    received: bytes from other chips by kind of collective, and `cost.BETWEEN` from other slices.
    seconds: time of compilation.
  """

  name: str
  arguments: dict[str, float]
  peak: float
  fits: bool | None
  flops: float
  received: dict[str, float]
  seconds: float

  def estimate(self, chip: Chip) -> tuple[float, float, float]:
    """Seconds of compute, memory and network in one run; see ASSUMPTIONS."""
    inside = sum(size for kind, size in self.received.items() if kind != cost.BETWEEN)
    return (
      self.flops / (EFFICIENCY * chip.flops),
      self.peak / chip.bandwidth,
      inside / chip.network,
    )


def abstract_batch(method: Method, position: int, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """The global batch number `position` as shapes, from this process's share of it."""
  parts = mesh_lib.batch_parts(mesh)
  shares = parts // len(mesh_lib.process_rows(parts, mesh))
  stream = method.stream(0, position)
  batch, sharding = next(stream), mesh_lib.batch_sharding(mesh)
  stream.close()
  return {
    name: jax.ShapeDtypeStruct((shares * len(a), *a.shape[1:]), a.dtype, sharding=sharding)
    for name, a in batch.items()
  }


def bytes_per_chip(tree) -> float:
  """The bytes of an abstract tree with shardings on one chip."""
  shapes = [(a.sharding.shard_shape(a.shape), a.dtype.itemsize) for a in jax.tree.leaves(tree)]
  return float(sum(math.prod(shape) * itemsize for shape, itemsize in shapes))


def compile_program(call: AbstractCall, chip: Chip | None) -> Program:
  """Compiles a call for a chip; None is a chip with unknown limits."""
  start = time.perf_counter()
  traced = jax.jit(call.function, **call.options).trace(*call.args)
  sizes = {group: bytes_per_chip(tree) for group, tree in call.groups.items()}
  common = {"name": call.name, "arguments": sizes, "flops": cost.flops(traced.jaxpr) / call.chips}
  try:
    compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as err:
    used = re.search(r"Used ([\d.]+)([KMGT]) of", str(err))
    if "RESOURCE_EXHAUSTED" not in str(err) or not used:
      raise
    peak = float(used.group(1)) * 1024 ** (1 + "KMGT".index(used.group(2)))
    return Program(
      **common, peak=peak, fits=False, received={}, seconds=time.perf_counter() - start
    )
  memory = compiled.memory_analysis()
  peak = (
    memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes
  )
  try:
    received = cost.collectives(compiled.as_text(), call.chips)
  except jax.errors.JaxRuntimeError as err:
    raise UserError(
      f"jaxlib {version('jaxlib')} cannot read what the installed libtpu has compiled; install "
      f"the one that goes with it: pip install 'jax[tpu]=={jax.__version__}'."
    ) from err
  fits, seconds = peak <= chip.memory if chip else None, time.perf_counter() - start
  return Program(**common, peak=peak, fits=fits, received=received, seconds=seconds)


def compile_step(
  method: Method,
  tx,
  decays: dict[str, float],
  optim: OptimConfig,
  position: int,
  mesh: Mesh,
  chip: Chip | None,
) -> Program:
  """Compiles the train step as the loop does; `position` is the number of the batch."""
  state = mesh_lib.abstract_state(jax.eval_shape(state_lib.create(method, tx, decays, 0)), mesh)
  shardings = jax.tree.map(lambda a: a.sharding, state)
  frozen = (mesh_lib.abstract_state(method.frozen.shapes, mesh),) if method.frozen else ()
  groups = {
    "frozen": frozen,
    "parameters": state.params,
    "optimiser": state.opt_state,
    "averages": state.ema,
    "auxiliary": state.aux_state,
  }
  call = AbstractCall(
    "train step",
    mesh_lib.with_mesh(
      mesh, make_train_step(method, tx, decays, optim.clip, optim.grad_accum_steps)
    ),
    (state, abstract_batch(method, position, mesh), *frozen),
    groups,
    mesh.size,
    {"donate_argnums": 0, "out_shardings": (shardings, None)},
  )
  return compile_program(call, chip)


def in_bytes(size: float) -> str:
  """A number of bytes with its unit, padded to eleven characters or more."""
  for unit, power in (("GiB", 3), ("MiB", 2), ("KiB", 1)):
    if size >= 0.1 * 1024**power:
      return f"{size / 1024**power:9.3f} {unit}"
  return f"{size:9.0f} B"


def describe(program: Program, chip: Chip | None) -> str:
  """The program's numbers as text, one a line."""
  lines = [(name, in_bytes(size)) for name, size in program.arguments.items() if size]
  verdict = "fits" if program.fits else "DOES NOT FIT"
  limit = f" of {chip.memory / GIB:.0f} GiB: {verdict}" if chip else ""
  lines.append(("memory peak", f"{in_bytes(program.peak)}{limit}"))
  flops, unit = (program.flops / 1e12, "T") if program.flops > 1e11 else (program.flops / 1e9, "G")
  lines.append(("FLOPs", f"{flops:9.3f} {unit}FLOP"))
  lines += [(kind, in_bytes(size)) for kind, size in sorted(program.received.items())]
  if chip and program.fits:
    compute, memory, network = (1e3 * seconds for seconds in program.estimate(chip))
    total = max(compute, memory) + network
    terms = f"max(compute {compute:.1f}, memory {memory:.1f}) + network {network:.1f}"
    lines.append(("estimate", f"{total:9.1f} ms = {terms}"))
  head = f"{program.name}: compiled in {program.seconds:.0f} s"
  return "\n".join([head, *(f"  {name:<18} {text}" for name, text in lines)])
