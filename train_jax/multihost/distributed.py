"""Several processes as one run: start-up, agreement, stopping and exit.

Process 0 is the coordinator. If a process is missing or dies, JAX's own service aborts the
interpreter late and does not name it. So there is a roll call before (`rollcall.py`), at the
address that JAX uses afterwards.

Environment variables, which `launch.sh` sets; those of Slurm and Cloud TPU are the default:

    JAX_COORDINATOR_ADDRESS   HOST:PORT of process 0
    JAX_NUM_PROCESSES         number of processes
    JAX_PROCESS_ID            number of this one, from 0
    START_LIMIT               seconds to wait for the others; default 50
    PROCESS_HOSTS             optional, comma-separated: the host of each, to name the missing
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

HEARTBEAT = 50  # seconds without a heartbeat after which a process counts as dead, and the rest end

_registries: list[ProcessRegistry] = []  # this process's own, if there are several processes


def _number(name: str, value: str) -> int:
  if not value.isdigit() or not int(value):
    raise UserError(f"{name}={value!r} must be a whole number above 0.")
  return int(value)


def find_process() -> ProcessSpec | None:
  """This process, from the environment or the cluster; None if it is the only one.

  UserError if the variables contradict each other or only some are set.
  """
  limit = _number("START_LIMIT", os.environ.get("START_LIMIT", "50"))
  values = tuple(os.environ.get(name, "") for name in NAMES)
  if not any(values):
    values = _find_cluster()
  elif "" in values:
    missing = NAMES[values.index("")]
    raise UserError(f"{missing} is not set but others of {', '.join(NAMES)} are; set all three.")
  address, count, index = values
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
  """(address, count, index) from Slurm or Cloud TPU; ("", "1", "0") without either."""
  port = os.environ.get("JAX_COORDINATOR_PORT")
  names = [f"SLURM_{name}" for name in ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID")]
  if all(map(os.environ.get, names)):
    job, nodes, count, index = map(os.environ.get, names)
    host = "".join(re.match(r"([^,\[]+)(?:\[(\w+))?", nodes).groups(""))  # of node[03-05],x
    # Another job on these hosts has another port.
    return f"{host}:{port or 61440 + int(job) % 4096}", count, index

  # The hosts of a TPU slice are in the environment (GKE) or on the metadata server (TPU VM).
  # MEGASCALE_* exist if several slices are joined.
  variables = dict(os.environ)
  workers, index = variables.get("TPU_WORKER_HOSTNAMES", ""), variables.get("TPU_WORKER_ID", "0")
  if not (workers or variables.get("TPU_SKIP_MDS_QUERY")) and google_cloud.has_tpus():
    keys = ("worker-network-endpoints", "agent-worker-number", "tpu-env")
    workers, index, lines = (google_cloud.ask(f"attributes/{key}") for key in keys)
    variables |= re.findall(r"^(MEGASCALE_\w+): *'?([^'\n]*)", lines, re.MULTILINE)
  if not workers:
    return "", "1", "0"
  hosts = [worker.split(":")[-1] for worker in workers.split(",")]  # `host` or `name:id:host`
  host = variables.get("MEGASCALE_COORDINATOR_ADDRESS", "").partition(":")[0] or hosts[0]
  first = int(variables.get("MEGASCALE_SLICE_ID") or 0) * len(hosts)
  count = int(variables.get("MEGASCALE_NUM_SLICES") or 1) * len(hosts)
  return f"{host}:{port or 8482}", str(count), str(first + int(index))


def start() -> None:
  """Joins this process to the others, if any; UserError if one is missing.

  Call it before anything asks JAX for devices.
  """
  spec = find_process()
  if spec is None:
    return
  registry = ProcessRegistry(spec)
  registry.call()
  registry.watch()
  _registries.append(registry)
  # The preemption service would take SIGTERM from the loop, which handles it (`Agreement`).
  jax.config.update("jax_enable_preemption_service", False)
  jax.distributed.initialize(
    f"{spec.host}:{spec.port}",
    spec.count,
    spec.index,
    cluster_detection_method="deactivate",  # it would leave Slurm's processes one GPU each
    initialization_timeout=spec.limit,
    heartbeat_timeout_seconds=HEARTBEAT,
  )
  if jax.default_backend() == "cpu":
    # A cached program may run its collectives in another order than one compiled here (jaxlib
    # 0.10.2). Processes then get each other's data, and crash.
    jax.config.update("jax_enable_compilation_cache", False)


def check_shared(workdir: Path, patience: float = 30) -> None:
  """Makes `workdir` if there are several processes, which must share it for checkpoints.

  UserError if a process does not see it within `patience` seconds, or this one cannot write to it.
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
  while not (exists := file.exists()) and time.monotonic() < deadline:  # network disks lag behind
    time.sleep(0.2)
  all_exist = np.atleast_1d(multihost_utils.process_allgather(np.bool_(exists)))
  if jax.process_index() == 0:
    file.unlink()
  if not all_exist.all():
    raise UserError(
      f"--workdir={workdir} of process 0 is not there for processes {_listed(~all_exist)}; "
      "choose a directory on a disk that all of them share."
    )


def _listed(flags: np.ndarray) -> str:
  """The numbers of the processes whose flag is set, for a message."""
  return ", ".join(map(str, np.flatnonzero(flags)[:20]))


def all_agree(condition: bool) -> bool:
  """Whether `condition` is true on every process; all of them must call it."""
  if jax.process_count() == 1:
    return condition
  return bool(np.all(multihost_utils.process_allgather(np.bool_(condition))))


def check_same_everywhere(metadata: dict) -> None:
  """Raises UserError, on all processes, unless all of them have the same metadata of the data."""
  if jax.process_count() == 1:
    return
  digest = np.uint32(zlib.crc32(json.dumps(metadata, sort_keys=True).encode()))
  digests = multihost_utils.process_allgather(digest)
  if np.any(digests != digests[0]):
    raise UserError(
      f"processes {_listed(digests != digests[0])} read other data than process 0; give all of "
      "them the same files, whole."
    )


def leave(code: int) -> int:
  """Returns the exit code; beside other processes, a failed one exits here at once.

  JAX would wait for the others to finish, and they would wait for this one. A process that was told
  to stop (`os.EX_TEMPFAIL`) has not failed: the others stop, too.
  """
  for registry in _registries:
    if code not in (0, os.EX_TEMPFAIL):
      if code == 1:  # perhaps a collective failed because another process died
        time.sleep(0.5)
        registry.report()
      sys.stdout.flush()
      sys.stderr.flush()
      os._exit(code)
    registry.farewell()
  return code


class Agreement:
  """Whether any process wants to stop; all of them learn it at the same step.

  It is read two steps late, as metrics are, so no step waits for it. A single process learns it at
  once.
  """

  def __init__(self, mesh: Mesh):
    self._mesh = mesh
    self._pending: collections.deque[jax.Array] = collections.deque()
    self._any = mesh_lib.jit(lambda flags: flags.any(), mesh)

  def __call__(self, stop: bool) -> bool:
    """Call it once a step, on every process."""
    if jax.process_count() == 1:
      return stop
    flags = np.full(len(self._mesh.local_devices), stop)
    sharding = NamedSharding(self._mesh, PartitionSpec(mesh_lib.AXES))
    self._pending.append(self._any(jax.make_array_from_process_local_data(sharding, flags)))
    return len(self._pending) > 2 and bool(self._pending.popleft())
