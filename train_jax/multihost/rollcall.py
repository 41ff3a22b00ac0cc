"""The roll of the processes of a run: who is there at the start, and who leaves before the end.

Every process tells process 0 its number and host over a plain socket; process 0 tells them all to
go on, or who did not come. The connections stay: a process that dies closes its own, process 0
passes its name on, and all end, also where a collective would wait for it for ever.
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

GRACE = 10.0  # seconds between a process's death and the others' end: they may end by themselves


@dataclass(frozen=True)
class ProcessSpec:
  """Process `index` of `count`, with process 0 at host:port, all to come within `limit` seconds.

  Attributes:
    planned: where each process should run, as far as it is known.
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
  """What a process knows of the others: process 0 of all, the others of process 0."""

  place: ProcessSpec
  hosts: dict[int, str] = field(default_factory=dict)
  peers: dict[int, socket.socket] = field(default_factory=dict)
  news: str = ""  # who ended early, until it is reported

  def call(self) -> None:
    """Returns when all processes are there.

    Raises:
      UserError: they are not, in time; it says who is missing.
    """
    if verdict := self._answer() if self.place.index else self._collect():
      raise UserError(verdict)

  def _collect(self) -> str:
    """Process 0: waits for the others' lines and tells them the verdict; "" if all came."""
    place, verdict = self.place, ""
    deadline = time.monotonic() + place.limit
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
      server = socket.create_server(("", place.port), family=family, dualstack_ipv6=both)
    except OSError as err:
      return f"process 0 cannot use port {place.port} ({err.strerror}); choose another port."
    self.hosts[0] = socket.gethostname()
    strays = []
    with server:
      while not verdict and len(self.hosts) < place.count:
        left = deadline - time.monotonic()
        if left <= 0:
          verdict = self._absence()
          break
        server.settimeout(left)
        try:
          peer, _ = server.accept()
          peer.settimeout(min(left, 5))
          count, index, host = _read(peer).split()
          count, index = int(count), int(index)
        except (OSError, ValueError):  # time is up, or a stranger
          continue
        if count != place.count or index in self.hosts:
          strays.append(peer)
          verdict = (
            f"{host} says that it is process {index} of {count}, but process 0 waits for "
            f"{place.count} and has {self._listed()}; give each process a number of its own."
          )
        else:
          self.hosts[index], self.peers[index] = host, _kept(peer)
    for peer in (*self.peers.values(), *strays):
      _send(peer, f"stop {verdict}" if verdict else "go")
    return verdict

  def _listed(self) -> str:
    return ", ".join(f"{index} ({host})" for index, host in sorted(self.hosts.items())[:20])

  def _absence(self) -> str:
    """Names the processes that are not in `hosts`."""
    planned = dict(enumerate(self.place.planned))
    absent = [index for index in range(self.place.count) if index not in self.hosts]
    names = ", ".join(f"{i} ({planned[i]})" if i in planned else str(i) for i in absent[:20])
    more = f" and {len(absent) - 20} more" if len(absent) > 20 else ""
    return (
      f"of {self.place.count} processes, these did not come within {self.place.limit:g} s: "
      f"{names}{more}; here are {self._listed()}; look at the logs of those that are missing, or "
      "raise START_LIMIT."
    )

  def _answer(self) -> str:
    """Any other process: tells process 0 that it is here; returns the verdict, "" to go on."""
    place, error = self.place, ""
    deadline = time.monotonic() + place.limit
    while (left := deadline - time.monotonic()) > 0:
      try:
        peer = socket.create_connection((place.host.strip("[]"), place.port), left)
        _send(peer, f"{place.count} {place.index} {socket.gethostname()}")
        # Process 0 may have started only now, and waits as long itself.
        peer.settimeout(place.limit + 5)
        verdict = _read(peer)
        if verdict == "go":
          self.hosts[0], self.peers[0] = place.host, _kept(peer)
          return ""
        if verdict.startswith("stop "):
          return verdict.removeprefix("stop ")
        error = "something else is there" if verdict else "it hung up"
      except OSError as err:
        error = err.strerror or str(err)
      time.sleep(0.2)
    return (
      f"process {place.index} ({socket.gethostname()}) got no answer from process 0 at "
      f"{place.host}:{place.port} within {place.limit:g} s ({error}): it is missing or ended, or "
      "JAX_COORDINATOR_ADDRESS is wrong or closed to this host."
    )

  def watch(self, end: Callable[[int], None] = os._exit) -> None:
    """From now on, when another process ends without `farewell`, says so and ends this one too."""
    threading.Thread(target=self._watch, args=(end,), daemon=True).start()

  def _watch(self, end: Callable[[int], None]) -> None:
    watched = selectors.DefaultSelector()  # not select(), which takes no descriptor above 1023
    for index, peer in self.peers.items():
      watched.register(peer, selectors.EVENT_READ, index)
    while watched.get_map():
      for key, _ in watched.select():
        watched.unregister(key.fileobj)
        index, line = key.data, _read(key.fileobj)
        if line == "bye":
          continue
        self.news = line.removeprefix("stop ") or f"process {index} ({self.hosts[index]}) died."
        for other in watched.get_map().values():
          _send(other.fileobj, f"stop {self.news}")
        time.sleep(GRACE / 10)  # enough, if this process ends for the same reason
        self.report()
        time.sleep(GRACE)
        return end(1)

  def report(self) -> None:
    """Prints who ended early, once."""
    if news := self.news:
      self.news = ""
      print(f"stopped: {news}", file=sys.stderr, flush=True)

  def farewell(self) -> None:
    """Says that this process is done, and what happens to the others is none of its business."""
    for peer in self.peers.values():
      _send(peer, "bye")


def _read(peer: socket.socket) -> str:
  """A line; "" if the other end is gone."""
  try:
    # Unbuffered: a second line that came along must not be taken with the first.
    return peer.makefile("rb", buffering=0).readline().decode(errors="replace").strip()
  except OSError:
    return ""


def _send(peer: socket.socket, line: str) -> None:
  with contextlib.suppress(OSError):  # whoever is gone is found out in reading
    peer.sendall(f"{line}\n".encode())


def _kept(peer: socket.socket) -> socket.socket:
  """A connection for hours: a host without power is found out within 50 s."""
  peer.settimeout(None)
  peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
  if hasattr(socket, "TCP_KEEPIDLE"):
    for name, value in (("KEEPIDLE", 10), ("KEEPINTVL", 10), ("KEEPCNT", 4)):
      peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)
  return peer
