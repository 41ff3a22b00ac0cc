"""The task of text without a right answer: documents of a corpus (see data/packing.py)."""

from __future__ import annotations

import hashlib

import jax
import numpy as np
from absl import logging

from seqmatch_jax import tokens
from seqmatch_jax.data import corpus, documents, packing
from seqmatch_jax.data.documents import Documents
from seqmatch_jax.evaluation import mauve
from seqmatch_jax.evaluation import questions as evaluate
from seqmatch_jax.evaluation import text as evaluate_text
from seqmatch_jax.huggingface import tokenizer
from seqmatch_jax.huggingface.tokenizer import TextVocab
from seqmatch_jax.tasks.task import Evaluation, Prompts, Task
from seqmatch_jax.tokens import Vocab
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError, check_at_least
from train_jax.storage.faults import LIMIT, Faults

TEMPERATURE = 1.0  # of a generation, by default
RETYPE = True  # whether a sample may type an erased token again
OPEN_ENDED = True  # whether a generation breaks off where its row is full, see rollout.py
GAP = ""  # shown between a prompt and its continuation


def _find(path: str, key: str) -> corpus.Corpus:
  return corpus.find(path, f"data.{key}") if path else corpus.python_prose()


def _characters(texts: list[corpus.Corpus], faults: list[Faults]) -> Vocab:
  """One token for each character of the texts."""
  symbols = set()
  for source, counter in zip(texts, faults, strict=True):
    for i in range(source.size):
      symbols.update(documents.read_text(source, i, counter))
  return Vocab.from_texts([symbols])


def open_documents(
  source, vocab: Vocab | TextVocab | None = None
) -> tuple[Documents, Documents, Vocab | TextVocab]:
  """Training and test documents of `config.data`, and their vocabulary.

  Args:
    vocab: encodes the texts; None chooses as `config.data` says.
  """
  limit = source.get("max_faults", LIMIT)  # configs of earlier versions have none
  faults = [Faults(limit, f"data.{name}={source[name]!r}") for name in ("path", "test")]
  if vocab is None and source.tokenizer:
    vocab = TextVocab.from_file(source.tokenizer)
  if documents.is_set(source.path):
    train, stored = documents.open_set(source.path)
    vocab = _check_same(source.path, stored, vocab)
    if not source.test:
      return *train.split(source.tests), vocab
    if not documents.is_set(source.test):
      return train, documents.encode_texts(_find(source.test, "test"), vocab, faults[1]), vocab
    test, other = documents.open_set(source.test)
    _check_same(source.test, other, vocab)
    return train, test, vocab
  texts = [_find(source.path, "path")] + ([_find(source.test, "test")] if source.test else [])
  faults = faults[: len(texts)]
  if vocab is None:
    vocab = _characters(texts, faults) if source.path else Vocab(tuple(corpus.PRINTABLE))
  encoded = [documents.encode_texts(x, vocab, f) for x, f in zip(texts, faults, strict=True)]
  return (*encoded, vocab) if source.test else (*encoded[0].split(source.tests), vocab)


def _check_same(path: str, stored: Vocab | TextVocab, vocab: Vocab | TextVocab | None):
  """`vocab`, or `stored` if it is None; UserError if they differ."""

  def identity(x):
    return x.sha256 if isinstance(x, TextVocab) else x.symbols

  if vocab is not None and identity(vocab) != identity(stored):
    raise UserError(
      f"the documents in {path!r} were encoded with other tokens than this run has; encode them "
      "with its tokenizer."
    )
  return stored if vocab is None else vocab


def _pack(config, source: Documents, vocab) -> packing.Packed:
  errors, data = config.noise.max_errors, config.data
  return packing.pack(source, vocab.size, data.context, errors, data.prompt)


def _digest(source: Documents) -> str:
  """Of the number of tokens of each document, in order."""
  return hashlib.sha256(source.length.tobytes()).hexdigest()


def _state(train: Documents, test: Documents) -> dict:
  """What tells these documents from others, as JSON."""
  state = {
    "documents": len(train.length),
    "lengths_sha256": _digest(train),
    "tests_lengths_sha256": _digest(test),
  }
  content = [train.content, test.content]
  return {**state, "content": content} if all(content) else state


def _describe(packed: packing.Packed, batch: int) -> None:
  """Prints the amount of data; warns if most of it are prompts."""
  size, length = packed.stop - packed.start, packed.documents.length
  learned = np.maximum(size - packed.prompt, 0).sum() / size.sum()
  if jax.process_index():
    return
  print(
    f"data: {len(length)} documents, {size.sum()} tokens in {packed.rows} rows, an epoch of "
    f"{packed.rows / batch:.1f} batches; {learned:.0%} of the tokens are learned, the others are "
    "prompts",
    flush=True,
  )
  if learned < 0.5:
    logging.warning(
      "data.prompt=%d takes most of these texts, and prompts are not learned: lower it (half of "
      "the documents have %d tokens or fewer).",
      *(packed.prompt, np.median(length)),
    )


def make_task(config, mesh) -> Task:
  """Documents of `config.data`; raises UserError if they do not fit the config."""
  if config.noise.source != "uniform":
    raise UserError(
      f"noise.source={config.noise.source!r} is for questions; choose 'uniform' for text."
    )
  check_at_least("eval.samples", config.eval.samples, 1)
  if config.eval.features and config.eval.samples < mauve.LEAST:
    raise UserError(
      f"eval.samples={config.eval.samples} must be at least {mauve.LEAST} for MAUVE, which "
      "eval.features asks for: with fewer it is near 1 for any texts."
    )
  train, test, vocab = open_documents(config.data)
  packed, max_backspaces = _pack(config, train, vocab), config.eval.max_backspaces
  if config.eval.features:
    _check_held_out(_pack(config, test, vocab))
  _describe(packed, config.batch)
  longest = config.data.context - config.noise.max_errors  # a text in training, <bos> too
  metadata = {
    **tokenizer.to_metadata(vocab),
    **_state(train, test),
    "max_length": longest,
    "max_actions": longest + 2 * max_backspaces,
    "max_backspaces": max_backspaces,
  }
  mesh_lib.check_batch(config.batch, mesh)
  rows = mesh_lib.process_rows(config.batch, mesh)

  def stream(noise, seed, position):
    return packing.stream(packed, noise, config.batch, rows, seed, position)

  def evaluation(model, features) -> Evaluation:
    return _evaluate(config, _pack(config, test, vocab), vocab, model, config.seed, features)

  return Task(metadata, 1 + config.data.prompt, stream, evaluation)


def _check_held_out(held: packing.Packed) -> None:
  """Raises UserError unless enough is held out for MAUVE."""
  if len(held.start) < mauve.LEAST:
    raise UserError(
      f"{len(held.start)} pieces of text are held out, and MAUVE, which the features are for, "
      f"needs {mauve.LEAST}: with fewer it is near 1 for any texts; hold out more by data.tests or "
      "data.test, or leave the features out."
    )


def _evaluate(config, held: packing.Packed, vocab, model, seed: int, features) -> Evaluation:
  """All that is held out at the end, a quarter of it before, but enough for MAUVE."""
  total = evaluate.make_total(model.network.apply, model.loss_config, model.mesh)
  erases = model.loss_config.backspace
  policies = {"T=1": (erases, None), "p=0.95": (erases, 0.95)}
  if erases:
    policies["T=1, forbidden"] = (False, None)

  def run(model, final: bool):
    rows = held.rows if final else max(held.rows // 4, 1)
    least = mauve.LEAST if features else 1
    count = max(config.eval.samples // (1 if final else 4), least)
    yield from evaluate_text.likelihood(total, model.params, held, vocab, rows, config.batch)
    piece = continued(held, count)
    real = evaluate_text.real_texts(held, np.unique(piece))
    yield from evaluate_text.variety(real, "real")
    real_features = evaluate_text.embed(real, vocab, features) if features else None
    prompt, length = held.prompts(piece)
    for name, (backspace, top_p) in policies.items():
      # The policy itself may type again what it has just erased. If it might not, only worse tokens
      # would be left after the erasure of a good one, and they would be erased in their turn.
      outputs = model.roll_out(
        *(prompt, length, config.batch, jax.random.key(seed)),
        temperature=1.0,
        allow_backspace=backspace,
        allow_retype=True,
        top_p=top_p,
      )
      yield from evaluate_text.measure(outputs, name)
      texts = evaluate_text.PromptedTexts(outputs.tokens, length, outputs.length)
      yield from evaluate_text.variety(texts, name)
      if features:
        embedded = evaluate_text.embed(texts, vocab, features)
        yield from evaluate_text.closeness(real_features, embedded, name)

  return run


def continued(held: packing.Packed, count: int) -> np.ndarray:
  """The held-out pieces whose prompts are continued: numbers, int64 [count].

  The first pieces of all documents come first, in their order, then the second pieces, and so on.
  If these are too few, they repeat.
  """
  order = np.lexsort((held.document, held.start))
  return order[np.arange(count) % len(order)]


def _held_out(config, metadata: dict) -> tuple[packing.Packed, Vocab | TextVocab]:
  """The held-out texts of a trained run, and its vocabulary; UserError if the data have changed."""
  train, test, vocab = open_documents(config.data, tokenizer.from_metadata(metadata))
  state = _state(train, test)
  # Runs of earlier versions have no content.
  if any(value != metadata.get(name, value) for name, value in state.items()):
    raise UserError(
      f"data.path={config.data.path!r} has {len(train.length)} documents to train on now, and the "
      f"run had {metadata['documents']}, or they or those held out are others or in another order; "
      "put the texts (or the Python, whose texts '' are) of that time back."
    )
  return _pack(config, test, vocab), vocab


def make_evaluate(config, metadata: dict, model, seed: int, features) -> tuple[Evaluation, int]:
  """(the evaluation of a trained run, number of generations)."""
  held, vocab = _held_out(config, metadata)
  if features:
    _check_held_out(held)
  count = max(config.eval.samples, mauve.LEAST if features else 1)
  return _evaluate(config, held, vocab, model, seed, features), count


def make_prompts(config, metadata: dict, prompts: list[str], count: int) -> Prompts:
  """The `prompts`, or if there are none, those of `count` held-out pieces, see `continued`."""
  if prompts:
    vocab = tokenizer.from_metadata(metadata)
    return Prompts(prompts, *tokens.encode_prompts(prompts, vocab, metadata["max_length"]))
  held, vocab = _held_out(config, metadata)
  piece = continued(held, count)
  prompt, length = held.prompts(piece)
  texts = [vocab.decode(row.tolist()) for row in prompt]
  places = zip(held.document[piece], held.start[piece], strict=True)
  whole = [vocab.decode(held.documents.read(*place).tolist()) for place in places]
  rest = [text[len(begin) :] for text, begin in zip(whole, texts, strict=True)]
  return Prompts(texts, prompt, length, rest)
