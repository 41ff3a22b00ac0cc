"""`--mode=encode --texts=...`: texts -> a set of token documents (see documents.py), in shards.

The threads of a process share the texts of a shard; see shards.py for the processes. Texts that
`documents.find_text` refuses or that are blank are named, skipped and counted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from absl import logging

from seqmatch_jax.data import corpus
from seqmatch_jax.data.corpus import Corpus
from seqmatch_jax.data.documents import VERSION, content_of, find_text, token_type
from seqmatch_jax.huggingface import tokenizer
from seqmatch_jax.huggingface.tokenizer import TextVocab
from seqmatch_jax.tokens import Vocab
from train_jax.errors import UserError
from train_jax.files import read_json, whole_file, write_json
from train_jax.metrics import progress_bar
from train_jax.storage.faults import LIMIT
from train_jax.storage.shards import Job, make_job, make_missing

KIND = "texts", "text", ("tokens.npy", "lengths.npy", "part.json")  # see shards.Job
CHUNK = 64  # texts that a thread takes at a time


def _read(texts: Corpus, i: int, use: Callable):
  """(use(text i), ""), or (None, the reason why it is skipped)."""
  text, why = find_text(texts, i)
  why = why or ("" if text.strip() else "it is blank")
  return (None, f"{texts.name(i)} ({why})") if why else (use(text), "")


def check_some(texts: Corpus) -> None:
  """Raises UserError if all of the first LIMIT texts are faults: another form of data, perhaps."""
  for i in range(min(texts.size, LIMIT)):
    _, why = find_text(texts, i)
    if not why:
      return
  raise UserError(
    f"none of the first {i + 1} texts can be used, the last of them is {texts.name(i)} ({why}); "
    "mend the data."
  )


def _map(texts: Corpus, rows: range, use: Callable, progress: Callable) -> tuple[list, int]:
  """([use(text) of each usable text], the number of skipped ones), by threads, in order."""
  chunks = [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]
  results, skipped = [], 0
  with ThreadPoolExecutor(os.cpu_count(), "encode") as pool:
    for pairs in pool.map(lambda chunk: [_read(texts, i, use) for i in chunk], chunks):
      for result, reason in pairs:
        if reason:
          logging.warning("skipped: %s", reason)
          skipped += 1
        else:
          results.append(result)
      progress(len(pairs))
  return results, skipped


def find_symbols(texts: Corpus, job: Job, out: Path) -> Vocab:
  """One token for each character of the texts; the characters are kept in `out`."""
  path = out / "symbols.json"
  stored = read_json(path) if path.exists() else {}
  known = {name: job.metadata[name] for name in ("texts", "content")}
  if not known.items() <= stored.items():  # those of a broken job on other texts, perhaps
    bar, symbols = progress_bar(texts.size, 0, unit="text", desc="looking for characters"), set()
    _map(texts, range(texts.size), symbols.update, bar.update)
    bar.close()
    stored = {**known, "symbols": sorted(symbols)}
    write_json(path, stored)
  return Vocab(tuple(stored["symbols"]))


def encode_shard(
  texts: Corpus, vocab: Vocab | TextVocab, job: Job, out: Path, shard: int, progress: Callable
) -> None:
  """Makes one shard."""
  kind = token_type(vocab.size)

  def use(text: str):
    return np.array(vocab.encode(text), kind), len(text)

  encoded, skipped = _map(texts, job.rows(shard), use, progress)
  lengths = np.array([len(ids) for ids, _ in encoded], np.int64)
  ids = np.concatenate([ids for ids, _ in encoded]) if encoded else np.zeros(0, kind)
  for path, array in zip(job.paths(out, shard), (ids, lengths), strict=False):
    with whole_file(path) as file:
      np.save(file, array)
  part = {
    "job": job.metadata,
    "documents": len(encoded),
    "tokens": len(ids),
    "characters": sum(size for _, size in encoded),
    "skipped": skipped,
    "documents_sha256": content_of(ids for ids, _ in encoded),
  }
  write_json(job.paths(out, shard)[-1], part)


def encode_texts(
  texts: Corpus, make_vocab: Callable[[], Vocab | TextVocab], job: Job, out: Path
) -> dict | None:
  """Makes the missing ones of this process's shards.

  Returns:
    The manifest once every shard is there; None while other processes are at work.
  """
  if not make_missing(job, out, lambda _: partial(encode_shard, texts, make_vocab(), job, out)):
    return None
  parts, vocab = job.parts(out), make_vocab()
  names = ("documents", "tokens", "characters", "skipped")
  counts = {name: sum(part[name] for part in parts) for name in names}
  if not counts["tokens"]:
    raise UserError(f"none of the {job.size} texts can be used; give text in UTF-8.")
  metadata = tokenizer.to_metadata(vocab)
  if isinstance(vocab, TextVocab):  # the set is moved with its tokenizer
    with whole_file(out / "tokenizer.json") as file:
      file.write(Path(vocab.path).read_bytes())
    metadata["tokenizer"]["path"] = "tokenizer.json"
  content = content_of((), [part["documents_sha256"] for part in parts])
  manifest = {**job.metadata, **counts, "documents_sha256": content, "vocab": metadata}
  write_json(out / "manifest.json", manifest)
  return manifest


def encode(source: str, tokenizer: str, shards: int, out: Path) -> None:
  """Encodes the texts of `source` into `out`, and prints the counts; see `encode_texts`.

  Args:
    source: .txt, .jsonl or .array_record files, or tfds:NAME.
    tokenizer: tokenizer.json, or its folder; "": a token for each character.
    shards: number of files; 0 chooses it.
  """
  texts = corpus.find(source, "--texts")
  vocab = TextVocab.from_file(tokenizer) if tokenizer else None
  check_some(texts)
  metadata = {"tokenizer": vocab.sha256 if vocab else "", "content": texts.content}
  job = make_job(KIND, VERSION, texts, shards, metadata)
  manifest = encode_texts(texts, lambda: vocab or find_symbols(texts, job, out), job, out)
  if manifest:
    print(
      f"tokens:    {manifest['tokens']} of {manifest['documents']} documents in {out}, "
      f"{manifest['characters'] / manifest['tokens']:.2f} characters each; "
      f"{manifest['skipped']} texts skipped\n"
      f"train:     --config.data.source=text --config.data.path={out}"
    )
