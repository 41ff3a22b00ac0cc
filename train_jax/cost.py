"""What a program costs, read from its text: FLOPs of a jaxpr, bytes between chips of compiled HLO.

XLA's own cost analysis counts the body of a loop once. Here it counts as often as it runs, where
that is known before it runs; other loops count once.
"""

from __future__ import annotations

import functools
import math
import re
from collections import Counter

# Of an element of each HLO type; the digits are its bits.
_BITS = re.compile(r"\d+")
_ARRAY = re.compile(r"\b(pred|bf16|[a-z]+\d+)(?:e\d+m\d+\w*)?\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\((.*)$")
_LOOP = re.compile(r"condition=%?([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|body|condition|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+)")
_LIMIT = re.compile(r"= s(?:32|64)\[\]\S* constant\((\d+)\)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[(\d+),(\d+)\]|mesh\[(.*?)\] \{(.*?)\})")
_AXIS = re.compile(r"'(\w+)'(?:=|:\(\d+\))?(\d*)")
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


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
  for kind, shape in _ARRAY.findall(types):
    bits = 8 if kind == "pred" else int(_BITS.search(kind).group())
    total += bits / 8 * math.prod(int(n) for n in shape.split(",") if n)
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


def collectives(text: str, chips: int) -> dict[str, float]:
  """Bytes that each chip receives in one run of compiled HLO, by kind of collective.

  A ring is assumed: an all-gather brings all but the chip's own share, an all-reduce twice that.
  """
  own: dict[str, Counter] = {}
  calls: dict[str, list[tuple[str, list[str]]]] = {}  # (condition of a loop or "", one of these)
  limits: dict[str, int] = {}  # the largest whole number in a computation: a loop's length
  entry, name, channels = "", "", set()
  for line in text.splitlines():
    if header := _HEADER.match(line):
      name = header.group(2)
      entry = name if header.group(1) else entry
      own[name], calls[name], limits[name] = Counter(), [], 1
      continue
    operation = _OPERATION.match(line)
    if not operation or not name:
      continue
    types, opcode, rest = operation.groups()
    if limit := _LIMIT.search(line):
      limits[name] = max(limits[name], int(limit.group(1)))
    kind, started = opcode.removesuffix("-start"), opcode.endswith("-start")
    if kind in KINDS:
      # A collective that is spread over several fusions appears in each of them.
      channel = _CHANNEL.search(rest)
      if channel is None or channel.group(1) not in channels:
        own[name][kind] += _received(kind, started, types, _group(rest, chips))
        channels.add(channel and channel.group(1))
      continue
    loop = _LOOP.search(rest) if opcode == "while" else None
    for called in _CALLED.findall(rest):
      calls[name].append((loop.group(1) if loop else "", [called]))
    branches = [
      b for pair in _BRANCHES.findall(rest) for b in re.findall(r"[\w.\-]+", "".join(pair))
    ]
    if branches:
      calls[name].append(("", branches))

  @functools.cache
  def add_up(name: str) -> Counter:
    """A computation's bytes with those of what it calls; of branches the dearest counts."""
    total = Counter(own.get(name, {}))
    for condition, branches in calls.get(name, ()):
      for kind, size in max(map(add_up, branches), key=Counter.total).items():
        total[kind] += limits.get(condition, 1) * size
    return total

  return dict(add_up(entry))
