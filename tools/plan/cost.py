"""The cost of a program, from its text: FLOPs of a jaxpr, bytes between chips of compiled HLO.

XLA's own cost analysis counts the body of a loop once. Here it counts as often as it runs, if that
is known at compile time.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from typing import NamedTuple

_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+))(?:e\d+m\d+\w*)?\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_OPERATION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_INDEX = re.compile(r"index=(\d+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[(\d+),(\d+)\]|mesh\[(.*?)\] \{(.*?)\})")
_AXIS = re.compile(r"'(\w+)'(?:=|:\(\d+\))?(\d*)")
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BETWEEN = "between slices"  # transfers that TPU's compiler leaves to the hosts


def flops(jaxpr) -> float:
  """FLOPs of matrix products and convolutions, over all devices.

  Recomputation (`jax.checkpoint`) is in the jaxpr and counts. The dearest branch of `cond` counts.
  """
  total = 0.0
  for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
      (contracted, _), _ = params["dimension_numbers"]
      inner = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
      total += 2 * math.prod(equation.outvars[0].aval.shape) * inner
    elif name == "conv_general_dilated":
      kernel = equation.invars[1].aval.shape
      features = kernel[params["dimension_numbers"].rhs_spec[0]]
      total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / features
    elif name == "cond":
      total += max(flops(branch) for branch in params["branches"])
    else:
      inner = [p for p in params.values() if hasattr(p, "eqns") or hasattr(p, "jaxpr")]
      total += params.get("length", 1) * sum(map(flops, inner)) if inner else 0
  return total


def _bytes(types: str) -> float:
  """Bytes of all arrays in an HLO type, such as `(f32[2,3]{1,0}, bf16[4])`."""
  total = 0.0
  for _, bits, shape in _ARRAY.findall(types):
    total += int(bits or 8) / 8 * math.prod(int(n) for n in shape.split(",") if n)
  return total


def _group(attributes: str, chips: int) -> int:
  """The number of chips in a group of a collective."""
  match = _GROUPS.search(attributes)
  if match is None:
    return chips
  members, _, size, mesh, axes = match.groups()
  if mesh is not None:  # mesh['a'=4,'b'=8] {'a'}, or {'b':(1)2} for a part of an axis
    sizes = dict(_AXIS.findall(mesh))
    return math.prod(int(part or sizes[axis]) for axis, part in _AXIS.findall(axes))
  return int(size) if size else (members.count(",") + 1 if members else chips)


def _received(kind: str, is_start: bool, types: str, group: int) -> float:
  """Bytes that each chip gets from others in a ring; `types` is the operation's result."""
  size, share = _bytes(types), (group - 1) / group
  if kind == "all-reduce":
    return 2 * size * share
  if kind == "all-gather":  # -start returns its operands as well
    return (size * group / (group + 1) if is_start else size) * share
  if kind == "reduce-scatter":
    return size * (group - 1)
  if kind == "collective-permute":
    return size / 2 if is_start else size
  return size * share


class Operation(NamedTuple):
  """A line of HLO: `name = types opcode(rest`."""

  name: str
  types: str
  opcode: str
  rest: str

  @property
  def operands(self) -> list[str]:
    return _NAME.findall(self.rest.partition(")")[0])


class Computation(dict[str, Operation]):
  """The operations of a computation by name; it returns `root`."""

  root: Operation


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """The computations of an HLO module by name, and the name of the entry."""
  computations: dict[str, Computation] = {}
  entry, current = "", Computation()
  for line in text.splitlines():
    if header := _HEADER.match(line):
      current = computations[header.group(2)] = Computation()
      entry = header.group(2) if header.group(1) else entry
    elif operation := _OPERATION.match(line):
      root, name, *parts = operation.groups()
      current[name] = Operation(name, *parts)
      if root:
        current.root = current[name]
  return computations, entry


def trips(loop: Operation, condition: Computation, body: Computation) -> int:
  """Iterations of a loop that counts from 0 to a constant by constant steps; 1 for any other."""
  if match := _TRIPS.search(loop.rest):
    return int(match.group(1))

  def number(computation: Computation, name: str) -> int | None:
    operation = computation.get(name)
    if operation is None or operation.opcode != "constant":
      return None
    value = operation.rest.partition(")")[0]
    return int(value) if value.isdigit() else None

  test = getattr(condition, "root", None)
  if test is None or test.opcode != "compare" or "direction=LT" not in test.rest:
    return 1
  counter, limit = test.operands
  limit, counter = number(condition, limit), condition.get(counter)
  if limit is None or counter is None or counter.opcode != "get-tuple-element":
    return 1
  name = body.root.operands[int(_INDEX.search(counter.rest).group(1))]
  while body[name].opcode == "copy":
    (name,) = body[name].operands
  steps = [number(body, operand) for operand in body[name].operands]
  return max(1, limit // max(next(filter(None, steps), 1), 1))


def collectives(text: str, chips: int) -> dict[str, float]:
  """Bytes that each chip receives in one run of compiled HLO, by kind of collective.

  A ring is assumed: an all-gather brings all but the chip's own share, an all-reduce twice that.
  The dearest branch counts. BETWEEN are arrays from other slices, which the hosts hand to the chip
  after they have reduced them.
  """
  computations, entry = parse(text)
  channels = set()

  @functools.cache
  def total(name: str) -> Counter:
    sizes = Counter()
    for operation in computations.get(name, {}).values():
      _, types, opcode, rest = operation
      kind = opcode.removesuffix("-start")
      if kind in KINDS:
        # A collective that is spread over several fusions appears in each of them.
        channel = _CHANNEL.search(rest)
        key = channel and (kind, channel.group(1))
        if key is None or key not in channels:
          channels.add(key)
          sizes[kind] += _received(kind, opcode != kind, types, _group(rest, chips))
      elif opcode == "recv" and "megascale" in rest:
        sizes[BETWEEN] += _bytes(types.partition("]")[0] + "]")
      elif opcode == "while":
        condition, body = _LOOP.search(rest).groups()
        times = trips(operation, computations[condition], computations[body])
        sizes.update({kind: times * size for kind, size in total(body).items()})
      else:
        sizes.update(sum(map(total, _CALLED.findall(rest)), Counter()))
        branches = _NAME.findall(" ".join(f"{a} %{b}" for a, b in _BRANCHES.findall(rest)))
        sizes.update(max(map(total, branches), key=Counter.total, default=Counter()))
    return sizes

  return dict(total(entry))
