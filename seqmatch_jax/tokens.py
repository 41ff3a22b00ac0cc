"""Text as tokens: characters, or those of a pretrained model, after four special ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from train_jax.errors import UserError
from train_jax.files import read_json
from train_jax.storage.weights import sha256

if TYPE_CHECKING:
  from tokenizers import Tokenizer

PAD, BOS, EOS, BACKSPACE = range(4)
SPECIAL = 4  # the first character's id
NAME = "<backspace>"  # of the token in a tokenizer.json
_SHOWN = ("", "", "", "⌫")


def short(text: str) -> str:
  return repr(text if len(text) < 80 else text[:80] + "...")


def _check(text: str) -> None:
  """Raises UserError if `text` holds a backspace, or half a character."""
  if "\b" in text or NAME in text:
    raise UserError(f"{short(text)} holds a backspace, which only the model may type; remove it.")
  if not is_unicode(text):
    raise UserError(f"{short(text)} is not text in UTF-8; write it as such.")


def is_unicode(text: str) -> bool:
  """Whether `text` can be written; half a pair of surrogates, which JSON may hold, cannot."""
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


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
    _check(text)
    unknown = sorted(set(text) - self._ids.keys())
    if unknown:
      raise UserError(
        f"{short(text)} has characters that the model does not know "
        f"({', '.join(map(repr, unknown))}); "
        f"use only {''.join(self.symbols)!r}."
      )
    return [self._ids[symbol] for symbol in text]

  def pieces(self, ids: Iterable[int]) -> list[str]:
    """What each of `ids` adds to the text: a backspace ⌫, other special tokens nothing."""
    shown = (*_SHOWN, *self.symbols)
    return [shown[i] for i in ids]

  def decode(self, ids: Iterable[int]) -> str:
    """The text of `ids`: a backspace is shown as ⌫, other special tokens as nothing."""
    return "".join(self.pieces(ids))


@dataclass(frozen=True)
class TextVocab:
  """The tokens of a tokenizer.json (Hugging Face's `tokenizers`), in our order.

  The special tokens come first, as everywhere; its begin- and end-of-text are BOS and EOS, and its
  others follow in its own order. Where one token both begins and ends a text (GPT-2), BOS and EOS
  are two copies of it.

  Attributes:
    path: of tokenizer.json.
    sha256: of that file.
    bos, eos: its numbers of the tokens that begin and end a text.
    backspace: its number of <backspace>, which a tokenizer that was written here has; or -1.
  """

  path: str
  sha256: str
  bos: int
  eos: int
  backspace: int = -1

  @classmethod
  def from_file(cls, path: str | Path) -> TextVocab:
    """The vocabulary of a tokenizer.json, or of the folder that holds it.

    Which tokens begin and end a text is in tokenizer_config.json or config.json beside it.

    Raises:
      UserError: it cannot be read, or nothing says which token ends a text.
    """
    path = Path(path).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
      raise UserError(
        f"there is no tokenizer {path}; give a tokenizer.json, or a folder that holds one (nothing "
        "is fetched by name)."
      )
    vocab = cls(str(path), sha256(path), 0, 0)
    bos, eos = (_special(vocab._tokenizer, path.parent, name) for name in ("bos", "eos"))
    if eos is None:
      raise UserError(
        f"nothing beside {path} says which token ends a text; write "
        '{"bos_token": "...", "eos_token": "..."} into '
        f"{path.with_name('tokenizer_config.json')}."
      )
    back = vocab._tokenizer.token_to_id(NAME)
    bos, back = eos if bos is None else bos, -1 if back is None else back
    return cls(vocab.path, vocab.sha256, bos, eos, back)

  @classmethod
  def from_metadata(cls, metadata: dict) -> TextVocab:
    """The vocabulary that `metadata` describes; UserError if its file has changed or is gone."""
    vocab = cls(**metadata)
    if not Path(vocab.path).is_file():
      raise UserError(
        f"the tokenizer {vocab.path} is not there; put it back, or give --pretrained=FOLDER if the "
        "run's pretrained folder was moved."
      )
    if (found := sha256(vocab.path)) != vocab.sha256:
      raise UserError(
        f"{vocab.path} has the SHA-256 {found[:12]}... and this run was made with "
        f"{vocab.sha256[:12]}...; put the tokenizer of that time back."
      )
    return vocab

  def metadata(self) -> dict:
    """JSON that `from_metadata` makes it from again."""
    return asdict(self)

  @cached_property
  def _tokenizer(self) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
      tokenizer = Tokenizer.from_file(self.path)
    except Exception as err:  # a plain Exception, whatever is wrong
      raise UserError(
        f"{self.path} is no tokenizer ({str(err)[:100]}); give a tokenizer.json of `tokenizers`."
      ) from err
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # "<|endoftext|>" in a text is those characters: a text can't end itself.
    tokenizer.encode_special_tokens = True
    return tokenizer

  @cached_property
  def hf_size(self) -> int:
    """Number of the tokenizer's own tokens, which a model's weights must have as rows."""
    return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

  @cached_property
  def hf_ids(self) -> np.ndarray:
    """int32 [size]: the tokenizer's number of each of our tokens; -1 where it has none."""
    special = (-1, self.bos, self.eos, self.backspace)
    others = [i for i in range(self.hf_size) if i not in special]
    return np.array([*special, *others], np.int32)

  @cached_property
  def _ids(self) -> list[int]:
    ids = np.full(self.hf_size, BACKSPACE, np.int32)
    ids[self.hf_ids[SPECIAL:]] = np.arange(SPECIAL, self.size)
    ids[self.bos] = BOS
    ids[self.eos] = EOS
    return ids.tolist()

  @property
  def size(self) -> int:
    """Number of tokens, special ones included."""
    return len(self.hf_ids)

  def encode(self, text: str) -> list[int]:
    """The tokens of `text`, no special ones added; UserError if it holds a backspace."""
    _check(text)
    return [self._ids[i] for i in self._tokenizer.encode(text, add_special_tokens=False).ids]

  def pieces(self, ids: Iterable[int]) -> list[str]:
    """What each of `ids` adds to the text, so that they joined are `decode(ids)`.

    A character of several tokens comes with the last of them. A backspace is shown as ⌫, other
    special tokens as nothing.
    """
    from tokenizers.decoders import DecodeStream

    stream, numbers, found, waiting = DecodeStream(), self.hf_ids, [], []
    for i in ids:
      if i < SPECIAL:
        found.append(_SHOWN[i])
        continue
      waiting.append(int(numbers[i]))
      try:
        piece = stream.step(self._tokenizer, waiting[-1])
      except Exception:  # a plain one, where bytes that are no character unmake the one before
        stream = DecodeStream()
        piece = "".join(stream.step(self._tokenizer, number) or "" for number in waiting)
      if piece:
        waiting.clear()
      found.append(piece or "")
    return found

  def decode(self, ids: Iterable[int]) -> str:
    """The text of `ids`: a backspace is shown as ⌫, other special tokens as nothing."""
    return "".join(self.pieces(ids))


def _special(tokenizer: Tokenizer, folder: Path, name: str) -> int | None:
  """The number of the token that is called `name`, "bos" or "eos", in `folder`; None if none is."""

  def read(file: str, key: str):
    try:
      return read_json(folder / file).get(key)
    except FileNotFoundError:
      return None
    except (OSError, ValueError) as err:
      raise UserError(f"{folder / file} cannot be read as JSON: {err}.") from err

  token = read("tokenizer_config.json", f"{name}_token")
  token = token["content"] if isinstance(token, dict) else token
  if token is not None:
    number = tokenizer.token_to_id(token)
  else:
    number = read("config.json", f"{name}_token_id")
    number = number[0] if isinstance(number, list) else number  # the first one ends a text
    token = number
  if token is not None and (number is None or tokenizer.id_to_token(number) is None):
    raise UserError(f"{folder} names {token!r} as {name} token, which its tokenizer does not have.")
  return number


def padded(texts: Sequence[Sequence[int]]) -> np.ndarray:
  """Lists of ids as the rows of one array, PAD after them."""
  rows = np.full((len(texts), max(map(len, texts))), PAD, np.int32)
  for row, text in zip(rows, texts, strict=True):
    row[: len(text)] = text
  return rows


def encode_prompts(
  texts: Sequence[str], vocab: Vocab | TextVocab, context: int
) -> tuple[np.ndarray, np.ndarray]:
  """Texts -> (prompt int32 [b, p], prompt_length int32 [b]), <bos> first.

  Raises:
    UserError: no text, characters that are not in the vocabulary, a backspace, or a prompt that
      leaves no room for an answer in `context` nodes.
  """
  if not texts:
    raise UserError("there are no prompts; give at least one.")
  rows = [[BOS, *vocab.encode(text)] for text in texts]
  long = max(range(len(rows)), key=lambda i: len(rows[i]))
  if len(rows[long]) >= context:
    raise UserError(
      f"the prompt {short(texts[long])} has {len(rows[long]) - 1} tokens, and the context "
      f"of {context} tokens holds {context - 2} before an answer; shorten it."
    )
  return padded(rows), np.array([len(row) for row in rows], np.int32)


def to_metadata(vocab: Vocab | TextVocab) -> dict:
  """JSON that `from_metadata` makes the vocabulary from again."""
  if isinstance(vocab, TextVocab):
    return {"tokenizer": vocab.metadata()}
  return {"symbols": list(vocab.symbols)}


def from_metadata(metadata: dict) -> Vocab | TextVocab:
  """The vocabulary that `metadata` describe; UserError if its tokenizer is another one now."""
  if "tokenizer" in metadata:
    return TextVocab.from_metadata(metadata["tokenizer"])
  return Vocab(tuple(metadata["symbols"]))
