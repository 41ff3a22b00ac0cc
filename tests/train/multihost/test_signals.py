"""Signals and the notice of preemption: the step is finished, saved, and the run goes on."""

import errno
import os
import signal
import threading
import time
from contextlib import nullcontext, suppress

import pytest

from train_jax import metrics
from train_jax.checkpointing.saver import SaveError
from train_jax.multihost import google_cloud, signals


def handlers():
  return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_saves_and_stops_and_the_run_goes_on_to_the_bit(
  tmp_path, train, method, load, number, stream_that, differences
):
  before = handlers()

  def act(position):
    if position == 2:
      os.kill(os.getpid(), number)

  assert not train(tmp_path / "parts", method=stream_that(act, method), steps=6, save_every=100)
  state, meta = load(tmp_path / "parts")
  assert int(state.step) == meta["position"] == 3
  assert handlers() == before
  for name in ("parts", "whole"):
    assert train(tmp_path / name, steps=6)
  assert differences(load(tmp_path / "parts")[0], load(tmp_path / "whole")[0]) == []


def test_signal_at_the_last_step_lets_the_run_complete(tmp_path, train, method, stream_that):
  def act(position):
    if position == 3:
      os.kill(os.getpid(), signal.SIGTERM)

  assert train(tmp_path, method=stream_that(act, method), steps=4)
  assert (tmp_path / "samples" / "00000004_grid.png").exists()  # the last that is evaluated


@pytest.mark.parametrize("when", ["evaluation", "logging"])
def test_signal_between_steps_loses_nothing(tmp_path, train, method, load, monkeypatch, when):
  """It may come after the loop has decided that nothing is due for a save."""

  def evaluate(params, step, final):
    if when == "evaluation" and step == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    yield "norm", 1.0

  scalars = metrics.MetricWriter.scalars

  def log(self, step, values):
    if when == "logging" and step == 2 and "loss" in values:
      os.kill(os.getpid(), signal.SIGTERM)
    scalars(self, step, values)

  monkeypatch.setattr(metrics.MetricWriter, "scalars", log)
  method = method._replace(evaluate=evaluate)
  assert not train(tmp_path, method=method, steps=8, eval_every=2, save_every=100)
  state, _ = load(tmp_path)
  assert int(state.step) == 2


def test_signal_breaks_off_an_evaluation_but_not_the_last(
  tmp_path, train, method, load, lines, losses
):
  saved = []

  def evaluate(params, step, final):
    yield "first", 1.0
    if step == 2:
      with suppress(Exception):  # of a library that goes on whatever happens
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1000):  # a number that takes long: ten seconds
          time.sleep(0.01)
      saved.append(step)
    yield "third", 3.0

  method = method._replace(evaluate=evaluate)
  options = {"steps": 4, "eval_every": 2, "save_every": 100}
  assert not train(tmp_path, method=method, **options)
  assert int(load(tmp_path)[0].step) == 2 and not saved
  assert train(tmp_path, method=method, **options)
  assert [step for step, _ in losses(tmp_path)] == [1, 2, 3, 4]
  found = [set(line) - {"step"} for line in lines(tmp_path) if "eval/first" in line]
  assert found == [{"eval/first"}, {"eval/first", "eval/third"}]


def test_several_processes_end_an_evaluation_between_two_numbers(
  tmp_path, train, method, lines, monkeypatch
):
  def evaluate(params, step, final):
    yield "first", 1.0
    os.kill(os.getpid(), signal.SIGTERM)
    yield "second", 2.0
    yield "third", 3.0

  monkeypatch.setattr(signals.Signals, "breaking", lambda self: nullcontext())
  assert not train(tmp_path, method=method._replace(evaluate=evaluate), steps=4, eval_every=2)
  assert lines(tmp_path)[-1] == {"step": 2, "eval/first": 1.0, "eval/second": 2.0}


def test_only_what_may_be_broken_off_is_and_at_once_after_a_signal():
  before = handlers()
  with signals.Signals() as found:
    with found.breaking():
      pass
    os.kill(os.getpid(), signal.SIGTERM)
    assert found.received == ["SIGTERM"]
    with pytest.raises(signals.Interrupted), found.breaking():
      raise AssertionError("begun")
  assert handlers() == before


def test_second_signal_acts_at_once(tmp_path, train, method, stream_that):
  found = []

  def act(position):
    if position == 2:
      os.kill(os.getpid(), signal.SIGINT)
      found.extend(handlers())

  before = handlers()
  assert not train(tmp_path, method=stream_that(act, method), steps=8)
  assert found == [signal.SIG_DFL] * 2  # not KeyboardInterrupt, which would wait for the save
  assert handlers() == before


def test_stop_that_cannot_be_saved_is_an_error(tmp_path, train, method, stream_that):
  (tmp_path / "checkpoints").write_text("not a directory")

  def act(position):
    if position == 2:
      os.kill(os.getpid(), signal.SIGTERM)

  with pytest.raises(SaveError, match=r"step 3 could not be saved .*no step was saved before it"):
    train(tmp_path, method=stream_that(act, method), steps=9, save_every=2)


def watchers():
  return [thread for thread in threading.enumerate() if thread.name == "preemption"]


def test_notice_of_preemption_is_as_a_signal(
  tmp_path, train, method, load, stream_that, metadata_server, monkeypatch, caplog
):
  monkeypatch.setenv("GCE_METADATA_HOST", metadata_server.host)
  monkeypatch.setattr(signals, "EVERY", 0.01)
  metadata_server.answers["preempted"] = "FALSE"
  assert train(tmp_path, steps=2)
  assert not watchers()

  def act(position):
    if position == 4:
      (watcher,) = watchers()
      metadata_server.answers["preempted"] = "TRUE"
      watcher.join(10)

  assert not train(tmp_path, method=stream_that(act, method), steps=8, save_every=100)
  assert int(load(tmp_path)[0].step) == 5
  assert "notice of preemption: saved step 5; the same command goes on." in caplog.messages
  assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("product, there", [("Google Compute Engine\n", True), ("KVM\n", False)])
def test_only_google_machines_are_asked(tmp_path, monkeypatch, product, there):
  monkeypatch.delenv("GCE_METADATA_HOST", raising=False)
  monkeypatch.setattr(google_cloud, "TPUS", ())
  monkeypatch.setattr(google_cloud, "PRODUCT", tmp_path / "product_name")
  assert not google_cloud.expected()
  with signals.Signals():
    assert not watchers()
  (tmp_path / "product_name").write_text(product)
  assert google_cloud.expected() is there


def test_a_signal_is_noted_where_nothing_can_be_written(monkeypatch):
  def write(*_):
    raise OSError(errno.ENOSPC, "no space left")

  monkeypatch.setattr(os, "write", write)
  with signals.Signals() as told:
    os.kill(os.getpid(), signal.SIGTERM)
    assert told.received == ["SIGTERM"]
