"""What is written, and what a resumed run finds in the file of the run before it."""

import io
import json
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event, SessionLog

from train_jax import metrics


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
  """What TensorBoard finds in the newest of its files, after the file's own version."""
  data, found = max(workdir.glob("events.out.tfevents.*")).read_bytes(), []
  while data:  # a TFRecord: its length, a CRC of that, an event, a CRC of that
    end = 12 + int.from_bytes(data[:8], "little")
    found.append(Event.FromString(data[12:end]))
    data = data[end + 4 :]
  return found[1:]


@pytest.fixture
def written(tmp_path):
  """A run's directory with the lines of steps 1 to 5."""
  writer = metrics.MetricWriter(tmp_path, 0)
  for step in range(1, 6):
    writer.scalars(step, {"loss": np.float32(1 / step)})
  writer.close()
  return tmp_path


def test_one_json_line_a_call(written):
  assert [line["step"] for line in lines(written)] == [1, 2, 3, 4, 5]
  assert lines(written)[1] == {"step": 2, "loss": 0.5}
  points = [
    (e.step, e.summary.value[0].tag, e.summary.value[0].simple_value) for e in events(written)[1:]
  ]
  assert points == [(step, "loss", np.float32(1 / step)) for step in range(1, 6)]


def test_resume_drops_the_steps_after_the_checkpoint(written):
  writer = metrics.MetricWriter(written, 3)
  assert [line["step"] for line in lines(written)] == [1, 2, 3]
  writer.scalars(4, {"loss": 7})
  writer.close()
  assert lines(written)[-1] == {"step": 4, "loss": 7.0}
  assert len(lines(written)) == 4
  # TensorBoard drops what it has from the step of a START on.
  start, point = events(written)
  assert (start.step, start.session_log.status) == (4, SessionLog.START) and point.step == 4


@pytest.mark.parametrize(
  "first, last",
  [
    *((b"", half) for half in (b'{"step": 6, "lo', b'{"step": 6', b"{", b"\n")),
    *((x + b"\n", x) for x in (b"12", b"[]", b"{}", b"\xff\xfe\x00garb", b'"a"', b"null")),
  ],
)
def test_resume_drops_what_is_half_written_or_no_record(written, first, last):
  path = written / "metrics.jsonl"
  path.write_bytes(first + path.read_bytes() + last)
  writer = metrics.MetricWriter(written, 9)
  writer.scalars(10, {"loss": 1})
  writer.close()
  assert [line["step"] for line in lines(written)] == [1, 2, 3, 4, 5, 10]


def test_line_is_on_disk_at_once_and_what_is_not_finite_is_null_in_it(tmp_path):
  writer = metrics.MetricWriter(tmp_path, 0)
  writer.scalars(1, {"loss": np.nan, "norm": np.inf, "lr": 1})
  wanted = [{"step": 1, "loss": None, "norm": None, "lr": 1.0}]
  assert lines(tmp_path) == wanted
  writer.scalars(2, {})  # an evaluation that was broken off at once
  writer.close()
  metrics.MetricWriter(tmp_path, 2).close()  # reads it again
  assert lines(tmp_path) == wanted


def test_tensorboard_sees_numbers_at_intervals(tmp_path, monkeypatch):
  now, seen = [1000.0], []
  monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
  writer = metrics.MetricWriter(tmp_path, 0)
  for step, seconds in enumerate((0, 1, 18, 2)):
    now[0] += seconds
    writer.scalars(step, {"loss": 1})
    seen.append(len(events(tmp_path)) - 1)
  writer.close()
  assert seen == [1, 1, 1, 4]


def test_other_processes_write_nothing(tmp_path):
  writer = metrics.MetricWriter(tmp_path, 0, active=False)
  writer.scalars(1, {"loss": 1})
  writer.picture(1, "grid", np.zeros((2, 3, 3), np.uint8))
  writer.close()
  assert list(tmp_path.iterdir()) == []


def test_picture_is_a_png_named_by_its_step(tmp_path):
  pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
  writer = metrics.MetricWriter(tmp_path, 0)
  path = writer.picture(12, "grid", pixels)
  writer.close()
  assert path == tmp_path / "samples" / "00000012_grid.png"
  np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels)
  event = events(tmp_path)[-1]
  (value,) = event.summary.value
  assert (event.step, value.tag) == (12, "grid")
  found = Image.open(io.BytesIO(value.image.encoded_image_string))
  np.testing.assert_array_equal(np.asarray(found), pixels)


def test_clock_leaves_out_what_lies_between_laps(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
  clock = metrics.StepClock()
  assert clock.lap() is None
  for time, step in ((9, 1), (9.5, 5), (11, 11)):
    now[0] = time
    clock.tick(step)
  assert clock.lap() == pytest.approx(200)  # without the 9 s before the first tick
  assert clock.lap() is None  # no step since
  now[0] = 50.0
  clock.restart()  # after an evaluation
  clock.tick(12)
  assert clock.lap() is None
  now[0] = 50.5
  clock.tick(22)
  assert clock.lap() == pytest.approx(50)


def test_table_has_a_row_for_each_setting_and_a_column_for_each_metric():
  numbers = {"fd/nfe1_w0": 3.81234, "accuracy/nfe1_w0": 0.95, "fd/nfe4_w0.5": 12, "leak": 0.5}
  assert metrics.table(numbers).splitlines() == [
    "               fd  accuracy   leak",
    "nfe1_w0     3.812     0.950       ",
    "nfe4_w0.5  12.000                 ",
    "                             0.500",
  ]
  assert metrics.table({}).strip() == ""


def test_full_disk_is_reported_once_and_nothing_is_lost_after_it(tmp_path, caplog):
  """Nor does anything wait: TensorBoard's own writer does, for ever, from the tenth number on."""
  writer = metrics.MetricWriter(tmp_path, 0)
  file = writer._file
  for first in (1, 101):
    with suppress(OSError), Path("/dev/full").open("w") as writer._file:
      for step in range(first, first + 30):
        writer.scalars(step, {"loss": 1})
    writer._file = file
    writer.scalars(first + 30, {"loss": 1})
  writer.close()
  said = [record.getMessage() for record in caplog.records]
  reason = "cannot be written: No space left on device"
  assert said == [f"numbers of step {first} {reason}" for first in (1, 101)]
  assert lines(tmp_path) == [{"step": step, "loss": 1.0} for step in (31, 131)]


def test_terminal_on_a_full_disk_stops_no_bar(monkeypatch):
  with suppress(OSError), Path("/dev/full").open("w", buffering=1) as full:
    monkeypatch.setattr(sys, "stderr", full)
    with metrics.progress_bar(9, 4) as bar:
      bar.write("a line\n", file=bar.fp)
      bar.update()
      bar.refresh()
  assert (bar.n, bar.total) == (5, 9)


def test_spikes_are_found_against_the_median_of_the_last():
  draw = np.random.default_rng(0)
  losses = draw.normal(5, 0.1, 1000)
  losses[[10, 300, 301, 600]] = 50  # the first comes before anything is usual
  losses += np.arange(1000) / 1000  # slow growth is none
  losses[700] = np.nan
  losses[750:] += 20  # is one once, and usual after a while
  losses[950] = 100
  spikes = metrics.Spikes()
  found = {i: usual for i, loss in enumerate(losses) if (usual := spikes.find(loss)) is not None}
  assert list(found) == [300, 600, 750, 950]
  assert found[300] == np.median(losses[100:300])


@pytest.mark.parametrize("loss", [1.0, -1.0])
def test_spikes_of_a_constant_loss(loss):
  spikes = metrics.Spikes()
  assert [spikes.find(loss) for _ in range(100)] == [None] * 100
  assert spikes.find(loss + 0.005) is None and spikes.find(loss + 0.02) == loss
