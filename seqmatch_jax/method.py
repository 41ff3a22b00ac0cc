"""Assembles SequenceMatch for the engine. ConfigDict ends here.

A run is one config: maximum likelihood first, then the objective with its noise, alpha annealed in.
The first `warmup` steps see data without noise and alpha = 0; from then on errors are typed and
erased in the data, alpha grows over `anneal` steps, and, where the divergence needs them, the model
writes trajectories of its own into a replay buffer every `buffer.refresh` steps.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from seqmatch_jax import buffer, loaded, loss, model, rollout, sample, show, tokens
from seqmatch_jax.actions import Noise, tree
from seqmatch_jax.huggingface import export
from seqmatch_jax.model import make_given, make_network, moved  # noqa: F401  main.py asks for them here
from seqmatch_jax.tasks import questions, text
from train_jax import lora
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.metrics import report
from train_jax.step import AbstractCall, Method


def task_of(config):
  """The module of what is written (see task.py)."""
  if config.data.source == "text":
    return text
  if config.data.source in questions.SOURCES:
    return questions
  known = ", ".join([*questions.SOURCES, "text"])
  raise UserError(f"data.source={config.data.source!r} is unknown; choose from {known}.")


def same(config) -> tuple[str, ...]:
  """What must be equal where config.init_from points (see train_jax/warm_start.py)."""
  keys = ("config.model.heads", "config.lora.alpha", "facts.symbols", "facts.tokenizer.sha256")
  if not (config.get("lora") and config.lora.rank):
    return keys
  # Adapters belong to the matrices that they were learned on.
  return (*keys, "facts.weights_sha256" if config.get("pretrained") else "config.seed")


FRESH = ()  # what may be missing there


def make_limits(config, facts: dict) -> rollout.RolloutConfig:
  """The limits of a generation: numbers that are among the facts, and how the task's texts end."""
  numbers = {name: facts[name] for name in ("max_length", "max_actions", "max_erasures")}
  return rollout.RolloutConfig(**numbers, open_ended=task_of(config).OPEN_ENDED)


def make_loss_config(config) -> loss.LossConfig:
  """The objective of `config`."""
  # A config that was saved before a field came has its default.
  names = loss.LossConfig.__dataclass_fields__
  return loss.LossConfig(**{k: config.loss[k] for k in names if k in config.loss})


def _check(config) -> None:
  schedule = config.loss
  for name in ("warmup", "anneal"):
    if schedule[name] < 0:
      raise UserError(f"loss.{name}={schedule[name]} must be at least 0 steps.")
  if config.noise.rate and not schedule.backspace:
    raise UserError(
      f"noise.rate={config.noise.rate} types errors that loss.backspace=False cannot erase; "
      "choose noise.rate=0 or loss.backspace=True."
    )
  if config.eval.erasures < 0:
    raise UserError(f"eval.erasures={config.eval.erasures} must be at least 0.")
  memory = config.buffer
  for name, most in (("refresh", math.inf), ("draw", math.inf), ("rollouts", config.batch)):
    if not 1 <= memory[name] <= most:
      limit = "" if most == math.inf else f" and at most batch={most}"
      raise UserError(f"buffer.{name}={memory[name]} must be at least 1{limit}.")
  if memory.rows < memory.rollouts:
    raise UserError(
      f"buffer.rows={memory.rows} must be at least buffer.rollouts={memory.rollouts}, which are "
      "kept at once."
    )


def without_data(config) -> tuple[ConfigDict, int]:
  """For `--mode=compile`: a config that reads nothing but the files here, and a batch's number.

  Texts are Python's own, and a pretrained decoder is drawn: it has the sizes in `config.model` and
  `data.vocab` tokens. The batch is the first with noise: rows of questions are wider then.
  """
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.pretrained = ""
    if config.data.source == "text":
      config.data.path = config.data.test = config.data.tokenizer = ""
      config.model.vocab = config.data.get("vocab", 0)
  return config, config.loss.warmup


def make_method(config, mesh: jax.sharding.Mesh) -> tuple[Method, dict]:
  """Returns the method and the facts that sampling needs: the characters, the lengths of rows.

  Raises:
    UserError: the config does not fit itself or the data.
  """
  _check(config)
  loss_config, noise = make_loss_config(config), Noise(**dict(config.noise))
  config = model.with_tokenizer(config)
  task = task_of(config).make_task(config, mesh)
  facts = model.make_facts(config, task.facts)
  model.read(config, facts)  # what does not fit is refused before anything is computed
  network = make_network(config, facts)
  generate = rollout.make_rollout(network, make_limits(config, facts))  # inside the step
  schedule, memory = config.loss, config.buffer
  # Of rows that they cannot share out, all devices compute all.
  multiple = mesh_lib.batch_parts(mesh) * config.optim.accumulate

  def init(key):
    extra = ()
    if loss_config.on_policy:
      extra = buffer.create(memory.rows, task.prompt, facts["max_actions"])
    return network.init(key), extra

  def augment(state, batch, key, *frozen):
    past = state.step - schedule.warmup
    batch = {**batch, "strength": jnp.clip(past / max(schedule.anneal, 1), 0.0, 1.0)}
    if not loss_config.on_policy:
      return state.extra, {**batch, "counts": loss.counts(batch)}
    key_roll, key_draw = jax.random.split(key)

    def refresh(extra):
      prompt, length = (batch[name][: memory.rollouts] for name in ("prompt", "prompt_length"))
      # Trajectories of the policy itself: temperature 1, no token excluded.
      row = jnp.arange(len(prompt))
      params = lora.join(state.params, *frozen)
      made = generate(
        params, prompt, length, key_roll, row, 1.0, loss_config.backspace, retype=True
      )
      return buffer.insert(extra, prompt, length, made.actions)

    due = (past >= 0) & (past % memory.refresh == 0)
    extra = jax.lax.cond(due, refresh, lambda extra: extra, state.extra)
    drawn = buffer.draw(extra, key_draw, memory.draw, multiple)
    # What is typed either stays in the text or is erased.
    nodes = facts["max_length"] + facts["max_erasures"]
    model = tree(drawn["prompt"], drawn["length"], drawn["actions"], nodes)
    model["weight"] *= drawn["weight"][:, None]
    return extra, {**batch, "model": model, "counts": loss.counts(batch, model)}

  def logits(params, rows):
    return network.apply(params, rows["token"], rows["position"], rows["end"])

  def loss_fn(params, ema, batch, key, *frozen):
    del ema, key
    params = lora.join(params, *frozen)
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
    strength, whole = batch["strength"], batch.get("counts")
    return loss.loss(loss_config, logits(params, batch), batch, model, own, strength, whole)

  def stream(seed: int, position: int) -> Iterator[dict[str, np.ndarray]]:
    quiet = dataclasses.replace(noise, rate=0.0)
    plain = task.stream(quiet, seed, position)
    yield from itertools.islice(plain, max(schedule.warmup - position, 0))
    yield from task.stream(noise, seed, max(position, schedule.warmup))

  evaluate = task.evaluate(
    network, rollout.make_rollout(network, make_limits(config, facts), mesh), loss_config
  )

  def measure(params, step: int, final: bool, *frozen):
    return evaluate(lora.join(params, *frozen), step, final)

  frozen = model.make_frozen(config, facts)
  return Method(init, loss_fn, augment, stream, measure, frozen), facts


def sampler_program(config, facts: dict, mesh) -> AbstractCall:
  """For `--mode=compile`: generation as `--mode=sample` does it, `config.batch` rows at a time."""
  mesh = model.mesh_of(config, list(mesh.devices.flat))
  network, prompt = make_network(config, facts), task_of(config).ask(config, facts, [], 1).prompt
  generate = rollout.make_rollout(network, make_limits(config, facts))
  key = jax.eval_shape(jax.random.key, 0)
  shapes = jax.eval_shape(lambda key: lora.join(network.init(key), network.frozen(key)), key)
  params = mesh_lib.lay_out(shapes, mesh)
  rows = jax.ShapeDtypeStruct((config.batch,), np.int32)
  prompts = jax.ShapeDtypeStruct((config.batch, prompt.shape[1]), np.int32)
  return AbstractCall(
    "generation, the prompts and one action",
    mesh_lib.within(mesh, generate),
    (params, prompts, rows, key, rows),
    {"parameters": params},
    mesh.size,
    {"out_shardings": mesh_lib.everywhere(mesh)},
  )


def sample_mode(config, facts: dict, load, flags, out: Path) -> None:
  """`--mode=sample`: goes on from prompts, erasures visible.

  Prints a line for each and writes generations.html and generations.json into `out`.
  `load(mesh) -> (params, step)` is called last.
  """
  if flags.stream and jax.process_count() > 1:
    raise UserError("--stream types into one terminal, for one process; leave it out.")
  task, vocab = task_of(config), tokens.from_facts(facts)
  asked = task.ask(config, facts, sample.prompts(flags), flags.num or 64)
  temperature = task.TEMPERATURE if flags.temperature is None else flags.temperature
  if not temperature and (flags.num or 1) > 1 and (flags.prompt or flags.prompts):
    raise UserError(
      f"--num={flags.num} of each prompt would all be the same at temperature 0; set --temperature."
    )
  erases = config.loss.backspace and flags.backspace
  settings = sample.sampling_options(
    temperature, task.RETYPE, erases, flags.top_k, flags.top_p, flags.max_actions
  )
  network, limits = make_network(config, facts), make_limits(config, facts)
  mesh = model.mesh_of(config)
  params, step = model.load_whole(config, facts, load, mesh)
  key = jax.random.key(flags.seed)
  if flags.stream:
    stream = rollout.make_stream(network, limits, sample.EVERY, mesh)
    typed, seconds = sample.live(stream, params, asked, vocab, key, settings, task.GAP)
  else:
    generate = rollout.make_rollout(network, limits, mesh)
    typed, seconds = sample.together(
      generate, params, asked, vocab, key, settings, config.batch, limits.max_actions
    )
  if jax.process_index():  # every process has all of it
    return
  if not flags.stream:
    for begin, keys in zip(asked.texts, typed, strict=True):
      print(f"{begin}{task.GAP}{show.line(keys, sys.stdout.isatty())}")
  names = ("top_k", "top_p", "max_actions")
  chosen = {"temperature": temperature} | {name: getattr(flags, name) for name in names}
  chosen = {"step": step, **chosen, "seed": flags.seed}
  title = ", ".join(f"{name} {value}" for name, value in chosen.items() if value is not None)
  show.write(out, title, asked.texts, typed, task.GAP, asked.references)
  print(sample.speed(typed, seconds))
  print(f"watch:   {out / 'generations.html'}")
  print(f"samples: {out / 'generations.json'}")


def evaluate_mode(config, facts: dict, load, flags, out: Path) -> None:
  """`--mode=evaluate`: every metric on all test examples, at --seed; MAUVE with --features."""
  trained, config = config, config.copy_and_resolve_references()
  config.seed = flags.seed
  if flags.features and task_of(config) is not text:
    raise UserError(
      f"--features={flags.features} is for the MAUVE of texts, and this run answers questions; "
      "leave it out."
    )
  if flags.features:
    config.eval.features = flags.features
  network, loss_config = make_network(config, facts), make_loss_config(config)
  mesh = model.mesh_of(config)
  generate = rollout.make_rollout(network, make_limits(config, facts), mesh)
  run, asked = task_of(config).make_evaluate(config, facts, network, generate, loss_config, mesh)
  # Of the config as it was: drawn parameters are of its own seed.
  params, step = model.load_whole(trained, facts, load, mesh)
  report({"step": step, "seed": flags.seed, "examples": asked}, run(params, step, True), out)


def export_mode(config, facts: dict, load, flags, out: Path) -> None:
  """`--mode=export`: the `sample` average as files that `seqmatch_jax.load_pretrained` reads.

  A run from pretrained weights becomes a folder as Hugging Face lays it out, adapters merged; any
  other the two files of train_jax/storage/exported.py.
  """
  del flags
  source, vocab, task = config.get("pretrained"), tokens.from_facts(facts), task_of(config)
  # What would be overwritten: the weights that the run began from, or those beside its tokenizer.
  taken = [source] if source else []
  taken += [Path(vocab.path).parent] if isinstance(vocab, tokens.TextVocab) else []
  if out.resolve() in (Path(path).expanduser().resolve() for path in taken):
    raise UserError(
      f"--out={out} is what the run began from or has its tokenizer; choose another directory."
    )
  params, step = model.load_whole(config, facts, load, model.mesh_of(config))
  sizes, run = model.make_sizes(config, facts), {"config": config.to_dict(), "facts": facts}
  generation = {
    **dataclasses.asdict(make_limits(config, facts)),
    "temperature": task.TEMPERATURE,
    "retype": task.RETYPE,
    "backspace": config.loss.backspace,
  }
  record = loaded.make_record(step, sizes, generation, run)
  if source:
    export.write(out, params, sizes, vocab, source, record)
  else:
    loaded.write(out, params, vocab, record)
  if jax.process_index() == 0:
    used = f"seqmatch_jax.load_pretrained({str(out)!r}) generates with it"
    begun = f", --config.pretrained={out} begins from it" if source else ""
    print(f"exported: {out} (step {step}); {used}{begun}")
