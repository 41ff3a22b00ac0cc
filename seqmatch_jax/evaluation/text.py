"""Metrics of a policy on text, where there is no right answer.

They are perplexity, the erasures and endings of generated texts, their closeness to real ones
(MAUVE), and the variety of both.

Dimensions: m texts, a actions, l tokens of a text, p of a prompt, f features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from seqmatch_jax.actions import Noise
from seqmatch_jax.data.packing import Packed
from seqmatch_jax.evaluation import diversity
from seqmatch_jax.evaluation.features import Features
from seqmatch_jax.evaluation.mauve import mauve
from seqmatch_jax.evaluation.questions import policies, sum_batches
from seqmatch_jax.rollout import Rollout
from seqmatch_jax.tokens import BACKSPACE, BOS, EOS, PAD, padded

N = 4  # tokens of the n-grams


def _exp(nats: float) -> float:
  return math.exp(nats) if nats < 700 else math.inf


def likelihood(
  total: Callable, params, held: Packed, vocab, rows: int, batch: int
) -> Iterator[tuple[str, float]]:
  """Perplexity of the first `rows` rows of held-out text, for each token and for each character.

  There is one under each of `questions.policies`. <eos> counts as a token and as no character;
  prompts count as neither.

  Args:
    total: see `questions.make_total`.
    batch: rows that are computed at a time.
  """
  quiet = Noise(0.0, held.errors)

  def select(index):
    return held.batch(index, np.random.default_rng(0), quiet)

  log_likelihood, count = sum_batches(total, params, select, rows, batch)
  pieces, _ = held.pieces(np.arange(rows))
  characters = 0
  for text, k in zip(held.texts(pieces), held.prompts(pieces)[1] - 1, strict=True):
    # A tokenizer may drop the blank that a text begins with.
    characters += len(vocab.decode(text.tolist())) - len(vocab.decode(text[:k].tolist()))
  for name, nats in zip(policies(len(log_likelihood) > 1), -log_likelihood, strict=True):
    yield f"perplexity/token{name}", _exp(nats / count)
    if characters > 0:
      yield f"perplexity/character{name}", _exp(nats / characters)


def measure(rollout: Rollout, name: str) -> Iterator[tuple[str, float]]:
  """Yields ("backspaces/NAME", value) and so on.

  `backspaces` is their share of all actions; `erasing` the share of texts with one; `run` the mean
  number of neighbouring ones; `finished` the share of texts that came to <eos> before the room was
  used up; `tokens` the mean length of the final text, its prompt included.
  """
  erased = rollout.actions == BACKSPACE
  count = erased.sum()
  yield "backspaces/" + name, float(count / np.sum(rollout.actions != PAD))
  if count:
    begins = erased & ~np.pad(erased, ((0, 0), (1, 0)))[:, :-1]
    yield "erasing/" + name, float(erased.any(1).mean())
    yield "run/" + name, float(count / begins.sum())
  finished = rollout.finished & (rollout.length < rollout.tokens.shape[1])
  yield "finished/" + name, float(finished.mean())
  yield "tokens/" + name, float(rollout.length.mean() - 1)


class PromptedTexts(NamedTuple):
  """Texts with their prompts.

  Attributes:
    tokens: int32 [m, l], <bos> first, no <eos>; then PAD.
    start: int [m], tokens of the prompt, <bos> too.
    length: int [m], tokens of the text, prompt and <bos> too.
  """

  tokens: np.ndarray
  start: np.ndarray
  length: np.ndarray


def real_texts(packed: Packed, piece: np.ndarray) -> PromptedTexts:
  """Pieces of documents as they are."""
  texts = [[BOS, *text[text != EOS]] for text in packed.texts(piece)]
  length = np.array([len(text) for text in texts])
  return PromptedTexts(padded(texts), packed.prompts(piece)[1], length)


def variety(texts: PromptedTexts, name: str) -> Iterator[tuple[str, float]]:
  """Yields ("entropy/NAME", value), `distinct` and `repetition`, see diversity.py.

  They leave out the prompts, which are the same for all models.
  """
  tokens, start, length = texts
  after = np.minimum(start[:, None] + np.arange(tokens.shape[1]), tokens.shape[1] - 1)
  answers = np.take_along_axis(tokens, after, 1), length - start
  for metric in (diversity.entropy, diversity.distinct, diversity.repetition):
    yield f"{metric.__name__}/{name}", metric(*answers, N)


def embed(texts: PromptedTexts, vocab, features: Features) -> np.ndarray:
  """Features [m, f] of whole texts, prompts included."""
  rows = zip(texts.tokens, texts.length, strict=True)
  return features([vocab.decode(row[:length].tolist()) for row, length in rows])


def closeness(
  real_features: np.ndarray, features: np.ndarray, name: str
) -> Iterator[tuple[str, float]]:
  """Yields ("mauve/NAME", value): mean, `mauve_spread` over k-means seeds, and `mauve_star`."""
  result = mauve(real_features, features)
  yield f"mauve/{name}", result.mean
  yield f"mauve_spread/{name}", result.spread
  yield f"mauve_star/{name}", result.smoothed
