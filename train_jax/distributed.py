"""Several processes as one run: start-up with a roll call, one decision to stop, and the way out.

Process 0 is the coordinator. Where a process is missing, JAX's own start-up aborts the interpreter
and does not say which one; so the roll is called first, over a plain socket at the address that JAX
uses right after: every process tells process 0 its number and host, and process 0 tells them all to
go on, or who did not come.

Read from the environment; `launch.sh` sets them, Slurm's and Cloud TPU's own are the default:

    JAX_COORDINATOR_ADDRESS   HOST:PORT of process 0
    JAX_NUM_PROCESSES         how many there are
    JAX_PROCESS_ID            which one this is, from 0
    START_LIMIT               seconds to wait for the others; default 50
    PROCESS_HOSTS             optional, comma-separated: where each should run, to name the missing
"""

from __future__ import annotations

import collections
import os
import socket
import sys
import time
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train_jax import mesh as mesh_lib
from train_jax.errors import UserError

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

# A process that sends no sign of life for so many seconds is dead, and the others end.
HEARTBEAT = 40


@dataclass(frozen=True)
class Place:
  """Process `index` of `count`, with process 0 at host:port, all to come within `limit` seconds."""

  host: str
  port: int
  count: int
  index: int
  limit: float

  def __post_init__(self):
    if not 0 <= self.index < self.count:
      raise UserError(
        f"JAX_PROCESS_ID={self.index} is not one of JAX_NUM_PROCESSES={self.count} processes; "
        f"number them from 0 to {self.count - 1}."
      )


def _number(name: str, value: str) -> int:
  if not value.isdigit() or not int(value):
    raise UserError(f"{name}={value!r} must be a whole number above 0.")
  return int(value)


def find_place() -> Place | None:
  """Where this process stands, from the environment or the cluster; None where it is alone.

  Raises:
    UserError: the variables contradict each other or only some are set.
  """
  limit = _number("START_LIMIT", os.environ.get("START_LIMIT", "50"))
  given = [os.environ.get(name, "") for name in NAMES]
  if not any(given):
    given = [str(value) for value in _find_cluster(limit)]
  elif missing := [name for name, value in zip(NAMES, given, strict=True) if not value]:
    raise UserError(f"{missing[0]} is not set but others of {', '.join(NAMES)} are; set all three.")
  address, count, index = given
  count = _number(NAMES[1], count)
  if count == 1:
    return None
  host, _, port = address.rpartition(":")
  if not host or not index.isdigit():
    raise UserError(
      f"{NAMES[0]}={address!r} and {NAMES[2]}={index!r} must be HOST:PORT and a whole number."
    )
  return Place(host, _number("the port of JAX_COORDINATOR_ADDRESS", port), count, int(index), limit)


def _find_cluster(limit: int) -> tuple[str, int, int]:
  """(address, count, index) by JAX's own detection; ("", 1, 0) where there is no cluster."""
  from jax._src import clusters  # public only through `initialize`, which would not call the roll

  for cluster in clusters.ClusterEnv._cluster_types:
    # The others need a package more, or mistake a lone pod for a part of something.
    if cluster.name in ("slurm", "gcetpu", "gketpu") and cluster.is_env_present():
      port = os.environ.get("JAX_COORDINATOR_PORT")
      address = cluster.get_coordinator_address(limit, port)
      return address, cluster.get_process_count(), cluster.get_process_id()
  return "", 1, 0


def _keep_roll(place: Place) -> str:
  """Process 0: collects the others' lines until all are there or time is up, and tells the verdict.

  Returns:
    "" if all came, else a sentence about those that did not.
  """
  deadline = time.monotonic() + place.limit
  both = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both else socket.AF_INET
  try:
    server = socket.create_server(("", place.port), family=family, dualstack_ipv6=both)
  except OSError as err:
    return f"process 0 cannot use port {place.port} ({err.strerror}); choose another port."
  hosts, peers, verdict = {0: socket.gethostname()}, [], ""
  with server:
    while len(hosts) < place.count and not verdict and (left := deadline - time.monotonic()) > 0:
      server.settimeout(left)
      try:
        peer, _ = server.accept()
        peer.settimeout(min(left, 5))
        count, index, host = peer.makefile(encoding="utf-8").readline().split()
        count, index = int(count), int(index)
      except (OSError, ValueError):  # time is up, or a stranger
        continue
      peers.append(peer)
      if count != place.count or index in hosts:
        verdict = (
          f"{host} says that it is process {index} of {count}, but process 0 waits for "
          f"{place.count} and has {_listed(hosts)}; give each process a number of its own."
        )
      hosts[index] = host
    if not verdict and len(hosts) < place.count:
      verdict = _absence(place, hosts)
    for peer in peers:
      with peer:
        peer.sendall(f"{verdict or 'go'}\n".encode())
  return verdict


def _listed(hosts: dict[int, str]) -> str:
  return ", ".join(f"{index} ({host})" for index, host in sorted(hosts.items())[:20])


def _absence(place: Place, hosts: dict[int, str]) -> str:
  """Names the processes that are not in `hosts`."""
  planned = os.environ.get("PROCESS_HOSTS") or os.environ.get("TPU_WORKER_HOSTNAMES", "")
  planned = dict(enumerate(planned.split(",") if planned else ()))
  absent = [index for index in range(place.count) if index not in hosts]
  names = ", ".join(f"{i} ({planned[i]})" if i in planned else str(i) for i in absent[:20])
  more = f" and {len(absent) - 20} more" if len(absent) > 20 else ""
  return (
    f"of {place.count} processes, these did not come within {place.limit:g} s: {names}{more}; "
    f"here are {_listed(hosts)}; look at the logs of those that are missing, or raise START_LIMIT."
  )


def _answer_roll(place: Place) -> str:
  """Any other process: tells process 0 that it is here; returns the verdict, "" to go on."""
  deadline, error = time.monotonic() + place.limit, None
  while (left := deadline - time.monotonic()) > 0:
    try:
      with socket.create_connection((place.host, place.port), timeout=left) as peer:
        peer.sendall(f"{place.count} {place.index} {socket.gethostname()}\n".encode())
        # Process 0 may have started only now, and waits as long itself.
        peer.settimeout(place.limit + 5)
        verdict = peer.makefile(encoding="utf-8").readline().strip()
        if verdict:
          return "" if verdict == "go" else verdict
        error = "it hung up"
    except OSError as err:
      error = err.strerror or str(err)
    time.sleep(0.2)
  return (
    f"process {place.index} ({socket.gethostname()}) got no answer from process 0 at "
    f"{place.host}:{place.port} within {place.limit:g} s ({error}): it is missing or ended, or "
    "JAX_COORDINATOR_ADDRESS is wrong or closed to this host."
  )


def start() -> None:
  """Joins this process to the others, if there are any; before anything asks JAX for devices.

  Raises:
    UserError: a process is missing, or the variables are wrong.
  """
  place = find_place()
  if place is None:
    return
  verdict = _answer_roll(place) if place.index else _keep_roll(place)
  if verdict:
    raise UserError(verdict)
  # The preemption service would take SIGTERM from the loop, which knows what to do (`Agreement`).
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
    f"{place.host}:{place.port}",
    place.count,
    place.index,
    cluster_detection_method="deactivate",  # it would leave Slurm's processes one GPU each
    initialization_timeout=place.limit,
    heartbeat_timeout_seconds=HEARTBEAT,
    shutdown_timeout_seconds=place.limit,
  )


def leave(code: int) -> int:
  """Returns the exit code; a process that failed beside others ends here and at once.

  JAX would wait for the others to finish first, and they would wait for this one.
  """
  if code and jax.distributed.is_initialized():
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
  return code


class Agreement:
  """Whether any process wants to stop: all of them hear of it at the same step, a little later.

  Read two steps late, as metrics are, so that no step waits for it. Alone, there is no delay.
  """

  def __init__(self, mesh: Mesh):
    self._mesh = mesh
    self._asked: collections.deque[jax.Array] = collections.deque()
    replicated = NamedSharding(mesh, PartitionSpec())
    self._any = jax.jit(lambda flags: flags.any(), out_shardings=replicated)

  def __call__(self, mine: bool) -> bool:
    """Once a step, on every process."""
    if jax.process_count() == 1:
      return mine
    flags = np.full(len(self._mesh.local_devices), mine)
    everywhere = NamedSharding(self._mesh, PartitionSpec(mesh_lib.AXES))
    self._asked.append(self._any(jax.make_array_from_process_local_data(everywhere, flags)))
    return len(self._asked) > 2 and bool(self._asked.popleft())
