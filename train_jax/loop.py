"""The only training loop: resume, step, log, evaluate, save."""

from __future__ import annotations

import collections
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import logging

from train_jax import mesh as mesh_lib
from train_jax import metrics as metrics_lib
from train_jax import state as state_lib
from train_jax.checkpointing.checkpoint import Checkpoints
from train_jax.errors import UserError, check_above_zero, check_at_least, check_fraction
from train_jax.multihost import distributed, lock
from train_jax.multihost.distributed import all_agree
from train_jax.multihost.signals import Interrupted, Signals
from train_jax.state import TrainState
from train_jax.step import Method, Metrics, make_train_step


@dataclass(frozen=True)
class LoopConfig:
  """The length of a run, the intervals of its loop, and the gradient's settings.

  Attributes:
    steps: optimiser steps of the whole run.
    log_every, eval_every, save_every: in steps; eval_every=0 evaluates only at the end. Each
      evaluation saves the state first.
    keep: number of newest checkpoints that stay on disk.
    keep_every: in steps; these checkpoints are saved and stay for good. 0: none.
    clip: global gradient norm, above 0.
    grad_accum_steps: parts of a batch whose gradients the step takes one after the other.
    max_skipped: after this many non-finite steps in a row the run goes back to its last checkpoint,
      and the second time it stops.
    seed: of parameters, data order and every draw; a uint32.
  """

  steps: int
  log_every: int
  eval_every: int
  save_every: int
  keep: int
  keep_every: int
  clip: float
  grad_accum_steps: int
  max_skipped: int
  seed: int

  @classmethod
  def of(cls, config: Mapping) -> LoopConfig:
    """The fields from a run's config: its own keys, and two of its section `optim`."""
    values = {**config["optim"], **config}
    return cls(**{field.name: values[field.name] for field in fields(cls)})

  def __post_init__(self):
    for name in ("steps", "log_every", "save_every", "keep", "max_skipped"):
      check_at_least(name, getattr(self, name), 1)
    for name in ("keep_every", "eval_every"):
      check_at_least(name, getattr(self, name), 0)
    check_above_zero("optim.clip", self.clip)
    if not 0 <= self.seed < 2**32:
      raise UserError(f"seed={self.seed} must be between 0 and {2**32 - 1}.")


class DivergedError(RuntimeError):
  """Too many non-finite steps in a row; none of them changed the parameters.

  Attributes:
    rollbacks: how often the run had gone back before.
  """

  def __init__(self, message: str, rollbacks: int):
    super().__init__(message)
    self.rollbacks = rollbacks


def data_seed(seed: int, rollbacks: int) -> int:
  """Seed of the data's order: another one after each rollback, and the same in every run."""
  if not rollbacks:
    return seed
  return int(np.random.SeedSequence((seed, rollbacks)).generate_state(1)[0]) // 2


def train(
  method: Method,
  tx: optax.GradientTransformation,
  rate: optax.Schedule,
  decays: dict[str, float],
  config: LoopConfig,
  mesh: jax.sharding.Mesh,
  workdir: Path,
  record: dict,
  init_params: Callable[[], dict[str, Any]] = dict,
) -> bool:
  """Trains a new or resumed run to its end; if it diverges, goes back to a checkpoint once.

  Args:
    rate: learning rate of `tx` by step, for the log.
    decays: of the averages, by name; the average "sample" is evaluated.
    record: JSON saved with every checkpoint: the config, and metadata of the data.
    init_params: () -> parameters by dotted name, which replace drawn ones in a run that begins at
      step 0 (see warm_start.py). They are not kept.

  Returns:
    Whether the run is complete; False after SIGTERM or SIGINT, with everything saved.

  Raises:
    DivergedError: `max_skipped` non-finite steps in a row, for the second time.
    SaveError: the run is at its end, and its state could not be saved.
    UserError: another run holds the workdir, no stored checkpoint is good, the newest is of a later
      step than `config.steps`, or a decay is not in [0, 1).
  """
  for name, decay in decays.items():
    check_fraction(f"ema.{name}", decay, inclusive=False)
  with lock.held(workdir), Signals() as signals:
    run = partial(
      _Run, method, tx, rate, decays, config, mesh, workdir, record, init_params, signals
    )
    try:
      return run(rollbacks=0).train()
    except DivergedError as err:
      if err.rollbacks:
        raise
      report = str(err)
    # Outside the handler: the error's frames hold a state, and there may be no memory for two.
    logging.error("%s Going back, once, with the data in another order.", report)
    return run(rollbacks=1).train()


@dataclass
class _Run:
  """A run from its newest good step until it ends, is stopped or diverges.

  Attributes (besides the arguments of `train`):
    signals: reasons to stop.
    rollbacks: how often the run has gone back.
    state: the state after the newest step.
    position: number of the next batch.
  """

  method: Method
  tx: optax.GradientTransformation
  rate: optax.Schedule
  decays: dict[str, float]
  config: LoopConfig
  mesh: jax.sharding.Mesh
  workdir: Path
  record: dict
  init_params: Callable[[], dict[str, Any]]
  signals: Signals
  rollbacks: int

  def __post_init__(self):
    self.checkpoints = Checkpoints(self.workdir, self.config.keep, self.config.keep_every)
    init = state_lib.create(self.method, self.tx, self.decays, self.config.seed)
    self.shardings = mesh_lib.state_sharding(jax.eval_shape(init), self.mesh)
    self.frozen = ()
    if frozen := self.method.frozen:
      self.frozen = (frozen.make(mesh_lib.state_sharding(frozen.shapes, self.mesh)),)
    self.state, self.position = self._begin(jax.jit(init, out_shardings=self.shardings))
    self.log = _Log(self.config, self.rate, self.workdir, int(self.state.step))

  def _begin(self, init: Callable) -> tuple[TrainState, int]:
    """State and position of the newest good step, or of step 0."""
    abstract = mesh_lib.abstract_state(jax.eval_shape(init), self.mesh)
    restored = self.checkpoints.restore(abstract)
    if not restored:
      leaves = state_lib.flatten(abstract.params)
      params = {
        name: mesh_lib.to_device(array, leaves[name].sharding, leaves[name].dtype)
        for name, array in self.init_params().items()
      }
      return init(params), 0
    state, meta = restored
    if (step := int(state.step)) > self.config.steps:  # the final evaluation would be of that step
      raise UserError(
        f"steps={self.config.steps} is less than the {step} that the run in {self.workdir} has "
        "taken; choose at least as many, or another --workdir."
      )
    if self.rollbacks > (before := meta["rollbacks"]):
      state = dataclasses.replace(state, skipped=0 * state.skipped)
    self.rollbacks = max(self.rollbacks, before)
    if jax.process_index() == 0:
      reached = f"resumed at step {step} of {self.config.steps}"
      print(f"{reached} from {self.checkpoints.directory}", flush=True)
    return state, meta["position"]

  def train(self) -> bool:
    """Takes the remaining steps and evaluates. Returns and raises as `train` does."""
    stream = self.method.stream(data_seed(self.config.seed, self.rollbacks), self.position)
    try:
      stopped = self._steps(stream)
      self.checkpoints.wait()
      self.signals.release()  # all is on disk
      self.log.bar.close()
      if stopped and (step := int(self.state.step)) < self.config.steps:
        reason = (self.signals.received or ["another process was told to stop"])[0]
        logging.warning("%s: saved step %d; the same command goes on.", reason, step)
        return False
      self._evaluate(final=True)
      return True
    finally:
      stream.close()
      self.log.close()
      self.checkpoints.close()

  def _steps(self, stream: Iterator) -> bool:
    """Takes steps, saves and evaluates; returns whether a signal ended it."""
    config = self.config
    step_fn = make_train_step(
      self.method, self.tx, self.decays, config.clip, config.grad_accum_steps
    )
    step_fn = jax.jit(
      mesh_lib.with_mesh(self.mesh, step_fn),
      donate_argnums=mesh_lib.donated(0),
      out_shardings=(self.shardings, None),
    )
    agree, stop = distributed.Agreement(self.mesh), False
    save_due = False  # a save waits while steps are skipped: the last state on disk is a good one
    for step in range(int(self.state.step) + 1, config.steps + 1):
      batch = mesh_lib.to_global(next(stream), self.mesh)
      self.state, values = step_fn(self.state, batch, *self.frozen)
      self.position += 1
      self.log.add(step, values)
      self._read(leave=2)
      last = step == config.steps
      # One agreement a step, so all processes stop at the same step and save it.
      stop = agree(bool(self.signals.received))
      keep = config.keep_every and step % config.keep_every == 0
      save_due = save_due or step % config.save_every == 0 or keep
      eval_due = config.eval_every and step % config.eval_every == 0 and not last
      if save_due or last or stop or eval_due:
        self._read(leave=0)
        # Evaluations come after the save: a machine that is taken away may not wait for their end.
        if save := last or stop or not self.log.skipped:
          self._save()
          save_due = False
        if eval_due and not stop:
          self._evaluate(final=False)
          if (stop := self._stop_requested()) and not save:
            self._save()
        self.log.clock.restart()
      if stop:
        break
    return stop

  def _read(self, leave: int) -> None:
    """Reads the metrics of all but the newest `leave` steps. Raises DivergedError."""
    self.log.read(leave)
    if step := self.log.diverged_at:
      first, good = step - self.log.skipped + 1, self.checkpoints.newest_good()
      raise DivergedError(
        f"loss or gradient was not finite for {self.log.skipped} steps in a row, from step {first} "
        f"on; none was applied. The last good checkpoint: {good or 'none was saved yet'}. Lower "
        "optim.lr, with which the same command goes on from there, or look at the data of those "
        "steps.",
        self.rollbacks,
      )

  def _save(self) -> None:
    progress = {"step": int(self.state.step), "position": self.position}
    meta = {**self.record, **progress, "rollbacks": self.rollbacks}
    self.checkpoints.save(self.state, meta)

  def _stop_requested(self) -> bool:
    """Whether any process has a reason to stop; all of them must call it."""
    return not all_agree(not self.signals.received)

  def _until_stop(self, values: Iterator) -> Iterator:
    """Yields values until a signal ends it: at once where no other process takes part.

    Several processes agree between two values. One that cannot wait may be killed: the state was
    saved before the evaluation.
    """
    alone = jax.process_count() == 1
    while True:
      try:
        with self.signals.breaking() if alone else nullcontext():
          item = next(values)
      except (StopIteration, Interrupted):
        return
      yield item

  def _evaluate(self, final: bool) -> None:
    """Logs and prints an evaluation, as far as it gets; a final one is not ended by signals."""
    step, results = int(self.state.step), {}
    values = self.method.evaluate(self.state.ema["sample"], step, final, *self.frozen)
    values = metrics_lib.with_progress(values, active=jax.process_index() == 0)
    try:
      for name, value in values if final else self._until_stop(values):
        if np.ndim(value):
          self.log.writer.picture(step, name, value)
        else:
          results[name] = value
        if not final and self._stop_requested():
          break
    finally:  # after an error, too
      self.log.writer.scalars(step, {f"eval/{name}": value for name, value in results.items()})
    if results and jax.process_index() == 0:
      # In training, through the bar's stream, which may be a log on a full disk.
      file = sys.stdout if final else self.log.bar.fp
      self.log.bar.write(f"step {step}\n{metrics_lib.table(results)}", file=file)


class _Log:
  """Metrics of the steps: progress bar, files, spikes, and whether they are finite.

  They are read two steps late. So the host neither waits for the device nor runs far ahead of it.

  Attributes:
    skipped: number of non-finite steps in a row, up to the newest step that was read.
    diverged_at: the step at which these were too many, and the last that is read; 0 until then.
  """

  def __init__(self, config: LoopConfig, rate: optax.Schedule, workdir: Path, start: int):
    self._config, self._rate, self._start = config, rate, start
    self._chief = jax.process_index() == 0
    self.writer = metrics_lib.MetricWriter(workdir, start, active=self._chief)
    self.bar = metrics_lib.progress_bar(
      config.steps, start, active=self._chief, unit="step", desc="compiling"
    )
    self.clock, self._spikes = metrics_lib.StepClock(), metrics_lib.Spikes()
    self._pending: collections.deque[tuple[int, Metrics]] = collections.deque()
    self.skipped = self.diverged_at = 0

  def add(self, step: int, values: Metrics) -> None:
    """Takes the metrics of a step, which may still be running."""
    self._pending.append((step, values))

  def read(self, leave: int) -> None:
    """Waits for all but the newest `leave` steps."""
    while len(self._pending) > leave:
      step, values = self._pending.popleft()
      loss, self.skipped = float(values["loss"]), int(values["skipped"])
      if self.skipped >= self._config.max_skipped:
        self.diverged_at = step
        return
      if self._chief and self.skipped == 1:
        logging.warning("step %d: loss or gradient is not finite; it is not applied.", step)
      if self._chief and (usual := self._spikes.find(loss)) is not None:
        logging.warning("step %d: the loss is %.4g; %.4g is usual.", step, loss, usual)
        self.writer.scalars(step, {"spike/loss": loss, "spike/usual": usual})
      if step == self._start + 1:  # the step that compiled does not count as speed
        self.bar.set_description("training", refresh=False)
        self.bar.unpause()
      self.bar.update()
      if leave:
        self.clock.tick(step)
      if step % self._config.log_every == 0 or step == self._config.steps:
        values = {name: float(value) for name, value in values.items()}
        values["lr"] = float(self._rate(step - 1))
        if milliseconds := self.clock.lap():
          values["milliseconds_per_step"] = milliseconds
        self.writer.scalars(step, values)
        postfix = {name: f"{values[name]:.3g}" for name in ("loss", "grad_norm")}
        self.bar.set_postfix(postfix, refresh=False)

  def close(self) -> None:
    self.bar.close()
    self.writer.close()
