"""The only training loop: resume, step, log, evaluate, save."""

from __future__ import annotations

import collections
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    max_skipped: the run stops after this many non-finite steps in a row.
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
  """Too many non-finite steps in a row; the parameters are those of before."""


@contextmanager
def _stop_on_signal() -> Iterator[list[str]]:
  """Yields a list that gets the signal's name; a second signal acts as it would have."""
  received: list[str] = []
  before = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

  def restore():
    for number, handler in before.items():
      signal.signal(number, handler)

  def note(number, _frame):
    received.append(signal.Signals(number).name)
    restore()

  for number in before:
    signal.signal(number, note)
  try:
    yield received
  finally:
    restore()


def _check_finite(metrics: dict, step: int, config: LoopConfig, checkpoints: Checkpoints) -> None:
  skipped = int(metrics["skipped"])
  if skipped >= config.max_skipped:
    checkpoints.wait()
    saved = checkpoints.steps()
    good = checkpoints.directory / str(saved[0]) if saved else "none was saved yet"
    raise DivergedError(
      f"loss or gradient was not finite for {skipped} steps in a row, from step "
      f"{step - skipped + 1} on; none was applied. The last good checkpoint: {good}. Lower "
      "optim.lr, or look at the data of those steps."
    )


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
  """Runs or resumes a run to its end.

  Args:
    decays: of the named EMAs; "sample" is the one that is evaluated.
    record: JSON saved with every checkpoint (the config and facts about the data).
    given: parameters that step 0 begins with instead of drawn ones, by dotted name (see start.py).

  Returns:
    Whether the run is complete; False after SIGTERM or SIGINT, with everything saved.

  Raises:
    DivergedError: `max_skipped` non-finite steps in a row.
    UserError: checkpoints are there but none is good.
  """
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
  else:
    state, position = init(mesh_lib.place(given or {}, state_lib.flatten(shardings.params))), 0
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
    checkpoints.save(state, {**record, "step": int(state.step), "position": position})

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
  stream = method.stream(config.seed, position)
  agree, stop = distributed.Agreement(mesh), False
  clock = metrics_lib.StepClock(start)
  # Metrics are read two steps late: the device is never waited for, nor run away from.
  pending: collections.deque = collections.deque()

  def read(wait_for_all: bool = False) -> None:
    while pending and (wait_for_all or len(pending) > 2):
      step, values = pending.popleft()
      _check_finite(values, step, config, checkpoints)
      bar.update()
      if step % config.log_every == 0 or step == config.steps:
        values = {name: float(value) for name, value in values.items()}
        shown = {k: v for k, v in values.items() if k != "skipped"}
        writer.scalars(step, {**values, "milliseconds_per_step": clock.lap(step)})
        bar.set_postfix({k: f"{v:.3g}" for k, v in shown.items()}, refresh=False)

  try:
    with _stop_on_signal() as stopped:
      for step in range(start + 1, config.steps + 1):
        state, values = step_fn(state, mesh_lib.to_global(next(stream), mesh), *frozen)
        position += 1
        pending.append((step, values))
        read()
        last = step == config.steps
        stop = agree(bool(stopped))  # once: what is left without a save must not be broken off
        due_save = step % config.save_every == 0 or last or stop
        due_eval = config.eval_every and step % config.eval_every == 0 and not last
        if due_save or due_eval:
          read(wait_for_all=True)
          if due_save:
            save()
          if due_eval and not stop:
            evaluate(final=False)
          clock.restart(step)
        if stop:
          break
    checkpoints.wait()
    bar.close()
    if stop and state.step < config.steps:
      reason = stopped[0] if stopped else "another process was told to stop"
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
