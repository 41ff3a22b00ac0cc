"""Generation: against one row at a time in plain Python, whose every logit is computed afresh."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmatch_jax import Model, transformer
from seqmatch_jax.actions import replay
from seqmatch_jax.display.sample import make_stream
from seqmatch_jax.rollout import (
  Rollout,
  RolloutConfig,
  make_rollout,
  nucleus,
)
from seqmatch_jax.tokens import BACKSPACE, BOS, EOS, PAD, SPECIAL
from seqmatch_jax.transformer import TransformerConfig, TransformerFunctions
from tests.seqmatch.trajectories import pad
from train_jax.errors import UserError

VOCAB, ROWS = 9, 24
A, B, C, D, E = range(SPECIAL, VOCAB)
X = BACKSPACE
LIMITS = RolloutConfig(max_length=10, max_actions=30, max_backspaces=8)
KEY = jax.random.key(7)


PROMPTS = [[BOS, *(A, C, E, B)[: i % 5]] for i in range(ROWS)]
PROMPT, LENGTH = pad(PROMPTS), np.array([len(prompt) for prompt in PROMPTS], np.int32)
ROW = np.arange(ROWS)


@pytest.fixture(scope="module")
def model():
  """A network, parameters with which every action is likely somewhere, and its rollout."""
  config = TransformerConfig(vocab=VOCAB, width=16, depth=2, heads=2, hidden=24)
  network, rng = transformer.make_network(config), np.random.default_rng(5)
  shapes = jax.eval_shape(network.init, KEY)
  params = jax.tree.map(lambda a: (0.4 * rng.normal(size=a.shape)).astype(np.float32), shapes)
  return network, params, make_rollout(network, LIMITS)


@pytest.fixture(scope="module")
def logits_of(model):
  """texts -> the logits after each, from a pass over the whole text."""
  network, params, _ = model
  apply = jax.jit(network.apply)

  def run(texts):
    token = pad(texts, LIMITS.max_length)
    position = np.broadcast_to(np.arange(LIMITS.max_length), token.shape)
    logits = apply(params, token, position, np.full_like(token, LIMITS.max_length))
    return np.asarray(logits)[np.arange(len(texts)), [len(text) - 1 for text in texts]]

  return run


def check_against_naive(made, logits_of, temperature, allow_backspace, allow_retype, forced):
  """Every action is the best of those allowed, up to 1e-5 in its logit."""
  actions = np.asarray(made.actions)
  texts, tried = [list(prompt) for prompt in PROMPTS], [{} for _ in PROMPTS]
  erased, done = np.zeros(ROWS, int), np.zeros(ROWS, bool)
  for i in range(LIMITS.max_actions):
    logits = logits_of(texts)
    for row, text in enumerate(texts):
      action = actions[row, i]
      if done[row]:
        assert action == PAD
        continue
      room, erasable = len(text) < LIMITS.max_length, len(text) > len(PROMPTS[row])
      legal = [EOS] + [X] * erasable + [A, B, C, D, E] * room
      tired = not allow_backspace or erased[row] == LIMITS.max_backspaces
      excluded = [] if allow_retype else tried[row].get(tuple(text), [])
      allowed = [a for a in legal if a not in excluded and not (a == X and tired)]

      if forced[row, i] in legal:
        assert action == forced[row, i]
      else:
        key = jax.random.fold_in(jax.random.fold_in(KEY, row), i)
        score = logits[row] + temperature * np.asarray(jax.random.gumbel(key, (VOCAB,)))
        assert action in allowed
        assert score[action] > score[allowed].max() - 1e-5

      if action == EOS:
        done[row] = True
      elif action == X:
        token = text.pop()
        tried[row].setdefault(tuple(text), []).append(token)
        erased[row] += 1
      else:
        text.append(action)
        tried[row].pop(tuple(text), None)  # a text that is typed again is a new state
  np.testing.assert_array_equal(made.tokens, pad(texts, LIMITS.max_length))
  np.testing.assert_array_equal(made.length, [len(text) for text in texts])
  np.testing.assert_array_equal(made.finished, done)
  assert done.any() and erased.any() == allow_backspace  # the test has seen something


FREE = np.full((ROWS, LIMITS.max_actions), PAD, np.int32)


def forced_actions():
  """Some rows are told how to begin: to type, to erase it, and then to type a wrong token."""
  forced = FREE.copy()
  forced[1::3, :3] = A, B, X
  forced[2::3, 4] = D
  forced[5, :5] = A, X, A, X, A  # what the model itself would not type again
  forced[9, :3] = A, EOS, B  # and what comes after the end is not played
  return forced


CASES = [
  (0.0, True, False, FREE),
  (0.0, False, False, FREE),
  (1.0, True, False, FREE),
  (1.0, True, True, FREE),
  (2.0, True, False, FREE),
  (0.7, False, False, FREE),
  (0.0, True, False, forced_actions()),
  (1.0, True, False, forced_actions()),
]
NAMES = ["greedy", "greedy-only", "T1", "T1-allow_retype", "T2", "T0.7-only", "forced", "T1-forced"]


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_every_action_is_that_of_a_model_that_reads_the_text_again(model, logits_of, case):
  _, params, rollout = model
  temperature, backspace, allow_retype, forced = case
  made = rollout(params, PROMPT, LENGTH, KEY, ROW, temperature, backspace, allow_retype, forced)
  check_against_naive(made, logits_of, *case)


def test_one_compilation_serves_all(model):
  network, params, _ = model
  traced = []
  extend = lambda *args: (traced.append(1), network.extend(*args))[1]  # noqa: E731
  rollout = make_rollout(network._replace(extend=extend), LIMITS)
  args = (params, PROMPT, LENGTH, KEY, ROW)
  rollout(*args)
  once = len(traced)
  rollout(*args, 0, False, True, FREE)
  rollout(*args, np.float64(0.5), np.True_)
  rollout(*args, jnp.float32(0.3), jnp.bool_(True), forced=jnp.asarray(forced_actions()))
  assert len(traced) == once


def test_a_row_does_not_depend_on_the_batch(model):
  _, params, rollout = model
  whole = rollout(params, PROMPT, LENGTH, KEY, ROW, 1.0)
  some = np.array([7, 2, 11, 4])
  part = rollout(params, PROMPT[some], LENGTH[some], KEY, some, 1.0)
  for left, right in zip(part, whole, strict=True):
    np.testing.assert_array_equal(left, np.asarray(right)[some])
  assert len({tuple(row) for row in np.asarray(whole.actions)}) > ROWS // 2


def test_a_stream_makes_the_same_actions_bit_by_bit(model):
  network, params, rollout = model
  whole = np.asarray(
    rollout(params, PROMPT, LENGTH, KEY, ROW, 1.0, forced=forced_actions()).actions
  )
  stream = make_stream(network, LIMITS, every=7)
  parts = list(stream(params, PROMPT, LENGTH, KEY, ROW, 1.0, forced=forced_actions()))
  done = np.flatnonzero(whole.any(0))[-1] + 1
  assert [part.shape[1] for part in parts] == [7] * (done // 7) + ([done % 7] if done % 7 else [])
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole[:, :done])
  # Fewer are asked for: the same, up to there.
  few = {"forced": forced_actions(), "max_actions": 10}
  cut = rollout(params, PROMPT, LENGTH, KEY, ROW, 1.0, **few)
  assert not np.asarray(cut.actions)[:, 10:].any() and not cut.finished.all()
  np.testing.assert_array_equal(cut.actions[:, :10], whole[:, :10])
  parts = list(stream(params, PROMPT, LENGTH, KEY, ROW, 1.0, **few))
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole[:, :10])
  # The last chunk ends with the actions: one more would be written over the last.
  assert done > 10
  stream = make_stream(network, replace(LIMITS, max_actions=10), every=7)
  forced = forced_actions()[:, :10]
  parts = list(stream(params, PROMPT, LENGTH, KEY, ROW, 1.0, forced=forced))
  np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole[:, :10])


# --- the rules, on a model that always wants the same ---------------------------------------------


def constant(prefers, config=LIMITS, rows=1, calls=None, **kwargs) -> Rollout:
  """A rollout of the prompt [BOS, A] where actions are preferred in the order of `prefers`."""

  def extend(params, cache, token, start):
    if calls is not None:
      jax.debug.callback(lambda: calls.append(token.shape))
    return jnp.broadcast_to(params, (*token.shape, VOCAB)), cache

  network = TransformerFunctions(None, None, None, None, lambda params, prompt, length: (), extend)
  logits = np.zeros(VOCAB, np.float32)
  logits[list(prefers)] = np.arange(len(prefers), 0, -1)
  logits = kwargs.pop("logits", logits)
  prompt = np.array([[BOS, A]] * rows, np.int32)
  kwargs = {"temperature": 0, **kwargs}
  return make_rollout(network, config)(
    logits, prompt, np.full(rows, 2, np.int32), KEY, np.arange(rows), **kwargs
  )


def typed(made: Rollout) -> list[int]:
  """The actions of the first row up to and with <eos>."""
  return [int(action) for action in made.actions[0] if action != PAD]


LIKELIEST = [{"top_k": 1}, {"top_p": 0.0}, {"top_k": 1, "temperature": 1.0}]
TIGHT, FEW = RolloutConfig(4, 9, 3), RolloutConfig(10, 30, 3)


@pytest.mark.parametrize(
  ("prefers", "limits", "settings", "expected"),
  [
    # <pad>, <bos>, and <backspace> at the prompt, are never chosen.
    ([PAD, BOS, X, EOS], LIMITS, {}, [EOS]),
    # A model that erases everything runs out of tokens: then there is nothing left but <eos>.
    ([X, A, B, C, D, E], LIMITS, {}, [A, X, B, X, C, X, D, X, E, X, EOS]),
    # Erasures are capped, and forbidden.
    ([X, A, B, C, EOS], RolloutConfig(10, 30, 2), {}, [A, X, B, X, C, *[A] * 7, EOS]),
    ([X, A], RolloutConfig(10, 4, 0), {}, [A, A, A, A]),
    ([X, EOS, A], LIMITS, {"allow_backspace": False}, [EOS]),
    # A full row stops or erases; A is excluded where it was erased, and the cap ends it.
    ([A, X, B], TIGHT, {}, [A, A, X, X, B, A, X, B, EOS]),
    ([A, X, B], TIGHT, {"allow_backspace": False}, [A, A, EOS]),
    ([A, X, B], TIGHT, {"allow_retype": True}, [A, A, X, A, X, A, X, A, EOS]),
    ([A, X], RolloutConfig(2, 5, 3), {}, [EOS]),
    ([A, X, B], replace(TIGHT, open_ended=True), {}, [A, A]),
    # A state that is left and come back to by other ways is another one: C is excluded after B, B
    # at the prompt; after D, neither is.
    ([B, C, EOS], RolloutConfig(10, 6, 8), {"forced": [B, C, X, X, D]}, [B, C, X, X, D, B]),
    ([C, B, EOS], RolloutConfig(10, 5, 8), {"forced": [B, C, X]}, [B, C, X, B, C]),
    # Forced actions are played where the rules allow them; else the model chooses.
    ([B, X, EOS], LIMITS, {"forced": [A, PAD, C, EOS]}, [A, B, C, EOS]),
    ([B, X, EOS], LIMITS, {"forced": [X, EOS]}, [B, EOS]),
    ([B, X, EOS], LIMITS, {"forced": [BOS, EOS]}, [B, EOS]),
    ([B, X, EOS], LIMITS, {"forced": [A, X, A, EOS]}, [A, X, A, EOS]),
    ([B, X, EOS], LIMITS, {"forced": [A, X, EOS], "allow_backspace": False}, [A, X, EOS]),
    ([B, X, EOS], RolloutConfig(3, 30, 8), {"forced": [A, B, EOS]}, [A, X, EOS]),
    # The likeliest only: what was tried, or may not be erased any more, takes no place among them.
    *(([X, A, B, C, EOS], FEW, how, [A, X, B, X, C, X, EOS]) for how in LIKELIEST),
  ],
)
def test_the_rules(prefers, limits, settings, expected):
  if "forced" in settings:
    settings = {**settings, "forced": pad([settings["forced"]], limits.max_actions)}
  made = constant(prefers, limits, **settings)
  assert typed(made) == expected and made.finished[0] == (expected[-1] == EOS)
  text = replay([BOS, A], expected)
  assert made.tokens[0].tolist() == text + [PAD] * (limits.max_length - len(text))
  assert made.length[0] == len(text)


def test_an_open_ended_text_is_broken_off_where_its_row_is_full(model):
  """And goes on as it would otherwise until then, streamed or not."""
  network, params, rollout = model
  limits = replace(LIMITS, open_ended=True)
  closed, broken = (
    each(params, PROMPT, LENGTH, KEY, ROW) for each in (rollout, make_rollout(network, limits))
  )
  ends = 0
  for row, actions in enumerate(np.asarray(closed.actions)):
    length = LENGTH[row] + np.cumsum((actions > X).astype(int) - (actions == X))
    full = np.flatnonzero(length == LIMITS.max_length)
    kept = actions[: full[0] + 1] if len(full) else actions
    assert typed(Rollout(*(x[row : row + 1] for x in broken))) == [a for a in kept if a != PAD]
    assert broken.finished[row] == (not len(full))
    ends += len(full) > 0
  assert 0 < ends < ROWS
  parts = make_stream(network, limits, 4)(params, PROMPT, LENGTH, KEY, ROW)
  streamed = np.concatenate(list(parts), axis=1)
  np.testing.assert_array_equal(streamed, broken.actions[:, : streamed.shape[1]])
  assert np.all(broken.actions[:, streamed.shape[1] :] == PAD)


def naive_nucleus(logits, top_k, top_p):
  """Indices of the likeliest tokens, one after the other until there are enough."""
  share = np.exp(logits - logits.max(), dtype=np.float64)
  share, kept = share / share.sum(), []
  for i in np.argsort(-share):
    if len(kept) == top_k or (kept and share[kept].sum() >= top_p):
      break
    kept.append(i)
  return kept


@pytest.mark.parametrize("top_k", [1, 3, 50])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 1.0])
def test_nucleus_is_that_of_a_loop(top_k, top_p):
  logits = np.random.default_rng(0).normal(0, 2, (40, 20)).astype(np.float32)
  logits[:, ::7] = -np.inf
  logits[0, 3] = 200  # so sure that nothing else is needed, not even for all
  found = np.asarray(jax.jit(nucleus)(logits, top_k, top_p))
  for row, kept in zip(logits, found, strict=True):
    allowed = set(np.flatnonzero(np.isfinite(row)))
    assert set(np.flatnonzero(kept)) & allowed == set(naive_nucleus(row, top_k, top_p)) & allowed


@pytest.mark.parametrize(
  "settings", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.8, "temperature": 2.0}], ids=str
)
def test_actions_are_drawn_from_the_likeliest_that_are_legal(settings):
  rows, one = 20_000, RolloutConfig(max_length=10, max_actions=1, max_backspaces=1)
  logits = np.array([3.0, 3.0, 0.2, 3.0, 0.0, 1.0, -1.0, 0.5, -0.5], np.float32)
  made = constant([], one, rows, logits=logits, **{"temperature": 1.0, **settings})
  scaled = np.where(np.isin(np.arange(VOCAB), [PAD, BOS, X]), -np.inf, logits)
  scaled = scaled / settings.get("temperature", 1.0)
  kept = naive_nucleus(scaled, settings.get("top_k", VOCAB), settings.get("top_p", 1.0))
  share = np.exp(scaled) * np.isin(np.arange(VOCAB), kept)
  share /= share.sum()
  count = np.bincount(made.actions[:, 0], minlength=VOCAB)
  assert np.all(np.abs(count - rows * share) <= 5 * np.sqrt(rows * share))


def test_equally_likely_actions_are_kept_together():
  score = np.log(np.array([[0.3, 0.1, 0.2, 0.1, 0.2, 0.1]], np.float32))
  for top_k, top_p in ((2, 1.0), (6, 0.4)):
    kept = nucleus(score, top_k, top_p)[0].tolist()
    assert kept == [True, False, True, False, True, False]


def test_it_stops_when_every_row_has_ended():
  calls = []
  constant([EOS], rows=3, calls=calls)
  jax.effects_barrier()
  assert calls == [(3,)]  # one step


@pytest.mark.parametrize(
  ("limits", "message"),
  [
    ((0, 1, 0), r"rollout.max_length=0 must be at least 1"),
    ((4, 0, 0), r"rollout.max_actions=0 must be at least 1"),
    ((4, 1, -1), r"rollout.max_backspaces=-1 must be at least 0"),
    ((1, 1, 0), r"prompts of 2 tokens do not fit into rollout.max_length=1"),
  ],
)
def test_bad_limits_are_refused_in_a_sentence(limits, message):
  with pytest.raises(UserError, match=message):
    constant([EOS], RolloutConfig(*limits))


def test_any_number_of_prompts_is_gone_on_from_a_batch_at_a_time():
  def generate(params, prompt, length, key, row, forced, temperature):
    assert len(prompt) == len(length) == 4 and key == "key" and temperature == 0.5
    if forced is not None:
      np.testing.assert_array_equal(forced, prompt + 1)
    made = prompt * params, prompt + row[:, None], length, row > 5
    return Rollout(*map(jnp.asarray, made))

  prompt, length = np.arange(10, dtype=np.int32)[:, None], np.arange(10)
  for forced in (None, prompt + 1):
    model = Model({}, None, None, lambda: 3, None, generate)
    made = model.roll_out(prompt, length, 4, "key", forced, temperature=0.5)
    np.testing.assert_array_equal(made.actions, prompt * 3)
    np.testing.assert_array_equal(made.tokens, prompt * 2)  # rows are numbered through
    np.testing.assert_array_equal(made.length, length)
    np.testing.assert_array_equal(made.finished, length > 5)
