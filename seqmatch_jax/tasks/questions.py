"""The task of questions with one right answer, from files or generated (see data/questions.py)."""

from __future__ import annotations

import functools
import hashlib

import jax

from seqmatch_jax import tokens
from seqmatch_jax.actions import Noise
from seqmatch_jax.data import questions as data
from seqmatch_jax.data.questions import Encoded, Example
from seqmatch_jax.evaluation import questions as evaluate
from seqmatch_jax.huggingface import tokenizer
from seqmatch_jax.tasks.task import Evaluation, Prompts, Task
from seqmatch_jax.tokens import Vocab
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError, check_at_least

TEMPERATURE = 0.0  # of a generation, by default
RETYPE = False  # whether a sample may type an erased token again
OPEN_ENDED = False  # a full row is a whole answer: it ends, or is erased
GAP = "  "  # shown between a prompt and the answer
SOURCES = ("files", "add_or_sub_in_base", "two_sum")


def make_examples(config) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
  """Training and test examples of `config.data`."""
  source = config.data
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
  for name in ("examples", "tests"):
    check_at_least(f"data.{name}", source[name], 1)
  count = source.examples + source.tests
  if source.source == "two_sum":
    examples = data.make_two_sum(count, source.seed, source.numbers, source.modulus)
  else:
    examples = data.make_add_or_sub_in_base(count, source.seed)
  return examples[: source.examples], examples[source.examples :]


def _digest(examples: tuple[Example, ...]) -> str:
  return hashlib.sha256(repr(examples).encode()).hexdigest()


def _tests(config, metadata: dict) -> tuple[Example, ...]:
  """The test examples of a trained run; UserError if they have changed."""
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
  check_at_least("data.sequences_per_row", n, 1)
  if batch % (n * parts):
    raise UserError(
      f"data.sequences_per_row={n}: batch={batch} does not divide into rows of {n} examples in "
      f"{parts} parts (devices times optim.grad_accum_steps); choose data.sequences_per_row=1, or "
      f"a batch that is a multiple of {n * parts}."
    )


def make_task(config, mesh) -> Task:
  """Questions of `config.data`; raises UserError if they do not fit the config."""
  _check_rows(config, mesh)
  train, test = make_examples(config)
  vocab = Vocab.from_texts([text for x in (*train, *test) for text in (x.question, x.answer)])
  train_data, test_data = (data.encode(x, vocab, config.data.context) for x in (train, test))
  # The limits of a generation: the data's longest text, and as many errors as the data make.
  longest = max(x.actions(Noise()) for x in (train_data, test_data))
  max_backspaces = config.eval.max_backspaces
  metadata = {
    **tokenizer.to_metadata(vocab),
    "examples": len(train),
    "examples_sha256": _digest(train),
    "tests_sha256": _digest(test),
    "max_length": max(x.nodes(Noise()) for x in (train_data, test_data)),
    "max_actions": longest + 2 * max_backspaces,
    "max_backspaces": max_backspaces,
  }
  per_row = config.data.sequences_per_row
  rows = mesh_lib.process_rows(config.batch // per_row, mesh)

  def stream(noise, seed, position):
    return data.stream(train_data, noise, config.batch, rows, seed, position, per_row)

  def evaluation(model, features) -> Evaluation:
    del features
    return _evaluate(config, test_data, model, config.seed)

  return Task(metadata, train_data.prompt.shape[1], stream, evaluation)


def _evaluate(config, test_data: Encoded, model, seed: int) -> Evaluation:
  """All test examples at the end, a quarter of them before."""
  apply, mesh, loss_config = model.network.apply, model.mesh, model.loss_config
  likelihood = evaluate.make_likelihood(apply, loss_config, config.batch, mesh)
  score = evaluate.make_score(apply, config.batch, mesh)

  def run(model, final: bool):
    examples = test_data if final else test_data.first(max(len(test_data.answer) // 4, 1))
    prompts = examples.prompt, examples.prompt_length, config.batch

    def generate(temperature, allow_retype, backspace, forced, seed):
      return model.roll_out(
        *prompts,
        jax.random.key(seed),
        temperature=temperature,
        allow_retype=allow_retype,
        allow_backspace=backspace,
        forced=forced,
      ).actions

    own_score = functools.partial(score, model.params, examples)
    noise, erases = Noise(source=config.noise.source), loss_config.backspace
    yield from evaluate.measure(generate, own_score, examples, erases, seed, noise)
    for name, value in zip(
      evaluate.policies(erases), likelihood(model.params, examples), strict=True
    ):
      yield f"log_likelihood/data{name}", value

  return run


def make_evaluate(config, metadata: dict, model, seed: int, features) -> tuple[Evaluation, int]:
  """(the evaluation of a trained run, number of test examples)."""
  del features
  vocab = tokenizer.from_metadata(metadata)
  test_data = data.encode(_tests(config, metadata), vocab, config.data.context)
  return _evaluate(config, test_data, model, seed), len(test_data.answer)


def make_prompts(config, metadata: dict, prompts: list[str], count: int) -> Prompts:
  """The `prompts`, or if there are none, the first `count` test questions."""
  examples = [] if prompts else _tests(config, metadata)[:count]
  texts, answers = prompts or [x.question for x in examples], [x.answer for x in examples]
  encoded = tokens.encode_prompts(texts, tokenizer.from_metadata(metadata), metadata["max_length"])
  return Prompts(texts, *encoded, answers)
