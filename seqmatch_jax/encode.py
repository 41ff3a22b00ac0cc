"""`--mode=encode --texts=...`: texts -> a set of token documents (see documents.py), in shards.

Each process makes its own shards, and the threads of a process share out the texts of a shard. A
shard is written under another name and renamed when it is whole: a run that is killed loses the
shard that it was at work on, and the same command goes on with the others kept. Texts that cannot
be used, because they are no UTF-8, hold a backspace or are blank, are named, skipped and counted.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from absl import logging

from seqmatch_jax import corpus, tokens
from seqmatch_jax.corpus import Texts
from seqmatch_jax.documents import VERSION, shard_name, token_type
from seqmatch_jax.tokens import TextVocab, Vocab
from train_jax.errors import UserError
from train_jax.metrics import progress_bar

PER_SHARD = 8192  # texts
CHUNK = 64  # texts that a thread takes at a time


@dataclass(frozen=True)
class Job:
  """What a set is made of: two runs into one directory must agree in all of it."""

  version: int
  texts: str  # SHA-256 of the texts' names
  tokenizer: str  # SHA-256 of its file; "": a token a character
  size: int  # texts
  shards: int

  def rows(self, shard: int) -> range:
    """The texts of a shard."""
    return range(self.size * shard // self.shards, self.size * (shard + 1) // self.shards)


def make_job(texts: Texts, tokenizer: str, shards: int) -> Job:
  """The job of `--texts --tokenizer --shards`; 0 shards chooses their number."""
  if not 0 <= shards <= texts.size:
    raise UserError(f"--shards={shards} must be between 1 and the {texts.size} texts.")
  if not shards:
    shards = min(texts.size, max(-(-texts.size // PER_SHARD), jax.process_count()))
  listing = hashlib.sha256()
  for i in range(texts.size):
    listing.update(texts.name(i).encode() + b"\0")
  return Job(VERSION, listing.hexdigest(), tokenizer, texts.size, shards)


def _check_same(out: Path, job: Job) -> None:
  """Raises UserError if `out` holds shards of another job."""
  known = {
    "version": "layout version",
    "texts": "--texts",
    "tokenizer": "--tokenizer",
    "size": "number of texts",
    "shards": "--shards",
  }
  for path in sorted(out.glob("part-*.json")):
    there = json.loads(path.read_text())["job"]
    differ = [name for key, name in known.items() if there.get(key) != getattr(job, key)]
    if differ:
      raise UserError(
        f"--out={out} holds tokens of another {' and '.join(differ)} ({path.name}); choose another "
        "directory, or give what those were made with to go on."
      )


def _write(path: Path, write: Callable) -> None:
  """`write(file)` under another name, which becomes `path` once it is whole and on the disk."""
  partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
  with partial.open("wb") as file:
    write(file)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)


def _write_json(path: Path, value) -> None:
  _write(path, lambda file: file.write(json.dumps(value).encode()))


def _read(texts: Texts, i: int, use: Callable):
  """(use(text i), ""), or (None, why it is skipped)."""
  try:
    text = texts.read(i)
  except ValueError as err:
    return None, f"{texts.name(i)} is not text in UTF-8 ({err})"
  if not text.strip():
    return None, f"{texts.name(i)} is blank"
  if "\b" in text or "<backspace>" in text:
    return None, f"{texts.name(i)} holds a backspace"
  return use(text), ""


def _over(texts: Texts, rows: range, use: Callable, progress: Callable) -> tuple[list, int]:
  """([use(text) of each that can be used], how many were skipped), by threads, in order."""
  parts = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
  used, skipped = [], 0
  with ThreadPoolExecutor(os.cpu_count(), "encode") as pool:
    for found in pool.map(lambda part: [_read(texts, i, use) for i in part], parts):
      for result, why in found:
        if why:
          logging.warning("skipped: %s", why)
          skipped += 1
        else:
          used.append(result)
      progress(len(found))
  return used, skipped


def find_symbols(texts: Texts, out: Path) -> Vocab:
  """One token for each character there is in the texts; found once, and kept in `out`."""
  path = out / "symbols.json"
  if not path.exists():
    bar = progress_bar(texts.size, 0, unit="text", desc="looking for characters")
    found, _ = _over(texts, range(texts.size), frozenset, bar.update)
    bar.close()
    _write_json(path, Vocab.from_texts([set().union(*found)]).symbols)
  return Vocab(tuple(json.loads(path.read_text())))


def encode_shard(
  texts: Texts, vocab: Vocab | TextVocab, job: Job, shard: int, out: Path, progress: Callable
) -> None:
  """Makes one shard."""
  kind = token_type(vocab.size)

  def use(text: str):
    return np.array(vocab.encode(text), kind), len(text)

  used, skipped = _over(texts, job.rows(shard), use, progress)
  lengths = np.array([len(ids) for ids, _ in used], np.int64)
  ids = np.concatenate([ids for ids, _ in used]) if used else np.zeros(0, kind)
  for name, array in (("tokens", ids), ("lengths", lengths)):
    _write(out / shard_name(name, shard, job.shards), lambda file, a=array: np.save(file, a))
  part = {
    "documents": len(used),
    "tokens": len(ids),
    "characters": sum(size for _, size in used),
    "skipped": skipped,
  }
  _write_json(_part(out, job, shard), {"job": vars(job), **part})


def _part(out: Path, job: Job, shard: int) -> Path:
  return out / shard_name("part", shard, job.shards).replace(".npy", ".json")


def encode_texts(
  texts: Texts, make_vocab: Callable[[], Vocab | TextVocab], job: Job, out: Path
) -> dict | None:
  """Makes what is missing of this process's shards.

  Returns:
    The manifest once every shard is there; None while other processes are at work.

  Raises:
    UserError: `out` holds tokens of another job, or no text can be used.
  """
  out.mkdir(parents=True, exist_ok=True)
  _check_same(out, job)
  vocab = make_vocab()
  mine = range(jax.process_index(), job.shards, jax.process_count())
  missing = [shard for shard in mine if not _part(out, job, shard).exists()]
  if missing:
    total, left = (sum(len(job.rows(shard)) for shard in part) for part in (mine, missing))
    bar = progress_bar(total, total - left, unit="text", desc="encoding")
    for shard in missing:
      encode_shard(texts, vocab, job, shard, out, bar.update)
    bar.close()
  parts = [_part(out, job, shard) for shard in range(job.shards)]
  if not all(part.exists() for part in parts):
    return None
  found = [json.loads(part.read_text()) for part in parts]
  names = ("documents", "tokens", "characters", "skipped")
  counts = {name: sum(part[name] for part in found) for name in names}
  if not counts["tokens"]:
    raise UserError(f"none of the {job.size} texts can be used; give text in UTF-8.")
  facts = tokens.to_facts(vocab)
  if isinstance(vocab, TextVocab):  # the set goes with its tokenizer, wherever it is moved to
    _write(out / "tokenizer.json", lambda file: file.write(Path(vocab.path).read_bytes()))
    facts["tokenizer"]["path"] = "tokenizer.json"
  manifest = {**vars(job), **counts, "vocab": facts}
  _write_json(out / "manifest.json", manifest)
  return manifest


def encode_mode(flags) -> None:
  """`--mode=encode --texts=SOURCE --out=DIR [--tokenizer=FILE --shards=N]`."""
  if not flags.out:
    raise UserError("--out is missing; --mode=encode needs --texts and --out.")
  texts, out = corpus.find(flags.texts, "--texts"), Path(flags.out)
  vocab = TextVocab.from_file(flags.tokenizer) if flags.tokenizer else None
  job = make_job(texts, vocab.sha256 if vocab else "", flags.shards)
  manifest = encode_texts(texts, lambda: vocab or find_symbols(texts, out), job, out)
  if manifest is None:
    return print(f"this process's shards are done; others are still at work in {out}")
  print(
    f"tokens:    {manifest['tokens']} of {manifest['documents']} documents in {out}, "
    f"{manifest['characters'] / manifest['tokens']:.2f} characters each; "
    f"{manifest['skipped']} texts skipped\n"
    f"train:     --config.data.source=text --config.data.path={out}"
  )
