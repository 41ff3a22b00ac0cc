"""Texts to stored tokens and back: whole, restarted, damaged; held-out documents."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from seqmatch_jax.data import corpus, documents, encode
from seqmatch_jax.huggingface.tokenizer import TextVocab
from seqmatch_jax.tokens import Vocab
from train_jax.errors import UserError
from train_jax.storage.faults import Faults

TEXTS = [f"text {i} " + "ab" * (i % 7) for i in range(200)]


@pytest.fixture
def source(tmp_path):
  """A directory of texts, among them three that cannot be used."""
  top = tmp_path / "texts"
  top.mkdir()
  rows = [*TEXTS, "a \b b", " "]
  (top / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in rows))
  (top / "b.txt").write_bytes(b"\xff\xfe")
  return str(top)


def run(source, out, tokenizer="", shards=3):
  encode.encode(source, tokenizer, shards, out)


def texts_of(found, vocab):
  return [vocab.decode(found.read(i).tolist()) for i in range(len(found.length))]


@pytest.fixture
def tokenizer(tmp_path):
  """The folder of a tokenizer of words."""
  top = tmp_path / "tokenizer"
  top.mkdir()
  words = sorted({word for text in TEXTS for word in text.split()})
  made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<end>", *words])}, "<end>"))
  made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  made.save(str(top / "tokenizer.json"))
  (top / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
  return str(top)


FAULTS = ("null", "[]", "{", '{"content": "hello"}', '{"text": 3}', '{"text": "a \\b b"}')
FAULTS += ('{"text": "\\ud800"}', '{"text": "<backspace>"}')


def test_a_line_without_text_costs_only_itself(tmp_path, capsys, caplog):
  """In memory as in `--mode=encode`."""
  file = tmp_path / "a.jsonl"
  file.write_text("\n".join([*FAULTS, '{"text": "abc"}']))
  run(str(file), tmp_path / "out", shards=2)
  assert f"1 documents in {tmp_path}" in (said := capsys.readouterr().out)
  assert f"{len(FAULTS)} texts skipped" in said
  stored, vocab = documents.open_set(str(tmp_path / "out"))
  caplog.clear()
  texts, faults = corpus.find(str(file), "--texts"), Faults(len(FAULTS), "data.path='a'")
  found = [documents.encode_texts(texts, vocab, faults) for _ in range(2)]
  assert texts_of(stored, vocab) == texts_of(found[0], vocab) == ["abc"]
  named = [text for text in caplog.messages if text.startswith("skipped: cannot read a.jsonl:")]
  assert len(named) == len(FAULTS) == len(caplog.messages)  # each once
  with pytest.raises(UserError, match=r"more than data.max_faults=7 records of data.path='a' .*"):
    documents.encode_texts(texts, vocab, Faults(7, "data.path='a'"))


def test_lines_of_another_form_end_it(source, tmp_path):
  """They are a mistake about the whole corpus."""
  (tmp_path / "texts" / "a.jsonl").write_text('{"content": "hello"}\n' * 120)
  with pytest.raises(
    UserError, match=r"first 100 texts .* a.jsonl:100 \(it is not a JSON object .*; mend the data"
  ):
    run(source, tmp_path / "out", shards=1)


def test_texts_that_were_replaced_by_others_as_long_are_not_taken_for_them(tmp_path):
  file, contents = tmp_path / "a.txt", []
  for text in ("abc", "abb"):
    file.write_text(text)
    texts = corpus.find(str(file), "--texts")
    contents.append(documents.encode_texts(texts, Vocab.from_texts(["abc"])).content)
    if text == "abc":
      run(str(file), tmp_path / "out", shards=1)
      stored = documents.open_set(str(tmp_path / "out"))[0].split(1)
      assert [x.content for x in stored] == contents * 2
  assert contents[0] != contents[1]
  with pytest.raises(UserError, match=r"holds tokens of another content of the texts"):
    run(str(file), tmp_path / "out", shards=1)


def test_characters_there_and_back(source, tmp_path, capsys):
  run(source, tmp_path / "out")
  assert "200 documents" in (said := capsys.readouterr().out) and "3 texts skipped" in said
  found, vocab = documents.open_set(str(tmp_path / "out"))
  assert texts_of(found, vocab) == TEXTS
  assert vocab == Vocab.from_texts([*TEXTS, "\b"][:-1])
  manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
  assert manifest["characters"] == manifest["tokens"] == sum(map(len, TEXTS))
  assert found.parts[0].dtype == np.uint16 and isinstance(found.parts[0], np.memmap)
  np.testing.assert_array_equal(found.read(5, 2, 6), vocab.encode(TEXTS[5][2:6]))


def test_a_tokenizer_goes_with_its_set(source, tokenizer, tmp_path):
  run(source, tmp_path / "out", tokenizer)
  (tmp_path / "out").rename(tmp_path / "moved")
  found, vocab = documents.open_set(str(tmp_path / "moved"))
  known = TextVocab.from_file(tokenizer)
  assert vocab.sha256 == known.sha256
  for i in (0, 57, 199):
    np.testing.assert_array_equal(found.read(i), known.encode(TEXTS[i]))


def test_what_is_done_is_kept_and_what_is_missing_is_made(source, tmp_path, monkeypatch):
  run(source, tmp_path / "out")
  files = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
  part = json.loads(files["part-00001-of-00003.json"])
  assert {*part["job"]} == {"version", "texts", "content", "tokenizer", "size", "shards"}
  for name in ("part-00001-of-00003.json", "tokens-00002-of-00003.npy", "manifest.json"):
    (tmp_path / "out" / name).unlink()
  made = []
  real = encode.encode_shard
  monkeypatch.setattr(encode, "encode_shard", lambda *args: (made.append(args[4]), real(*args)))
  run(source, tmp_path / "out")
  assert made == [1, 2]
  assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files


def test_other_texts_or_tokens_are_refused(source, tokenizer, tmp_path):
  run(source, tmp_path / "out")
  with pytest.raises(UserError, match=r"tokens of another --shards \(part-00000"):
    run(source, tmp_path / "out", shards=2)
  with pytest.raises(UserError, match="tokens of another --tokenizer"):
    run(source, tmp_path / "out", tokenizer)
  with pytest.raises(UserError, match="--shards=999 must be between 1 and the 203 texts"):
    run(source, tmp_path / "other", shards=999)


def test_characters_of_a_job_that_was_broken_off_are_not_those_of_another(source, tmp_path):
  other, out = tmp_path / "other.txt", tmp_path / "out"
  other.write_text("XYZ")
  texts, job = (
    corpus.find(str(other), "--texts"),
    SimpleNamespace(metadata=dict.fromkeys(("texts", "content"), "others")),
  )
  out.mkdir()
  assert encode.find_symbols(texts, job, out).symbols == ("X", "Y", "Z")
  run(source, out)
  found, vocab = documents.open_set(str(out))
  assert texts_of(found, vocab) == TEXTS


def test_half_a_character_costs_its_text_only(tokenizer, tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "text 1"}\n{"text": "text \\ud800"}\n')
  run(str(tmp_path / "a.jsonl"), tmp_path / "out", tokenizer, shards=1)
  assert len(documents.open_set(str(tmp_path / "out"))[0].length) == 1


def test_damage_is_named(source, tmp_path):
  run(source, tmp_path / "out")
  path = tmp_path / "out" / "tokens-00001-of-00003.npy"
  whole = path.read_bytes()
  path.write_bytes(whole[:-50])
  with pytest.raises(UserError, match=r"tokens-00001-of-00003.npy .* missing or damaged"):
    documents.open_set(str(tmp_path / "out"))
  np.save(path, np.load(tmp_path / "out" / "tokens-00000-of-00003.npy")[:-1])
  with pytest.raises(UserError, match="do not belong together"):
    documents.open_set(str(tmp_path / "out"))
  path.write_bytes(whole)
  lengths = tmp_path / "out" / "lengths-00001-of-00003.npy"
  kept = np.load(lengths)
  np.save(lengths, kept[:-1])  # more tokens than they say
  with pytest.raises(UserError, match="do not belong together"):
    documents.open_set(str(tmp_path / "out"))
  kept[-1] -= 1  # a token less in both
  np.save(lengths, kept)
  np.save(path, np.load(path)[:-1])
  with pytest.raises(UserError, match=r"are not those of its manifest.json; encode again"):
    documents.open_set(str(tmp_path / "out"))
  for broken in (b"[]", b"\xff\xfe"):
    (tmp_path / "out" / "manifest.json").write_bytes(broken)
    with pytest.raises(UserError, match=r"manifest.json is damaged; encode the texts again"):
      documents.open_set(str(tmp_path / "out"))


@pytest.mark.parametrize("size", [5, 2**16, 2**16 + 1, 2**17])
def test_the_largest_token_can_be_stored(size):
  assert int(np.array(size - 1).astype(documents.token_type(size))) == size - 1


def test_held_out_documents_are_spread_and_not_trained_on():
  texts = corpus.from_list([f"{i:04d}" for i in range(1000)], "text")
  vocab = Vocab.from_texts(["0123456789"])
  train, test = documents.encode_texts(texts, vocab).split(10)
  held = [int(text) for text in texts_of(test, vocab)]
  assert len(held) == 10 and max(np.diff(held)) < 100 and held[0] > 0
  assert sorted(held + [int(text) for text in texts_of(train, vocab)]) == list(range(1000))
  few = documents.encode_texts(corpus.from_list([f"{i:04d}" for i in range(9)], "text"), vocab)
  for count in range(1, 9):
    train, test = few.split(count)
    assert len(test.length) == count
    assert sorted(texts_of(test, vocab) + texts_of(train, vocab)) == texts_of(few, vocab)
  with pytest.raises(UserError, match=r"data.tests=1000 must be at least 1 and less than the 1000"):
    documents.encode_texts(texts, vocab).split(1000)


def test_of_a_single_document_the_end_is_held_out():
  text = "".join(f"{i:03d}" for i in range(100))
  vocab = Vocab.from_texts([text])
  for tests in (1, 500):
    train, test = documents.encode_texts(corpus.from_list([text], "text"), vocab).split(tests)
    assert (texts_of(train, vocab), texts_of(test, vocab)) == ([text[:270]], [text[270:]])
  with pytest.raises(UserError, match=r"one document of one token, of which no part can be held"):
    documents.encode_texts(corpus.from_list(["0"], "text"), vocab).split(1)


def test_texts_without_tokens_and_too_many_characters(monkeypatch):
  vocab = Vocab.from_texts(["ab"])
  found = documents.encode_texts(corpus.from_list(["ab", "", "b"], "text"), vocab)
  assert found.length.tolist() == [2, 1]
  monkeypatch.setattr(documents, "MAX_CHARACTERS", 2)
  with pytest.raises(UserError, match=r"more than 2 characters; .* --mode=encode"):
    documents.encode_texts(corpus.from_list(["ab", "b"], "text"), vocab)
