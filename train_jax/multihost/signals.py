"""Reasons to stop before the end: SIGTERM, SIGINT, and a Google VM's notice of preemption.

The metadata server of a VM gives notice before the shutdown sends SIGTERM, and reaches processes
that get no signal. Elsewhere (Slurm, GKE) SIGTERM is the only notice.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from train_jax.multihost import google_cloud

EVERY = 5.0  # seconds between two requests to the metadata server; a VM stops 30 s after its notice


_should_stop: ContextVar[Callable[[], bool]] = ContextVar("should_stop", default=lambda: False)


class Interrupted(BaseException):
  """A signal came during work that may be interrupted; no `except Exception` catches it."""


def pause() -> None:
  """Raises Interrupted between two batches of long work if `pausing` asks for it.

  Processes that share the work must call it equally often, and leave together.
  """
  if _should_stop.get()():
    raise Interrupted


@contextlib.contextmanager
def pausing(should_stop: Callable[[], bool]) -> Iterator[None]:
  """The block ends at its next `pause` once `should_stop()`, which all processes answer alike."""
  token = _should_stop.set(should_stop)
  try:
    yield
  finally:
    _should_stop.reset(token)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
  """Ctrl-C raises KeyboardInterrupt in the block; if Python drops it, Interrupted at a `pause`.

  Python drops exceptions in finalizers and in callbacks of the garbage collector. A program that
  ignored Ctrl-C from its start, in the background, goes on ignoring it.
  """
  received = threading.Event()

  def handle(*_) -> None:
    received.set()
    raise KeyboardInterrupt

  before = signal.getsignal(signal.SIGINT)
  try:
    if before is not signal.SIG_IGN:
      signal.signal(signal.SIGINT, handle)
    with pausing(received.is_set):
      yield
  finally:
    signal.signal(signal.SIGINT, before)


class Signals:
  """Records signals instead of obeying them; a second one ends the program at once.

  Attributes:
    received: the reasons to stop, in order.
  """

  def __enter__(self) -> Signals:
    self.received: list[str] = []
    self._before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    self._released, self._breaks = threading.Event(), False
    for number in self._before:
      signal.signal(number, self._handle)
    if google_cloud.expected():
      threading.Thread(target=self._watch, name="preemption", daemon=True).start()
    return self

  def _handle(self, number, _frame) -> None:
    self.received.append(name := signal.Signals(number).name)
    for other in self._before:
      signal.signal(other, signal.SIG_DFL)
    text = f"\n{name}: ends after this step and saves; the next one ends at once\n"
    with contextlib.suppress(OSError):  # a log on a full disk
      os.write(2, text.encode())  # the signal may have come inside a print
    if self._breaks:
      raise Interrupted

  @contextlib.contextmanager
  def breaking(self) -> Iterator[None]:
    """A signal raises Interrupted in the block, or at its start if one was received before.

    Python handles signals between its own instructions, so a call of the device or the compiler
    ends first. A notice of preemption comes in another thread: only `pause`, and the start of a
    block, raise Interrupted for it.
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
    """Restores the handlers from before."""
    self._released.set()
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def __exit__(self, *_) -> None:
    self.release()
