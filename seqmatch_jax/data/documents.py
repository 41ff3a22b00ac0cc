"""Documents as tokens: in memory, or stored by `--mode=encode` and read where they lie.

A stored set is a directory (see encode.py):

    manifest.json                    the counts, the vocabulary, and the origin of the texts
    tokenizer.json                   the tokenizer, unless a token is a character
    tokens-00003-of-00157.npy        the tokens of one shard's documents, one after the other
    lengths-00003-of-00157.npy       the number of tokens of each document

Dimensions: d documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from seqmatch_jax import tokens
from seqmatch_jax.data.corpus import Corpus
from seqmatch_jax.huggingface import tokenizer
from seqmatch_jax.huggingface.tokenizer import TextVocab
from seqmatch_jax.tokens import Vocab
from train_jax.errors import UserError
from train_jax.files import read_json
from train_jax.storage.faults import LIMIT, Faults
from train_jax.storage.shards import shard_name

VERSION = 1  # of the layout above
MAX_CHARACTERS = 100_000_000  # that are turned into tokens at the start of a run


def token_type(size: int) -> np.dtype:
  """The stored type of the tokens of a vocabulary of `size`."""
  return np.dtype("<u2" if size <= 2**16 else "<i4")


@dataclass(frozen=True)
class Documents:
  """Token documents in random access.

  Attributes:
    parts: 1-D arrays of tokens, which may be mapped files.
    length: int64 [d], tokens of each document, <eos> not counted.
    part, offset: int64 [d], the part that holds it, and its first place there.
    content: `content_of` all documents of the source; "" if it is unknown.
  """

  parts: tuple[np.ndarray, ...]
  length: np.ndarray
  part: np.ndarray
  offset: np.ndarray
  content: str = ""

  @classmethod
  def from_parts(
    cls, parts: Sequence[np.ndarray], lengths: Sequence[np.ndarray], content: str = ""
  ) -> Documents:
    """`parts` hold documents of these lengths, one after the other."""
    part = np.repeat(np.arange(len(lengths)), [len(x) for x in lengths])
    offset = [np.cumsum(x, dtype=np.int64) - x for x in lengths]
    length, offset = np.concatenate(lengths).astype(np.int64), np.concatenate(offset)
    return cls(tuple(parts), length, part, offset, content)

  def read(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Tokens `start` to `stop` of a document, int32."""
    stop = self.length[document] if stop is None else stop
    begin = self.offset[document]
    return self.parts[self.part[document]][begin + start : begin + stop].astype(np.int32)

  def select(self, index: np.ndarray) -> Documents:
    """The documents of `index`."""
    picked = {name: getattr(self, name)[index] for name in ("length", "part", "offset")}
    return replace(self, **picked)

  def split(self, tests: int) -> tuple[Documents, Documents]:
    """(the others, `tests` documents spread evenly over all); UserError if there are too few.

    The last tenth is held out from a single document, such as a book.
    """
    size = len(self.length)
    if size == 1:
      end = self.length[0] * 9 // 10
      if not end:
        raise UserError(
          "these texts are one document of one token, of which no part can be held out; give more "
          "text, or data.test."
        )
      rest = replace(self, length=self.length - end, offset=self.offset + end)
      return replace(self, length=0 * self.length + end), rest
    if not 1 <= tests < size:
      raise UserError(
        f"data.tests={tests} must be at least 1 and less than the {size} documents there are; "
        "choose another number, or give data.test."
      )
    held = np.linspace(0, size - 1, tests + 2).round().astype(int)[1:-1]
    if tests == size - 1:  # the places are less than 1 apart
      held = np.arange(1, size)
    return self.select(np.setdiff1d(np.arange(size), held)), self.select(held)


def encode_texts(
  texts: Corpus, vocab: Vocab | TextVocab, faults: Faults | None = None
) -> Documents:
  """All of `texts` that have tokens, in memory; UserError if there are too many.

  Args:
    faults: counts the texts that are left out; None for any LIMIT of them.
  """
  encoded, characters, faults = [], 0, faults or Faults(LIMIT, "the texts")
  for i in range(texts.size):
    text = read_text(texts, i, faults)
    characters += len(text)
    if characters > MAX_CHARACTERS:
      raise UserError(
        f"these texts have more than {MAX_CHARACTERS:,} characters; turn them into tokens once, "
        "with --mode=encode --texts=..., and give its directory as data.path."
      )
    encoded.append(np.array(vocab.encode(text), token_type(vocab.size)))
  encoded = [ids for ids in encoded if len(ids)]
  if not encoded:
    raise UserError("these texts have no tokens; give texts that are not blank.")
  lengths = np.array([len(ids) for ids in encoded])
  return Documents.from_parts([np.concatenate(encoded)], [lengths], content_of(encoded))


def content_of(documents: Iterable[np.ndarray], others: Iterable[str] = ()) -> str:
  """The sum of the SHA-256 of each document's tokens, and of `others`, which are such sums.

  So shards can be added; the order is not in it.
  """
  total = sum(int(other, 16) for other in others)
  total += sum(int(hashlib.sha256(ids.data).hexdigest(), 16) for ids in documents)
  return f"{total % 2**256:064x}"


def read_text(texts: Corpus, i: int, faults: Faults) -> str:
  """Text i; "" if it cannot be used, which is counted as a fault."""
  text, why = find_text(texts, i)
  if why:
    faults.add(texts.name(i), why)
  return text


def find_text(texts: Corpus, i: int) -> tuple[str, str]:
  """(text i, ""), or ("", the reason why it cannot be used)."""
  try:
    text = texts.read(i)
  except UserError:
    raise
  except ValueError as err:
    return "", str(err)
  if "\b" in text or tokens.NAME in text:
    return "", "it holds a backspace"
  if not tokens.is_unicode(text):
    return "", "it holds half a character, which is not text in UTF-8"
  return text, ""


def is_set(path: str) -> bool:
  """Whether `path` is a stored set."""
  return bool(path) and (Path(path).expanduser() / "manifest.json").is_file()


def open_set(path: str) -> tuple[Documents, Vocab | TextVocab]:
  """The stored set in the directory `path`, with its vocabulary; UserError if it is not whole."""
  top = Path(path).expanduser()
  try:
    manifest = read_json(top / "manifest.json")
  except (OSError, ValueError) as err:
    raise UserError(f"{top / 'manifest.json'} is damaged; encode the texts again.") from err
  if manifest.get("version") != VERSION or "documents" not in manifest:
    raise UserError(
      f"{path!r} is not a set of token documents of layout version {VERSION}; make one with "
      "--mode=encode --texts=..."
    )
  if "tokenizer" in manifest["vocab"]:
    manifest["vocab"]["tokenizer"]["path"] = str(top / "tokenizer.json")
  vocab, shards = tokenizer.from_metadata(manifest["vocab"]), manifest["shards"]
  parts, lengths = [], []
  for i in range(shards):
    files = [top / shard_name(file, i, shards) for file in ("tokens.npy", "lengths.npy")]
    try:
      parts.append(np.load(files[0], mmap_mode="r"))
      lengths.append(np.load(files[1]))
    except (OSError, ValueError) as err:
      raise UserError(
        f"{files[0]} and {files[1].name} are missing or damaged; delete them and run the "
        "--mode=encode command again, which makes only what is missing."
      ) from err
    if lengths[-1].sum() != len(parts[-1]):
      raise UserError(f"{files[0]} and {files[1].name} do not belong together; encode again.")
  documents = Documents.from_parts(parts, lengths, manifest.get("documents_sha256", ""))
  counts = len(documents.length), documents.length.sum()
  if counts != (manifest["documents"], manifest["tokens"]):
    raise UserError(f"the shards in {path!r} are not those of its manifest.json; encode again.")
  return documents, vocab
