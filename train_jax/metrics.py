"""Where numbers and pictures go: metrics.jsonl, TensorBoard, PNG files and the progress bar."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboardX import SummaryWriter
from tqdm import tqdm


class MetricWriter:
  """Writes scalars and pictures of a run; every process but the first writes nothing.

  Args:
    workdir: gets `metrics.jsonl`, `samples/<step>_<name>.png` and TensorBoard's event file.
    step: the step that the run goes on from. Later lines, of a run that was cut off after its last
      checkpoint, are dropped: each step stands in the file once.
    active: whether this process writes.
  """

  def __init__(self, workdir: Path, step: int, active: bool = True):
    self.active = active
    self.path = Path(workdir) / "metrics.jsonl"
    self.samples = Path(workdir) / "samples"
    if not active:
      return
    self.samples.mkdir(parents=True, exist_ok=True)
    kept = []
    if self.path.exists():
      for line in self.path.read_text().splitlines():
        try:
          record = json.loads(line)
        except json.JSONDecodeError:  # the line that a killed run was writing
          continue
        if record["step"] <= step:
          kept.append(line + "\n")
    partial = self.path.with_suffix(".tmp")
    partial.write_text("".join(kept))
    partial.replace(self.path)
    self._file = self.path.open("a")
    self._board = SummaryWriter(str(workdir), purge_step=step + 1)

  def scalars(self, step: int, values: dict[str, float]) -> None:
    """Appends one JSON line and the TensorBoard points."""
    if not self.active or not values:
      return
    values = {name: float(value) for name, value in values.items()}
    self._file.write(json.dumps({"step": step, **values}) + "\n")
    self._file.flush()
    for name, value in values.items():
      self._board.add_scalar(name, value, step)

  def picture(self, step: int, name: str, pixels: np.ndarray) -> Path:
    """Saves uint8 [h, w, 3] as a PNG; returns its path."""
    path = self.samples / f"{step:08d}_{name}.png"
    if self.active:
      Image.fromarray(pixels).save(path)
      self._board.add_image(name, pixels, step, dataformats="HWC")
    return path

  def close(self) -> None:
    if self.active:
      self._file.close()
      self._board.close()


class StepClock:
  """Wall time of a training step, with evaluations and saves left out."""

  def __init__(self, step: int):
    self.restart(step)

  def restart(self, step: int) -> None:
    """Begins a lap after `step`."""
    self._step, self._time = step, time.perf_counter()

  def lap(self, step: int) -> float:
    """Milliseconds a step since the lap began; begins the next."""
    now, steps = time.perf_counter(), step - self._step
    milliseconds = 1e3 * (now - self._time) / max(steps, 1)
    self._step, self._time = step, now
    return milliseconds


def progress_bar(total: int, initial: int, active: bool = True, **kwargs) -> tqdm:
  """A bar with speed and time left; where there is no terminal, a line every 20 s."""
  live = sys.stderr.isatty()
  return tqdm(
    total=total,
    initial=initial,
    dynamic_ncols=True,
    mininterval=0.5 if live else 20,
    maxinterval=1 if live else 20,
    disable=not active,
    smoothing=0.05,
    **kwargs,
  )


def table(results: dict[str, float]) -> str:
  """{"fd/nfe1_w0": 3.8, ...} as text: a row for each setting, a column for each metric."""
  settings = list(dict.fromkeys(name.partition("/")[2] for name in results))
  columns = list(dict.fromkeys(name.partition("/")[0] for name in results))
  lines = [["", *columns]]
  for setting in settings:
    values = (results.get(f"{column}/{setting}") for column in columns)
    lines.append([setting, *("" if v is None else f"{v:.3f}" for v in values)])
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return "\n".join(
    "  ".join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    )
    for line in lines
  )
