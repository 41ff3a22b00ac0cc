"""Where a process stands, the roll call with its absences, what all agree on, when they stop."""

import fcntl
import os
import re
import resource
import socket
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.multihost import distributed, google_cloud, rollcall
from train_jax.multihost.rollcall import ProcessRegistry, ProcessSpec

HERE = socket.gethostname()
VARIABLES = (*distributed.NAMES, "START_LIMIT", "PROCESS_HOSTS", "JAX_COORDINATOR_PORT")
CLUSTER = re.compile("SLURM_|TPU_|MEGASCALE_|GCE_")


@pytest.fixture
def environment(monkeypatch):
  """Sets these variables and takes all others away that matter."""

  def put(**values: str):
    for name in (*VARIABLES, *filter(CLUSTER.match, os.environ)):
      monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
      monkeypatch.setenv(name, value)

  put()
  return put


def given(address="10.0.0.1:1234", count="4", index="2") -> dict[str, str]:
  return dict(zip(distributed.NAMES, (address, count, index), strict=True))


def slurm(nodes="x", **more) -> dict[str, str]:
  values = {"JOB_ID": "4099", "STEP_NODELIST": nodes, "NTASKS": "4", "PROCID": "2"}
  return {**{f"SLURM_{name}": value for name, value in values.items()}, **more}


SLICES = {"COORDINATOR_ADDRESS": "x:8080", "NUM_SLICES": "3", "SLICE_ID": "2"}
GKE = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}
NODES = {"node[03-05],x": "node03", "a-1": "a-1", "a,b[1-2]": "a", "n[7,9]": "n7"}


@pytest.mark.parametrize(
  "values, wanted",
  [
    ({}, None),
    (given(count="1", index="0"), None),
    (
      {**given(), "START_LIMIT": "7", "PROCESS_HOSTS": "a,b,c,d"},
      ProcessSpec("10.0.0.1", 1234, 4, 2, 7, ("a", "b", "c", "d")),
    ),
    *((slurm(nodes), ProcessSpec(first, 61443, 4, 2, 50)) for nodes, first in NODES.items()),
    (slurm(JAX_COORDINATOR_PORT="99"), ProcessSpec("x", 99, 4, 2, 50)),
    ({"SLURM_JOB_ID": "9", "SLURM_NTASKS": "4"}, None),  # a shell in a job, not a step of it
    (GKE, ProcessSpec("a", 8482, 2, 1, 50, ("a", "b"))),
    (
      {**GKE, **{f"MEGASCALE_{name}": value for name, value in SLICES.items()}},
      ProcessSpec("x", 8482, 6, 5, 50, ("a", "b")),
    ),
    ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
  ],
)
def test_place_is_read_from_the_environment(environment, values, wanted):
  environment(**values)
  assert distributed.find_process() == wanted


def test_tpu_vms_are_found(environment, monkeypatch, tmp_path, metadata_server):
  monkeypatch.setattr(google_cloud, "TPUS", (str(tmp_path),))
  environment(GCE_METADATA_HOST=metadata_server.host)
  assert distributed.find_process() is None

  def attributes(**values):
    metadata_server.answers |= {
      f"attributes/{name.replace('_', '-')}": value for name, value in values.items()
    }

  attributes(worker_network_endpoints="n:0:10.0.0.1,m:1:10.0.0.2", agent_worker_number="1")
  assert distributed.find_process() == ProcessSpec("10.0.0.1", 8482, 2, 1, 50)
  joined = "".join(f"MEGASCALE_{name}: '{value}'\n" for name, value in SLICES.items())
  attributes(tpu_env=f"ZONE: 'a'\n{joined}")
  place = distributed.find_process()
  assert (place.host, place.count, place.index) == ("x", 6, 5)


@pytest.mark.parametrize(
  "values, words",
  [
    ({"JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS is not set but"),
    (given(address="host"), "JAX_COORDINATOR_ADDRESS='host' and JAX_PROCESS_ID='2' must be HOST"),
    (given(address="host:x"), "port of JAX_COORDINATOR_ADDRESS='x' must be a whole number"),
    (given(count="0"), "JAX_NUM_PROCESSES='0' must be a whole number above 0"),
    (given(index="4"), "JAX_PROCESS_ID=4 is not one of JAX_NUM_PROCESSES=4.* from 0 to 3"),
    (given(index="-1"), "JAX_PROCESS_ID='-1'"),
    ({"START_LIMIT": "soon"}, "START_LIMIT='soon'"),
  ],
)
def test_variables_that_make_no_sense_are_refused(environment, values, words):
  environment(**values)
  with pytest.raises(UserError, match=words):
    distributed.find_process()


@pytest.fixture
def rolls(environment):
  """(count, limit, planned) -> index -> the roll of that process, all of them at a free port."""

  def make(count: int, limit: float = 20, planned=()):
    with socket.create_server(("", 0)) as server:
      port = server.getsockname()[1]
    return lambda index: ProcessRegistry(
      ProcessSpec("127.0.0.1", port, count, index, limit, planned)
    )

  return make


def call(rolls) -> list[str]:
  """What each says after the roll call, all of them threads of this process."""
  said = [""] * len(rolls)

  def answer(i, roll):
    try:
      roll.call()
    except UserError as err:
      said[i] = str(err)

  threads = [threading.Thread(target=answer, args=pair) for pair in enumerate(rolls)]
  for thread in threads:
    thread.start()
    time.sleep(0.02)
  for thread in threads:
    thread.join(timeout=60)
  return said


@pytest.mark.parametrize("order", [(0, 3, 1, 2), (2, 1, 3, 0)])
def test_roll_call_lets_all_go_on_in_whatever_order_they_come(rolls, order):
  make = rolls(4)
  assert call([make(index) for index in order]) == [""] * 4


def test_the_missing_are_named_to_all_that_came(rolls):
  make, started = rolls(4, 1, ("a", "b", "c", "d")), time.monotonic()
  said = call([make(0), make(2)])
  assert time.monotonic() - started < 10
  assert said[0] == said[1]
  assert "did not come within 1 s: 1 (b), 3 (d); " in said[0]
  assert f"here are 0 ({HERE}), 2 ({HERE})" in said[0]


def test_a_missing_coordinator_is_named(rolls):
  (said,) = call([rolls(2, 1)(1)])
  assert said.startswith(f"process 1 ({HERE}) got no answer from process 0 at 127.0.0.1:")


def test_an_unknown_host_is_named():
  with pytest.raises(UserError, match=r"process 0 at nowhere.invalid:9 within 0.5 s \("):
    ProcessRegistry(ProcessSpec("nowhere.invalid", 9, 2, 1, limit=0.5)).call()


def test_two_processes_of_one_number_are_told_apart(rolls):
  make = rolls(3, 2)
  assert all("says that it is process 1 of 3" in text for text in call([make(0), make(1), make(1)]))


def test_a_stranger_does_not_count(rolls):
  make = rolls(2)
  coordinator = make(0)
  thread = threading.Thread(target=coordinator.call)
  thread.start()
  for _ in range(100):
    try:
      with socket.create_connection(("127.0.0.1", coordinator.spec.port), timeout=5) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
      break
    except ConnectionRefusedError:
      time.sleep(0.05)
  make(1).call()
  thread.join(timeout=60)
  assert list(coordinator.hosts) == [0, 1]


def test_a_taken_port_is_named(rolls):
  roll = rolls(2)(0)
  with (
    socket.create_server(("", roll.spec.port)),
    pytest.raises(UserError, match=f"cannot use port {roll.spec.port}"),
  ):
    roll.call()


@pytest.fixture
def watched(rolls, monkeypatch):
  """Three rolls that watch, and the exit codes with which they ended."""
  monkeypatch.setattr(rollcall, "GRACE", 0.2)
  made, codes = list(map(rolls(3), range(3))), []
  assert call(made) == [""] * 3
  for roll in made:
    roll.watch(codes.append)
  yield made, codes
  for roll in made:  # or those that still watch would report a death, into the next test's output
    roll.farewell()


def wait_for(condition) -> None:
  deadline = time.monotonic() + 20
  while not condition() and time.monotonic() < deadline:
    time.sleep(0.02)
  assert condition()


@pytest.mark.parametrize("dead, host", [(1, HERE), (0, "127.0.0.1")])
def test_a_death_is_named_by_the_others_and_ends_them(watched, capfd, dead, host):
  made, codes = watched
  for roll in made:  # those that are connected to it find the line cut
    if dead in roll.peers:
      roll.peers[dead].shutdown(socket.SHUT_RD)
  wait_for(lambda: len(codes) == 2)
  assert codes == [1, 1]
  assert capfd.readouterr().err.count(f"stopped: process {dead} ({host}) died.") == 2


def test_a_death_behind_a_high_descriptor_is_seen(monkeypatch):
  """As process 0 of a thousand has them."""
  monkeypatch.setattr(rollcall, "GRACE", 0.2)
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2000)), hard))
  mine, theirs = socket.socketpair()
  peer, codes = socket.socket(fileno=fcntl.fcntl(mine, fcntl.F_DUPFD, 1024)), []
  with mine, peer:
    ProcessRegistry(ProcessSpec("here", 1, 2, 0, 1), {1: "there"}, {1: peer}).watch(codes.append)
    theirs.close()
    wait_for(lambda: codes == [1])


def test_a_farewell_is_no_death(watched, capfd):
  made, codes = watched
  for roll in made:
    roll.farewell()
    for peer in roll.peers.values():
      peer.shutdown(socket.SHUT_WR)
  time.sleep(0.5)
  assert (codes, capfd.readouterr().err) == ([], "")


def test_one_process_agrees_with_itself_at_once():
  agree = distributed.Agreement(mesh_lib.make_mesh())
  assert [agree(mine) for mine in (False, True, False)] == [False, True, False]


def test_many_processes_hear_of_a_stop_two_steps_later(monkeypatch):
  agree = distributed.Agreement(mesh_lib.make_mesh(2, 2))
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  assert [agree(i == 1) for i in range(5)] == [False, False, False, True, False]


def test_processes_that_see_other_data_are_named(monkeypatch):
  distributed.check_same_everywhere({"examples": 3})
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  gathered = []

  def gather(mine):  # what process 2 gets, the second time from others that differ
    gathered.append(mine)
    others = mine + np.uint32(len(gathered) - 1)
    return np.stack([others, others, mine])

  monkeypatch.setattr(multihost_utils, "process_allgather", gather)
  distributed.check_same_everywhere({"examples": 3, "names": ["a"]})
  with pytest.raises(UserError, match="processes 2 read other data than process 0"):
    distributed.check_same_everywhere({"names": ["a"], "examples": 3})
  assert gathered[0] == gathered[1]  # the order of the keys does not matter


@pytest.mark.parametrize("seen", [(True, True), (True, False)])
def test_a_workdir_that_not_all_see_is_refused(tmp_path, monkeypatch, seen):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  fake = SimpleNamespace(
    broadcast_one_to_all=lambda mark: mark, process_allgather=lambda mine: np.array([mine, seen[1]])
  )
  monkeypatch.setattr(distributed, "multihost_utils", fake)
  if all(seen):
    distributed.check_shared(tmp_path / "new")
  else:
    with pytest.raises(UserError, match=r"is not there for processes 1; choose"):
      distributed.check_shared(tmp_path / "new")
  assert list((tmp_path / "new").iterdir()) == []


def test_leaving_alone_returns_the_code():
  assert [distributed.leave(code) for code in (0, 2)] == [0, 2]
