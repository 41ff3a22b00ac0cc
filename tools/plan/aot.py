"""`--mode=compile`: compiles a run's programs for hardware that is not here; what they need of it.

XLA's compiler for TPUs is in the package libtpu and needs no TPU. The memory is what it allots; the
bytes between chips are in the program that it makes (`cost.py`); the time is estimated from peaks.
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
from train_jax.step import AbstractCall, Method, make_train_step

GIB = 2**30


@dataclass(frozen=True)
class Chip:
  """Of one chip: memory in bytes, its bandwidth, bfloat16 FLOP/s, bytes/s from the other chips."""

  memory: float
  bandwidth: float
  flops: float
  network: float


# docs.cloud.google.com/tpu/docs/{v5e,v5p-training,v6e}; `network` is half of what they call
# bidirectional inter-chip bandwidth.
CHIPS = {
  "v5e": Chip(16 * GIB, 819e9, 197e12, 200e9),
  "v5p": Chip(95 * GIB, 2765e9, 459e12, 600e9),
  "v6e": Chip(32 * GIB, 1638e9, 918e12, 400e9),
}

# Of peak FLOP/s, in matrix products: what good training runs reach.
EFFICIENCY = 0.5
ASSUMPTIONS = (
  f"Estimated time: the larger of FLOPs at {EFFICIENCY:.0%} of the bfloat16 peak and one pass over "
  "the memory in use, plus the collectives over all links of a chip; nothing overlaps, a loop "
  "whose length is not known (sampling steps, rollouts) counts once, and what comes from other "
  "slices takes no time."
)


def find_devices(topology: str) -> list:
  """Devices of `v5e:16x16`, `v5p:2x2x2`, `v6e:4x4` (`*2`: two slices of that) or `cpu:8`.

  Raises:
    UserError: there is no such topology, or libtpu is not installed.
  """
  kind, _, shape = topology.partition(":")
  if not re.fullmatch(r"cpu:[1-9]\d*|(v5e|v5p|v6e):\d+(x\d+)+(\*[1-9]\d*)?", topology):
    raise UserError(
      f"--topology={topology} is unknown; write v5e:16x16, v5p:2x2x2, v6e:4x4 (with *2 for two "
      "slices) or cpu:8."
    )
  if kind == "cpu":
    return _fake_devices(int(shape))
  shape, _, slices = shape.partition("*")
  for name, value in {"SKIP_MDS_QUERY": "1", "WORKER_HOSTNAMES": "localhost"}.items():
    os.environ.setdefault(f"TPU_{name}", value)  # there is no TPU machine to ask
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor one to keep for this process
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
  except RuntimeError:  # JAX has started already
    pass
  if len(jax.devices()) < n:
    raise UserError(f"--topology=cpu:{n} is more than the {len(jax.devices())} devices here.")
  return jax.devices()[:n]


@dataclass(frozen=True)
class Program:
  """A compiled program; bytes and FLOPs are of one chip.

  Attributes:
    arguments: bytes of each group of arguments: parameters, optimiser, averages, ...
    peak: bytes of memory, or of what was asked for where it does not fit.
    fits: whether the compiler and the chip's table agree that it does; None for chips unknown.
    flops: of matrix products.
    received: bytes from other chips, by kind of collective; from other slices, `cost.BETWEEN`.
    seconds: of compilation.
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
  share = parts // len(mesh_lib.process_rows(parts, mesh))
  stream = method.stream(0, position)
  rows, sharding = next(stream), mesh_lib.batch_sharding(mesh)
  stream.close()
  return {
    name: jax.ShapeDtypeStruct((share * len(a), *a.shape[1:]), a.dtype, sharding=sharding)
    for name, a in rows.items()
  }


def bytes_per_chip(tree) -> float:
  """Of the leaves of an abstract tree with shardings."""
  return float(
    sum(
      math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree)
    )
  )


def compile_program(call: AbstractCall, chip: Chip | None) -> Program:
  """Compiles a call for a chip; `chip` is None where its limits are not known."""
  start = time.perf_counter()
  traced = jax.jit(call.function, **call.options).trace(*call.args)
  sizes = {group: bytes_per_chip(tree) for group, tree in call.groups.items()}
  known = {"name": call.name, "arguments": sizes, "flops": cost.flops(traced.jaxpr) / call.chips}
  try:
    compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as err:
    used = re.search(r"Used ([\d.]+)([KMGT]) of", str(err))
    if "RESOURCE_EXHAUSTED" not in str(err) or not used:
      raise
    peak = float(used.group(1)) * 1024 ** (1 + "KMGT".index(used.group(2)))
    return Program(**known, peak=peak, fits=False, received={}, seconds=time.perf_counter() - start)
  found = compiled.memory_analysis()
  peak = (
    found.argument_size_in_bytes
    + found.output_size_in_bytes
    - found.alias_size_in_bytes
    + found.temp_size_in_bytes
    + found.generated_code_size_in_bytes
  )
  return Program(
    **known,
    peak=peak,
    fits=peak <= chip.memory if chip else None,
    received=cost.collectives(_text(compiled), call.chips),
    seconds=time.perf_counter() - start,
  )


def _text(compiled: jax.stages.Compiled) -> str:
  """The compiled program as HLO. Raises UserError if its compiler is too new for this jaxlib."""
  try:
    return compiled.as_text()
  except jax.errors.JaxRuntimeError as err:
    raise UserError(
      f"jaxlib {version('jaxlib')} cannot read what the installed libtpu has compiled; install "
      f"the one that goes with it: pip install 'jax[tpu]=={jax.__version__}'."
    ) from err


def compile_step(
  method: Method,
  tx,
  decays: dict,
  clip: float,
  grad_accum_steps: int,
  position: int,
  mesh: Mesh,
  chip: Chip | None,
) -> Program:
  """The train step of a run, as the loop compiles it; `position` is that of the batch."""
  state = mesh_lib.abstract_state(jax.eval_shape(state_lib.create(method, tx, decays, 0)), mesh)
  shardings = jax.tree.map(lambda a: a.sharding, state)
  frozen = (mesh_lib.abstract_state(method.frozen.shapes, mesh),) if method.frozen else ()
  groups = {
    "frozen": frozen,
    "parameters": state.params,
    "optimiser": state.opt_state,
    "averages": state.ema,
    "side-car": state.aux_state,
  }
  call = AbstractCall(
    "train step",
    mesh_lib.with_mesh(mesh, make_train_step(method, tx, decays, clip, grad_accum_steps)),
    (state, abstract_batch(method, position, mesh), *frozen),
    groups,
    mesh.size,
    {"donate_argnums": 0, "out_shardings": (shardings, None)},
  )
  return compile_program(call, chip)


def in_bytes(size: float) -> str:
  """A number of bytes with its unit, in eleven characters or more."""
  for unit, power in (("GiB", 3), ("MiB", 2), ("KiB", 1)):
    if size >= 0.1 * 1024**power:
      return f"{size / 1024**power:9.3f} {unit}"
  return f"{size:9.0f} B"


def describe(program: Program, chip: Chip | None) -> str:
  """The program's numbers, a line each."""
  rows = [f"{program.name}: compiled in {program.seconds:.0f} s"]
  rows += [f"  {name:<18} {in_bytes(size)}" for name, size in program.arguments.items() if size]
  verdict = "fits" if program.fits else "DOES NOT FIT"
  limit = f" of {chip.memory / GIB:.0f} GiB: {verdict}" if chip else ""
  rows.append(f"  {'memory peak':<18} {in_bytes(program.peak)}{limit}")
  flops, unit = (program.flops / 1e12, "T") if program.flops > 1e11 else (program.flops / 1e9, "G")
  rows.append(f"  {'FLOPs':<18} {flops:9.3f} {unit}FLOP")
  rows += [f"  {kind:<18} {in_bytes(size)}" for kind, size in sorted(program.received.items())]
  if chip and program.fits:
    compute, memory, network = program.estimate(chip)
    total = max(compute, memory) + network
    rows.append(
      f"  {'estimate':<18} {1e3 * total:9.1f} ms = max(compute {1e3 * compute:.1f}, memory "
      f"{1e3 * memory:.1f}) + network {1e3 * network:.1f}"
    )
  return "\n".join(rows)
