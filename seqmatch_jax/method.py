"""Assembles SequenceMatch for the engine. ConfigDict ends here.

A run is one config: maximum likelihood first, then the objective with its noise, alpha annealed in.
The first `warmup` steps see data without noise and alpha = 0; from then on errors are typed and
erased in the data, alpha grows over `anneal` steps, and, where the divergence needs them, the model
writes trajectories of its own into a replay buffer every `buffer.refresh` steps.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from seqmatch_jax import buffer, data, evaluate, loss, rollout, show, transformer
from seqmatch_jax.actions import Noise, tree
from seqmatch_jax.data import Encoded, Example
from seqmatch_jax.tokens import Vocab
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.faults import LIMIT
from train_jax.metrics import table
from train_jax.step import Method


def make_examples(config) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
  """Training and test examples of `config.data`."""
  source, wanted = config.data, config.data.examples + config.data.tests
  if source.source == "files":
    train = source.train or data.OFFICIAL / "add_or_sub_in_base_train.txt"
    test = source.test or data.OFFICIAL / "add_or_sub_in_base_test.txt"
    faults = source.get("max_faults", LIMIT)
    return data.read_module(train, faults), data.read_module(test, faults)
  makers = {
    "add_or_sub_in_base": lambda: data.make_add_or_sub_in_base(wanted, 0),
    "two_sum": lambda: data.make_two_sum(wanted, 0, source.numbers, source.modulus),
  }
  if source.source not in makers:
    known = ", ".join(["files", *makers])
    raise UserError(f"data.source={source.source!r} is unknown; choose from {known}.")
  if min(source.examples, source.tests) < 1:
    raise UserError(
      f"data.examples={source.examples} and data.tests={source.tests} must be at least 1."
    )
  made = makers[source.source]()
  return made[: source.examples], made[source.examples :]


# For config.init_from (see train_jax/start.py): what must be equal there, and what may be missing.
SAME = ("config.model.heads", "facts.symbols")
FRESH = ()


def make_network(config, facts: dict) -> transformer.Network:
  """The network; `facts` are those saved with a checkpoint."""
  vocab = Vocab(tuple(facts["symbols"]))
  return transformer.make_network(
    transformer.TransformerConfig(vocab=vocab.size, **dict(config.model))
  )


def make_generate(network: transformer.Network, facts: dict):
  """`rollout.make_rollout` with the limits of the facts."""
  names = rollout.RolloutConfig.__dataclass_fields__
  return rollout.make_rollout(network, rollout.RolloutConfig(**{k: facts[k] for k in names}))


def make_loss_config(config) -> loss.LossConfig:
  """The objective of `config`."""
  return loss.LossConfig(**{k: config.loss[k] for k in loss.LossConfig.__dataclass_fields__})


def _check(config, mesh: jax.sharding.Mesh) -> None:
  schedule = config.loss
  for name in ("warmup", "anneal"):
    if schedule[name] < 0:
      raise UserError(f"loss.{name}={schedule[name]} must be at least 0 steps.")
  if config.noise.rate and not schedule.backspace:
    raise UserError(
      f"noise.rate={config.noise.rate} types errors that loss.backspace=False cannot erase; "
      "choose noise.rate=0 or loss.backspace=True."
    )
  lanes = config.data.lanes
  parts = mesh_lib.batch_parts(mesh)
  if lanes < 1 or config.batch % (lanes * parts):
    raise UserError(
      f"data.lanes={lanes}: batch={config.batch} does not divide into rows of {lanes} examples in "
      f"{parts} parts; choose data.lanes=1, or a batch that is a multiple of "
      f"{max(lanes, 1) * parts}."
    )
  memory = config.buffer
  for name, most in (("refresh", math.inf), ("draw", math.inf), ("rollouts", config.batch)):
    if not 1 <= memory[name] <= most:
      limit = "" if most == math.inf else f" and at most batch={most}"
      raise UserError(f"buffer.{name}={memory[name]} must be at least 1{limit}.")


def without_data(config) -> tuple[ConfigDict, int]:
  """For `--mode=compile`: a config that reads nothing but the files here, and a batch's number.

  The batch is the first with noise: rows are wider then.
  """
  return config, config.loss.warmup


def make_method(config, mesh: jax.sharding.Mesh) -> tuple[Method, dict]:
  """Returns the method and the facts that sampling needs: the characters, the lengths of rows.

  Raises:
    UserError: the config does not fit itself or the data.
  """
  _check(config, mesh)
  loss_config, noise = make_loss_config(config), Noise(**dict(config.noise))
  train, test = make_examples(config)
  vocab = Vocab.from_texts([text for x in (*train, *test) for text in (x.question, x.answer)])
  known, asked = (data.encode(x, vocab, config.data.context) for x in (train, test))
  # What a generation may take: the data's longest row, and as many errors as the data make.
  answers, erasures = max(x.actions(Noise()) for x in (known, asked)), config.eval.erasures
  facts = {
    "symbols": list(vocab.symbols),
    "examples": len(train),
    "max_length": max(x.nodes(Noise()) for x in (known, asked)),
    "max_actions": answers + 2 * erasures,
    "max_erasures": erasures,
  }
  network = make_network(config, facts)
  generate = make_generate(network, facts)
  schedule, memory = config.loss, config.buffer
  width = known.prompt.shape[1]

  def init(key):
    extra = ()
    if loss_config.on_policy:
      extra = buffer.create(memory.rows, width, facts["max_actions"])
    return network.init(key), extra

  def augment(state, batch, key):
    past = state.step - schedule.warmup
    batch = {**batch, "strength": jnp.clip(past / max(schedule.anneal, 1), 0.0, 1.0)}
    if not loss_config.on_policy:
      return state.extra, batch
    key_roll, key_draw = jax.random.split(key)

    def refresh(extra):
      prompt, length = (batch[name][: memory.rollouts] for name in ("prompt", "prompt_length"))
      # Trajectories of the policy itself: temperature 1, no token excluded.
      row = jnp.arange(len(prompt))
      made = generate(
        state.params, prompt, length, key_roll, row, 1.0, loss_config.backspace, retype=True
      )
      return buffer.insert(extra, prompt, length, made.actions)

    due = (past >= 0) & (past % memory.refresh == 0)
    extra = jax.lax.cond(due, refresh, lambda extra: extra, state.extra)
    drawn = buffer.draw(extra, key_draw, memory.draw)
    # What is typed either stays in the text or is erased.
    nodes = facts["max_length"] + facts["max_erasures"]
    model = tree(drawn["prompt"], drawn["length"], drawn["actions"], nodes)
    model["weight"] *= drawn["weight"][:, None]
    return extra, {**batch, "model": model}

  def logits(params, rows):
    return network.apply(params, rows["token"], rows["position"], rows["end"])

  def loss_fn(params, ema, batch, key):
    del ema, key
    model, own = batch.get("model"), None
    if model is not None:
      # As long as alpha is 0 their penalty is, too: the pass is saved.
      shape = jax.eval_shape(logits, params, model)
      own = jax.lax.cond(
        batch["strength"] > 0,
        logits,
        lambda params, rows: jnp.zeros(shape.shape, shape.dtype),
        params,
        model,
      )
    return loss.loss(loss_config, logits(params, batch), batch, model, own, batch["strength"])

  def stream(seed: int, position: int) -> Iterator[dict[str, np.ndarray]]:
    lanes = config.data.lanes
    rows = mesh_lib.process_rows(config.batch // lanes, mesh)
    quiet = Noise(**{**dict(config.noise), "rate": 0.0})
    plain = data.stream(known, quiet, config.batch, rows, seed, position, lanes)
    yield from itertools.islice(plain, max(schedule.warmup - position, 0))
    position = max(position, schedule.warmup)
    yield from data.stream(known, noise, config.batch, rows, seed, position, lanes)

  measure = make_evaluate(config, asked, network, generate, loss_config, facts["max_actions"])
  return Method(init, loss_fn, augment, stream, measure), facts


def make_evaluate(config, asked: Encoded, network, generate, loss_config, max_actions: int):
  """`Method.evaluate`: all test examples at the end, a quarter of them on the way."""
  likelihood = evaluate.make_likelihood(network.apply, loss_config, config.batch)

  def run(params, step: int, final: bool):
    del step
    few = asked if final else asked.first(max(len(asked.answer) // 4, 1))

    def actions(temperature, backspace, forced, seed):
      if forced is None:  # an array in any case: one compilation serves all
        forced = np.zeros((len(few.answer), max_actions), np.int32)
      key, row = jax.random.key(seed), np.arange(len(few.answer))
      made = generate(
        params, few.prompt, few.prompt_length, key, row, temperature, backspace, forced=forced
      )
      return mesh_lib.fetch(made.actions)

    yield from evaluate.measure(actions, few, loss_config.backspace, config.seed)
    yield "log_likelihood/data", likelihood(params, few)

  return run


def _prompts(config, flags) -> list[str]:
  """The prompts that the flags ask for, or else the first test questions."""
  if flags.prompts and flags.prompt:
    raise UserError("--prompt and --prompts are both given; choose one.")
  if flags.prompts:
    try:
      lines = Path(flags.prompts).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as err:
      raise UserError(f"--prompts={flags.prompts} cannot be read as text.") from err
    return [line for line in lines if line.strip()]
  return flags.prompt or [x.question for x in make_examples(config)[1][: flags.num or 64]]


def sample_mode(config, facts: dict, load, flags, out: Path) -> None:
  """`--mode=sample`: answers prompts, erasures visible; `load() -> (params, step)` is called last.

  Prints a line for each and writes generations.html and generations.json into `out`.
  """
  temperature = 0.0 if flags.temperature is None else flags.temperature
  vocab, prompts = Vocab(tuple(facts["symbols"])), _prompts(config, flags)
  prompt, length = data.encode_prompts(prompts, vocab, facts["max_length"])
  generate = make_generate(make_network(config, facts), facts)
  params, step = load()
  key, row = jax.random.key(flags.seed), np.arange(len(prompts))
  backspace = make_loss_config(config).backspace
  args = (params, prompt, length, key, row, temperature, backspace)
  jax.block_until_ready(generate(*args))  # compiles, so that the speed below is generation's own
  start = time.perf_counter()
  actions = np.asarray(generate(*args).actions)
  seconds = time.perf_counter() - start
  typed = [show.strokes(row.tolist(), vocab) for row in actions]
  for text, keys in zip(prompts, typed, strict=True):
    print(f"{text}  {show.line(keys, sys.stdout.isatty())}")
  show.write(out, f"step {step}, temperature {temperature:g}", prompts, typed)
  print(f"{np.sum(actions != 0) / seconds:.0f} actions/s")
  print(f"watch:   {out / 'generations.html'}")
  print(f"samples: {out / 'generations.json'}")


def evaluate_mode(config, facts: dict, load, flags, out: Path) -> None:
  """`--mode=evaluate`: every metric on all test examples, at --seed."""
  config = config.copy_and_resolve_references()
  config.seed = flags.seed
  vocab = Vocab(tuple(facts["symbols"]))
  asked = data.encode(make_examples(config)[1], vocab, config.data.context)
  network = make_network(config, facts)
  generate = make_generate(network, facts)
  run = make_evaluate(
    config, asked, network, generate, make_loss_config(config), facts["max_actions"]
  )
  params, step = load()
  results = dict(run(params, step, True))
  print(table(results))
  out.mkdir(parents=True, exist_ok=True)
  record = {"step": step, "seed": flags.seed, "examples": len(asked.answer), **results}
  (out / "evaluation.json").write_text(json.dumps(record, indent=1))
  print(f"numbers: {out / 'evaluation.json'}")
