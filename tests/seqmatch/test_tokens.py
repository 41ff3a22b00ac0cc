"""Characters as tokens, and prompts that fit a context."""

import numpy as np
import pytest

from seqmatch_jax.tokens import BACKSPACE, BOS, EOS, PAD, Vocab, encode_prompts
from train_jax.errors import UserError


def test_special_tokens_come_first_and_characters_are_sorted():
  assert (PAD, BOS, EOS, BACKSPACE) == (0, 1, 2, 3)
  vocab = Vocab.from_texts(["cab", "a b"])
  assert vocab.symbols == (" ", "a", "b", "c") and vocab.size == 8
  assert vocab.encode("abc a") == [5, 6, 7, 4, 5]
  assert Vocab.from_texts([]).size == 4 and Vocab.from_texts([""]).encode("") == []


def test_decoding_undoes_encoding_and_shows_erasures():
  text = "In base 7, what is -12 + 5?"
  vocab = Vocab.from_texts([text])
  assert vocab.decode(vocab.encode(text)) == text
  one, two = vocab.encode("12")
  assert vocab.decode([BOS, one, two, BACKSPACE, EOS, PAD]) == "12⌫"


def test_prompts_are_padded_behind_bos():
  prompt, length = encode_prompts(["1", "q123"], Vocab.from_texts(["q123"]), context=6)
  np.testing.assert_array_equal(length, [2, 5])
  np.testing.assert_array_equal(prompt, [[BOS, 4, PAD, PAD, PAD], [BOS, 7, 4, 5, 6]])


@pytest.mark.parametrize(
  ("texts", "message"),
  [
    (["q1", "q123"], r"'q123' has 4 tokens, and the context of 5 tokens holds 3 .* shorten it"),
    (["1z2é"], r"'1z2é' .*\('z', 'é'\); use only '123<>abcekpqs'"),
    (["1\b2"], "a backspace, which only the model may type"),
    (["1<backspace>2"], "a backspace, which only the model may type"),
    (["a\ud800"], "is not text in UTF-8"),
    ([], "no prompts"),
  ],
)
def test_what_is_no_prompt_is_refused(texts, message):
  with pytest.raises(UserError, match=message):
    encode_prompts(texts, Vocab.from_texts(["q123<backspace>"]), context=5)
