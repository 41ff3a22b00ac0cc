"""The loop: resume to the bit, one compilation, and how a run ends before its time."""

import dataclasses
import errno
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train_jax import loop, metrics
from train_jax import mesh as mesh_lib
from train_jax.checkpointing import checksum
from train_jax.checkpointing.checkpoint import Checkpoints
from train_jax.checkpointing.saver import SaveError
from train_jax.errors import UserError
from train_jax.step import Frozen


def test_training_2n_equals_training_n_twice(tmp_path, train, load, differences, losses):
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
  record = {"config": {"name": "tiny"}, "metadata": {"classes": 3}}
  assert meta == {**record, "step": 3, "position": 3, "rollbacks": 0}
  assert Checkpoints(tmp_path).steps() == [3, 2]


def test_steps_that_are_kept_for_good_are_saved_when_they_come(tmp_path, train):
  train(tmp_path, steps=7, save_every=4, keep=1, keep_every=3)
  assert Checkpoints(tmp_path).steps() == [7, 6, 3]


@pytest.mark.parametrize("shape", [(1, 1), (4, 2)], ids=["1x1", "4x2"])
def test_fresh_run_begins_with_init_params_and_a_resumed_one_does_not(
  tmp_path, train, load, make_mesh, monkeypatch, shape
):
  monkeypatch.setattr("train_jax.mesh.SMALL", 1)

  def run(steps, value):
    init_params = {"layer.kernel": np.full((4, 3), value, np.float32)}
    assert train(tmp_path, mesh=make_mesh(*shape), init_params=lambda: init_params, steps=steps)
    np.testing.assert_array_equal(init_params["layer.kernel"], value)  # its buffer was not donated
    return load(tmp_path)[0].aux_state["kernel"]  # as the last step found it

  np.testing.assert_array_equal(run(1, 7.0), np.full((4, 3), 7))
  assert np.all(np.abs(run(2, 3.0) - 7) < 0.1)


@pytest.mark.parametrize("shape", [(1, 1), (4, 2)], ids=["1x1", "4x2"])
def test_step_is_compiled_once_also_after_resume(tmp_path, train, make_mesh, monkeypatch, shape):
  """And the memory of a state is the next one's, but on a CPU: there may be no room for two."""
  monkeypatch.setattr("train_jax.mesh.SMALL", 1)
  if donates := shape != (1, 1):
    monkeypatch.setattr("train_jax.mesh.donated", lambda *arguments: arguments)
  jit, jitted, gone = jax.jit, [], []

  def spy(function, **kwargs):
    compiled = jit(function, **kwargs)
    if function.__name__ != "train_step":
      return compiled
    jitted.append(compiled)

    def call(state, *rest):
      made = compiled(state, *rest)
      large = (state.params, state.opt_state, state.ema)
      gone.append(all(array.is_deleted() for array in jax.tree.leaves(large)))
      return made

    return call

  monkeypatch.setattr(jax, "jit", spy)
  train(tmp_path, mesh=make_mesh(*shape), steps=2)
  assert gone == [donates] * 2
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


def test_every_batch_comes_once_and_in_order(tmp_path, train, method, losses, stream_that):
  seen = []
  recording = stream_that(seen.append, method)
  for steps in (4, 6, 6):  # one that is complete is not trained again
    assert train(tmp_path, method=recording, steps=steps)
    assert seen == list(range(steps)) and len(losses(tmp_path)) == steps


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
  assert sorted(path.name for path in checkpoints.iterdir()) == ["2", "6"]  # nor half a step
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


def test_evaluates_the_slow_average_on_time(tmp_path, train, method, load, lines):
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


def test_an_evaluation_that_fails_leaves_its_numbers(tmp_path, train, lines, method):
  def evaluate(params, step, final):
    yield "norm", 2.5
    raise OSError("no such network")

  with pytest.raises(OSError, match="no such network"):
    train(tmp_path, method=method._replace(evaluate=evaluate), steps=2)
  assert lines(tmp_path)[-1] == {"step": 2, "eval/norm": 2.5}


def test_what_was_learned_is_on_disk_or_on_its_way_before_an_evaluation(
  tmp_path, train, method, monkeypatch
):
  saved, save = [], Checkpoints.save

  def spy(self, state, *args):
    saved.append(int(state.step))
    save(self, state, *args)

  def evaluate(params, step, final):
    assert saved[-1] == step
    yield "norm", 1.0

  monkeypatch.setattr(Checkpoints, "save", spy)
  train(tmp_path, method=method._replace(evaluate=evaluate), steps=9, eval_every=1, save_every=4)
  assert saved == list(range(1, 10))
  assert Checkpoints(tmp_path).steps() == [9, 8]


@pytest.mark.parametrize("options", [{"eval_every": 8}, {"save_every": 8}], ids=str)
def test_time_of_a_step_is_right_or_absent(tmp_path, train, method, lines, monkeypatch, options):
  """A step takes 1 s, and a compilation, an evaluation or a save 100."""
  now, seen = [0.0], set()

  def stream(seed, position):
    for batch in method.stream(seed, position):
      now[0] += 1 if seen else 100
      seen.add(position)
      yield batch

  def evaluate(params, step, final):
    now[0] += 100
    yield "norm", 1.0

  def slow_save(self, *args):
    now[0] += 100
    save(self, *args)

  save = Checkpoints.save
  monkeypatch.setattr(Checkpoints, "save", slow_save)
  monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
  slow = method._replace(stream=stream, evaluate=evaluate)
  train(tmp_path, method=slow, steps=20, **{"save_every": 100, **options})
  found = {row["step"]: row.get("milliseconds_per_step") for row in lines(tmp_path) if "lr" in row}
  # Around a save (of steps 8, 16 and 20), no two reads are equally late.
  right = [*range(2, 7), *range(10, 15), 18]
  assert found == {step: 1000 if step in right else None for step in range(1, 21)}


def test_logs_every_so_many_steps_and_the_last(tmp_path, train, lines, losses):
  train(tmp_path, steps=7, log_every=3, save_every=100)
  assert [step for step, _ in losses(tmp_path)] == [3, 6, 7]
  first = lines(tmp_path)[0]
  assert {"loss", "noise", "grad_norm", "skipped", "lr", "milliseconds_per_step"} < set(first)
  assert [line["lr"] for line in lines(tmp_path) if "lr" in line] == pytest.approx(
    [0.05 - 0.005 * before for before in (2, 5, 6)]
  )


def test_resume_says_so_and_the_bar_goes_on(tmp_path, train, capsys):
  train(tmp_path, steps=2)
  out, bar = capsys.readouterr()
  assert "resumed" not in out
  assert re.search(r"compiling: +0%.* 0/2 .*training: 100%.* 2/2 .*, loss=", bar, re.DOTALL)
  train(tmp_path, steps=4)
  out, bar = capsys.readouterr()
  assert f"resumed at step 2 of 4 from {tmp_path / 'checkpoints'}" in out
  assert re.search(r"compiling: +50%.* 2/4 .*training: 100%.* 4/4 .*, loss=", bar, re.DOTALL)
  assert "skipped" not in bar


def test_damaged_checkpoint_costs_one_interval_only(tmp_path, train, load, differences, losses):
  train(tmp_path / "a", steps=4)
  (tmp_path / "a" / "checkpoints" / "4" / "meta" / "metadata").write_text("{")
  train(tmp_path / "a", steps=6)
  train(tmp_path / "b", steps=6)
  assert differences(load(tmp_path / "a")[0], load(tmp_path / "b")[0]) == []
  assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_run_is_not_shorter_than_what_it_has_taken(tmp_path, train):
  assert train(tmp_path, steps=4) and train(tmp_path, steps=4)
  with pytest.raises(UserError, match=r"steps=3 is less than the 4 that the run in .* has taken"):
    train(tmp_path, steps=3)
  assert Checkpoints(tmp_path).steps() == [4, 2]


@pytest.mark.parametrize(
  "wrong, message",
  [
    *(
      ({name: 0}, f"{name}=0 must be at least 1")
      for name in ("steps", "log_every", "save_every", "keep", "max_skipped")
    ),
    ({"keep_every": -1}, "keep_every=-1 must be at least 0"),
    ({"eval_every": -1}, "eval_every=-1 must be at least 0"),
    ({"clip": 0.0}, "optim.clip=0.0 must be above 0"),
    ({"seed": -1}, "seed=-1 must be between 0 and 4294967295"),
    ({"seed": 2**32}, "seed=4294967296 must be between"),
  ],
)
def test_numbers_that_would_learn_nothing_or_break_later_are_refused(settings, wrong, message):
  with pytest.raises(UserError, match=message):
    settings(**wrong)


def test_settings_are_a_config_s_own_keys_and_two_of_its_optimiser(settings):
  wanted = settings(steps=7, clip=0.3, grad_accum_steps=2)
  values = dataclasses.asdict(wanted)
  optim = {name: values.pop(name) for name in ("clip", "grad_accum_steps")}
  assert loop.LoopConfig.of({**values, "batch": 8, "optim": {**optim, "lr": 1.0}}) == wanted


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decays_must_be_below_one(tmp_path, method, tx, settings, one_device, decay):
  with pytest.raises(UserError, match=rf"ema.sample={decay} must be between 0 and 1, below 1"):
    rate = optax.constant_schedule(0.1)
    loop.train(method, tx, rate, {"sample": decay}, settings(), one_device, tmp_path, {})


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
