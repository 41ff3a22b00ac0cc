"""Numbers about text: perplexity, erasures; what counts as said, what is embedded, their names."""

from pathlib import Path
from types import MethodType, SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from configs import seqmatch_text
from seqmatch_jax.data import packing
from seqmatch_jax.data.documents import Documents
from seqmatch_jax.evaluation import diversity
from seqmatch_jax.evaluation import text as evaluate_text
from seqmatch_jax.loss import LossConfig
from seqmatch_jax.model import Model
from seqmatch_jax.rollout import Rollout
from seqmatch_jax.tasks import text
from seqmatch_jax.tokens import BACKSPACE, BOS, EOS, PAD, Vocab

VOCAB = Vocab(tuple("abc"))
X = BACKSPACE


def documents(*texts):
  encoded = [np.array(VOCAB.encode(text)) for text in texts]
  return Documents.from_parts([np.concatenate(encoded)], [[len(x) for x in encoded]])


def test_texts_that_are_prompts_only_have_no_perplexity_a_character():
  vocab = Vocab(tuple("ab"))
  found = Documents.from_parts([np.full(10, 4, np.uint16)], [np.array([4, 6])])
  held = packing.pack(found, vocab.size, 8, 0, 4)  # a row each, the longer text first
  total = lambda params, rows: (np.float32([-5000.0]), np.float32(1.0))  # noqa: E731
  both = dict(evaluate_text.likelihood(total, None, held, vocab, 2, 2))
  assert both == {"perplexity/token": np.inf, "perplexity/character": np.inf}
  held = packing.Packed(**{**vars(held), "first": held.first[1:]})
  assert [name for name, _ in evaluate_text.likelihood(total, None, held, vocab, 1, 1)] == [
    "perplexity/token"
  ]


def test_perplexity_is_of_the_policy_and_of_the_one_that_may_not_erase():
  held = packing.pack(documents("ab", "c"), VOCAB.size, 8, 0, 0)  # 3 characters, an <eos> each
  total = lambda params, rows: (np.float32([-10.0, -5.0]), np.float32(5.0))  # noqa: E731
  found = dict(evaluate_text.likelihood(total, None, held, VOCAB, 1, 1))
  wanted = {"token": 2, "character": 10 / 3, "token, forbidden": 1, "character, forbidden": 5 / 3}
  assert found == pytest.approx({f"perplexity/{k}": np.exp(v) for k, v in wanted.items()})


def test_erasures_are_counted():
  actions = np.array(
    [[7, 8, X, X, 9, X, EOS, 0], [7, 7, 7, 7, 7, 7, 7, EOS], [7, 7, 7, EOS, *[0] * 4]]
  )
  made = Rollout(actions, np.zeros((3, 9)), np.array([1, 8, 9]), np.array([True, True, True]))
  assert dict(evaluate_text.measure(made, "a")) == {
    "backspaces/a": pytest.approx(3 / 19),
    "erasing/a": pytest.approx(1 / 3),
    "run/a": pytest.approx(1.5),
    "finished/a": pytest.approx(2 / 3),  # the last one had no more room
    "tokens/a": pytest.approx(5.0),
  }


def test_real_texts_are_the_documents_with_their_prompts():
  texts = ("abcabc", "a", "bbacca")
  held = packing.pack(documents(*texts), VOCAB.size, context=10, errors=1, prompt=2)
  piece = np.argsort(held.document)
  found = evaluate_text.real_texts(held, piece)
  assert found.start.tolist() == [3, 2, 3] and found.length.tolist() == [7, 2, 7]
  assert found.tokens[:, 0].tolist() == [BOS] * 3 and np.all(found.tokens[1, 2:] == PAD)
  seen = []
  evaluate_text.embed(found, VOCAB, lambda rows: seen.extend(rows))
  assert seen == list(texts)


def test_a_document_that_does_not_fit_is_its_first_piece():
  held = packing.pack(documents("abcabcabcabc"), VOCAB.size, context=10, errors=1, prompt=2)
  found = evaluate_text.real_texts(held, np.flatnonzero(held.start == 0))
  assert found.length.tolist() == [9]
  assert VOCAB.decode(found.tokens[0].tolist()) == "abcabcab"


def test_variety_is_of_what_follows_the_prompt():
  tokens = np.array([[BOS, 4, 4, 5, 5, 5, 5, 5], [BOS, 6, 4, 5, 6, 5, PAD, PAD]])
  texts = evaluate_text.PromptedTexts(tokens, np.array([3, 2]), np.array([8, 6]))
  found = dict(evaluate_text.variety(texts, "T=1"))
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
  found = dict(evaluate_text.closeness(one, two, "T=1"))
  assert list(found) == ["mauve/T=1", "mauve_spread/T=1", "mauve_star/T=1"]
  assert 0.5 < found["mauve/T=1"] < 1 and 0 < found["mauve_spread/T=1"] < 0.2
  assert dict(evaluate_text.closeness(one, one - 9, "x"))["mauve/x"] < 0.02


@pytest.mark.parametrize(("backspace", "final"), [(True, True), (False, True), (True, False)])
def test_every_way_to_generate_is_compared(backspace, final):
  """Without <backspace>, with it, and by nucleus sampling, beside the documents themselves.

  On the way it is a quarter of them, but enough for MAUVE.
  """
  rng = np.random.default_rng(0)
  texts = ["".join(rng.choice(list("abc"), 9)) for _ in range(120)]
  held = packing.pack(documents(*texts), VOCAB.size, context=24, errors=2, prompt=2)
  config = seqmatch_text.get_config("debug")
  config.eval.samples, asked = 160, []

  def features(rows):
    return np.array([[row.count(c) + 1 for c in "abc"] for row in rows], float)

  def generate(params, prompt, length, key, row, forced, allow_backspace, top_p, **policy):
    # Its own samples.
    assert forced is None and policy == {"temperature": 1.0, "allow_retype": True}
    asked.append((allow_backspace, top_p))
    tokens = jnp.pad(jnp.asarray(prompt), ((0, 0), (0, 8)), constant_values=4)
    return Rollout(*map(jnp.asarray, (tokens[:, 3:], tokens, length + 8, length > 0)))

  model = SimpleNamespace(
    network=SimpleNamespace(apply=lambda p, token, *_: jnp.zeros((*token.shape, VOCAB.size))),
    loss_config=LossConfig("chi2", 0.0, 1.0, backspace),
    rollout=generate,
    params=None,
    mesh=None,
  )
  model.roll_out = MethodType(Model.roll_out, model)
  found = dict(text._evaluate(config, held, VOCAB, model, 0, features)(model, final))
  ways = {"T=1": (backspace, None), "p=0.95": (backspace, 0.95)}
  ways |= {"T=1, forbidden": (False, None)} if backspace else {}
  assert sorted(asked, key=str) == sorted([*ways.values()] * (20 if final else 13), key=str)
  for way in ways:
    assert found[f"repetition/{way}"] > 0.7 and found[f"mauve/{way}"] < 0.5
  assert found["repetition/real"] < 0.3
  assert ("mauve/T=1, forbidden" in found) == backspace
  page = (Path(text.__file__).parents[2] / "docs" / "METRICS.md").read_text()
  explained = page.partition("\n## Text\n")[2]
  assert all(f"`{name.partition('/')[0]}`" in explained for name in found)
