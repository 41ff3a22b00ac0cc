"""Several processes as one run: start-up, what they agree on, when they stop, and the way out.

Process 0 is the coordinator. Where a process is missing or dies, JAX's own service aborts the
interpreter, late, and does not say which one it was; so a roll is called before it (`rollcall.py`)
at the address that JAX uses right after.

Read from the environment; `launch.sh` sets them, Slurm's and Cloud TPU's own are the default:

    JAX_COORDINATOR_ADDRESS   HOST:PORT of process 0
    JAX_NUM_PROCESSES         how many there are
    JAX_PROCESS_ID            which one this is, from 0
    START_LIMIT               seconds to wait for the others; default 50
    PROCESS_HOSTS             optional, comma-separated: where each should run, to name the missing
"""

from __future__ import annotations

import collections
import json
import os
import re
import sys
import time
import zlib
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.files import check_writable
from train_jax.multihost import google_cloud
from train_jax.multihost.rollcall import ProcessRegistry, ProcessSpec

NAMES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

# A process that sends no sign of life for so many seconds is dead, and the others end.
HEARTBEAT = 50

_rolls: list[ProcessRegistry] = []  # this process's, once it has started beside others


def _number(name: str, value: str) -> int:
  if not value.isdigit() or not int(value):
    raise UserError(f"{name}={value!r} must be a whole number above 0.")
  return int(value)


def find_process() -> ProcessSpec | None:
  """Where this process stands, from the environment or the cluster; None where it is alone.

  Raises:
    UserError: the variables contradict each other or only some are set.
  """
  limit = _number("START_LIMIT", os.environ.get("START_LIMIT", "50"))
  given = [os.environ.get(name, "") for name in NAMES]
  if not any(given):
    given = list(_find_cluster())
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
  port = _number("the port of JAX_COORDINATOR_ADDRESS", port)
  hosts = os.environ.get("PROCESS_HOSTS") or os.environ.get("TPU_WORKER_HOSTNAMES", "")
  planned = tuple(filter(None, hosts.split(",")))
  return ProcessSpec(host, port, count, int(index), limit, planned)


def _find_cluster() -> tuple[str, str, str]:
  """(address, count, index) by Slurm or Cloud TPU; ("", "1", "0") where there is neither."""
  chosen = os.environ.get("JAX_COORDINATOR_PORT")
  names = [f"SLURM_{name}" for name in ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID")]
  if all(map(os.environ.get, names)):
    job, nodes, count, index = map(os.environ.get, names)
    host = "".join(re.match(r"([^,\[]+)(?:\[(\w+))?", nodes).groups(""))  # of node[03-05],x
    # Another job on these hosts has another port.
    return f"{host}:{chosen or 61440 + int(job) % 4096}", count, index

  # GKE describes the hosts of a TPU slice in the environment, a TPU VM by its metadata server;
  # MEGASCALE_* are there where several slices are joined.
  facts = dict(os.environ)
  workers, index = facts.get("TPU_WORKER_HOSTNAMES", ""), facts.get("TPU_WORKER_ID", "0")
  if not (workers or facts.get("TPU_SKIP_MDS_QUERY")) and google_cloud.has_tpus():
    keys = ("worker-network-endpoints", "agent-worker-number", "tpu-env")
    workers, index, rest = (google_cloud.ask(f"attributes/{key}") for key in keys)
    facts |= re.findall(r"^(MEGASCALE_\w+): *'?([^'\n]*)", rest, re.MULTILINE)
  if not workers:
    return "", "1", "0"
  hosts = [worker.split(":")[-1] for worker in workers.split(",")]  # `host` or `name:id:host`
  host = facts.get("MEGASCALE_COORDINATOR_ADDRESS", "").partition(":")[0] or hosts[0]
  before = int(facts.get("MEGASCALE_SLICE_ID") or 0) * len(hosts)
  count = int(facts.get("MEGASCALE_NUM_SLICES") or 1) * len(hosts)
  return f"{host}:{chosen or 8482}", str(count), str(before + int(index))


def start() -> None:
  """Joins this process to the others, if there are any; before anything asks JAX for devices.

  Raises:
    UserError: a process is missing, or the variables are wrong.
  """
  place = find_process()
  if place is None:
    return
  roll = ProcessRegistry(place)
  roll.call()
  roll.watch()
  _rolls.append(roll)
  # The preemption service would take SIGTERM from the loop, which knows what to do (`Agreement`).
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
    f"{place.host}:{place.port}",
    place.count,
    place.index,
    cluster_detection_method="deactivate",  # it would leave Slurm's processes one GPU each
    initialization_timeout=place.limit,
    heartbeat_timeout_seconds=HEARTBEAT,
  )
  if jax.default_backend() == "cpu":
    # A program from the cache may run its collectives in another order than one that was compiled
    # here (jaxlib 0.10.2): processes then take each other's data, and end.
    jax.config.update("jax_enable_compilation_cache", False)


def check_shared(workdir: Path, patience: float = 30) -> None:
  """Makes `workdir` where there are several processes: a checkpoint is one place for all of them.

  Raises:
    UserError: not all of them see it within `patience` seconds, or this one cannot write to it.
  """
  if jax.process_count() == 1:
    return
  check_writable(workdir)
  mark = np.int32(time.time_ns() % 2**31)
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / f".start-{mark}").touch()
  mark = multihost_utils.broadcast_one_to_all(mark)
  deadline, file = time.monotonic() + patience, workdir / f".start-{mark}"
  while not (seen := file.exists()) and time.monotonic() < deadline:  # network disks lag behind
    time.sleep(0.2)
  everywhere = np.atleast_1d(multihost_utils.process_allgather(np.bool_(seen)))
  if jax.process_index() == 0:
    file.unlink()
  if not everywhere.all():
    blind = ", ".join(map(str, np.flatnonzero(~everywhere)[:20]))
    raise UserError(
      f"--workdir={workdir} of process 0 is not there for processes {blind}; "
      "choose a directory on a disk that all of them share."
    )


def all_agree(mine: bool) -> bool:
  """Whether it is so on every process; all of them must call it."""
  if jax.process_count() == 1:
    return mine
  return bool(np.all(multihost_utils.process_allgather(np.bool_(mine))))


def check_same_everywhere(facts: dict) -> None:
  """Raises UserError, on all processes, unless all of them found the same data."""
  if jax.process_count() == 1:
    return
  mine = np.uint32(zlib.crc32(json.dumps(facts, sort_keys=True).encode()))
  found = multihost_utils.process_allgather(mine)
  if np.any(found != found[0]):
    others = ", ".join(map(str, np.flatnonzero(found != found[0])[:20]))
    raise UserError(
      f"processes {others} read other data than process 0; give all of them the same files, whole."
    )


def leave(code: int) -> int:
  """Returns the exit code; a process that failed beside others ends here and at once.

  One that was told to stop (`os.EX_TEMPFAIL`) stops with the others and has not failed.

  JAX would wait for the others to finish first, and they would wait for this one.
  """
  for roll in _rolls:
    if code not in (0, os.EX_TEMPFAIL):
      if code == 1:  # a collective that failed, perhaps
        time.sleep(0.5)
        roll.report()
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)
    roll.farewell()
  return code


class Agreement:
  """Whether any process wants to stop: all of them hear of it at the same step, a little later.

  Read two steps late, as metrics are, so that no step waits for it. Alone, there is no delay.
  """

  def __init__(self, mesh: Mesh):
    self._mesh = mesh
    self._asked: collections.deque[jax.Array] = collections.deque()
    self._any = mesh_lib.jit(lambda flags: flags.any(), mesh)

  def __call__(self, mine: bool) -> bool:
    """Once a step, on every process."""
    if jax.process_count() == 1:
      return mine
    flags = np.full(len(self._mesh.local_devices), mine)
    everywhere = NamedSharding(self._mesh, PartitionSpec(mesh_lib.AXES))
    self._asked.append(self._any(jax.make_array_from_process_local_data(everywhere, flags)))
    return len(self._asked) > 2 and bool(self._asked.popleft())
