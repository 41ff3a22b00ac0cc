"""Files and generators against the official data; batches depend on their number and no more."""

import itertools
import re

import numpy as np
import pytest
from scipy import stats

from seqmatch_jax.actions import Noise, replay
from seqmatch_jax.data import questions as data
from seqmatch_jax.data.questions import Example
from seqmatch_jax.tokens import BACKSPACE, BOS, EOS, PAD, Vocab
from train_jax.errors import UserError

BATCH = 16
QUESTION = re.compile(r"In base (\d+), what is (-?[0-9a-f]+) ([+-]) (-?[0-9a-f]+)\?")


@pytest.fixture(scope="module")
def official():
  files = {name: f"add_or_sub_in_base_{name}.txt" for name in ("train", "test")}
  return {name: data.read_module(data.OFFICIAL / file) for name, file in files.items()}


@pytest.fixture(scope="module")
def generated():
  return data.make_add_or_sub_in_base(5000, seed=0)


def parse(examples):
  """[e, 5] integers: base, p, sign (1 or -1), q, answer."""
  rows = []
  for example in examples:
    base, p, sign, q = QUESTION.fullmatch(example.question).groups()
    base = int(base)
    numbers = [int(x, base) for x in (p, q, example.answer)]
    rows.append((base, numbers[0], 1 if sign == "+" else -1, *numbers[1:]))
  return np.array(rows)


# --- files ----------------------------------------------------------------------------------------


def test_the_official_files(official):
  assert len(official["train"]) == 5000 and len(official["test"]) == 1000
  assert official["test"][0][:2] == ("In base 14, what is -6 + 5b?", "55")
  questions = [{x.question for x in examples} for examples in official.values()]
  assert not questions[0] & questions[1]
  base, p, sign, q, answer = parse(official["train"]).T
  np.testing.assert_array_equal(p + sign * q, answer)
  assert base.min() == 2 and base.max() == 16


@pytest.mark.parametrize(
  "text, message",
  [
    ("", "is empty"),
    ("\n\n", "is empty"),
    ("q1\na1\nq2\n", "line 3: the last question has no answer"),
    ("q1\na1\n\na2\n", "line 3: the question is blank"),
    ("q1\na1\nq2\n \nq3\na3\n", "line 4: the answer is blank"),
    ("q1\n \n", "line 2: the answer is blank"),
  ],
)
def test_malformed_files_name_the_line(tmp_path, text, message):
  path = tmp_path / "module.txt"
  path.write_text(text)
  with pytest.raises(UserError, match=f"module.txt.*{message}"):
    data.read_module(path)


def test_questions_that_are_not_text_are_named_skipped_and_limited(tmp_path, caplog):
  path = tmp_path / "module.txt"
  path.write_bytes(b"q1\na1\n\xff\xfe\na2\nq3\n\0\0\0\nq4\na4\n")
  assert [x[:2] for x in data.read_module(path)] == [("q1", "a1"), ("q4", "a4")]
  assert [text[:46] for text in caplog.messages] == [
    f"skipped: cannot read the question of line {n} (i" for n in (3, 5)
  ]
  with pytest.raises(UserError, match=r"more than data.max_faults=1 records of .*module.txt"):
    data.read_module(path, max_faults=1)
  path.write_bytes(b"\xff\na1\n")
  with pytest.raises(UserError, match="has no question that is text in UTF-8"):
    data.read_module(path)
  for path in (tmp_path, tmp_path / "no.txt"):
    with pytest.raises(UserError, match="cannot be read"):
      data.read_module(path)


def test_files_of_other_systems_and_modules(tmp_path):
  path = tmp_path / "module.txt"
  path.write_bytes(b"\xef\xbb\xbfSort 3, 1.\r\n1, 3\r\nIs 4 < 5?\r\nTrue\r\n")
  assert [x[:2] for x in data.read_module(path)] == [("Sort 3, 1.", "1, 3"), ("Is 4 < 5?", "True")]


# --- generators -----------------------------------------------------------------------------------


def test_generated_arithmetic_is_exact_distinct_and_named_by_its_seed(generated):
  _, p, sign, q, answer = parse(generated).T
  np.testing.assert_array_equal(p + sign * q, answer)
  assert len({x.question for x in generated}) == 5000
  assert data.make_add_or_sub_in_base(100, seed=0) == generated[:100]
  assert data.make_add_or_sub_in_base(100, seed=1) != generated[:100]


def test_generated_arithmetic_has_the_official_distribution(official, generated):
  examples = {"official": official["train"] + official["test"], "generated": generated}
  columns = {name: parse(x).T for name, x in examples.items()}
  features = {}
  for name, (base, p, sign, q, _) in columns.items():
    size = [np.log10(np.abs(x) + 0.5) for x in (p, q)]
    features[name] = {
      "base": base,
      "sign": sign,
      "sign of p": np.sign(p),
      "sign of q": np.sign(q),
      "size of p": size[0],
      "size of q": size[1],
      "both": size[0] + size[1],
      "difference": size[0] - size[1],
      "question": np.array([len(x.question) for x in examples[name]]),
      "answer": np.array([len(x.answer) for x in examples[name]]),
    }
  for feature, values in features["official"].items():
    # For discrete values the test errs on the quiet side; the largest gap is then bounded too.
    result = stats.ks_2samp(values, features["generated"][feature])
    assert result.pvalue > 1e-3 and result.statistic < 0.04, feature


@pytest.mark.parametrize("numbers, modulus", [(6, 16), (8, 24)])
def test_two_sum_has_one_answer_in_order(numbers, modulus):
  examples = data.make_two_sum(2000, 0, numbers, modulus)
  places = set()
  for question, answer, candidates in examples:
    text, target = question.split("=")
    values = [int(x, modulus) for x in text]
    assert text == candidates and len(set(values)) == numbers
    fits = [
      (i, j)
      for i, j in itertools.combinations(range(numbers), 2)
      if (values[i] + values[j]) % modulus == int(target, modulus)
    ]
    assert [text[i] + text[j] for i, j in fits] == [answer]
    places |= set(fits)
  assert len(places) == numbers * (numbers - 1) // 2  # any pair can be the one


def test_two_sum_questions_differ_in_more_than_order():
  examples = data.make_two_sum(6000, seed=0)
  keys = {("".join(sorted(x.candidates)), x.question[-1]) for x in examples}
  assert len(keys) == 6000
  assert data.make_two_sum(50, seed=0) == examples[:50] != data.make_two_sum(50, seed=1)


@pytest.mark.parametrize(
  "numbers, modulus, message",
  [
    (1, 16, "choose 2 <= numbers"),
    (9, 8, "numbers <= modulus"),
    (6, 37, "modulus <= 36"),
    (3, 4, "different questions, and 1000 are asked for; ask for fewer"),
    (16, 16, "hardly more than 0 different questions"),
  ],
)
def test_two_sum_that_cannot_be(numbers, modulus, message):
  with pytest.raises(UserError, match=message):
    data.make_two_sum(1000, 0, numbers, modulus)


# --- tokens ---------------------------------------------------------------------------------------

# Of the candidates for a wrong token, `q` is in no answer.
TOY = tuple(Example(f"q{i}?", str(i * i), "789q") for i in range(10, 110))


@pytest.fixture(scope="module")
def vocab():
  return Vocab.from_texts([*"0123456789q?="])


@pytest.fixture(scope="module")
def toy(vocab):
  return data.encode(TOY, vocab, context=64)


def test_examples_as_tokens(toy, vocab):
  assert toy.prompt.shape == toy.answer.shape == (100, 6)  # <bos> q109? and 11881 <eos>
  for i, (question, answer, _) in enumerate(TOY):
    prompt = toy.prompt[i, : toy.prompt_length[i]]
    assert prompt[0] == BOS and vocab.decode(prompt) == question
    assert not toy.prompt[i, toy.prompt_length[i] :].any()
    actions = toy.answer[i][toy.answer[i] != PAD]
    assert actions[-1] == EOS and vocab.decode(actions) == answer
  assert vocab.decode(np.flatnonzero(toy.alphabet)) == "0123456789"
  assert all(vocab.decode(np.flatnonzero(row)) == "789" for row in toy.candidates)


def test_the_longest_row_just_fits(vocab):
  examples = (Example("q1234?", "1", ""), Example("q?", "12345", ""))
  encoded = data.encode(examples, vocab, context=8)
  assert encoded.nodes(Noise()) == 8 and encoded.actions(Noise()) == 6
  noise = Noise(rate=1.0, max_errors=3)
  assert encoded.nodes(noise) == 11 and encoded.actions(noise) == 12
  batch = next(data.stream(encoded, noise, 2, slice(0, 2), 0, 0))
  assert batch["token"].shape == (2, 11) and batch["action"].shape == (2, 12)
  assert batch["token"].astype(bool).all(1).any()
  with pytest.raises(UserError, match=r"'q\?' with its answer '12345' takes 8 tokens.* holds 7"):
    data.encode(examples[1:], vocab, context=7)


# --- batches --------------------------------------------------------------------------------------


def take(count, encoded, noise, position=0, rows=slice(0, BATCH), seed=0):
  return list(itertools.islice(data.stream(encoded, noise, BATCH, rows, seed, position), count))


def assert_same(batches, others):
  for batch, other in zip(batches, others, strict=True):
    assert batch.keys() == other.keys()
    for name, value in batch.items():
      np.testing.assert_array_equal(value, other[name])


NOISE = Noise(rate=0.3, max_errors=4, run=0.2)


def prompts_of(batch, vocab):
  """The questions of a batch, from its nodes."""
  real = np.arange(batch["token"].shape[1]) < batch["end"][:, :1]
  return [
    vocab.decode(t[m]) for t, m in zip(batch["token"], real & ~batch["erasable"], strict=True)
  ]


def test_batches_hold_questions_with_their_answers(toy, vocab):
  answers = dict(x[:2] for x in TOY)
  for batch in take(5, toy, NOISE):
    for question, actions in zip(prompts_of(batch, vocab), batch["action"], strict=True):
      assert vocab.decode(replay([], actions)) == answers[question]
    assert batch["weight"].dtype == np.float32
    erased = np.sum(batch["action"] == BACKSPACE)
    real = np.sum(batch["action"] != PAD)
    assert erased > 0 and batch["weight"].sum() == real - erased  # as many wrong tokens as erasures


@pytest.mark.parametrize("source, drawn", [("uniform", "0123456789"), ("prompt", "789")])
def test_wrong_tokens_come_from_where_they_should(toy, vocab, source, drawn):
  noise = Noise(rate=0.5, max_errors=4, source=source)
  wrong = set()
  for batch in take(20, toy, noise):
    wrong |= set(batch["action"][(batch["weight"] == 0) & (batch["action"] != PAD)].tolist())
  assert vocab.decode(sorted(wrong)) == drawn


def test_each_epoch_has_every_question_once_in_a_new_order_with_new_noise(toy, vocab):
  batches = take(25, toy, NOISE)  # four epochs; a batch spans two of them
  questions = np.array([q for batch in batches for q in prompts_of(batch, vocab)]).reshape(4, 100)
  actions = np.concatenate([batch["action"] for batch in batches]).reshape(4, 100, -1)
  same = []
  for epoch in questions:
    assert sorted(epoch) == sorted(x.question for x in TOY)
  for one, other in itertools.combinations(range(4), 2):
    assert np.mean(questions[one] == questions[other]) < 0.1
    rows = [actions[k][np.argsort(questions[k])] for k in (one, other)]
    same.append(np.mean(np.all(rows[0] == rows[1], axis=1)))
  assert np.mean(same) < 0.3


def test_noise_does_not_change_the_order(toy, vocab):
  pairs = zip(take(5, toy, NOISE), take(5, toy, Noise()), strict=True)
  for noisy, plain in pairs:
    assert prompts_of(noisy, vocab) == prompts_of(plain, vocab)
    assert not (plain["action"] == BACKSPACE).any()
    np.testing.assert_array_equal(plain["weight"], plain["action"] != PAD)


@pytest.mark.parametrize("position", [1, 6, 13])
def test_a_stream_can_begin_anywhere_and_seeds_differ(toy, position):
  whole = take(position + 4, toy, NOISE)
  assert_same(take(4, toy, NOISE, position), whole[position:])
  other = take(position + 1, toy, NOISE, seed=1)[-1]
  assert np.mean(other["action"] == whole[position]["action"]) < 0.9


def test_questions_that_share_rows_are_the_same_questions(toy):
  noise = Noise(0.5, 2)
  (alone,) = take(1, toy, noise)
  (packed,) = itertools.islice(
    data.stream(toy, noise, BATCH, slice(0, 8), 0, 0, sequences_per_row=2), 1
  )
  assert packed["token"].shape[0] == 8 and packed["action"].shape[1] == 2 * alone["action"].shape[1]
  assert packed["prompt"].shape == alone["prompt"].shape

  def texts(batch):  # the tokens of each tree, its prompt first
    flat = batch["token"][batch["token"] != PAD]
    return sorted(tree.tolist() for tree in np.split(flat, np.flatnonzero(flat == BOS)[1:]))

  assert texts(packed) == texts(alone)
  actions = [sorted(batch["action"].reshape(BATCH, -1).tolist()) for batch in (packed, alone)]
  assert actions[0] == actions[1]
  assert packed["weight"].sum() == alone["weight"].sum()
  # Prompts come as they were drawn, not by their sizes as rows are made up.
  np.testing.assert_array_equal(packed["prompt"], alone["prompt"])
  # Two processes see the halves of the same rows.
  halves = [next(data.stream(toy, noise, BATCH, rows, 0, 0, 2)) for rows in (slice(4), slice(4, 8))]
  for name, whole in packed.items():
    np.testing.assert_array_equal(np.concatenate([half[name] for half in halves]), whole)


def test_batches_of_shared_rows_have_one_width(toy):
  noise = Noise(1.0, 4)
  batches = itertools.islice(
    data.stream(toy, noise, BATCH, slice(0, 8), 0, 0, sequences_per_row=2), 30
  )
  used = [(batch["token"] != PAD).sum(1).max() for batch in batches]
  width = data.row_nodes(toy, noise, BATCH, 2)
  assert 0.9 * width < max(used) <= width


def test_a_batch_that_is_too_wide_is_widened_and_not_cut(toy, monkeypatch):
  monkeypatch.setattr(data, "row_nodes", lambda *args: 1)
  batch = next(data.stream(toy, Noise(0.5, 2), BATCH, slice(0, 8), 0, 0, sequences_per_row=2))
  used = (batch["token"] != PAD).sum(1).max()
  assert used <= batch["token"].shape[1] == -(-used // 32) * 32
