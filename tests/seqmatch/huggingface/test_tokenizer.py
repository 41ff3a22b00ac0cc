"""The tokens of a tokenizer.json: there and back, after four special ones."""

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from seqmatch_jax.display import show
from seqmatch_jax.huggingface.tokenizer import TextVocab, from_metadata, to_metadata
from seqmatch_jax.tokens import BACKSPACE, BOS, EOS, PAD
from train_jax.errors import UserError

TEXT = ["the cat sat on the mat, and the naïve café was 20 € away", "the dog sat, too: 日本語"]


def byte_level(folder, **config):
  """Writes a tokenizer like GPT-2's, and `config` as its tokenizer_config.json -> the folder."""
  made = Tokenizer(models.BPE())
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=["<s>", "<|endoftext|>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  made.train_from_iterator(TEXT, trainer)
  made.enable_truncation(3)
  made.enable_padding(length=40)
  made.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
  return folder


def sentence_pieces(folder):
  """Writes a tokenizer like Llama 2's: spaces as ▁, one before the text, bytes where it must."""
  letters = sorted(set("▁the catsondm,"))
  tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters, "▁t", "▁th"]
  made = Tokenizer(
    models.BPE(
      {token: i for i, token in enumerate(tokens)},
      [("▁", "t"), ("▁t", "h")],
      unk_token="<unk>",
      byte_fallback=True,
      fuse_unk=True,
    )
  )
  made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
  made.decoder = decoders.Sequence(
    [
      decoders.Replace("▁", " "),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(" ", 1, 0),
    ]
  )
  made.add_special_tokens(["<unk>", "<s>", "</s>"])
  made.save(str(folder / "tokenizer.json"))
  (folder / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 0]}))
  return folder


BOTH = pytest.mark.parametrize("make", [lambda p: byte_level(p, eos_token="<s>"), sentence_pieces])


def test_a_tokenizers_tokens_follow_the_special_ones_in_its_own_order(tmp_path):
  vocab = TextVocab.from_file(byte_level(tmp_path, bos_token="<s>", eos_token="<|endoftext|>"))
  assert (vocab.bos, vocab.eos) == (0, 1)
  assert vocab.size == 4 + vocab.hf_size - 2 == len(vocab.hf_ids)
  assert vocab.hf_ids.tolist() == [-1, 0, 1, -1, *range(2, vocab.hf_size)]
  made = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
  made.no_truncation()
  made.no_padding()
  ids = vocab.encode(TEXT[0])
  assert len(ids) > 3
  assert vocab.hf_ids[ids].tolist() == made.encode(TEXT[0], add_special_tokens=False).ids


@pytest.mark.parametrize("words, size", [({"a": 0}, 2), ({"a": 0, "b": 9}, 10)], ids=str)
def test_numbers_of_tokens_may_be_added_or_left_out(words, size, tmp_path):
  made = Tokenizer(models.WordLevel(words, "a"))
  made.add_special_tokens(["<end>"])
  made.save(str(tmp_path / "tokenizer.json"))
  (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
  vocab = TextVocab.from_file(tmp_path)
  assert vocab.hf_size == size and vocab.size == 4 + size - 1
  assert [vocab.decode(vocab.encode(word)) for word in words] == list(words)


@pytest.mark.parametrize("token", ["<|endoftext|>", {"content": "<|endoftext|>"}])
def test_special_tokens_map_names_what_tokenizer_config_does_not(token, tmp_path):
  byte_level(tmp_path, bos_token="<s>")
  (tmp_path / "config.json").write_text('{"eos_token_id": 0}')  # transformers' tokenizers ignore it
  names = {"bos_token": "<|endoftext|>", "eos_token": token}
  (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
  vocab = TextVocab.from_file(tmp_path)
  assert (vocab.bos, vocab.eos) == (0, 1)


def test_one_token_that_begins_and_ends_texts_becomes_two(tmp_path):
  vocab = TextVocab.from_file(byte_level(tmp_path, eos_token={"content": "<|endoftext|>"}))
  assert vocab.bos == vocab.eos == 1 and vocab.size == 4 + vocab.hf_size - 1
  assert vocab.hf_ids.tolist() == [-1, 1, 1, -1, 0, *range(2, vocab.hf_size)]


@BOTH
def test_a_tokenizers_text_comes_back_and_erasures_are_shown(make, tmp_path):
  vocab = TextVocab.from_file(make(tmp_path))
  for text in (*TEXT, "", "an </s> <|endoftext|> <s> in a text is a text"):
    ids = vocab.encode(text)
    assert vocab.decode(ids) == text and not set(ids) & {PAD, BOS, EOS, BACKSPACE}
    assert len(vocab.pieces(ids)) == len(ids)
  first, second = vocab.encode("the cat"), vocab.encode("the dog")
  shared = len([1 for a, b in zip(first, second, strict=False) if a == b])
  typed = [BOS, *first, *[BACKSPACE] * (len(first) - shared), *second[shared:], EOS, PAD]
  erased = "⌫" * (len(first) - shared)
  kept = vocab.decode(first[:shared])
  assert vocab.decode(typed) == "the cat" + erased + "the dog".removeprefix(kept)


def test_bytes_that_are_no_character_are_shown_and_end_nothing(tmp_path):
  """After a byte that was shown, as a line's end is: the tokenizer then refuses to go on."""
  vocab = TextVocab.from_file(sentence_pieces(tmp_path))
  line, byte, word = (
    int(np.flatnonzero(vocab.hf_ids == vocab._tokenizer.token_to_id(name))[0])
    for name in ("<0x0A>", "<0xF0>", "▁th")
  )
  pieces = vocab.pieces([word, line, byte, word, word])
  assert pieces[:3] == ["th", "\n", ""] and pieces[3].endswith("� th") and pieces[4] == " th"


@BOTH
def test_half_a_character_is_erased_by_token(make, tmp_path):
  """What is left is decoded as if it had never been typed: in pieces, keys and streams."""
  vocab, rng = TextVocab.from_file(make(tmp_path)), np.random.default_rng(0)
  first, *_ = half = vocab.encode("€")[-2:]
  the = vocab.encode("the")
  assert "\ufffd" not in vocab.decode([first, BACKSPACE, *the]) and len(half) == 2
  some = [*vocab.encode("日本語 € é a b the"), *vocab.encode("\n the")]
  for _ in range(200):
    actions, alive = [], [BOS]
    for token in rng.choice(some, 15).tolist():
      erases = len(alive) > 1 and rng.random() < 0.4
      actions.append(BACKSPACE if erases else token)
      alive[:] = alive[:-1] if erases else [*alive, token]
    left, typist = vocab.decode(alive), show.Typist(vocab, [BOS])
    pieces = vocab.pieces([BOS, *actions])
    assert show.answer(["\b" if piece == "⌫" else piece for piece in pieces]) == left
    assert show.answer(show.Typist(vocab, [BOS]).keys(actions)) == left
    assert show.answer([key for action in actions for key in typist.keys([action])]) == left


@BOTH
def test_half_a_character_is_refused(make, tmp_path):
  with pytest.raises(UserError, match="is not text in UTF-8"):
    TextVocab.from_file(make(tmp_path)).encode("a\ud800")


def test_a_vocabulary_is_made_again_from_its_metadata_and_from_no_other_file(tmp_path):
  vocab = TextVocab.from_file(sentence_pieces(tmp_path) / "tokenizer.json")
  metadata = json.loads(json.dumps(to_metadata(vocab)))
  (tmp_path / "config.json").unlink()
  assert from_metadata(metadata) == vocab and (vocab.bos, vocab.eos) == (1, 2)
  with (tmp_path / "tokenizer.json").open("a") as file:
    file.write("\n")
  with pytest.raises(UserError, match=r"tokenizer.json has the SHA-256 .* put the tokenizer of"):
    from_metadata(metadata)
  (tmp_path / "tokenizer.json").unlink()
  with pytest.raises(UserError, match=r"tokenizer.json is not there; .* --pretrained=FOLDER"):
    from_metadata(metadata)


@pytest.mark.parametrize(
  ("files", "config", "message"),
  [
    ({}, None, r"there is no tokenizer .*tokenizer.json; give"),
    ({}, {}, r"nothing beside .* says which token ends a text; write"),
    ({}, {"eos_token": "</s>"}, r"names '</s>' as eos token, which its tokenizer does not"),
    ({}, {"eos_token": "<s>"}, "a backspace, which only the model may type"),
    ({"tokenizer_config.json": "[]"}, {}, r"tokenizer_config.json cannot be read as JSON: "),
    ({"config.json": '{"eos_token_id": "2"}'}, {}, r"eos_token_id='2', which must be a token's"),
    ({"config.json": '{"eos_token_id": []}'}, {}, r"eos_token_id=\[\], which must be a token's"),
    ({}, {"eos_token": 7}, r"names 7 as eos token; give the token as a string"),
    (
      {"tokenizer.model": ""},
      None,
      r"and tokenizer.model beside it is not read; write it once with",
    ),
    (
      {"tokenizer.json": "version https://git-lfs.github.com/spec/v1\n"},
      {},
      r"tokenizer.json is git-LFS's pointer",
    ),
    ({"tokenizer.json": "{}"}, {"eos_token": "<s>"}, r"is no tokenizer \(.*give a tokenizer.json"),
  ],
)
def test_what_is_wrong_with_a_tokenizer_is_said(files, config, message, tmp_path):
  if config is not None:
    byte_level(tmp_path, **config)
  for name, content in files.items():
    (tmp_path / name).write_text(content)
  with pytest.raises(UserError, match=message):
    TextVocab.from_file(tmp_path).encode("a\bb")
