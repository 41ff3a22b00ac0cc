"""Reasons to stop before the end: SIGTERM, SIGINT, and a Google VM's notice of preemption.

The metadata server of a VM gives notice before the shutdown sends SIGTERM, and reaches processes
that get no signal. Elsewhere (Slurm, GKE) SIGTERM is the only notice.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from train_jax.multihost import google_cloud

EVERY = 5.0  # seconds between two requests to the metadata server; a VM stops 30 s after its notice


class Interrupted(BaseException):
  """A signal came during work that may be interrupted; no `except Exception` catches it."""


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
