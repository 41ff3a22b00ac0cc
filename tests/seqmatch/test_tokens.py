"""Characters to ids and back."""

import pytest

from seqmatch_jax.tokens import BACKSPACE, BOS, EOS, PAD, Vocab
from train_jax.errors import UserError


def test_special_tokens_come_first_and_characters_are_sorted():
  assert (PAD, BOS, EOS, BACKSPACE) == (0, 1, 2, 3)
  vocab = Vocab.from_texts(["cab", "a b"])
  assert vocab.symbols == (" ", "a", "b", "c") and vocab.size == 8
  assert vocab.encode("abc a") == [5, 6, 7, 4, 5]
  assert Vocab(vocab.symbols) == vocab


def test_decoding_undoes_encoding_and_shows_erasures():
  text = "In base 7, what is -12 + 5?"
  vocab = Vocab.from_texts([text])
  assert vocab.decode(vocab.encode(text)) == text
  one, two = vocab.encode("12")
  assert vocab.decode([BOS, one, two, BACKSPACE, EOS, PAD]) == "12⌫"


def test_a_vocabulary_of_nothing_has_the_special_tokens():
  assert Vocab.from_texts([]).size == 4 and Vocab.from_texts([""]).encode("") == []


def test_unknown_characters_are_named():
  vocab = Vocab.from_texts(["0123456789"])
  with pytest.raises(UserError, match=r"'1z2é' .*\('z', 'é'\); use only '0123456789'"):
    vocab.encode("1z2é")


@pytest.mark.parametrize("text", ["1\b2", "1<backspace>2"])
def test_a_backspace_in_a_text_is_refused(text):
  vocab = Vocab.from_texts(["12<backspace>"])
  with pytest.raises(UserError, match="a backspace, which only the model may type"):
    vocab.encode(text)
