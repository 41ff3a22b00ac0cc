"""Steps that are not finite, spikes, and the way back."""

import itertools

import numpy as np
import pytest

from train_jax import loop
from train_jax.checkpointing.checkpoint import Checkpoints


def poison(positions):
  def change(rows, i):
    return {**rows, "poison": np.full_like(rows["poison"], i in positions)}

  return change


def stream_with(change, method):
  def stream(seed, position):
    for i in itertools.count(position):
      yield change(next(method.stream(seed, i)), i)

  return method._replace(stream=stream)


def test_steps_that_are_not_finite_are_counted_and_passed_over(
  tmp_path, train, load, method, lines, caplog
):
  assert train(tmp_path, method=stream_with(poison({2, 3}), method), steps=6)
  said = [text for text in caplog.messages if text.startswith("step")]
  assert said == ["step 3: loss or gradient is not finite; it is not applied."]
  state, _ = load(tmp_path)
  assert int(state.aux_state["count"]) == 4 and int(state.step) == 6
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
  assert "Lower optim.lr, with which the same command goes on" in sentence
  assert Checkpoints(tmp_path / "bad").steps() == [4, 2]
  train(tmp_path / "good", steps=4)
  (state, _), (good, _) = load(tmp_path / "bad"), load(tmp_path / "good")
  assert differences(state, good) == []


def test_save_that_was_due_while_steps_were_skipped_is_made_after_them(
  tmp_path, train, method, stream_that
):
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
  tmp_path, train, load, method, differences, losses
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
  assert int(whole.aux_state["count"]) == 12  # none of them was skipped
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


def test_divergence_before_the_first_save_says_that_none_is_there(
  tmp_path, train, method, stream_that
):
  seen = []
  bad = stream_that(seen.append, stream_with(poison(range(99)), method))
  with pytest.raises(loop.DivergedError, match="none was saved yet"):
    train(tmp_path, method=bad, steps=20, save_every=10, max_skipped=3)
  assert max(seen) == 4  # noticed two steps later, and not when a save is due


def test_spike_is_logged_once_and_written(tmp_path, train, method, lines):
  def change(rows, i):
    return {**rows, "y": rows["y"] + (1000 if i in (70, 71, 90) else 0)}

  train(tmp_path, method=stream_with(change, method), steps=95, log_every=100, save_every=100)
  found = [line for line in lines(tmp_path) if "spike/loss" in line]
  assert [line["step"] for line in found] == [71, 91]
  assert all(line["spike/loss"] > 1e5 > 10 > line["spike/usual"] for line in found)
