"""Documents of text, in random access: files, JSON lines, ArrayRecord, TFDS, or Python's own.

A source knows the number of documents and the place of each, and reads them one by one. In plain
text files only, a line `<|endoftext|>` ends a document. A file without one is a document, and blank
lines are a part of it.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from train_jax.errors import UserError
from train_jax.storage import records

SEPARATOR = b"<|endoftext|>"
PLAIN, LINES, RECORDS = (".txt", ".md", ".rst"), (".jsonl", ".ndjson"), ".array_record"
FIELDS = {"text": bytes}, "a 'text'"  # of records


@dataclass(frozen=True)
class Corpus:
  """Documents.

  Attributes:
    size: their number.
    read: i -> the text of document i. Raises ValueError, with the reason, if it is no text.
    name: i -> the origin of document i, the same wherever the source lies.
    content: SHA-256 of all files; "" for those that are not read when the corpus is opened.
  """

  size: int
  read: Callable[[int], str]
  name: Callable[[int], str]
  content: str = ""


def from_list(texts: list[str], name: str) -> Corpus:
  """Documents in memory."""
  return Corpus(len(texts), texts.__getitem__, lambda i: f"{name} {i}")


def _lines(path: Path, digest) -> Iterator[tuple[int, bytes]]:
  """(offset, line) of each line of a file, of which `digest` takes note."""
  offset = 0
  digest.update(f"\0{path.name}\0".encode())
  try:
    with path.open("rb") as file:
      for line in file:
        digest.update(line)
        yield offset, line
        offset += len(line)
  except OSError as err:
    raise UserError(f"the text file {str(path)!r} cannot be read: {err.strerror}.") from err


def _plain(path: Path, digest) -> list[tuple[Path, int, int, str]]:
  """(file, offset, bytes, name) of each document of a plain text file, without blank ones."""
  documents, start, stop, blank = [], 0, 0, True

  def close():
    if not blank:
      documents.append((path, start, stop - start, f"{path.name}:{start}"))

  for offset, line in _lines(path, digest):
    if line.strip() == SEPARATOR:
      close()
      start, stop, blank = offset + len(line), offset + len(line), True
    else:
      stop, blank = offset + len(line), blank and not line.strip()
  close()
  return documents


def _json_lines(path: Path, digest) -> list[tuple[Path, int, int, str]]:
  """(file, offset, bytes, name) of each line that is not blank."""
  return [
    (path, offset, len(line), f"{path.name}:{number}")
    for number, (offset, line) in enumerate(_lines(path, digest), 1)
    if line.strip()
  ]


def _decode(content: bytes, encoding: str = "utf-8") -> str:
  try:
    return content.decode(encoding)
  except ValueError as err:
    raise ValueError(f"it is not text in UTF-8: {err}") from err


def files(paths: list[Path]) -> Corpus:
  """Plain text, and JSON lines `{"text": "...", ...}`; read, and checked, where they lie."""
  documents, digest = [], hashlib.sha256()
  for path in paths:
    documents += (_json_lines if path.suffix in LINES else _plain)(path, digest)

  def read(i: int) -> str:
    path, offset, size, _ = documents[i]
    with path.open("rb") as file:
      file.seek(offset)
      text = _decode(file.read(size), "utf-8" if offset else "utf-8-sig")
    if path.suffix not in LINES:
      return text.replace("\r\n", "\n").strip("\n")
    try:
      text = json.loads(text)["text"]
      if isinstance(text, str):
        return text
    except (json.JSONDecodeError, KeyError, TypeError):
      pass
    raise ValueError('it is not a JSON object {"text": "...", ...}')

  return Corpus(len(documents), read, lambda i: documents[i][3], digest.hexdigest())


def _decoded(source: records.Records) -> Corpus:
  return Corpus(source.size, lambda i: _decode(source.read(i)[0]), source.name)


def find(source: str, flag: str) -> Corpus:
  """The documents that `flag=source` names; UserError if there are none.

  Args:
    source: a file, a pattern, or a directory (with those below it) of .txt, .md, .rst, .jsonl or
      .array_record files; where there are .array_record files, the others are ignored. Or a TFDS
      builder's directory, or `tfds:NAME[@SPLIT]`.
  """
  path = Path(source).expanduser()
  if records.is_tfds(source):
    corpus = _decoded(records.open_tfds(source, flag, *FIELDS))
  else:
    named = [path] if path.is_file() else map(Path, glob.glob(str(path)))
    inside = path.rglob("*") if path.is_dir() else named
    paths = sorted(file for file in inside if file.is_file())
    packed = [file for file in paths if RECORDS in file.name]
    written = [file for file in paths if file.suffix in (*PLAIN, *LINES)]
    if not paths:
      raise UserError(f"{flag}={source!r} is not there; give a file, a directory or a pattern.")
    if not packed and not written:
      raise UserError(
        f"{flag}={source!r} has no texts; give .txt files (a document each, or split by lines "
        f"{SEPARATOR.decode()}), .jsonl or .array_record files, a TFDS directory, or tfds:NAME."
      )
    corpus = _decoded(records.open_array_records(packed, *FIELDS)) if packed else files(written)
  if not corpus.size:
    raise UserError(f"{flag}={source!r} holds no document; give texts that are not blank.")
  return corpus


_ASCII = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "…": "...", "—": "--", "–": "-"})
PRINTABLE = "".join(map(chr, range(32, 127)))


def _paragraphs(text: str) -> Iterator[str]:
  """The paragraphs of English prose in `text`, each as one line of printable ASCII."""
  for paragraph in re.split(r"\n\s*\n", text):
    line = " ".join(paragraph.split()).translate(_ASCII)
    if len(line) >= 32 and line[0].isupper() and line[-1] == "." and not set(line) - {*PRINTABLE}:
      yield line


def python_prose() -> Corpus:
  """The English that every Python comes with: about 0.7 MB, some 5000 documents of a paragraph.

  These are the paragraphs of the language reference (pydoc_data.topics) and of the docstrings in
  the standard library's single-file modules. The text differs by a few per cent from one version of
  Python to the next; its characters, printable ASCII, do not.
  """
  try:
    from pydoc_data.topics import topics
  except ImportError:
    topics = {}
  texts = [topics[name] for name in sorted(topics)]
  for path in sorted(Path(os.__file__).parent.glob("*.py")):
    texts += re.findall(r'"""(.*?)"""', path.read_text(encoding="utf-8", errors="ignore"), re.S)
  texts = list(dict.fromkeys(line for text in texts for line in _paragraphs(text)))
  if len(texts) < 1000:
    raise UserError(
      "this Python comes without the texts of its library; give others with data.path."
    )
  return from_list(texts, "paragraph")
