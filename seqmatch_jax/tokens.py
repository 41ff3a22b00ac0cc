"""Text as tokens: four special ones, then one for each character.

The tokens of a pretrained model are `TextVocab` in huggingface/tokenizer.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from train_jax.errors import UserError

if TYPE_CHECKING:
  from seqmatch_jax.huggingface.tokenizer import TextVocab

PAD, BOS, EOS, BACKSPACE = range(4)
SPECIAL = 4  # the first character's id
NAME = "<backspace>"  # of the token in a tokenizer.json
SHOWN = ("", "", "", "⌫")  # the special tokens in decoded text


def short(text: str) -> str:
  """The text as it is quoted in a message."""
  return repr(text if len(text) < 80 else text[:80] + "...")


def check_text(text: str) -> None:
  """Raises UserError if `text` holds a backspace, or half a character."""
  if "\b" in text or NAME in text:
    raise UserError(f"{short(text)} holds a backspace, which only the model may type; remove it.")
  if not is_unicode(text):
    raise UserError(f"{short(text)} is not text in UTF-8; write it as such.")


def is_unicode(text: str) -> bool:
  """Whether `text` can be encoded; half a pair of surrogates, which JSON may hold, cannot."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


@dataclass(frozen=True)
class Vocab:
  """Special tokens 0 to 3, then one token for each of `symbols`, the sorted characters."""

  symbols: tuple[str, ...]

  @classmethod
  def from_texts(cls, texts: Iterable[str]) -> Vocab:
    """The vocabulary of the characters in `texts`."""
    return cls(tuple(sorted(set().union(*texts))))

  @property
  def size(self) -> int:
    """Number of tokens, special ones included."""
    return SPECIAL + len(self.symbols)

  @cached_property
  def _ids(self) -> dict[str, int]:
    return {symbol: i for i, symbol in enumerate(self.symbols, SPECIAL)}

  def encode(self, text: str) -> list[int]:
    """One id for each character; UserError for an unknown character or a backspace."""
    check_text(text)
    unknown = sorted(set(text) - self._ids.keys())
    if unknown:
      raise UserError(
        f"{short(text)} has characters that the model does not know "
        f"({', '.join(map(repr, unknown))}); use only {''.join(self.symbols)!r}."
      )
    return [self._ids[symbol] for symbol in text]

  def pieces(self, ids: Iterable[int]) -> list[str]:
    """The text that each of `ids` adds: ⌫ for a backspace, nothing for other special tokens."""
    shown = (*SHOWN, *self.symbols)
    return [shown[i] for i in ids]

  def decode(self, ids: Iterable[int]) -> str:
    """The joined `pieces` of `ids`."""
    return "".join(self.pieces(ids))


def padded(texts: Sequence[Sequence[int]]) -> np.ndarray:
  """Lists of ids as the rows of one int32 array, with PAD after them."""
  array = np.full((len(texts), max(map(len, texts))), PAD, np.int32)
  for row, text in zip(array, texts, strict=True):
    row[: len(text)] = text
  return array


def encode_prompts(
  texts: Sequence[str], vocab: Vocab | TextVocab, context: int
) -> tuple[np.ndarray, np.ndarray]:
  """Texts -> (prompt int32 [b, p], prompt_length int32 [b]), <bos> first.

  Raises:
    UserError: there is no text, the vocabulary refuses one, or a prompt leaves no room for an
      answer in `context` tokens.
  """
  if not texts:
    raise UserError("there are no prompts; give at least one.")
  prompts = [[BOS, *vocab.encode(text)] for text in texts]
  length = np.array([len(prompt) for prompt in prompts], np.int32)
  longest = int(length.argmax())
  if length[longest] >= context:
    raise UserError(
      f"the prompt {short(texts[longest])} has {length[longest] - 1} tokens, and the context "
      f"of {context} tokens holds {context - 2} before an answer; shorten it."
    )
  return padded(prompts), length
