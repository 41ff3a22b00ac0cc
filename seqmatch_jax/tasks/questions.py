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
from seqmatch_jax.task import Asked, Evaluation, Task
from seqmatch_jax.tokens import Vocab
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError

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
    return data.read_module(train, source.max_faults), data.read_module(test, source.max_faults)
  if source.train or source.test:
    raise UserError(
      f"data.train={source.train!r} and data.test={source.test!r} are not read where data.source="
      f"{source.source!r}; choose data.source=files, or leave them empty."
    )
  if min(source.examples, source.tests) < 1:
    raise UserError(
      f"data.examples={source.examples} and data.tests={source.tests} must be at least 1."
    )
  if source.source == "two_sum":
    made = data.make_two_sum(wanted, source.seed, source.numbers, source.modulus)
  else:
    made = data.make_add_or_sub_in_base(wanted, source.seed)
  return made[: source.examples], made[source.examples :]


def _digest(examples: tuple[Example, ...]) -> str:
  return hashlib.sha256(repr(examples).encode()).hexdigest()


def _tests(config, metadata: dict) -> tuple[Example, ...]:
  """The test examples of a trained run; UserError where they are others now."""
  test = make_examples(config)[1]
  if _digest(test) != metadata["tests_sha256"]:
    raise UserError(
      f"data.test={config.data.test!r} has other questions than the run had; put the file of that "
      "time back."
    )
  return test


def _check_rows(config, mesh) -> None:
  n, batch = config.data.sequences_per_row, config.batch
  parts = mesh_lib.batch_parts(mesh) * config.optim.grad_accum_steps
  if n < 1 or batch % (n * parts):
    raise UserError(
      f"data.sequences_per_row={n}: batch={batch} does not divide into rows of {n} examples in "
      f"{parts} parts (devices times optim.grad_accum_steps); choose data.sequences_per_row=1, or "
      f"a batch that is a multiple of {max(n, 1) * parts}."
    )


def make_task(config, mesh) -> Task:
  """Questions of `config.data`; raises UserError if they do not fit the config."""
  _check_rows(config, mesh)
  train, test = make_examples(config)
  vocab = Vocab.from_texts([text for x in (*train, *test) for text in (x.question, x.answer)])
  known, asked = (data.encode(x, vocab, config.data.context) for x in (train, test))
  # What a generation may take: the data's longest row, and as many errors as the data make.
  answers = max(x.actions(Noise()) for x in (known, asked))
  max_backspaces = config.eval.max_backspaces
  metadata = {
    **tokens.to_metadata(vocab),
    "examples": len(train),
    "examples_sha256": _digest(train),
    "tests_sha256": _digest(test),
    "max_length": max(x.nodes(Noise()) for x in (known, asked)),
    "max_actions": answers + 2 * max_backspaces,
    "max_backspaces": max_backspaces,
  }
  sequences_per_row = config.data.sequences_per_row
  rows = mesh_lib.process_rows(config.batch // sequences_per_row, mesh)

  def stream(noise, seed, position):
    return data.stream(known, noise, config.batch, rows, seed, position, sequences_per_row)

  def evaluation(model, features) -> Evaluation:
    del features
    return _evaluate(config, asked, model, config.seed)

  return Task(metadata, known.prompt.shape[1], stream, evaluation)


def _evaluate(config, asked: Encoded, model, seed: int) -> Evaluation:
  """All test examples at the end, a quarter of them on the way."""
  apply, mesh, loss_config = model.network.apply, model.mesh, model.loss_config
  likelihood = evaluate.make_likelihood(apply, loss_config, config.batch, mesh)
  score = evaluate.make_score(apply, config.batch, mesh)

  def run(model, final: bool):
    few = asked if final else asked.first(max(len(asked.answer) // 4, 1))

    def actions(temperature, allow_retype, backspace, forced, seed):
      how = {"temperature": temperature, "allow_retype": allow_retype}
      how |= {"allow_backspace": backspace, "forced": forced}
      prompts, key = (few.prompt, few.prompt_length), jax.random.key(seed)
      return rollout.in_batches(
        model.rollout, model.params, *prompts, config.batch, key, **how
      ).actions

    noise, own = Noise(source=config.noise.source), functools.partial(score, model.params, few)
    yield from evaluate.measure(actions, own, few, loss_config.backspace, seed, noise)
    names = evaluate.policies(loss_config.backspace)
    for name, value in zip(names, likelihood(model.params, few), strict=True):
      yield f"log_likelihood/data{name}", value

  return run


def make_evaluate(config, metadata: dict, model, seed: int, features) -> tuple[Evaluation, int]:
  """(The evaluation of a trained run, number of test examples)."""
  del features
  asked = data.encode(_tests(config, metadata), tokens.from_metadata(metadata), config.data.context)
  return _evaluate(config, asked, model, seed), len(asked.answer)


def ask(config, metadata: dict, given: list[str], count: int) -> Asked:
  """The prompts that are `given`, or else the first `count` test questions."""
  found = [] if given else _tests(config, metadata)[:count]
  texts, answers = given or [x.question for x in found], [x.answer for x in found]
  encoded = tokens.encode_prompts(texts, tokens.from_metadata(metadata), metadata["max_length"])
  return Asked(texts, *encoded, answers)
