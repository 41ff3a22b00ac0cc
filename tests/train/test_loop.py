"""The loop: resume to the bit, one compilation, and how a run ends before its time."""

import errno
import itertools
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train_jax import checksum, loop, metrics
from train_jax import mesh as mesh_lib
from train_jax.checkpoint import Checkpoints
from train_jax.errors import UserError
from train_jax.saver import SaveError
from train_jax.step import Frozen

DECAYS = {"target": 0.5, "sample": 0.99}
RECORD = {"config": {"name": "tiny"}, "facts": {"classes": 3}}


@pytest.fixture(scope="module")
def tx():
  return optax.adamw(optax.linear_schedule(0.05, 0.01, 8))


@pytest.fixture
def train(method, tx, one_device, settings):
  """(workdir, method, mesh, **settings) -> what loop.train returns."""

  def run(workdir, method=method, mesh=one_device, **kwargs):
    return loop.train(method, tx, DECAYS, settings(**kwargs), mesh, workdir, RECORD)

  return run


@pytest.fixture
def load(method, tx, make_state, one_device):
  """workdir -> (state, meta) of its newest checkpoint."""
  abstract = jax.eval_shape(lambda: make_state(method, tx, one_device, DECAYS))

  def run(workdir):
    checkpoints = Checkpoints(workdir)
    state, meta = checkpoints.restore(abstract)
    checkpoints.close()
    return state, meta

  return run


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
  return [(line["step"], line["loss"]) for line in lines(workdir) if "loss" in line]


def stream_that(act, method):
  """`method`, calling `act(position)` before each batch is handed out."""

  def stream(seed, position):
    for i in itertools.count(position):
      act(i)
      yield next(method.stream(seed, i))

  return method._replace(stream=stream)


def test_training_2n_equals_training_n_twice(tmp_path, train, load, differences):
  assert train(tmp_path / "whole", steps=8, save_every=4)
  assert train(tmp_path / "parts", steps=4, save_every=4)
  assert train(tmp_path / "parts", steps=8, save_every=4)
  (whole, meta), (parts, parts_meta) = load(tmp_path / "whole"), load(tmp_path / "parts")
  assert differences(parts, whole) == []
  assert int(whole.step) == meta["position"] == 8
  assert parts_meta == meta
  assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
  assert [step for step, _ in losses(tmp_path / "whole")] == list(range(1, 9))


def test_checkpoint_holds_the_record_and_the_data_position(tmp_path, train, load):
  train(tmp_path, steps=3)
  _, meta = load(tmp_path)
  del meta["checksums"]
  assert meta == {**RECORD, "step": 3, "position": 3, "rollbacks": 0}
  assert Checkpoints(tmp_path).steps() == [3, 2]


@pytest.mark.parametrize("shape", [(1, 1), (4, 2)], ids=["1x1", "4x2"])
def test_fresh_run_begins_with_given_parameters_and_a_resumed_one_does_not(
  tmp_path, method, tx, load, make_mesh, settings, monkeypatch, shape
):
  monkeypatch.setattr("train_jax.mesh.SMALL", 1)

  def run(steps, value):
    given = {"layer.kernel": np.full((4, 3), value, np.float32)}
    config, mesh = settings(steps=steps), make_mesh(*shape)
    assert loop.train(method, tx, DECAYS, config, mesh, tmp_path, RECORD, given)
    np.testing.assert_array_equal(given["layer.kernel"], value)  # its buffer was not donated
    return load(tmp_path)[0].extra["kernel"]  # as the last step found it

  np.testing.assert_array_equal(run(1, 7.0), np.full((4, 3), 7))
  assert np.all(np.abs(run(2, 3.0) - 7) < 0.1)


@pytest.mark.parametrize("shape", [(1, 1), (4, 2)], ids=["1x1", "4x2"])
def test_step_is_compiled_once_also_after_resume(tmp_path, train, make_mesh, monkeypatch, shape):
  monkeypatch.setattr("train_jax.mesh.SMALL", 1)
  jit, jitted = jax.jit, []

  def spy(function, **kwargs):
    compiled = jit(function, **kwargs)
    if function.__name__ == "train_step":
      jitted.append(compiled)
    return compiled

  monkeypatch.setattr(jax, "jit", spy)
  train(tmp_path, mesh=make_mesh(*shape), steps=2)
  train(tmp_path, mesh=make_mesh(*shape), steps=4)
  assert [step._cache_size() for step in jitted] == [1, 1]


def test_run_goes_on_on_another_mesh(tmp_path, train, load, make_mesh, monkeypatch):
  monkeypatch.setattr("train_jax.mesh.SMALL", 1)
  train(tmp_path / "one", steps=4)
  train(tmp_path / "two", steps=2, mesh=make_mesh(2, 4))
  train(tmp_path / "two", steps=4, mesh=make_mesh(8, 1))
  one, two = (load(tmp_path / name)[0] for name in ("one", "two"))
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_every_batch_comes_once_and_in_order(tmp_path, train, method):
  seen = []
  recording = stream_that(seen.append, method)
  train(tmp_path, method=recording, steps=4)
  train(tmp_path, method=recording, steps=6)
  assert seen == list(range(6))


def test_run_that_is_complete_is_not_trained_again(tmp_path, train, method):
  def refuse(position):
    raise AssertionError(position)

  train(tmp_path, steps=3)
  before = losses(tmp_path)
  assert train(tmp_path, method=stream_that(refuse, method), steps=3)
  assert losses(tmp_path) == before


def poison(positions):
  def change(rows, i):
    return {**rows, "poison": np.full_like(rows["poison"], i in positions)}

  return change


def stream_with(change, method):
  def stream(seed, position):
    for i in itertools.count(position):
      yield change(next(method.stream(seed, i)), i)

  return method._replace(stream=stream)


def test_steps_that_are_not_finite_are_counted_and_passed_over(tmp_path, train, load, method):
  assert train(tmp_path, method=stream_with(poison({2, 3}), method), steps=6)
  state, _ = load(tmp_path)
  assert int(state.extra["count"]) == 4 and int(state.step) == 6
  skipped = [line["skipped"] for line in lines(tmp_path) if "loss" in line]
  assert skipped == [0, 0, 1, 2, 0, 0]


def test_too_many_in_a_row_again_stop_the_run_and_name_the_last_checkpoint(
  tmp_path, train, load, method, differences
):
  """Saves that are due meanwhile wait: the checkpoints of before are the ones to go back to."""
  bad = stream_with(poison(range(5, 99)), method)
  with pytest.raises(loop.DivergedError) as err:
    train(tmp_path / "bad", method=bad, steps=20, save_every=2, max_skipped=3)
  sentence = str(err.value)
  assert "not finite for 3 steps in a row, from step 6 on" in sentence
  assert f"last good checkpoint: {tmp_path / 'bad' / 'checkpoints' / '4'}" in sentence
  assert Checkpoints(tmp_path / "bad").steps() == [4, 2]
  train(tmp_path / "good", steps=4)
  (state, _), (good, _) = load(tmp_path / "bad"), load(tmp_path / "good")
  assert differences(state, good) == []


def test_save_that_was_due_while_steps_were_skipped_is_made_after_them(tmp_path, train, method):
  seen = []

  def act(position):
    seen.append(Checkpoints(tmp_path).steps()[:1])

  bad = stream_that(act, stream_with(poison({3, 4}), method))
  train(tmp_path, method=bad, steps=8, save_every=4)
  # Steps 4 and 5 were skipped, and 6 is the first that is good.
  assert [6] in [*seen[6:], Checkpoints(tmp_path).steps()[1:2]] and [4] not in seen


def poison_order(seed, method):
  """`method` with data that are bad from position 5 on, in the order of `seed` only."""

  def stream(found, position):
    change = poison(range(5, 99) if found == seed else ())
    yield from stream_with(change, method).stream(found, position)

  return method._replace(stream=stream)


def test_run_goes_back_once_with_another_order_and_resumes_to_the_bit(
  tmp_path, train, load, method, differences
):
  bad = poison_order(0, method)
  for name, stops in (("whole", (12,)), ("parts", (7, 12))):
    for steps in stops:
      assert train(
        tmp_path / name, method=bad, steps=steps, save_every=4, max_skipped=3 - (steps < 8)
      )
  (whole, meta), (parts, parts_meta) = load(tmp_path / "whole"), load(tmp_path / "parts")
  assert differences(whole, parts) == [] and meta == parts_meta
  assert meta["rollbacks"] == 1 and meta["position"] == int(whole.step) == 12
  assert int(whole.extra["count"]) == 12  # none of them was skipped
  assert [step for step, _ in losses(tmp_path / "whole")] == list(range(1, 13))
  assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_second_divergence_after_going_back_stops_also_a_resumed_run(tmp_path, train, method):
  train(tmp_path, method=poison_order(0, method), steps=8, save_every=4, max_skipped=3)
  bad = poison_order(loop.data_seed(0, 1), method)
  with pytest.raises(loop.DivergedError, match="from step 9 on"):
    train(tmp_path, method=bad, steps=20, save_every=4, max_skipped=3)


def test_seeds_of_the_data_are_the_same_every_time_and_never_twice():
  assert loop.data_seed(7, 0) == 7
  seeds = [loop.data_seed(seed, back) for seed in range(50) for back in range(3)]
  assert len(set(seeds)) == 150 and min(seeds) >= 0 and max(seeds) < 2**31


@pytest.fixture
def full_disk(monkeypatch):
  """step -> from now on, its save fails in the background, as on a full disk; None: no more."""

  def fill(step):
    def of_json(value):
      if value["step"] == step:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
      return whole(value)

    monkeypatch.setattr(checksum, "of_json", of_json)

  whole = checksum.of_json
  return fill


def test_save_that_fails_is_reported_and_training_goes_on(
  tmp_path, train, load, differences, full_disk, caplog
):
  full_disk(4)
  assert train(tmp_path / "full", steps=6)
  full_disk(None)
  checkpoints = tmp_path / "full" / "checkpoints"
  assert Checkpoints(tmp_path / "full").steps() == [6, 2]
  said = [text for text in caplog.messages if "could not be saved" in text]
  assert len(said) == 1 and "step 4 could not be saved (No space left on device)" in said[0]
  assert f"{checkpoints / '2'} is whole" in said[0]
  train(tmp_path / "good", steps=6)
  assert differences(load(tmp_path / "full")[0], load(tmp_path / "good")[0]) == []


def test_end_that_cannot_be_saved_is_an_error(tmp_path, train, load, full_disk):
  full_disk(4)
  with pytest.raises(SaveError, match=r"step 4 could not be saved .*checkpoints/2 is whole"):
    train(tmp_path, steps=4)
  full_disk(None)
  assert int(load(tmp_path)[0].step) == 2
  assert train(tmp_path, steps=4)


def test_stop_that_cannot_be_saved_is_an_error(tmp_path, train, method):
  (tmp_path / "checkpoints").write_text("not a directory")

  def act(position):
    if position == 2:
      os.kill(os.getpid(), signal.SIGTERM)

  with pytest.raises(SaveError, match=r"step 3 could not be saved .*no step was saved before it"):
    train(tmp_path, method=stream_that(act, method), steps=9, save_every=2)


def test_spike_is_logged_once_and_written(tmp_path, train, method):
  def change(rows, i):
    return {**rows, "y": rows["y"] + (1000 if i in (70, 71, 90) else 0)}

  train(tmp_path, method=stream_with(change, method), steps=95, log_every=100, save_every=100)
  assert [line["step"] for line in lines(tmp_path) if "spike/loss" in line] == [71, 91]


def test_divergence_before_the_first_save_says_that_none_is_there(tmp_path, train, method):
  bad = stream_with(poison(range(99)), method)
  with pytest.raises(loop.DivergedError, match="none was saved yet"):
    train(tmp_path, method=bad, steps=20, save_every=10, max_skipped=3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_saves_and_stops(tmp_path, train, method, load, number):
  before = signal.getsignal(number)

  def act(position):
    if position == 4:
      os.kill(os.getpid(), number)

  assert not train(tmp_path, method=stream_that(act, method), steps=8, save_every=100)
  state, meta = load(tmp_path)
  assert int(state.step) == meta["position"] == 5
  assert signal.getsignal(number) is before


def test_run_goes_on_bit_exactly_after_a_signal(tmp_path, train, method, load, differences):
  def act(position):
    if position == 2:
      os.kill(os.getpid(), signal.SIGTERM)

  assert not train(tmp_path / "parts", method=stream_that(act, method), steps=6)
  assert train(tmp_path / "parts", steps=6)
  train(tmp_path / "whole", steps=6)
  assert differences(load(tmp_path / "parts")[0], load(tmp_path / "whole")[0]) == []


def test_signal_at_the_last_step_lets_the_run_complete(tmp_path, train, method):
  def act(position):
    if position == 3:
      os.kill(os.getpid(), signal.SIGTERM)

  assert train(tmp_path, method=stream_that(act, method), steps=4)


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
  assert int(state.step) == 3


def test_second_signal_acts_at_once(tmp_path, train, method):
  found = []

  def act(position):
    if position == 2:
      os.kill(os.getpid(), signal.SIGINT)
      found.extend(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM))

  before = signal.getsignal(signal.SIGINT)
  assert not train(tmp_path, method=stream_that(act, method), steps=8)
  assert found == [signal.SIG_DFL] * 2  # not KeyboardInterrupt, which would wait for the save
  assert signal.getsignal(signal.SIGINT) is before


def test_evaluates_the_slow_average_on_time(tmp_path, train, method, load):
  seen = []

  def evaluate(params, step, final):
    seen.append((step, final))
    yield "norm", float(jnp.linalg.norm(params["layer"]["kernel"]))
    yield "grid", np.full((4, 6, 3), step, np.uint8)

  train(tmp_path, method=method._replace(evaluate=evaluate), steps=5, eval_every=2)
  assert seen == [(2, False), (4, False), (5, True)]
  found = [(line["step"], line["eval/norm"]) for line in lines(tmp_path) if "eval/norm" in line]
  assert [step for step, _ in found] == [2, 4, 5]
  kernel = load(tmp_path)[0].ema["sample"]["layer"]["kernel"]
  assert found[-1][1] == pytest.approx(float(jnp.linalg.norm(kernel)))
  pictures = sorted(p.name for p in (tmp_path / "samples").iterdir())
  assert pictures == ["00000002_grid.png", "00000004_grid.png", "00000005_grid.png"]


def test_logs_every_so_many_steps_and_the_last(tmp_path, train):
  train(tmp_path, steps=7, log_every=3)
  assert [step for step, _ in losses(tmp_path)] == [3, 6, 7]
  first = lines(tmp_path)[0]
  assert {"loss", "noise", "grad_norm", "skipped", "milliseconds_per_step"} < set(first)


def test_resume_says_so(tmp_path, train, capsys):
  train(tmp_path, steps=2)
  assert "resumed" not in capsys.readouterr().out
  train(tmp_path, steps=4)
  said = f"resumed at step 2 of 4 from {tmp_path / 'checkpoints'}"
  assert said in capsys.readouterr().out


def test_damaged_checkpoint_costs_one_interval_only(tmp_path, train, load, differences):
  train(tmp_path / "a", steps=4)
  (tmp_path / "a" / "checkpoints" / "4" / "meta" / "metadata").write_text("{")
  train(tmp_path / "a", steps=6)
  train(tmp_path / "b", steps=6)
  assert differences(load(tmp_path / "a")[0], load(tmp_path / "b")[0]) == []
  assert losses(tmp_path / "a") == losses(tmp_path / "b")


@pytest.mark.parametrize("name", ["steps", "log_every", "save_every", "keep", "max_skipped"])
def test_lengths_and_intervals_must_be_positive(settings, name):
  with pytest.raises(UserError, match=f"{name}=0 must be at least 1"):
    settings(**{name: 0})


def test_frozen_arrays_are_seen_by_all_and_saved_by_none(
  tmp_path, method, train, load, make_mesh, differences, monkeypatch
):
  monkeypatch.setattr(mesh_lib, "SMALL", 4)
  shift = np.linspace(0, 1, 8, dtype=np.float32).reshape(2, 4)
  made, seen = [], []

  def make(shardings):
    made.append(jax.device_put({"shift": shift}, shardings))
    return made[-1]

  def moved(batch, frozen):
    return {**batch, "x": batch["x"] + frozen["shift"].sum(0)}

  def evaluate(params, step, final, frozen):
    seen.append(frozen is made[-1])
    yield "shift", float(frozen["shift"].sum())

  shapes = {"shift": jax.ShapeDtypeStruct((2, 4), np.float32)}
  learner = method._replace(
    augment=lambda state, batch, key, frozen: method.augment(state, moved(batch, frozen), key),
    loss=lambda params, ema, batch, key, frozen: method.loss(
      params, ema, {**batch, "y": batch["y"] * frozen["shift"][0, 1]}, key
    ),
    evaluate=evaluate,
    frozen=Frozen(shapes, make),
  )

  def plain_stream(seed, position):
    for rows in method.stream(seed, position):
      yield {**rows, "x": rows["x"] + shift.sum(0), "y": rows["y"] * shift[0, 1]}

  assert train(tmp_path / "frozen", learner, make_mesh(2, 2), eval_every=2)
  assert train(tmp_path / "plain", method._replace(stream=plain_stream), make_mesh(2, 2))
  (found, _), (expected, _) = load(tmp_path / "frozen"), load(tmp_path / "plain")
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected)
  assert seen == [True, True] and not made[0]["shift"].is_deleted()
  assert made[0]["shift"].addressable_shards[0].data.size == 4  # split over fsdp, as all is
