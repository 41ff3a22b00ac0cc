"""Generated texts beside real ones: what counts as said, what is embedded, names of the numbers."""

import numpy as np

from seqmatch_jax import diversity, packing, quality
from seqmatch_jax.documents import Documents
from seqmatch_jax.tokens import BOS, PAD, Vocab

VOCAB = Vocab(tuple("abc"))


def documents(*texts):
  encoded = [np.array(VOCAB.encode(text)) for text in texts]
  return Documents.from_parts([np.concatenate(encoded)], [[len(x) for x in encoded]])


def test_real_texts_are_the_documents_with_their_prompts():
  texts = ("abcabc", "a", "bbacca")
  held = packing.pack(documents(*texts), VOCAB.size, context=10, errors=1, prompt=2)
  piece = np.argsort(held.document)
  found = quality.real(held, piece)
  assert found.start.tolist() == [3, 2, 3] and found.length.tolist() == [7, 2, 7]
  assert found.tokens[:, 0].tolist() == [BOS] * 3 and np.all(found.tokens[1, 2:] == PAD)
  seen = []
  quality.embed(found, VOCAB, lambda rows: seen.extend(rows))
  assert seen == list(texts)


def test_a_document_that_does_not_fit_is_its_first_piece():
  held = packing.pack(documents("abcabcabcabc"), VOCAB.size, context=10, errors=1, prompt=2)
  found = quality.real(held, np.flatnonzero(held.start == 0))
  assert found.length.tolist() == [9]
  assert VOCAB.decode(found.tokens[0].tolist()) == "abcabcab"


def test_variety_is_of_what_follows_the_prompt():
  tokens = np.array([[BOS, 4, 4, 5, 5, 5, 5, 5], [BOS, 6, 4, 5, 6, 5, PAD, PAD]])
  found = dict(quality.variety(quality.Texts(tokens, np.array([3, 2]), np.array([8, 6])), "T=1"))
  said = np.array([[5, 5, 5, 5, 5], [4, 5, 6, 5, PAD]]), np.array([5, 4])
  assert found == {
    "entropy/T=1": diversity.entropy(*said, 4),
    "distinct/T=1": diversity.distinct(*said, 4),
    "repetition/T=1": diversity.repetition(*said, 4),
  }
  assert found["distinct/T=1"] == 2 / 3 and found["repetition/T=1"] == 1 / 4


def test_closeness_is_mauve():
  rng = np.random.default_rng(0)
  one, two = rng.normal(size=(2, 100, 3))
  found = dict(quality.closeness(one, two, "T=1"))
  assert list(found) == ["mauve/T=1", "mauve_spread/T=1", "mauve_star/T=1"]
  assert 0.5 < found["mauve/T=1"] < 1 and 0 < found["mauve_spread/T=1"] < 0.2
  assert dict(quality.closeness(one, one - 9, "x"))["mauve/x"] < 0.02
