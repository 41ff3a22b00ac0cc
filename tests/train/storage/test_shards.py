"""Sets in shards: shared out, made once, gone on with, and not mixed with others."""

import hashlib
import json
from types import SimpleNamespace

import jax
import pytest

from train_jax.errors import UserError
from train_jax.files import whole_file, write_json
from train_jax.storage import shards

KIND = "words", "word", ("letters.txt", "part.json")


def source_of(size):
  return SimpleNamespace(size=size, name=lambda i: f"name {i}")


def job_of(size=23, number=4, version=1, **flags):
  return shards.make_job(KIND, version, source_of(size), number, {"tongue": "en", **flags})


def make(job, out, made=None, fail_at=None):
  """Makes what is missing; lists the shards that were made, and fails in one of them."""

  def one(shard, progress):
    letters, part = job.paths(out, shard)
    with whole_file(letters) as file:
      file.write(b"half")
      if shard == fail_at:
        raise KeyboardInterrupt
      file.write(bytes(job.rows(shard)))
    write_json(part, {"job": job.metadata, "number": shard})
    if made is not None:
      made.append(shard)
    progress(len(job.rows(shard)))

  return shards.make_missing(job, out, lambda missing: one)


def files_of(out):
  return {path.name: path.read_bytes() for path in out.iterdir()}


def test_every_item_is_in_one_shard_and_shards_are_even():
  job = job_of(23, 4)
  assert [list(job.rows(i)) for i in range(4)] == [
    list(range(a, b)) for a, b in ((0, 5), (5, 11), (11, 17), (17, 23))
  ]


def test_the_number_of_shards_is_chosen(monkeypatch):
  assert [job_of(n, 0).shards for n in (1, 8192, 8193, 100_000)] == [1, 1, 2, 13]
  monkeypatch.setattr(jax, "process_count", lambda: 5)
  assert [job_of(n, 0).shards for n in (3, 8193, 100_000)] == [3, 5, 13]
  for number in (-1, 24):
    with pytest.raises(UserError, match=rf"--shards={number} must be between 1 and the 23 words\."):
      job_of(23, number)


def test_a_set_says_what_it_is_made_of(tmp_path):
  job = job_of()
  names = hashlib.sha256(b"".join(b"name %d\0" % i for i in range(23))).hexdigest()
  metadata = {"version": 1, "words": names, "tongue": "en", "size": 23, "shards": 4}
  assert make(job, tmp_path / "new" / "out") and job.metadata == metadata
  part = tmp_path / "new" / "out" / "part-00003-of-00004.json"
  assert json.loads(part.read_text()) == {"job": metadata, "number": 3}
  assert [part["number"] for part in job.parts(part.parent)] == [0, 1, 2, 3]
  assert (part.parent / "letters-00000-of-00004.txt").read_bytes() == b"half" + bytes(range(5))


def test_processes_make_their_own_shards(tmp_path, monkeypatch, capsys):
  job, made = job_of(), []
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  assert not make(job, tmp_path, made) and made == [1, 3]
  said = f"this process's shards are done; others are still at work in {tmp_path}\n"
  assert capsys.readouterr().out == said
  monkeypatch.setattr(jax, "process_index", lambda: 0)
  assert make(job, tmp_path, made) and made == [1, 3, 0, 2]
  assert not capsys.readouterr().out


def test_what_is_done_is_kept_and_what_is_missing_is_made(tmp_path):
  job, made = job_of(), []
  with pytest.raises(KeyboardInterrupt):
    make(job, tmp_path, made, fail_at=2)
  assert made == [0, 1] and not job.paths(tmp_path, 2)[0].exists()
  assert make(job, tmp_path, made) and made == [0, 1, 2, 3]
  whole = files_of(tmp_path)
  for name in ("letters-00001-of-00004.txt", "part-00003-of-00004.json"):
    (tmp_path / name).unlink()
  assert make(job, tmp_path, made) and made[4:] == [1, 3]
  assert files_of(tmp_path) == whole

  def fail(missing):
    raise AssertionError("prepared for nothing")

  assert shards.make_missing(job, tmp_path, fail)


@pytest.mark.parametrize(
  ("words", "other"),
  [
    ("layout version", {"version": 2}),
    ("--tongue", {"tongue": "de"}),
    ("--shards", {"number": 5}),
    ("--words and number of words", {"size": 22}),
  ],
)
def test_another_job_in_the_same_directory_is_refused(words, other, tmp_path):
  make(job_of(), tmp_path)
  before = files_of(tmp_path)
  message = rf"--out=.* holds letters of another {words} \(part-00000-of-00004.json\); choose"
  with pytest.raises(UserError, match=message):
    make(job_of(**other), tmp_path)
  assert files_of(tmp_path) == before


@pytest.mark.parametrize("text", ['{"job": {"vers', "[]", "7", '{"number": 2}', "\xff\xfe"])
def test_a_damaged_part_is_named_and_made_again_once_it_is_deleted(text, tmp_path):
  job = job_of()
  make(job, tmp_path)
  before = files_of(tmp_path)
  part = tmp_path / "part-00002-of-00004.json"
  part.write_text(text, encoding="latin-1")
  for reading in (lambda: make(job, tmp_path), lambda: job.parts(tmp_path)):
    with pytest.raises(UserError, match=r"part-00002-of-00004.json is damaged; delete it, and"):
      reading()
  part.unlink()
  assert make(job, tmp_path)
  assert files_of(tmp_path) == before
