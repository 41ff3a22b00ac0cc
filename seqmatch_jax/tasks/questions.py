"""The task of questions with one right answer, from files or generated (see data/questions.py)."""

from __future__ import annotations

import functools
import hashlib

import jax

from seqmatch_jax import rollout, tokens
from seqmatch_jax.actions import Noise
from seqmatch_jax.data import questions as data
from seqmatch_jax.data.questions import Encoded, Example
from seqmatch_jax.evaluation import questions as evaluate
from seqmatch_jax.task import Asked, Task
from seqmatch_jax.tokens import Vocab
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.storage.faults import LIMIT

TEMPERATURE = 0.0  # of a generation, where none is asked for
RETYPE = False  # whether a sample may type again what it has erased
OPEN_ENDED = False  # a full row is a whole answer: it ends, or is erased
GAP = "  "  # between a prompt and what is typed, as it is shown
SOURCES = ("files", "add_or_sub_in_base", "two_sum")


def make_examples(config) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
  """Training and test examples of `config.data`."""
  source, wanted = config.data, config.data.examples + config.data.tests
  if source.source == "files":
    train = source.train or data.OFFICIAL / "add_or_sub_in_base_train.txt"
    test = source.test or data.OFFICIAL / "add_or_sub_in_base_test.txt"
    if bool(source.train) != bool(source.test):
      raise UserError(
        f"data.train={source.train!r} and data.test={source.test!r}: give both, or neither for "
        "mathematics_dataset's add_or_sub_in_base."
      )
    faults = source.get("max_faults", LIMIT)
    return data.read_module(train, faults), data.read_module(test, faults)
  if source.get("train") or source.get("test"):
    raise UserError(
      f"data.train={source.train!r} and data.test={source.test!r} are not read where data.source="
      f"{source.source!r}; choose data.source=files, or leave them empty."
    )
  if min(source.examples, source.tests) < 1:
    raise UserError(
      f"data.examples={source.examples} and data.tests={source.tests} must be at least 1."
    )
  seed = source.get("seed", 0)  # older runs do not know it
  if source.source == "two_sum":
    made = data.make_two_sum(wanted, seed, source.numbers, source.modulus)
  else:
    made = data.make_add_or_sub_in_base(wanted, seed)
  return made[: source.examples], made[source.examples :]


def _digest(examples: tuple[Example, ...]) -> str:
  return hashlib.sha256(repr(examples).encode()).hexdigest()


def _tests(config, facts: dict) -> tuple[Example, ...]:
  """The test examples of a trained run; UserError where they are others now."""
  test = make_examples(config)[1]
  if (now := _digest(test)) != facts.get("tests_sha256", now):  # older runs do not know it
    raise UserError(
      f"data.test={config.data.test!r} has other questions than the run had; put the file of that "
      "time back."
    )
  return test


def _check_lanes(config, mesh) -> None:
  lanes, parts = config.data.lanes, mesh_lib.batch_parts(mesh) * config.optim.accumulate
  if lanes < 1 or config.batch % (lanes * parts):
    raise UserError(
      f"data.lanes={lanes}: batch={config.batch} does not divide into rows of {lanes} examples in "
      f"{parts} parts (devices times optim.accumulate); choose data.lanes=1, or a batch that is a "
      f"multiple of {max(lanes, 1) * parts}."
    )


def make_task(config, mesh) -> Task:
  """Questions of `config.data`; raises UserError if they do not fit the config."""
  _check_lanes(config, mesh)
  train, test = make_examples(config)
  vocab = Vocab.from_texts([text for x in (*train, *test) for text in (x.question, x.answer)])
  known, asked = (data.encode(x, vocab, config.data.context) for x in (train, test))
  # What a generation may take: the data's longest row, and as many errors as the data make.
  answers, erasures = max(x.actions(Noise()) for x in (known, asked)), config.eval.erasures
  facts = {
    **tokens.to_facts(vocab),
    "examples": len(train),
    "examples_sha256": _digest(train),
    "tests_sha256": _digest(test),
    "max_length": max(x.nodes(Noise()) for x in (known, asked)),
    "max_actions": answers + 2 * erasures,
    "max_erasures": erasures,
  }
  lanes = config.data.lanes
  rows = mesh_lib.process_rows(config.batch // lanes, mesh)

  def stream(noise, seed, position):
    return data.stream(known, noise, config.batch, rows, seed, position, lanes)

  def measure(network, generate, loss_config):
    return _evaluate(config, asked, network, generate, loss_config, facts, mesh)

  return Task(facts, known.prompt.shape[1], stream, measure)


def _evaluate(config, asked: Encoded, network, generate, loss_config, facts: dict, mesh):
  """`Method.evaluate`: all test examples at the end, a quarter of them on the way."""
  likelihood = evaluate.make_likelihood(network.apply, loss_config, config.batch, mesh)
  score = evaluate.make_score(network.apply, config.batch, mesh)

  def run(params, step: int, final: bool):
    del step
    few = asked if final else asked.first(max(len(asked.answer) // 4, 1))

    def actions(temperature, retype, backspace, forced, seed):
      how = {"temperature": temperature, "retype": retype}
      how |= {"allow_backspace": backspace, "forced": forced}
      return rollout.in_batches(
        generate, params, few.prompt, few.prompt_length, config.batch, jax.random.key(seed), **how
      ).actions

    noise = Noise(source=config.noise.source)
    own = functools.partial(score, params, few)
    yield from evaluate.measure(actions, own, few, loss_config.backspace, config.seed, noise)
    names = evaluate.policies(loss_config.backspace)
    for name, value in zip(names, likelihood(params, few), strict=True):
      yield f"log_likelihood/data{name}", value

  return run


def make_evaluate(config, facts: dict, network, generate, loss_config, mesh):
  """(`Method.evaluate`, number of test examples)."""
  asked = data.encode(_tests(config, facts), tokens.from_facts(facts), config.data.context)
  run = _evaluate(config, asked, network, generate, loss_config, facts, mesh)
  return run, len(asked.answer)


def ask(config, facts: dict, given: list[str], count: int) -> Asked:
  """The prompts that are `given`, or else the first `count` test questions."""
  found = [] if given else _tests(config, facts)[:count]
  texts, answers = given or [x.question for x in found], [x.answer for x in found]
  encoded = tokens.encode_prompts(texts, tokens.from_facts(facts), facts["max_length"])
  return Asked(texts, *encoded, answers)
