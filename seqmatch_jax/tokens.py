"""Characters as tokens, after four special ones that every vocabulary has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from train_jax.errors import UserError

PAD, BOS, EOS, BACKSPACE = range(4)
SPECIAL = 4  # the first character's id
_SHOWN = ("", "", "", "⌫")


@dataclass(frozen=True)
class Vocab:
  """Special tokens 0 to 3, then one token a character.

  Attributes:
    symbols: the characters, sorted.
  """

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
    """One id a character.

    Raises:
      UserError: characters that are not in the vocabulary, or a backspace.
    """
    if "\b" in text or "<backspace>" in text:
      raise UserError(f"{text!r} holds a backspace, which only the model may type; remove it.")
    unknown = sorted(set(text) - self._ids.keys())
    if unknown:
      raise UserError(
        f"{text!r} has characters that the model does not know ({', '.join(map(repr, unknown))}); "
        f"use only {''.join(self.symbols)!r}."
      )
    return [self._ids[symbol] for symbol in text]

  def decode(self, ids: Iterable[int]) -> str:
    """The text of `ids`: a backspace is shown as ⌫, other special tokens as nothing."""
    shown = (*_SHOWN, *self.symbols)
    return "".join(shown[i] for i in ids)
