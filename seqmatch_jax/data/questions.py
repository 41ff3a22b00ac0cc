"""Questions and answers from files or generators to batches of action trees, addressed by position.

The examples and the noise of a batch are a function of (seed, position) only.

Dimensions: e examples, b batch, p prompt, n data actions, v vocabulary, s nodes, a actions.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np

from seqmatch_jax.actions import Noise, corrupt, tree
from seqmatch_jax.data.rows import group_into_rows, pack
from seqmatch_jax.tokens import BACKSPACE, EOS, SPECIAL, Vocab, encode_prompts, padded
from train_jax.errors import UserError
from train_jax.storage.faults import LIMIT, Faults

OFFICIAL = Path(__file__).parent / "mathematics_dataset"


class Example(NamedTuple):
  """A question, its answer, and the candidates for a wrong token (`Noise.source`)."""

  question: str
  answer: str
  candidates: str


def read_module(path, max_faults: int = LIMIT) -> tuple[Example, ...]:
  """A text file of any module of mathematics_dataset: question and answer on alternating lines.

  A question with bytes that are not UTF-8 (from a damaged disk, say) is named, skipped and counted,
  and more than `max_faults` of them are a UserError.
  """
  try:
    content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
  except OSError as err:
    raise UserError(f"the data file {str(path)!r} cannot be read: {err.strerror}.") from err
  lines = content.replace(b"\r\n", b"\n").rstrip(b"\n").split(b"\n")
  if lines == [b""]:
    raise UserError(f"{path} is empty; give question and answer on alternating lines.")
  for number, line in enumerate(lines, 1):
    if not line.strip():
      raise UserError(
        f"{path}, line {number}: the {'question' if number % 2 else 'answer'} is blank; give "
        "question and answer on alternating lines."
      )
  if len(lines) % 2:
    raise UserError(f"{path}, line {len(lines)}: the last question has no answer; add it.")
  faults, examples = Faults(max_faults, str(path)), []
  for number in range(0, len(lines), 2):
    try:
      question, answer = (line.decode() for line in lines[number : number + 2])
      if "\0" in question + answer:
        raise ValueError("zero bytes")
      examples.append(Example(question, answer, question))
    except ValueError:
      faults.add(f"the question of line {number + 1}", "it is not text in UTF-8")
  if not examples:
    raise UserError(f"{path} has no question that is text in UTF-8; save it as such.")
  return tuple(examples)


def _distinct(draw: Callable[[], tuple | None], count: int, source: str) -> tuple[Example, ...]:
  """`count` examples with different keys, of `draw() -> (key, example)`, or None for a bad draw."""
  examples, misses = {}, 0
  while len(examples) < count:
    drawn = draw()
    if drawn is None or drawn[0] in examples:
      misses += 1
    else:
      misses, examples[drawn[0]] = 0, drawn[1]
    if misses > 1000:
      raise UserError(
        f"{source} has hardly more than {len(examples)} different questions, and {count} are asked "
        "for; ask for fewer."
      )
  return tuple(examples.values())


def make_add_or_sub_in_base(count: int, seed: int) -> tuple[Example, ...]:
  """`count` different questions from the distribution of the official files.

  It is that of mathematics_dataset/modules/arithmetic.py: the two numbers share 3 to 10 decimal
  digits, and the base is from 2 to 16. Parts of the result are disjoint sets for training and
  testing.
  """
  rng = np.random.default_rng(seed)

  def number(digits: float) -> int:
    largest = math.ceil(10**digits / 2)
    return int(rng.integers(-largest, largest, endpoint=True))

  def draw():
    digits = rng.uniform(3, 10)
    first = max(1.0, rng.uniform(0, digits))
    p, q = number(first), number(max(1.0, digits - first))
    base, sign = int(rng.integers(2, 17)), rng.choice(["+", "-"])
    p_text, q_text, answer = (
      np.base_repr(x, base).lower() for x in (p, q, p + q if sign == "+" else p - q)
    )
    question = f"In base {base}, what is {p_text} {sign} {q_text}?"
    return question, Example(question, answer, question)

  return _distinct(draw, count, "add_or_sub_in_base")


def make_two_sum(count: int, seed: int, numbers: int = 6, modulus: int = 16) -> tuple[Example, ...]:
  """`count` different questions of 2-SUM: which two of the numbers add up to the target?

  "a13f06=4" -> "13": 1 + 3 = 4 modulo 16, in the order of the question; no other two do. A number
  is one character, a digit in base `modulus`. No two questions differ only in their order, so parts
  of the result are disjoint sets for training and testing.
  """
  if not 2 <= numbers <= modulus <= 36:
    raise UserError(
      f"two_sum with numbers={numbers} and modulus={modulus}: choose 2 <= numbers <= modulus <= 36."
    )
  rng = np.random.default_rng(seed)
  pairs = np.array(list(combinations(range(numbers), 2)))

  def draw():
    values = rng.permutation(modulus)[:numbers]
    sums = values[pairs].sum(1) % modulus
    chosen = rng.integers(len(pairs))
    if np.sum(sums == sums[chosen]) > 1:
      return None
    text = "".join(np.base_repr(x, 36).lower() for x in values)
    target = np.base_repr(sums[chosen], 36).lower()
    i, j = pairs[chosen]
    return (*sorted(text), target), Example(f"{text}={target}", text[i] + text[j], text)

  return _distinct(draw, count, f"two_sum with numbers={numbers} and modulus={modulus}")


@dataclass(frozen=True)
class Encoded:
  """Examples as tokens.

  Attributes:
    prompt: int32 [e, p], <bos> first, PAD last.
    prompt_length: int32 [e].
    answer: int32 [e, n], data actions: characters, <eos>, PAD.
    alphabet: bool [v], the characters of all answers.
    candidates: bool [e, v], the candidates for a wrong token among them.
  """

  prompt: np.ndarray
  prompt_length: np.ndarray
  answer: np.ndarray
  alphabet: np.ndarray
  candidates: np.ndarray

  def first(self, count: int) -> Encoded:
    """The first `count` examples."""
    rows = {name: getattr(self, name)[:count] for name in ("prompt", "prompt_length", "answer")}
    return replace(self, **rows, candidates=self.candidates[:count])

  def nodes(self, noise: Noise) -> int:
    """s of a batch: the longest prompt with its answer, and all wrong tokens."""
    letters = np.sum(self.answer >= SPECIAL, axis=1)
    return int(np.max(self.prompt_length + letters)) + noise.max_errors

  def actions(self, noise: Noise) -> int:
    """a of a batch: the longest answer, <eos>, and a <backspace> for each wrong token."""
    return self.answer.shape[1] + 2 * noise.max_errors

  def wrong(self, noise: Noise) -> np.ndarray:
    """bool [e, v]: the tokens that an example's wrong tokens are drawn from."""
    if noise.source == "prompt":
      return self.candidates
    return np.broadcast_to(self.alphabet, self.candidates.shape)


def encode(examples: Sequence[Example], vocab: Vocab, context: int) -> Encoded:
  """Examples as tokens; UserError for one of more than `context`, or with unknown characters."""
  prompt, prompt_length = encode_prompts([x.question for x in examples], vocab, context)
  answers = [vocab.encode(x.answer) for x in examples]
  for x, before, answer in zip(examples, prompt_length, answers, strict=True):
    if before + len(answer) > context:
      raise UserError(
        f"the question {x.question!r} with its answer {x.answer!r} takes {before + len(answer)} "
        f"tokens, and the context holds {context}; raise it or remove the question."
      )

  def members(text: str) -> np.ndarray:
    return np.isin(np.array(["", "", "", "", *vocab.symbols]), list(text))

  alphabet = members("".join(x.answer for x in examples))
  candidates = np.stack([members(x.candidates) for x in examples]) & alphabet
  return Encoded(prompt, prompt_length, padded([[*x, EOS] for x in answers]), alphabet, candidates)


def row_nodes(data: Encoded, noise: Noise, batch: int, sequences_per_row: int) -> int:
  """Nodes of a row: those of the fullest row of 100 random batches."""
  if sequences_per_row == 1:
    return data.nodes(noise)
  size = data.prompt_length + np.sum(data.answer >= SPECIAL, axis=1)
  draws = np.random.default_rng(0).choice(size, (100, batch))
  fullest = max(int(draw[group_into_rows(draw, sequences_per_row)].sum(1).max()) for draw in draws)
  return fullest + sequences_per_row * noise.max_errors


def stream(
  data: Encoded,
  noise: Noise,
  batch: int,
  rows: slice | np.ndarray,
  seed: int,
  position: int,
  sequences_per_row: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
  """This process's rows of batch `position`, `position + 1`, ...

  Each epoch is a new permutation, with new noise. MLE is the same call without noise.

  Args:
    batch: examples in a global batch.
    rows: this process's rows of it; there are batch / sequences_per_row in all.
    sequences_per_row: examples in a row.

  Yields:
    A batch of `actions.tree` with `sequences_per_row` trees in a row and weight 0 at wrong tokens,
    and the examples' prompts, `prompt` [b, p] with `prompt_length` [b]. A batch of unusually long
    rows is not cut off: it is wider than the others, and compiled anew.
  """
  nodes, wrong = data.nodes(noise), data.wrong(noise)
  usual = row_nodes(data, noise, batch, sequences_per_row)

  def make(index: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    # Noise and rows are those of the global batch: they must not depend on the number of processes.
    actions, weight = corrupt(rng, data.answer[index], wrong[index], noise)
    size = data.prompt_length[index] + np.sum(actions > BACKSPACE, axis=1)
    table = group_into_rows(size, sequences_per_row)
    width = usual if (fullest := size[table].sum(1).max()) <= usual else -(-fullest // 32) * 32
    prompt, length = data.prompt[index], data.prompt_length[index]
    local = table[rows].reshape(-1)
    trees = tree(prompt[local], length[local], actions[local], nodes) | {"weight": weight[local]}
    # The prompts keep the order of their draw. That of the table goes by size, and only the first
    # prompts are rolled out.
    drawn = np.arange(batch).reshape(-1, sequences_per_row)[rows].reshape(-1)
    return {
      **pack(trees, sequences_per_row, width),
      "prompt": prompt[drawn],
      "prompt_length": length[drawn],
    }

  order = grain.MapDataset.range(len(data.answer)).seed(seed).shuffle().repeat().batch(batch)
  batches = order.random_map(make)
  while True:
    yield batches[position]
    position += 1
