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
from train_jax.errors import UserError, check_above_zero, check_at_least
from train_jax.multihost import distributed
from train_jax.multihost.distributed import all_agree
from train_jax.multihost.signals import Interrupted, Signals, pausing
from train_jax.state import TrainState
from train_jax.step import Method, Metrics, make_train_step


@dataclass(frozen=True)
class LoopConfig:
  """How long and how often; what the gradient is of, and how far it is clipped.

  Attributes:
    steps: optimiser steps of the whole run.
    log_every, eval_every, save_every: in steps; 0 turns evaluation during training off. Before each
      evaluation the state is saved as well.
    keep: newest checkpoints kept.
    keep_every: in steps; these are saved, and kept for good as well. 0: none.
    clip: global gradient norm, above 0.
    accumulate: parts of a batch whose gradients are taken one after the other (gradient
      accumulation).
    max_skipped: after this many non-finite steps in a row the run goes back to its last checkpoint,
      the second time it stops.
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
    """Those of a run's config: its own keys, and two of its `optim`."""
    return cls(
      **{
        f.name: config[f.name] if f.name in config else config["optim"][f.name] for f in fields(cls)
      }
    )

  def __post_init__(self):
    for name in ("steps", "log_every", "save_every", "keep", "max_skipped"):
      check_at_least(name, getattr(self, name), 1)
    for name in ("keep_every", "eval_every"):  # 0: none for good, only at the end
      check_at_least(name, getattr(self, name), 0)
    check_above_zero("optim.clip", self.clip)
    if not 0 <= self.seed < 2**32:
      raise UserError(f"seed={self.seed} must be between 0 and {2**32 - 1}.")


class DivergedError(RuntimeError):
  """Too many non-finite steps in a row; the parameters are those of before.

  Attributes:
    rollbacks: how often the run had gone back before.
  """

  def __init__(self, message: str, rollbacks: int):
    super().__init__(message)
    self.rollbacks = rollbacks


def data_seed(seed: int, rollbacks: int) -> int:
  """Seed of the data's order after `rollbacks`: another order each time, the same in every run."""
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
  """Runs or resumes a run to its end; goes back to its last checkpoint once if it diverges.

  Args:
    rate: learning rate of `tx` by step, to be logged.
    decays: of the named EMAs; "sample" is the one that is evaluated.
    record: JSON saved with every checkpoint (the config and metadata about the data).
    given: called where a run begins at step 0, for the parameters that it begins with instead of
      drawn ones, by dotted name (see warm_start.py). They are not held on to.

  Returns:
    Whether the run is complete; False after SIGTERM or SIGINT, with everything saved.

  Raises:
    DivergedError: `max_skipped` non-finite steps in a row, for the second time.
    SaveError: the run is at its end, and its state could not be saved.
    UserError: checkpoints are there but none is good, or one of a later step than `config.steps`;
      or a decay is not in [0, 1).
  """
  for name, decay in decays.items():
    if not 0 <= decay < 1:
      raise UserError(f"ema.{name}={decay} must be at least 0 and below 1.")
  with Signals() as signals:
    run = partial(
      _Run, method, tx, rate, decays, config, mesh, workdir, record, init_params, signals
    )
    try:
      return run(rollbacks=0).train()
    except DivergedError as err:
      if err.rollbacks:
        raise
      report = str(err)
    # Out of the handler: the frames of the error hold a state, and there may be no room for two.
    logging.error("%s Going back, once, with the data in another order.", report)
    return run(rollbacks=1).train()


@dataclass
class _Run:
  """A run, from its newest good step until it ends, is stopped or diverges.

  Attributes (those that are not here are arguments of `train`):
    signals: reasons to stop.
    rollbacks: how often it has gone back.
    state: after the newest step.
    position: of the data, after that step.
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
    found = self.checkpoints.restore(abstract)
    if not found:
      wanted, init_params = state_lib.flatten(abstract.params), self.init_params()
      return init(
        {
          n: mesh_lib.to_device(a, wanted[n].sharding, wanted[n].dtype)
          for n, a in init_params.items()
        }
      ), 0
    state, meta = found
    if (step := int(state.step)) > self.config.steps:  # its evaluation would be called this run's
      raise UserError(
        f"steps={self.config.steps} is less than the {step} that the run in {self.workdir} has "
        "taken; choose at least as many, or another --workdir."
      )
    if self.rollbacks > (before := meta.get("rollbacks", 0)):
      state = dataclasses.replace(state, skipped=0 * state.skipped)
    self.rollbacks = max(self.rollbacks, before)
    if jax.process_index() == 0:
      reached = f"resumed at step {step} of {self.config.steps}"
      print(f"{reached} from {self.checkpoints.directory}", flush=True)
    return state, meta["position"]

  def train(self) -> bool:
    """Takes the steps that are left; the final evaluation. Returns and raises as `train` does."""
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
    """Steps, with their saves and evaluations; returns whether they were ended by a signal."""
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
    # Saves that are due while steps are skipped wait: the state before is the one to keep.
    owed = False
    for step in range(int(self.state.step) + 1, config.steps + 1):
      batch = mesh_lib.to_global(next(stream), self.mesh)
      self.state, values = step_fn(self.state, batch, *self.frozen)
      self.position += 1
      self.log.add(step, values)
      self._read(leave=2)
      last = step == config.steps
      # Once a step: what is left without a save must not be broken off.
      stop = agree(bool(self.signals.received))
      kept = config.keep_every and step % config.keep_every == 0
      owed = owed or step % config.save_every == 0 or kept
      due_eval = config.eval_every and step % config.eval_every == 0 and not last
      if owed or last or stop or due_eval:
        self._read(leave=0)
        # Before an evaluation, too: a machine that is taken away may not wait for its end.
        if save := last or stop or not self.log.skipped:
          self._save()
          owed = False
        if due_eval and not stop:
          self._evaluate(final=False)
          if (stop := self._told()) and not save:
            self._save()
        self.log.clock.restart(step)
      if stop:
        break
    return stop

  def _read(self, leave: int) -> None:
    """Reads the metrics of all but the newest `leave` steps. Raises DivergedError."""
    self.log.read(leave)
    if step := self.log.diverged:
      first, good = step - self.log.skipped + 1, self.checkpoints.newest_good()
      raise DivergedError(
        f"loss or gradient was not finite for {self.log.skipped} steps in a row, from step {first} "
        f"on; none was applied. The last good checkpoint: {good or 'none was saved yet'}. Lower "
        "optim.lr, with which the same command goes on from there, or look at the data of those "
        "steps.",
        self.rollbacks,
      )

  def _save(self) -> None:
    metadata = {
      "step": int(self.state.step),
      "position": self.position,
      "rollbacks": self.rollbacks,
    }
    self.checkpoints.save(self.state, {**self.record, **metadata})

  def _told(self) -> bool:
    """Whether any process was told to stop, at once; all of them must call it."""
    return not all_agree(not self.signals.received)

  def _until_told(self, found: Iterator) -> Iterator:
    """What is found, until a signal breaks it off: at once, or several processes at a `pause`."""
    alone = jax.process_count() == 1
    while True:
      try:
        with pausing(self._told), self.signals.breaking() if alone else nullcontext():
          item = next(found)
      except (StopIteration, Interrupted):
        return
      yield item

  def _evaluate(self, final: bool) -> None:
    """Logs and shows the numbers; those there are, where all were told to stop before the end."""
    step, results = int(self.state.step), {}
    found = self.method.evaluate(self.state.ema["sample"], step, final, *self.frozen)
    found = metrics_lib.watched(found, active=jax.process_index() == 0)
    try:
      for name, value in found if final else self._until_told(found):
        if np.ndim(value):
          self.log.writer.picture(step, name, value)
        else:
          results[name] = value
        if not final and self._told():
          break
    finally:  # an error, too, leaves the numbers that there are
      self.log.writer.scalars(step, {f"eval/{name}": value for name, value in results.items()})
    if results and jax.process_index() == 0:
      # On the way beside the bar, whose terminal may be a log on a full disk.
      file = sys.stdout if final else self.log.bar.fp
      self.log.bar.write(f"step {step}\n{metrics_lib.table(results)}", file=file)


class _Log:
  """What is said of the steps: progress bar, metrics, spikes, and whether they are finite.

  Metrics are read two steps late: the device is never waited for, nor run away from.

  Attributes:
    skipped: non-finite steps in a row, up to the newest step that was read.
    diverged: the step at which they were too many; no step after it is read. 0 until then.
  """

  def __init__(self, config: LoopConfig, rate: optax.Schedule, workdir: Path, start: int):
    self._config, self._rate, self._start = config, rate, start
    self._chief = jax.process_index() == 0
    self.writer = metrics_lib.MetricWriter(workdir, start, active=self._chief)
    self.bar = metrics_lib.progress_bar(
      config.steps, start, active=self._chief, unit="step", desc="compiling"
    )
    self.clock, self._spikes = metrics_lib.StepClock(start), metrics_lib.Spikes()
    self._pending: collections.deque[tuple[int, Metrics]] = collections.deque()
    self.skipped = self.diverged = 0

  def add(self, step: int, values: Metrics) -> None:
    """Takes the metrics of a step, which may still be under way."""
    self._pending.append((step, values))

  def read(self, leave: int) -> None:
    """Waits for all but the newest `leave` steps."""
    while len(self._pending) > leave:
      step, values = self._pending.popleft()
      loss, self.skipped = float(values["loss"]), int(values["skipped"])
      if self.skipped >= self._config.max_skipped:
        self.diverged = step
        return
      if self._chief and self.skipped == 1:
        logging.warning("step %d: loss or gradient is not finite; it is not applied.", step)
      if self._chief and (usual := self._spikes.find(loss)) is not None:
        logging.warning("step %d: the loss is %.4g; %.4g is usual.", step, loss, usual)
        self.writer.scalars(step, {"spike/loss": loss, "spike/usual": usual})
      if step == self._start + 1:  # compiled, which took longer than all others will
        self.bar.set_description("training", refresh=False)
        self.bar.unpause()
      self.bar.update()
      if step % self._config.log_every == 0 or step == self._config.steps:
        values = {name: float(value) for name, value in values.items()}
        shown = {name: f"{values[name]:.3g}" for name in ("loss", "grad_norm")}
        known = {"lr": float(self._rate(step - 1)), "milliseconds_per_step": self.clock.lap(step)}
        self.writer.scalars(step, {**values, **known})
        self.bar.set_postfix(shown, refresh=False)
      if step == self._start + 1:
        self.clock.restart(step)

  def close(self) -> None:
    self.bar.close()
    self.writer.close()
