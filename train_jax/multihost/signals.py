"""When to stop before the end: SIGTERM, SIGINT, and the notice of preemption of a Google VM.

A VM that is about to be taken away gets SIGTERM as it shuts down, and says so on its metadata
server before; that reaches processes that no shutdown signals, too. Elsewhere (Slurm, GKE) notice
comes as SIGTERM alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from train_jax.multihost import google_cloud

EVERY = 5.0  # seconds between two looks at the metadata server; a VM has 30 from its notice on


_told: ContextVar[Callable[[], bool]] = ContextVar("told", default=lambda: False)


class Interrupted(BaseException):
  """A signal came while work was done that may be broken off; no `except Exception` takes it."""


def pause() -> None:
  """Between two batches of long work: Interrupted where `pausing` says so.

  Processes that share the work call it equally often, and leave together.
  """
  if _told.get()():
    raise Interrupted


@contextlib.contextmanager
def pausing(told: Callable[[], bool]) -> Iterator[None]:
  """What is done inside ends at its next `pause` once `told` says so, on every process alike."""
  token = _told.set(told)
  try:
    yield
  finally:
    _told.reset(token)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
  """Ctrl-C is a KeyboardInterrupt inside; where Python drops that one, Interrupted at a `pause`.

  It drops what is raised in a finalizer or a callback of the garbage collector. A program that was
  started deaf to Ctrl-C, in the background, stays so.
  """
  came = threading.Event()

  def note(*_) -> None:
    came.set()
    raise KeyboardInterrupt

  before = signal.getsignal(signal.SIGINT)
  try:
    if before is not signal.SIG_IGN:
      signal.signal(signal.SIGINT, note)
    with pausing(came.is_set):
      yield
  finally:
    signal.signal(signal.SIGINT, before)


class Signals:
  """Signals, noted instead of obeyed; a second one ends the program at once.

  Attributes:
    received: the reasons to stop, in order.
  """

  def __enter__(self) -> Signals:
    self.received: list[str] = []
    self._before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    self._released, self._breaks = threading.Event(), False
    for number in self._before:
      signal.signal(number, self._note)
    if google_cloud.expected():
      threading.Thread(target=self._watch, name="preemption", daemon=True).start()
    return self

  def _note(self, number, _frame) -> None:
    self.received.append(name := signal.Signals(number).name)
    for each in self._before:
      signal.signal(each, signal.SIG_DFL)
    said = f"\n{name}: ends after this step and saves; the next one ends at once\n"
    with contextlib.suppress(OSError):  # a log on a full disk
      os.write(2, said.encode())  # not by print: the signal may have come within one
    if self._breaks:
      raise Interrupted

  @contextlib.contextmanager
  def breaking(self) -> Iterator[None]:
    """What is done inside is broken off by a signal: Interrupted; at once if one was received.

    Python takes signals between two of its own steps: one call of the device or the compiler ends.
    A notice of preemption comes in another thread, and breaks off what begins after it; `pause`
    is where it is asked for on the way.
    """
    self._breaks = True
    try:
      if self.received:
        raise Interrupted
      yield
    finally:
      self._breaks = False

  def _watch(self) -> None:
    while google_cloud.ask("preempted") != "TRUE":
      if self._released.wait(EVERY):
        return
    self.received.append("notice of preemption")

  def release(self) -> None:
    """From now on they act as they did before."""
    self._released.set()
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def __exit__(self, *_) -> None:
    self.release()
