"""The roll call of a run's processes: who is missing at the start, and who dies before the end.

Every process sends process 0 its number and host over a plain socket. Process 0 tells all of them
to go on, or who is missing. The connections stay open. A process that dies closes its own; process
0 passes its name on, and all end. A collective would wait for it for ever.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from train_jax.errors import UserError

GRACE = 10.0  # seconds between a process's death and the others' end, so they may end by themselves


@dataclass(frozen=True)
class ProcessSpec:
  """Process `index` of `count`, with process 0 at host:port; all must come within `limit` seconds.

  Attributes:
    planned: the hosts of the processes, as far as they are known.
  """

  host: str
  port: int
  count: int
  index: int
  limit: float
  planned: tuple[str, ...] = ()

  def __post_init__(self):
    if not 0 <= self.index < self.count:
      raise UserError(
        f"JAX_PROCESS_ID={self.index} is not one of JAX_NUM_PROCESSES={self.count} processes; "
        f"number them from 0 to {self.count - 1}."
      )


@dataclass
class ProcessRegistry:
  """The processes that a process is connected to: process 0 to all, the others to process 0."""

  spec: ProcessSpec
  hosts: dict[int, str] = field(default_factory=dict)
  peers: dict[int, socket.socket] = field(default_factory=dict)
  failure: str = ""  # which process ended early, until it is reported

  def call(self) -> None:
    """Returns when all processes are there; UserError, which names the missing, after `limit` s."""
    if verdict := self._answer() if self.spec.index else self._collect():
      raise UserError(verdict)

  def _collect(self) -> str:
    """Process 0: waits for the others' lines and sends them the verdict; "" if all came."""
    spec, verdict, strays = self.spec, "", []
    deadline = time.monotonic() + spec.limit
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
      server = socket.create_server(("", spec.port), family=family, dualstack_ipv6=both)
    except OSError as err:
      return f"process 0 cannot use port {spec.port} ({err.strerror}); choose another port."
    self.hosts[0] = socket.gethostname()
    with server:
      while not verdict and len(self.hosts) < spec.count:
        left = deadline - time.monotonic()
        if left <= 0:
          verdict = self._name_missing()
          break
        server.settimeout(left)
        try:
          peer, _ = server.accept()
          peer.settimeout(min(left, 5))
          count, index, host = _read(peer).split()
          count, index = int(count), int(index)
        except (OSError, ValueError):  # time is up, or the peer is no process of a run
          continue
        if count != spec.count or index in self.hosts:
          strays.append(peer)
          verdict = (
            f"{host} says that it is process {index} of {count}, but process 0 waits for "
            f"{spec.count} and has {self._list_hosts()}; give each process a number of its own."
          )
        else:
          self.hosts[index], self.peers[index] = host, _keep_alive(peer)
    for peer in (*self.peers.values(), *strays):
      _send(peer, f"stop {verdict}" if verdict else "go")
    return verdict

  def _list_hosts(self) -> str:
    return ", ".join(f"{index} ({host})" for index, host in sorted(self.hosts.items())[:20])

  def _name_missing(self) -> str:
    """The sentence that names the processes that are not in `hosts`."""
    planned = dict(enumerate(self.spec.planned))
    missing = [index for index in range(self.spec.count) if index not in self.hosts]
    names = ", ".join(f"{i} ({planned[i]})" if i in planned else str(i) for i in missing[:20])
    more = f" and {len(missing) - 20} more" if len(missing) > 20 else ""
    return (
      f"of {self.spec.count} processes, these did not come within {self.spec.limit:g} s: "
      f"{names}{more}; here are {self._list_hosts()}; look at the logs of those that are missing, "
      "or raise START_LIMIT."
    )

  def _answer(self) -> str:
    """Any other process: reports to process 0, and returns the verdict, "" to go on."""
    spec, error = self.spec, ""
    deadline = time.monotonic() + spec.limit
    while (left := deadline - time.monotonic()) > 0:
      try:
        peer = socket.create_connection((spec.host.strip("[]"), spec.port), left)
        _send(peer, f"{spec.count} {spec.index} {socket.gethostname()}")
        # Process 0 may have started just now, and waits for `limit` seconds itself.
        peer.settimeout(spec.limit + 5)
        verdict = _read(peer)
        if verdict == "go":
          self.hosts[0], self.peers[0] = spec.host, _keep_alive(peer)
          return ""
        if verdict.startswith("stop "):
          return verdict.removeprefix("stop ")
        error = "something else is there" if verdict else "it hung up"
      except OSError as err:
        error = err.strerror or str(err)
      time.sleep(0.2)
    return (
      f"process {spec.index} ({socket.gethostname()}) got no answer from process 0 at "
      f"{spec.host}:{spec.port} within {spec.limit:g} s ({error}): it is missing or ended, or "
      "JAX_COORDINATOR_ADDRESS is wrong or closed to this host."
    )

  def watch(self, end: Callable[[int], None] = os._exit) -> None:
    """In a thread: if another process ends without `farewell`, reports it and calls `end(1)`."""
    threading.Thread(target=self._watch, args=(end,), daemon=True).start()

  def _watch(self, end: Callable[[int], None]) -> None:
    selector = selectors.DefaultSelector()  # select() takes no descriptor above 1023
    for index, peer in self.peers.items():
      selector.register(peer, selectors.EVENT_READ, index)
    while selector.get_map():
      for key, _ in selector.select():
        selector.unregister(key.fileobj)
        index, line = key.data, _read(key.fileobj)
        if line == "bye":
          continue
        self.failure = line.removeprefix("stop ") or f"process {index} ({self.hosts[index]}) died."
        for other in selector.get_map().values():
          _send(other.fileobj, f"stop {self.failure}")
        time.sleep(GRACE / 10)  # enough if this process ends for the same reason
        self.report()
        time.sleep(GRACE)
        return end(1)

  def report(self) -> None:
    """Prints once which process ended early."""
    if failure := self.failure:
      self.failure = ""
      print(f"stopped: {failure}", file=sys.stderr, flush=True)

  def farewell(self) -> None:
    """Tells the peers that this process is done; it no longer depends on theirs."""
    for peer in self.peers.values():
      _send(peer, "bye")


def _read(peer: socket.socket) -> str:
  """One line; "" if the other end is gone."""
  try:
    # Unbuffered: a second line must stay in the socket.
    return peer.makefile("rb", buffering=0).readline().decode(errors="replace").strip()
  except OSError:
    return ""


def _send(peer: socket.socket, line: str) -> None:
  with contextlib.suppress(OSError):  # reading finds out that a peer is gone
    peer.sendall(f"{line}\n".encode())


def _keep_alive(peer: socket.socket) -> socket.socket:
  """Sets up a connection for hours; it finds out within 50 s that a host has lost power."""
  peer.settimeout(None)
  peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  if hasattr(socket, "TCP_KEEPIDLE"):
    for name, value in (("KEEPIDLE", 10), ("KEEPINTVL", 10), ("KEEPCNT", 4)):
      peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)
  return peer
