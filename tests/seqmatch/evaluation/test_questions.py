"""Exact match, forced errors and erasures, on trajectories written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmatch_jax.actions import Noise
from seqmatch_jax.data import questions as data
from seqmatch_jax.evaluation import questions as evaluate
from seqmatch_jax.loss import LossConfig
from seqmatch_jax.tokens import BACKSPACE, EOS, PAD, Vocab

A, B, C = 4, 5, 6
RIGHT = [A, B, EOS, PAD]


def rows(*trajectories):
  width = max(map(len, trajectories))
  return np.array([[*t, *[PAD] * (width - len(t))] for t in trajectories], np.int32)


@pytest.mark.parametrize(
  "trajectory, exact",
  [
    ([A, B, EOS], True),
    ([A, C, BACKSPACE, B, EOS], True),
    ([C, C, BACKSPACE, BACKSPACE, A, B, EOS], True),
    ([A, B], False),  # not ended
    ([A, EOS], False),
    ([A, B, B, EOS], False),
    ([A, C, EOS], False),
    ([A, B, BACKSPACE, EOS], False),
    ([EOS], False),
  ],
)
def test_exact_match(trajectory, exact):
  assert evaluate.exact_match(rows(trajectory), rows(RIGHT)).tolist() == [exact]


def test_erasures_are_counted_by_what_they_erase():
  trajectories = rows(
    [A, C, BACKSPACE, B, EOS],  # an error, erased
    [C, B, BACKSPACE, EOS],  # an error that stays; what followed it was wrong too, and erased
    [A, BACKSPACE, A, B, EOS],  # a right token erased
    [A, B, C, BACKSPACE, EOS],  # too long is wrong
  )
  found = evaluate.erasures(trajectories, np.repeat(rows(RIGHT), 4, axis=0))
  assert found.rate == 4 / (5 + 4 + 5 + 5)
  assert found.precision == 3 / 4
  assert found.recall == 2 / 3
  # Without erasures or errors there is no precision or recall.
  found = evaluate.erasures(rows([A, B, EOS]), rows(RIGHT))
  assert found.rate == 0 and np.isnan(found.precision) and np.isnan(found.recall)


def test_one_wrong_token_is_forced_after_a_right_beginning():
  answer = np.repeat(rows([A, B, A, C, EOS], [B, C, EOS]), 200, axis=0)
  wrong = np.zeros((400, 7), bool)
  wrong[:, [A, B, C]] = True
  forced = evaluate.force_error(np.random.default_rng(0), answer, wrong, 9)
  assert forced.shape == (400, 9)
  places, instead_of_b = [], set()
  for got, right in zip(forced, answer, strict=True):
    length = np.sum(got != PAD)
    places.append(length - 1)
    assert np.all(got[: length - 1] == right[: length - 1])
    assert got[length - 1] in {A, B, C} - {right[length - 1]}
    if right[length - 1] == B:
      instead_of_b.add(int(got[length - 1]))
    assert np.all(got[length:] == PAD)
  assert set(places[:200]) == {0, 1, 2, 3} and set(places[200:]) == {0, 1}
  assert instead_of_b == {A, C}
  wrong[:] = np.arange(7) == A  # where the right one is the only one, none is forced
  forced = evaluate.force_error(np.random.default_rng(0), answer, wrong, 9)
  for got, right in zip(forced, answer, strict=True):
    differ = int(np.argmax(got[:5] != right[:5]))
    assert (got[differ], right[differ]) in [(A, B), (A, C), (PAD, A)]


@pytest.fixture(scope="module")
def encoded():
  examples = data.make_two_sum(37, 0)
  vocab = Vocab.from_texts([x.question + x.answer for x in examples])
  return data.encode(examples, vocab, 64), vocab


def test_likelihood_of_a_uniform_policy(encoded):
  known, vocab = encoded
  apply = lambda params, token, position, end: jnp.zeros((*token.shape, vocab.size)) * params  # noqa: E731
  found = evaluate.make_likelihood(apply, LossConfig("chi2", 0.5, 0.9, True), 8)(1.0, known)
  # All but <pad> and <bos>; <backspace> too after the first of an answer's three actions.
  legal = vocab.size - 2
  wanted = [-np.mean(np.log([legal - 1, legal, legal])), -np.log(legal - 1)]
  assert found == pytest.approx(wanted, rel=1e-6)
  assert [*evaluate.policies(True)] == ["", ", forbidden"]
  found = evaluate.make_likelihood(apply, LossConfig("chi2", 0.5, 0.9, False), 8)(1.0, known)
  assert found == pytest.approx(wanted[1:], rel=1e-6)


def test_likelihood_does_not_depend_on_the_batch(encoded):
  known, vocab = encoded

  def apply(params, token, position, end):
    return jax.nn.one_hot(token, vocab.size) * params + position[..., None] / 7

  config = LossConfig("kl", 0.1, 0.9, False)
  found = [evaluate.make_likelihood(apply, config, batch)(2.0, known)[0] for batch in (1, 8, 64)]
  assert found == pytest.approx([found[0]] * 3, rel=1e-5)


def test_the_likeliest_of_several_draws_is_kept(encoded):
  """Against a loop, and scores against the softmax written out."""
  known, vocab = encoded
  rng = np.random.default_rng(0)
  table = rng.normal(size=(vocab.size, vocab.size))

  def apply(params, token, position, end):
    return jnp.asarray(params)[token]  # the next action depends on the last one

  shuffled = [rng.permutation(known.answer) for _ in range(2)]
  draws = [shuffled[0], known.answer, shuffled[1]]
  score = evaluate.make_score(apply, 8)
  wanted = np.zeros((3, len(known.answer)))
  for i, actions in enumerate(draws):
    for j, row in enumerate(actions):
      last = known.prompt[j, known.prompt_length[j] - 1]
      for action in row[row != PAD]:
        logits = np.delete(table[last], [PAD, 1, BACKSPACE])
        wanted[i, j] += table[last, action] - np.log(np.exp(logits).sum())
        last = action
  scores = [score(table.astype(np.float32), known, actions) for actions in draws]
  np.testing.assert_allclose(scores, wanted, rtol=1e-4)
  match, taken = evaluate.best_of(lambda actions: score(table, known, actions), draws, known.answer)
  best = wanted.argmax(0)
  right = [np.array_equal(draws[k][j], known.answer[j]) for j, k in enumerate(best)]
  np.testing.assert_array_equal(match, right)
  assert 0 < match.mean() < 1 and np.all(taken == 9)


@pytest.mark.parametrize("backspace", [True, False])
def test_measure_of_a_policy_that_is_always_right(encoded, backspace):
  known, _ = encoded
  calls = []

  def generate(temperature, allow_retype, allowed, forced, seed):
    calls.append((temperature, allow_retype, allowed))
    if forced is None:  # without the <backspace> that it has learned it is lost
      return known.answer if allowed == backspace else np.full_like(known.answer, EOS)
    length = np.sum(forced != PAD, axis=1)
    rest = [
      [*f[:n], BACKSPACE, *right[n - 1 :]] if allowed else [*f[:n], *right[n:]]
      for f, n, right in zip(forced.tolist(), length, known.answer.tolist(), strict=True)
    ]
    return rows(*rest)

  score = lambda actions: np.arange(len(actions))  # noqa: E731
  found = dict(evaluate.measure(generate, score, known, backspace, 0, Noise()))
  assert ("exact/T=1, best of 3" in found) != backspace
  search = "T=1, no retyping"
  assert (f"exact/{search}" in found) == backspace and f"forbidden/{search}" not in found
  for name in {*evaluate.GENERATIONS} - {search}:
    assert found[f"exact/{name}"] == 1
    assert found[f"actions/{name}"] == np.mean(np.sum(known.answer != PAD, axis=1))
    assert found[f"recovery/{name}"] == float(backspace)
    assert found[f"finished/{name}"] == 1
    assert (f"forbidden/{name}" in found) == backspace
    # Erasures are those of its own actions, not of what it does about a forced error.
    assert found.get(f"forbidden/{name}", 0) == found.get(f"rate/{name}", 0) == 0
  # Greedily it would repeat itself; at a temperature the policy is the model's own.
  own = {(0.0, False), (1.0, True), (0.5, True)}
  assert {tuple(how) for *how, _ in calls} == own | ({(1.0, False)} if backspace else set())
  assert {allowed for *_, allowed in calls} == ({True, False} if backspace else {False})
  assert known.nodes(Noise()) >= 11
