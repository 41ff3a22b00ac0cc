"""What a program costs, read from its text: FLOPs of a jaxpr, bytes between chips of compiled HLO.

XLA's own cost analysis counts the body of a loop once. Here it counts as often as it runs, where
that is known before it runs; other loops count once.
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
BETWEEN = "between slices"  # what TPU's compiler leaves to the hosts and their network


def flops(jaxpr) -> float:
  """Floating-point operations of the matrix products and convolutions, over all devices.

  Recomputation (`jax.checkpoint`) is in the jaxpr and counts; of `cond` the dearest branch does.
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
  """Of all arrays in an HLO type, such as `(f32[2,3]{1,0}, bf16[4])`."""
  total = 0.0
  for _, bits, shape in _ARRAY.findall(types):
    total += int(bits or 8) / 8 * math.prod(int(n) for n in shape.split(",") if n)
  return total


def _group(attributes: str, chips: int) -> int:
  """How many chips take part in one of the groups of a collective."""
  found = _GROUPS.search(attributes)
  if found is None:
    return chips
  listed, _, size, axes, used = found.groups()
  if axes is not None:  # mesh['a'=4,'b'=8] {'a'}, or {'b':(1)2} for a part of an axis
    sizes = dict(_AXIS.findall(axes))
    return math.prod(int(part or sizes[axis]) for axis, part in _AXIS.findall(used))
  return int(size) if size else (listed.count(",") + 1 if listed else chips)


def _received(kind: str, started: bool, types: str, group: int) -> float:
  """Bytes that each chip must get from others, by a ring; `types` is what the operation returns."""
  size, share = _bytes(types), (group - 1) / group
  if kind == "all-reduce":
    return 2 * size * share
  if kind == "all-gather":
    return (size * group / (group + 1) if started else size) * share  # -start returns operands too
  if kind == "reduce-scatter":
    return size * (group - 1)
  if kind == "collective-permute":
    return size / 2 if started else size
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
  """The operations of a computation by name; `root` is the one that it returns."""

  root: Operation


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """The computations of an HLO module by name, and the name of the entry."""
  found: dict[str, Computation] = {}
  entry, current = "", Computation()
  for line in text.splitlines():
    if header := _HEADER.match(line):
      current = found[header.group(2)] = Computation()
      entry = header.group(2) if header.group(1) else entry
    elif operation := _OPERATION.match(line):
      root, name, *parts = operation.groups()
      current[name] = Operation(name, *parts)
      if root:
        current.root = current[name]
  return found, entry


def trips(loop: Operation, condition: Computation, body: Computation) -> int:
  """How often a loop runs that counts from 0 to a constant by constant steps; 1 for any other."""
  if known := _TRIPS.search(loop.rest):
    return int(known.group(1))

  def number(computation: Computation, name: str) -> int | None:
    operation = computation.get(name)
    if operation is None or operation.opcode != "constant":
      return None
    value = operation.rest.partition(")")[0]
    return int(value) if value.isdigit() else None

  compared = getattr(condition, "root", None)
  if compared is None or compared.opcode != "compare" or "direction=LT" not in compared.rest:
    return 1
  counter, limit = compared.operands
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
  Of branches the dearest counts. What comes from other slices, through the hosts, is BETWEEN: the
  arrays that the hosts hand to the chip, where they have reduced them already.
  """
  computations, entry = parse(text)
  channels = set()

  @functools.cache
  def total(name: str) -> Counter:
    found = Counter()
    for operation in computations.get(name, {}).values():
      _, _, opcode, rest = operation
      kind = opcode.removesuffix("-start")
      if kind in KINDS:
        # A collective that is spread over several fusions appears in each of them.
        channel = _CHANNEL.search(rest)
        key = channel and (kind, channel.group(1))
        if key is None or key not in channels:
          channels.add(key)
          group = _group(rest, chips)
          found[kind] += _received(kind, opcode != kind, operation.types, group)
      elif opcode == "recv" and "megascale" in rest:
        found[BETWEEN] += _bytes(operation.types.partition("]")[0] + "]")
      elif opcode == "while":
        condition, body = _LOOP.search(rest).groups()
        times = trips(operation, computations[condition], computations[body])
        found.update({kind: times * size for kind, size in total(body).items()})
      else:
        found.update(sum(map(total, _CALLED.findall(rest)), Counter()))
        branches = _NAME.findall(" ".join(f"{a} %{b}" for a, b in _BRANCHES.findall(rest)))
        found.update(max(map(total, branches), key=Counter.total, default=Counter()))
    return found

  return dict(total(entry))
