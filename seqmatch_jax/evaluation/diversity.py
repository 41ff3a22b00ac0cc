"""The variety of texts: entropy of n-grams, distinct n-grams, repetition. Plain NumPy.

Tokens are those of the network: characters, bytes or pieces of words. Entropy and distinct-n depend
on the amount of text. So compare equally many texts of equal length, and look at the numbers of the
real texts, too.

Sources: Ent-n, Zhang et al., arXiv 1809.05972; distinct-n, Li et al., arXiv 1510.03055; seq-rep-n,
Welleck et al., arXiv 1908.04319.

Dimensions: m texts, l tokens of a row, g n-grams of all texts.
"""

from __future__ import annotations

import numpy as np

from train_jax.errors import check_at_least


def _ngrams(tokens: np.ndarray, length: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
  """The text [g] and the number [g] of every n-gram: equal n-grams have equal numbers.

  Args:
    tokens: int [m, l].
    length: int [m], tokens of each text; padding follows.
  """
  check_at_least("n", n, 1)
  tokens, length = np.asarray(tokens), np.asarray(length)
  places = max(tokens.shape[1] - n + 1, 0)
  inside = np.arange(places) <= length[:, None] - n  # [m, places]
  number = np.zeros(inside.sum(), np.int64)
  for i in range(n):
    # New numbers after each token stay below g and never overflow.
    token = np.unique(tokens[:, i : i + places][inside], return_inverse=True)[1]
    both = number * (token.max(initial=0) + 1) + token
    number = np.unique(both, return_inverse=True)[1]
  return np.nonzero(inside)[0], number


def entropy(tokens: np.ndarray, length: np.ndarray, n: int) -> float:
  """Entropy in nats of the n-grams of all texts together (Ent-n); NaN without any.

  It is at most log(number of n-grams), the value of texts that never repeat one.
  """
  number = _ngrams(tokens, length, n)[1]
  if not len(number):
    return float("nan")
  share = np.bincount(number) / len(number)
  return float(-np.sum(share * np.log(share)))


def distinct(tokens: np.ndarray, length: np.ndarray, n: int) -> float:
  """Different n-grams over all n-grams, of all texts together (distinct-n); NaN without any."""
  number = _ngrams(tokens, length, n)[1]
  return len(np.unique(number)) / len(number) if len(number) else float("nan")


def repetition(tokens: np.ndarray, length: np.ndarray, n: int) -> float:
  """The share of a text's n-grams that came before in it, averaged over texts (seq-rep-n).

  Texts shorter than n are left out; NaN if all are.
  """
  text, number = _ngrams(tokens, length, n)
  if not len(text):
    return float("nan")
  total = np.bincount(text)
  new = np.bincount(np.unique(np.stack([text, number]), axis=1)[0])
  return float(np.mean(1 - new[total > 0] / total[total > 0]))
