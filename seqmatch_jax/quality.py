"""Generated texts beside real ones: how close they are (MAUVE), and how varied both are.

Dimensions: m texts, l tokens, f features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from seqmatch_jax import diversity
from seqmatch_jax.mauve import mauve
from seqmatch_jax.packing import Packed
from seqmatch_jax.text_features import Features
from seqmatch_jax.tokens import BOS, EOS, padded

N = 4  # tokens of the n-grams


class Texts(NamedTuple):
  """Texts with their prompts.

  Attributes:
    tokens: int32 [m, l], <bos> first, no <eos>; then PAD.
    start: int [m], tokens of the prompt, <bos> too.
    length: int [m], tokens of the text, prompt and <bos> too.
  """

  tokens: np.ndarray
  start: np.ndarray
  length: np.ndarray


def real(held: Packed, piece: np.ndarray) -> Texts:
  """Held-out pieces as they are."""
  rows = [[BOS, *text[text != EOS]] for text in held.texts(piece)]
  length = np.array([len(row) for row in rows])
  return Texts(padded(rows), held.prompts(piece)[1], length)


def variety(texts: Texts, name: str) -> Iterator[tuple[str, float]]:
  """Yields ("entropy/NAME", value), `distinct` and `repetition`, see diversity.py.

  Of what follows the prompts, which is the same text for all models.
  """
  tokens, start, length = texts
  after = np.minimum(start[:, None] + np.arange(tokens.shape[1]), tokens.shape[1] - 1)
  said = np.take_along_axis(tokens, after, 1), length - start
  for metric in (diversity.entropy, diversity.distinct, diversity.repetition):
    yield f"{metric.__name__}/{name}", metric(*said, N)


def embed(texts: Texts, vocab, features: Features) -> np.ndarray:
  """Features [m, f] of whole texts, prompts included."""
  rows = zip(texts.tokens, texts.length, strict=True)
  return features([vocab.decode(row[:length].tolist()) for row, length in rows])


def closeness(
  real_features: np.ndarray, made_features: np.ndarray, name: str
) -> Iterator[tuple[str, float]]:
  """Yields ("mauve/NAME", value): mean, `mauve_spread` over k-means seeds, and `mauve_star`."""
  found = mauve(real_features, made_features)
  yield f"mauve/{name}", found.mean
  yield f"mauve_spread/{name}", found.spread
  yield f"mauve_star/{name}", found.smoothed
