"""Output of numbers and pictures: metrics.jsonl, TensorBoard, PNG files and the progress bar."""

from __future__ import annotations

import collections
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from PIL import Image
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tqdm import tqdm

from train_jax import files

FLUSH = 20.0  # seconds between flushes of TensorBoard's file


class MetricWriter:
  """Writes scalars and pictures of a run; only the first process writes.

  A failed write (a full disk, say) is logged once, and the next write is tried as usual.

  Args:
    workdir: gets `metrics.jsonl`, `samples/<step>_<name>.png` and TensorBoard's event file.
    step: the step that the run goes on from. Later lines, which a run wrote after its last
      checkpoint, are dropped, so each training step is in the file once. Only the final evaluation
      is repeated if a complete run is started again.
    active: whether this process writes.
  """

  def __init__(self, workdir: Path, step: int, active: bool = True):
    self.active, self._failed = active, False
    self.path = Path(workdir) / "metrics.jsonl"
    self.samples = Path(workdir) / "samples"
    if not active:
      return
    self.samples.mkdir(parents=True, exist_ok=True)
    lines = []
    for line in self.path.read_bytes().splitlines() if self.path.exists() else ():
      # A killed run leaves half a line, and a bad disk leaves other damage: both are dropped.
      with suppress(ValueError, TypeError, KeyError):
        if json.loads(line)["step"] <= step:
          lines.append(line + b"\n")
    with files.whole_file(self.path) as file:
      file.writelines(lines)
    self._file = self.path.open("a")
    # On a full disk the thread of SummaryWriter ends, and training would wait for it for ever.
    self._board = EventsWriter(str(Path(workdir) / "events"), f".{time.time_ns()}")
    self._flush_at = 0.0
    self._add(step + 1, session_log=SessionLog(status=SessionLog.START))

  def _add(self, step: int, **content) -> None:
    self._board.write_event(Event(wall_time=time.time(), step=step, **content))

  @contextmanager
  def _guard(self, content: str) -> Iterator[None]:
    """Logs an error of the disk, and only the first of several in a row."""
    try:
      yield
      self._failed = False
    except OSError as err:
      if not self._failed:
        logging.error("%s cannot be written: %s", content, err.strerror)
      self._failed = True

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Appends one JSON line and the TensorBoard points; in the line NaN and infinity are null."""
    if not self.active or not values:
      return
    values = {name: float(value) for name, value in values.items()}
    with self._guard(f"numbers of step {step}"):
      self._file.write(files.plain_json({"step": step, **values}) + "\n")
      self._file.flush()
      for name, value in values.items():
        self._add(step, summary=summary.scalar(name, value))
      if time.monotonic() > self._flush_at:  # it waits for the disk
        self._board.flush()
        self._flush_at = time.monotonic() + FLUSH

  def picture(self, step: int, name: str, pixels: np.ndarray) -> Path:
    """Saves uint8 [h, w, 3] as a PNG; returns its path."""
    path = self.samples / f"{step:08d}_{name}.png"
    if self.active:
      with self._guard(str(path)):
        Image.fromarray(pixels).save(path)
        self._add(step, summary=summary.image(name, pixels, dataformats="HWC"))
    return path

  def close(self) -> None:
    for file in (self._file, self._board) if self.active else ():
      with self._guard("the last numbers"):
        file.close()


class Spikes:
  """Finds losses far above the usual one, the median of the last 200 finite losses.

  Far is 10 median absolute deviations: a normal distribution gets there once in 1e11 draws.
  """

  WINDOW, LEAST, FAR = 200, 50, 10.0  # LEAST: losses before any can be a spike

  def __init__(self):
    self._recent, self._high = collections.deque(maxlen=self.WINDOW), False

  def find(self, loss: float) -> float | None:
    """The usual loss at the first step of a spike, None at all others; call it once a step."""
    if not np.isfinite(loss):
      return None
    was_high, self._high, usual = self._high, False, None
    if len(self._recent) >= self.LEAST:
      # For 200 numbers `statistics` takes a tenth of NumPy's time.
      usual = statistics.median(self._recent)
      if loss > usual:
        deviation = statistics.median(abs(other - usual) for other in self._recent)
        self._high = loss > usual + self.FAR * max(deviation, 1e-3 * abs(usual))
    self._recent.append(loss)
    return usual if self._high and not was_high else None


class StepClock:
  """Wall time of a training step, without compilation, evaluations and saves.

  Metrics are read some steps late, and just before a save all at once. So a time belongs to a step
  only as the distance of two reads that are equally late, and such reads are its ticks.
  """

  def __init__(self):
    self.restart()

  def restart(self) -> None:
    """Forgets all ticks: what lies between them and the next is not training alone."""
    self._first = self._last = None

  def tick(self, step: int) -> None:
    """Notes the time at which `step` was read, as late as at every other tick."""
    self._last = step, time.perf_counter()
    self._first = self._first or self._last

  def lap(self) -> float | None:
    """Milliseconds a step between the ticks since the last lap; None if there are not two."""
    if self._first == self._last:
      return None
    (start, begun), (stop, ended) = self._first, self._last
    self._first = self._last
    return 1e3 * (ended - begun) / (stop - start)


class _Terminal:
  """sys.stderr, whose failed writes (to a log on a full disk) are ignored."""

  def __getattr__(self, name):
    return getattr(sys.stderr, name)

  def write(self, text: str) -> None:
    with suppress(OSError):
      sys.stderr.write(text)

  def flush(self) -> None:
    with suppress(OSError):
      sys.stderr.flush()


def progress_bar(total: int | None, initial: int, active: bool = True, **kwargs) -> tqdm:
  """A bar with speed and time left; without a terminal, a line every 20 s."""
  live = sys.stderr.isatty()
  return tqdm(
    file=_Terminal(),
    total=total,
    initial=initial,
    dynamic_ncols=True,
    mininterval=0.5 if live else 20,
    maxinterval=1 if live else 20,
    disable=not active,
    smoothing=0.05,
    **kwargs,
  )


def with_progress(values: Iterator[tuple[str, Any]], active: bool) -> Iterator[tuple[str, Any]]:
  """Yields named values as they come; a bar shows the newest one and the time taken."""
  with progress_bar(None, 0, active, unit=" values", desc="evaluating", leave=False) as bar:
    for name, value in values:
      bar.set_postfix_str(name, refresh=False)
      bar.update()
      yield name, value


def table(results: dict[str, float]) -> str:
  """{"fd/nfe1_w0": 3.8, ...} as text: a row for each setting, a column for each metric."""
  settings = list(dict.fromkeys(name.partition("/")[2] for name in results))
  columns = list(dict.fromkeys(name.partition("/")[0] for name in results))
  lines = [["", *columns]]
  for setting in settings:
    values = (results.get(f"{column}/{setting}" if setting else column) for column in columns)
    lines.append([setting, *("" if v is None else f"{v:.3f}" for v in values)])
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    for line in lines
  )


def report(
  metadata: dict[str, int], values: Iterator[tuple[str, Any]], out: Path
) -> dict[str, float]:
  """Prints an evaluation's numbers, and writes them with `metadata` to out/evaluation.json.

  The file is written after each number, so an interrupted evaluation leaves its numbers. Pictures
  are `out/evaluation_NAME.png`. All processes must call it; the first one writes.
  """
  is_primary, path, results = jax.process_index() == 0, out / "evaluation.json", {}
  out.mkdir(parents=True, exist_ok=True)
  for name, value in with_progress(values, active=is_primary):
    if not np.ndim(value):
      results[name] = value
    if is_primary and np.ndim(value):
      Image.fromarray(value).save(picture := out / f"evaluation_{name}.png")
      print(f"{name + ':':<8} {picture}")
    elif is_primary:
      with files.whole_file(path) as file:
        file.write(files.plain_json({**metadata, **results}, indent=1).encode())
  if is_primary:
    settings = ", ".join(f"{name} {value}" for name, value in metadata.items())
    print(f"{settings}; docs/METRICS.md explains the metrics\n{table(results)}\nnumbers: {path}")
  return results
