"""Token documents to batches of packed rows, addressed by position.

A document is cut into pieces that fit into a row, and short pieces share one. They do not see each
other. A piece begins with <bos> and a prompt, which carries no loss. <eos> ends the last piece of a
document, and the others break off. All rows of a run have one shape, with noise and without: a part
of the row is reserved for wrong tokens.

The pieces of a row are fixed. Each epoch is a new permutation of the rows, with new noise. So every
piece comes once an epoch, and a batch is a function of (seed, position) only.

Dimensions: i pieces, r rows of a batch, n data actions of a row, a actions, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import grain
import numpy as np

from seqmatch_jax.actions import Noise, corrupt, tree
from seqmatch_jax.data.documents import Documents
from seqmatch_jax.data.rows import pack_rows
from seqmatch_jax.tokens import BACKSPACE, BOS, EOS, PAD, SPECIAL
from train_jax.errors import UserError


def cut(length: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Documents of `length` [d] in pieces of at most `limit` tokens -> document, start, stop [i]."""
  count = -(-length // limit)
  document = np.repeat(np.arange(len(length)), count)
  start = limit * (np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count))
  return document, start, np.minimum(start + limit, length[document])


def assign(size: np.ndarray, capacity: int) -> np.ndarray:
  """Puts pieces of `size` [i] <= capacity into few rows -> the row of each, int64 [i].

  It is best fit with the largest first, and all pieces of one size at once.
  """
  row, rows = np.empty(len(size), np.int64), 0
  free = [np.empty(0, np.int64) for _ in range(capacity + 1)]  # rows, by their room
  order = np.argsort(-size, kind="stable")
  for group in np.split(order, np.flatnonzero(np.diff(-size[order])) + 1):
    each = size[group[0]]
    while len(group):
      room = next((c for c in range(each, capacity + 1) if len(free[c])), capacity)
      if not len(free[room]):
        opened = -(-len(group) // (capacity // each))
        free[room], rows = np.arange(rows, rows + opened), rows + opened
      targets, free[room] = free[room][: len(group)], free[room][len(group) :]
      row[group[: len(targets)]], group = targets, group[len(targets) :]
      free[room - each] = np.concatenate([free[room - each], targets])
  return row


class _Generators:
  """One generator for each row, used as one: the draws of a row do not depend on the others."""

  def __init__(self, generators: list[np.random.Generator]):
    self.generators = generators

  def random(self, shape):
    return np.stack([g.random(shape[1:]) for g in self.generators])

  def geometric(self, p: float, shape):
    return np.stack([g.geometric(p, shape[1:]) for g in self.generators])


@dataclass(frozen=True)
class Packed:
  """Documents in rows.

  Attributes:
    documents: the tokens.
    document, start, stop: int64 [i], the pieces, row by row.
    first: int64 [rows + 1], the first piece of each row.
    prompt: tokens of a piece's prompt, <bos> not counted.
    nodes: tokens of a row, wrong ones included.
    errors: most wrong tokens of a row.
    vocab: v.
  """

  documents: Documents
  document: np.ndarray
  start: np.ndarray
  stop: np.ndarray
  first: np.ndarray
  prompt: int
  nodes: int
  errors: int
  vocab: int

  @property
  def rows(self) -> int:
    """The number of rows."""
    return len(self.first) - 1

  def pieces(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pieces [i] of `rows` [r], and the place in `rows` of each."""
    parts = [np.arange(self.first[k], self.first[k + 1]) for k in rows]
    return np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])

  def texts(self, piece: np.ndarray) -> list[np.ndarray]:
    """The tokens of pieces, prompt included and <eos>, where there is one, last."""
    texts, columns = [], (self.document, self.start, self.stop)
    for document, start, stop in zip(*(x[piece] for x in columns), strict=True):
      tokens = self.documents.read(document, start, stop)
      texts.append(np.append(tokens, EOS) if stop == self.documents.length[document] else tokens)
    return texts

  def prompts(self, piece: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(prompt int32 [i, p], its length int32 [i]) of pieces, <bos> first."""
    length = np.minimum(self.prompt, self.stop[piece] - self.start[piece])
    prompt = np.full((len(piece), 1 + self.prompt), PAD, np.int32)
    prompt[:, 0] = BOS
    for row, i, k in zip(prompt, piece, length, strict=True):
      row[1 : k + 1] = self.documents.read(self.document[i], self.start[i], self.start[i] + k)
    return prompt, (1 + length).astype(np.int32)

  def batch(self, rows: np.ndarray, rng, noise: Noise) -> dict[str, np.ndarray]:
    """The `rows` [r] as `actions.tree` describes a batch; `rng` draws the noise."""
    piece, row = self.pieces(rows)
    prompt, prompt_length = self.prompts(piece)
    answers = [text[k - 1 :] for text, k in zip(self.texts(piece), prompt_length, strict=True)]
    answer = np.full((len(rows), self.nodes - self.errors), PAD, np.int32)
    owner = np.zeros_like(answer)
    count = np.array([len(text) for text in answers])
    for k in range(len(rows)):
      here = np.flatnonzero(row == k)
      answer[k, : count[here].sum()] = np.concatenate([answers[i] for i in here])
      owner[k, : count[here].sum()] = np.repeat(here, count[here])
    wrong = np.arange(self.vocab)[None] >= SPECIAL
    actions, weight = corrupt(rng, answer, wrong, noise)
    acts, weights = _by_piece(actions, weight, owner, len(piece))
    longest = np.max(prompt_length + np.sum(acts > BACKSPACE, axis=1))
    nodes = max(prompt.shape[1], int(longest))  # all of them may be shorter than a prompt
    trees = tree(prompt, prompt_length, acts, nodes) | {"weight": weights}
    return pack_rows(trees, row, self.nodes, actions.shape[1])


def _by_piece(actions, weight, owner, pieces: int):
  """Actions and weight [r, a] of rows -> those of their pieces [i, a'], PAD last.

  `owner` [r, n] is the piece of each data action, and of the errors before it.
  """
  data = (weight > 0) & (actions != BACKSPACE)
  index = np.minimum(np.cumsum(data, 1) - data, owner.shape[1] - 1)
  row, time = np.nonzero(actions != PAD)
  piece = owner[row, index[row, time]]
  count = np.bincount(piece, minlength=pieces)
  place = np.arange(len(piece)) - (np.cumsum(count) - count)[piece]

  def split(values):
    out = np.zeros((pieces, count.max()), values.dtype)
    out[piece, place] = values[row, time]
    return out

  return split(actions), split(weight)


def pack(documents: Documents, vocab: int, context: int, errors: int, prompt: int) -> Packed:
  """Cuts documents and puts their pieces into rows of `context` tokens.

  Args:
    vocab: size of the vocabulary.
    errors: wrong tokens for which a row must have room.
    prompt: tokens of a piece's prompt, <bos> not counted.
  """
  limit = context - errors - 1
  if limit < 1:
    raise UserError(
      f"data.context={context} leaves no room for text: <bos> takes 1 and noise.max_errors "
      f"{errors}; choose more context."
    )
  if not 0 <= prompt < limit:
    raise UserError(
      f"data.prompt={prompt} must be at least 0 and, with data.context={context} and "
      f"noise.max_errors={errors}, less than {limit}; choose a smaller one, or more context."
    )
  if (longest := documents.length.max()) <= prompt:
    raise UserError(
      f"data.prompt={prompt} leaves nothing to learn: the longest of {len(documents.length)} texts "
      f"for training or testing has {longest} tokens (of a single document the last tenth is for "
      f"testing); choose less than {longest}, or give longer texts, or texts to test in data.test."
    )
  document, start, stop = cut(documents.length, limit)
  row = assign(1 + stop - start, context - errors)
  order = np.argsort(row, kind="stable")
  first = np.searchsorted(row[order], np.arange(row.max() + 2))
  columns = (x[order] for x in (document, start, stop))
  return Packed(documents, *columns, first, prompt, context, errors, vocab)


def stream(
  packed: Packed, noise: Noise, batch: int, rows: np.ndarray, seed: int, position: int
) -> Iterator[dict[str, np.ndarray]]:
  """This process's rows of batch `position`, `position + 1`, ...

  Args:
    batch: rows in a global batch.
    rows: this process's rows of it.

  Yields:
    A batch of `actions.tree` with several trees in a row and weight 0 at the wrong tokens, and the
    prompt of one piece of each row, `prompt` [r, p] with `prompt_length` [r].
  """
  order = grain.MapDataset.range(packed.rows).seed(seed).shuffle().repeat()
  while True:
    numbers = (position * batch + np.asarray(rows)).tolist()
    index = np.array([order[number] for number in numbers])
    rngs = [np.random.default_rng((seed, number)) for number in numbers]
    bounds = zip(rngs, packed.first[index], packed.first[index + 1], strict=True)
    prompt, length = packed.prompts(np.array([rng.integers(a, b) for rng, a, b in bounds]))
    trees = packed.batch(index, _Generators(rngs), noise)
    yield trees | {"prompt": prompt, "prompt_length": length}
    position += 1
