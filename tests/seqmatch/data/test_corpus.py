"""Documents wherever they lie; what is no text is refused by name."""

import json

import pytest
import tensorflow_datasets as tfds

from seqmatch_jax.data import corpus
from tests.train.record_files import write_array_record, write_tfds
from train_jax.errors import UserError


def read_all(source):
  texts = corpus.find(str(source), "--texts")
  return [texts.read(i) for i in range(texts.size)], [texts.name(i) for i in range(texts.size)]


def test_a_plain_file_is_a_document_unless_separators_split_it(tmp_path):
  (tmp_path / "b.txt").write_bytes(b"one\r\n\r\nparagraph more\n")
  (tmp_path / "a").mkdir()
  many = "first\n\nof it\n<|endoftext|>\n\n  \n<|endoftext|>\nsecond\n<|endoftext|>\n"
  (tmp_path / "a" / "c.txt").write_text(many)
  (tmp_path / "ignored.bin").write_bytes(b"\xff")
  texts, names = read_all(tmp_path)
  assert texts == ["first\n\nof it", "second", "one\n\nparagraph more"]
  assert len(set(names)) == 3 and names[0].startswith("c.txt")
  assert read_all(tmp_path / "a" / "*.txt")[0] == texts[:2]


def test_json_lines(tmp_path):
  rows = [{"text": "a\nb", "id": 1}, {"text": "ü"}]
  (tmp_path / "x.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
  assert read_all(tmp_path / "x.jsonl") == (["a\nb", "ü"], ["x.jsonl:1", "x.jsonl:3"])
  for line in ("{", "[]", "null", '{"txt": "a"}', '{"text": 3}', '{"text": null}'):
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(ValueError, match=r"^it is not a JSON object"):
      read_all(tmp_path / "x.jsonl")


def test_array_records_and_tfds(tmp_path):
  rows = ["one", "zwölf"]
  path = tmp_path / "a.array_record"
  write_array_record(path, [{"text": text.encode()} for text in rows])
  assert read_all(tmp_path)[0] == rows
  write_array_record(path, [{"words": b"one"}])
  with pytest.raises(UserError, match=r"record 0 .* is not a tf.train.Example with a 'text'"):
    read_all(tmp_path)
  examples = [{"text": text} for text in rows]
  built = write_tfds(tmp_path, {"text": tfds.features.Text()}, examples)
  assert sorted(read_all(built)[0]) == rows


def test_sources_that_are_none(tmp_path):
  with pytest.raises(UserError, match=r"--texts='.*nowhere' is not there; give a file"):
    read_all(tmp_path / "nowhere")
  (tmp_path / "a.txt").write_text(" \n<|endoftext|>\n")
  with pytest.raises(UserError, match="holds no document"):
    read_all(tmp_path)
  with pytest.raises(UserError, match="--texts='no_such_set' is not a prepared set with a 'text'"):
    read_all("tfds:no_such_set")


def test_a_mark_of_utf_8_is_no_text_and_brackets_no_pattern(tmp_path):
  (tmp_path / "my[1].txt").write_text("Hello", encoding="utf-8-sig")
  (tmp_path / "b.jsonl").write_text('{"text": "a"}', encoding="utf-8-sig")
  assert read_all(tmp_path / "my[1].txt")[0] == ["Hello"]
  assert read_all(tmp_path / "b.jsonl")[0] == ["a"]


def test_bytes_that_are_no_text_are_an_error_of_value(tmp_path):
  (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
  texts = corpus.find(str(tmp_path), "--texts")
  with pytest.raises(ValueError):
    texts.read(0)


def test_python_s_prose_is_plain_english():
  texts = corpus.python_prose()
  rows = [texts.read(i) for i in range(texts.size)]
  assert len(rows) > 3000 and len(set(rows)) == len(rows) and sum(map(len, rows)) > 400_000
  assert set().union(*rows) <= set(corpus.PRINTABLE)
  words = " ".join(rows).lower().split()
  assert words.count("the") > 0.03 * len(words)
