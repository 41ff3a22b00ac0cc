"""The only training loop: resume, step, log, evaluate, save."""

from __future__ import annotations

import collections
import dataclasses
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
from absl import logging

from train_jax import distributed
from train_jax import mesh as mesh_lib
from train_jax import metrics as metrics_lib
from train_jax import state as state_lib
from train_jax.checkpoint import Checkpoints
from train_jax.errors import UserError
from train_jax.step import Method, make_train_step


@dataclass(frozen=True)
class LoopConfig:
  """How long and how often; nothing here changes what a step computes, `steps` excepted.

  Attributes:
    steps: optimiser steps of the whole run.
    log_every, eval_every, save_every: in steps; 0 turns evaluation during training off.
    keep: checkpoints kept.
    clip: global gradient norm.
    max_skipped: after this many non-finite steps in a row the run goes back to its last checkpoint,
      the second time it stops.
    seed: of parameters, data order and every draw.
  """

  steps: int
  log_every: int
  eval_every: int
  save_every: int
  keep: int
  clip: float
  max_skipped: int
  seed: int

  def __post_init__(self):
    for name in ("steps", "log_every", "save_every", "keep", "max_skipped"):
      if getattr(self, name) < 1:
        raise UserError(f"{name}={getattr(self, name)} must be at least 1.")


class DivergedError(RuntimeError):
  """Too many non-finite steps in a row; the parameters are those of before.

  Attributes:
    rollbacks: how often the run had gone back before.
  """

  def __init__(self, message: str, rollbacks: int):
    super().__init__(message)
    self.rollbacks = rollbacks


class Signals:
  """SIGTERM and SIGINT, noted instead of obeyed; a second one ends the program at once."""

  def __enter__(self) -> Signals:
    self.received: list[str] = []
    self._before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}
    for number in self._before:
      signal.signal(number, self._note)
    return self

  def _note(self, number, _frame) -> None:
    self.received.append(signal.Signals(number).name)
    for each in self._before:
      signal.signal(each, signal.SIG_DFL)

  def release(self) -> None:
    """From now on they act as they did before."""
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def __exit__(self, *_) -> None:
    self.release()


def data_seed(seed: int, rollbacks: int) -> int:
  """Seed of the data's order after `rollbacks`: another order each time, the same in every run."""
  if not rollbacks:
    return seed
  return int(np.random.SeedSequence((seed, rollbacks)).generate_state(1)[0]) // 2


def train(
  method: Method,
  tx: optax.GradientTransformation,
  decays: dict[str, float],
  config: LoopConfig,
  mesh: jax.sharding.Mesh,
  workdir: Path,
  record: dict,
  given: dict[str, np.ndarray] | None = None,
) -> bool:
  """Runs or resumes a run to its end; goes back to its last checkpoint once if it diverges.

  Args:
    decays: of the named EMAs; "sample" is the one that is evaluated.
    record: JSON saved with every checkpoint (the config and facts about the data).
    given: parameters that step 0 begins with instead of drawn ones, by dotted name (see start.py).

  Returns:
    Whether the run is complete; False after SIGTERM or SIGINT, with everything saved.

  Raises:
    DivergedError: `max_skipped` non-finite steps in a row, for the second time.
    SaveError: the run is at its end, and its state could not be saved.
    UserError: checkpoints are there but none is good.
  """
  with Signals() as signals:
    run = partial(_run, method, tx, decays, config, mesh, workdir, record, given or {}, signals)
    try:
      return run(rollbacks=0)
    except DivergedError as err:
      if err.rollbacks:
        raise
      report = str(err)
    # Out of the handler: the frames of the error hold a state, and there may be no room for two.
    logging.error("%s Going back, once, with the data in another order.", report)
    return run(rollbacks=1)


def _run(
  method: Method,
  tx: optax.GradientTransformation,
  decays: dict[str, float],
  config: LoopConfig,
  mesh: jax.sharding.Mesh,
  workdir: Path,
  record: dict,
  given: dict[str, np.ndarray],
  signals: Signals,
  rollbacks: int,
) -> bool:
  """`train` until it ends, stops or diverges; `rollbacks` counts how often it has gone back."""
  chief = jax.process_index() == 0
  checkpoints = Checkpoints(workdir, config.keep)
  init = state_lib.create(method, tx, decays, config.seed)
  shardings = mesh_lib.state_sharding(jax.eval_shape(init), mesh)
  init = jax.jit(init, out_shardings=shardings)
  abstract = jax.tree.map(
    lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), jax.eval_shape(init), shardings
  )
  frozen = ()
  if method.frozen:
    frozen = (method.frozen.make(mesh_lib.state_sharding(method.frozen.shapes, mesh)),)
  found = checkpoints.restore(abstract)
  if found:
    state, position = found[0], found[1]["position"]
    if rollbacks > (before := found[1].get("rollbacks", 0)):
      state = dataclasses.replace(state, skipped=0 * state.skipped)
    rollbacks = max(rollbacks, before)
  else:
    state, position = init(mesh_lib.place(given, state_lib.flatten(shardings.params))), 0
  start = int(state.step)
  if found and chief:
    print(f"resumed at step {start} of {config.steps} from {checkpoints.directory}", flush=True)

  step_fn = jax.jit(
    mesh_lib.within(mesh, make_train_step(method, tx, decays, config.clip)),
    donate_argnums=0,
    out_shardings=(shardings, None),
  )
  writer = metrics_lib.MetricWriter(workdir, start, active=chief)

  def save():
    facts = {"step": int(state.step), "position": position, "rollbacks": rollbacks}
    checkpoints.save(state, {**record, **facts})

  def evaluate(final: bool) -> dict[str, float]:
    results = {}
    for name, value in method.evaluate(state.ema["sample"], int(state.step), final, *frozen):
      if np.ndim(value):
        writer.picture(int(state.step), name, value)
      else:
        results[name] = value
    writer.scalars(int(state.step), {f"eval/{name}": value for name, value in results.items()})
    return results

  bar = metrics_lib.progress_bar(config.steps, start, active=chief, unit="step", desc="training")
  stream = method.stream(data_seed(config.seed, rollbacks), position)
  agree, stop = distributed.Agreement(mesh), False
  clock = metrics_lib.StepClock(start)
  # Metrics are read two steps late: the device is never waited for, nor run away from.
  pending: collections.deque = collections.deque()

  spikes, in_a_row = metrics_lib.Spikes(), 0

  def read(wait_for_all: bool = False) -> None:
    nonlocal in_a_row
    while pending and (wait_for_all or len(pending) > 2):
      step, values = pending.popleft()
      loss, in_a_row = float(values["loss"]), int(values["skipped"])
      if in_a_row >= config.max_skipped:
        raise DivergedError(_describe(step, in_a_row, checkpoints.newest_good()), rollbacks)
      if chief and in_a_row == 1:
        logging.warning("step %d: loss or gradient is not finite; it is not applied.", step)
      if chief and (usual := spikes.find(loss)) is not None:
        logging.warning("step %d: the loss is %.4g; %.4g is usual.", step, loss, usual)
        writer.scalars(step, {"spike/loss": loss, "spike/usual": usual})
      bar.update()
      if step % config.log_every == 0 or step == config.steps:
        values = {name: float(value) for name, value in values.items()}
        shown = {k: v for k, v in values.items() if k != "skipped"}
        writer.scalars(step, {**values, "milliseconds_per_step": clock.lap(step)})
        bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items()}, refresh=False)

  owed = False  # a save that was due while steps were skipped: the state before is the one to keep
  try:
    for step in range(start + 1, config.steps + 1):
      state, values = step_fn(state, mesh_lib.to_global(next(stream), mesh), *frozen)
      position += 1
      pending.append((step, values))
      read()
      last = step == config.steps
      # Once a step: what is left without a save must not be broken off.
      stop = agree(bool(signals.received))
      owed = owed or step % config.save_every == 0
      due_eval = config.eval_every and step % config.eval_every == 0 and not last
      if owed or last or stop or due_eval:
        read(wait_for_all=True)
        if last or stop or (owed and not in_a_row):
          save()
          owed = False
        if due_eval and not stop:
          evaluate(final=False)
        clock.restart(step)
      if stop:
        break
    checkpoints.wait()
    signals.release()  # all is on disk
    bar.close()
    if stop and state.step < config.steps:
      reason = (signals.received or ["another process was told to stop"])[0]
      logging.warning("%s: saved step %d; the same command goes on.", reason, int(state.step))
      return False
    results = evaluate(final=True)
    if chief:
      print(metrics_lib.table(results))
    return True
  finally:
    bar.close()
    stream.close()
    writer.close()
    checkpoints.close()


def _describe(step: int, in_a_row: int, good: Path | None) -> str:
  return (
    f"loss or gradient was not finite for {in_a_row} steps in a row, from step "
    f"{step - in_a_row + 1} on; none was applied. The last good checkpoint: "
    f"{good or 'none was saved yet'}. Lower optim.lr, or look at the data of those steps."
  )
