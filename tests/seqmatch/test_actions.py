"""Trees against a naive replay of every prefix; noise against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmatch_jax.actions import Noise, corrupt, replay, tree, visible
from seqmatch_jax.tokens import BACKSPACE, BOS, EOS, PAD, SPECIAL
from tests.seqmatch.trajectories import pad, random_actions
from train_jax.errors import UserError

A, B, C, D = range(SPECIAL, SPECIAL + 4)
X = BACKSPACE


def grow(prompts, trajectories, nodes=None, xp=np):
  """`tree` of lists; trajectories[row] is a list of lists of actions."""
  longest = max(len(t) for row in trajectories for t in row)
  actions = np.stack([pad(row, longest) for row in trajectories])
  lengths = np.array([len(p) for p in prompts], np.int32)
  tokens = (actions >= SPECIAL).sum((1, 2))
  nodes = nodes or int((lengths + tokens).max())
  return tree(*map(xp.asarray, (pad(prompts), lengths, actions)), nodes)


def random_trajectory(rng, steps, erase):
  """Two in three end with <eos>."""
  return random_actions(rng, steps, erase, 30) + [EOS] * int(rng.random() < 2 / 3)


def random_batch(seed, rows, packed, erase=0.4):
  rng = np.random.default_rng(seed)
  prompts = [[BOS, *rng.integers(SPECIAL, 30, rng.integers(0, 6)).tolist()] for _ in range(rows)]
  trajectories = [
    [random_trajectory(rng, rng.integers(0, 25), rng.uniform(0, erase)) for _ in range(packed)]
    for _ in range(rows)
  ]
  return prompts, trajectories


def seen_text(batch, row, node):
  """The tokens that a node sees, in the order of their positions, which must be 0, 1, 2, ..."""
  nodes = np.flatnonzero(visible(batch["end"][row])[node])
  order = nodes[np.argsort(batch["position"][row][nodes])]
  np.testing.assert_array_equal(batch["position"][row][order], np.arange(len(order)))
  return batch["token"][row][order].tolist()


def check(batch, prompts, trajectories):
  """Every state by replaying its prefix, against what its node sees."""
  for row, (prompt, several) in enumerate(zip(prompts, trajectories, strict=True)):
    width = batch["action"].shape[1] // len(several)
    used = len(prompt) + sum(a >= SPECIAL for t in several for a in t)
    for number, actions in enumerate(several):
      for i, action in enumerate(actions):
        at = number * width + i
        before, after = replay(prompt, actions[:i]), replay(prompt, actions[: i + 1])
        read, following = batch["read"][row, at], batch["next"][row, at]
        assert seen_text(batch, row, read) == before
        assert seen_text(batch, row, following) == after
        assert batch["action"][row, at] == action and batch["time"][row, at] == i
        assert batch["weight"][row, at] == 1
        assert batch["erasable"][row, read] == (len(before) > len(prompt))
        assert action != EOS or following == read
      rest = slice(number * width + len(actions), (number + 1) * width)
      for name in ("action", "read", "next", "time", "weight"):
        assert not batch[name][row, rest].any()
    # Padding sees itself only, and nothing sees it.
    mask = visible(batch["end"][row])
    np.testing.assert_array_equal(mask[used:], np.eye(len(mask), dtype=bool)[used:])
    assert not mask[:used, used:].any()
    assert (batch["end"][row, : len(prompt)] == used).all()
    for name in ("token", "position", "erasable"):
      assert not batch[name][row, used:].any()


# --- trees ----------------------------------------------------------------------------------------


def test_a_tree_by_hand():
  # a b <x> c <x> <x> d <eos> after the prompt <bos> a: the text ends as "a d".
  batch = grow([[BOS, A]], [[[A, B, X, C, X, X, D, EOS]]], nodes=7)
  expected = {
    "token": [BOS, A, A, B, C, D, PAD],
    "position": [0, 1, 2, 3, 3, 2, 0],
    "end": [6, 6, 5, 4, 5, 6, 7],
    "erasable": [False, False, True, True, True, True, False],
    "action": [A, B, X, C, X, X, D, EOS],
    "read": [1, 2, 3, 2, 4, 2, 1, 5],
    "next": [2, 3, 2, 4, 2, 1, 5, 5],
    "time": list(range(8)),
    "weight": [1] * 8,
  }
  assert batch.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(batch[name][0], value, err_msg=name)
  kinds = {"erasable": bool, "weight": np.float32}
  assert all(x.dtype == kinds.get(name, np.int32) for name, x in batch.items())


@pytest.mark.parametrize(
  "actions",
  [
    [EOS],
    [],
    [A, B, C, X, X, X, EOS],
    [A, X, A, X, A, X, EOS],
    [A, X, B, C, X, X, D],
    [A, B, C, X, X, D, X, D, D, X, X, X, A, EOS],
  ],
  ids=["end at once", "nothing", "erase all", "allow_retype", "end erased", "erase upon erase"],
)
def test_edge_cases(actions):
  prompts, trajectories = [[BOS, C, D], [BOS]], [[actions], [[A, B, EOS]]]
  check(grow(prompts, trajectories, nodes=20), prompts, trajectories)


@pytest.mark.parametrize("packed, rows", [(1, 1000), (3, 300)])
def test_every_state_of_random_trajectories(packed, rows):
  prompts, trajectories = random_batch(packed, rows, packed)
  check(grow(prompts, trajectories), prompts, trajectories)


@pytest.mark.parametrize("packed", [1, 4])
def test_the_same_in_jit(packed):
  prompts, trajectories = random_batch(packed, 64, packed)
  expected = grow(prompts, trajectories, nodes=120)
  made = grow(prompts, trajectories, nodes=120, xp=jnp)
  longest = expected["action"].shape[1] // packed
  lengths = np.array([len(p) for p in prompts], np.int32)
  actions = expected["action"].reshape(64, packed, longest)
  jitted = jax.jit(tree, static_argnums=3)(pad(prompts), lengths, actions, 120)
  for name, value in expected.items():
    for other in (made[name], jitted[name]):
      assert isinstance(other, jax.Array) and other.dtype == value.dtype
      np.testing.assert_array_equal(other, value, err_msg=name)
  np.testing.assert_array_equal(visible(jnp.asarray(expected["end"])), visible(expected["end"]))


def test_one_trajectory_needs_no_axis_for_several():
  prompts, trajectories = random_batch(0, 20, 1)
  packed = grow(prompts, trajectories, nodes=60)
  lengths = np.array([len(p) for p in prompts], np.int32)
  plain = tree(pad(prompts), lengths, pad([t for (t,) in trajectories]), 60)
  for name, value in packed.items():
    np.testing.assert_array_equal(plain[name], value)


@pytest.mark.parametrize("actions", [[X], [A, X, X, B], [A, B, X, EOS, X, X]])
def test_erasing_the_prompt_or_another_trajectory_is_illegal(actions):
  with pytest.raises(ValueError, match="meets the prompt in row 1"):
    grow([[BOS, A], [BOS, A]], [[[A, EOS]], [actions]])
  with pytest.raises(ValueError, match="meets the prompt"):
    grow([[BOS]], [[[A, B, EOS], actions]])
  with pytest.raises(ValueError, match="meets the prompt"):
    replay([BOS, A], [a for a in actions if a != EOS])


def test_too_few_nodes_are_refused():
  grow([[BOS, A]], [[[A, X, A]]], nodes=4)
  with pytest.raises(ValueError, match="4 nodes do not fit into 3"):
    grow([[BOS, A]], [[[A, X, A]]], nodes=3)


def test_replay_stops_at_the_end():
  assert replay([BOS, A], [B, C, X, EOS, D]) == [BOS, A, B]
  assert replay(np.array([BOS]), np.array([B, PAD, C])) == [BOS, B]


# --- noise ----------------------------------------------------------------------------------------

VOCAB = 20


def answers(rng, rows, longest=6):
  return pad(
    [[*rng.integers(SPECIAL, VOCAB, rng.integers(0, longest + 1)), EOS] for _ in range(rows)]
  )


def anything(rows):
  return np.broadcast_to(np.arange(VOCAB) >= SPECIAL, (rows, VOCAB))


def errors_of(answer, actions):
  """Walks through the actions: per data action, the wrong tokens before it; checks their order."""
  found, wrong, erased = [], [], 0
  for action in actions[actions != PAD]:
    right = answer[len(found)]
    if action == X:
      erased += 1
      assert erased <= len(wrong)
    elif erased == len(wrong) and action == right:
      found.append(wrong)
      wrong, erased = [], 0
    else:
      assert not erased, "a token between the erasures, or a data action that is not the right one"
      wrong.append(int(action))
      assert action != right and action >= SPECIAL
  assert not wrong and len(found) == (answer != PAD).sum()
  return found


@pytest.mark.parametrize("run", [0.0, 0.4])
def test_errors_are_erased_and_carry_no_weight(run):
  rng = np.random.default_rng(0)
  answer = answers(rng, 500)
  noise = Noise(rate=0.4, max_errors=4, run=run)
  actions, weight = corrupt(rng, answer, anything(500), noise)
  assert actions.shape == weight.shape == (500, 7 + 8)
  assert actions.dtype == np.int32 and weight.dtype == np.float32
  lengths = []
  for row in range(500):
    before = errors_of(answer[row], actions[row])
    expected = [w for e in before for w in [0] * len(e) + [1] * (len(e) + 1)]
    np.testing.assert_array_equal(weight[row], pad([expected], 15)[0])
    data = answer[row][answer[row] >= SPECIAL].tolist()
    assert replay([BOS], actions[row]) == [BOS, *data]
    lengths.extend(map(len, before))
    assert sum(map(len, before)) <= 4
  assert max(lengths) == 1 if run == 0 else max(lengths) > 2


def test_the_rate_is_eta_and_runs_are_geometric():
  rng = np.random.default_rng(1)
  answer = answers(rng, 4000)
  actions, _ = corrupt(rng, answer, anything(4000), Noise(rate=0.2, max_errors=60, run=0.3))
  before = [errors_of(*rows) for rows in zip(answer, actions, strict=True)]
  lengths = np.array([len(e) for row in before for e in row])
  for n, share, p in [
    (len(lengths), np.mean(lengths > 0), 0.2),
    (np.sum(lengths > 0), np.mean(lengths[lengths > 0] > 1), 0.3),
    (np.sum(lengths > 1), np.mean(lengths[lengths > 1] > 2), 0.3),
  ]:
    assert abs(share - p) < 4 * np.sqrt(p * (1 - p) / n)
  at_eos = np.array([len(row[-1]) > 0 for row in before])
  assert abs(at_eos.mean() - 0.2) < 4 * np.sqrt(0.16 / len(at_eos))


def test_wrong_tokens_are_uniform_among_those_allowed_but_the_right_one():
  rng = np.random.default_rng(2)
  answer = np.tile(np.array([[A, B, EOS]], np.int32), (6000, 1))
  wrong = np.isin(np.arange(VOCAB), [B, C, D])
  noise = Noise(rate=1.0, max_errors=3)
  actions, _ = corrupt(rng, answer, np.broadcast_to(wrong, (6000, VOCAB)), noise)
  for i, allowed in enumerate([[B, C, D], [C, D], [B, C, D]]):
    drawn, p = actions[:, 3 * i], 1 / len(allowed)
    assert set(drawn.tolist()) == set(allowed)
    for token in allowed:
      assert abs(np.mean(drawn == token) - p) < 4 * np.sqrt(p * (1 - p) / 6000)


def test_a_full_budget_spares_no_part_of_the_answer():
  rng = np.random.default_rng(3)
  answer = np.tile(np.array([[A, B, C, D, EOS]], np.int32), (5000, 1))
  actions, _ = corrupt(rng, answer, anything(5000), Noise(rate=1.0, max_errors=2))
  errors = [[len(e) for e in errors_of(*rows)] for rows in zip(answer, actions, strict=True)]
  np.testing.assert_array_equal(np.sum(errors, 1), 2)
  np.testing.assert_allclose(np.mean(errors, 0), 2 / 5, atol=4 * np.sqrt(0.24 / 5000))
  # Of five draws at 1/2, none is an error once in 32 times and one of them five times.
  actions, _ = corrupt(rng, answer, anything(5000), Noise(rate=0.5, max_errors=2))
  count = [sum(map(len, errors_of(*rows))) for rows in zip(answer, actions, strict=True)]
  share = np.bincount(count, minlength=3) / 5000
  np.testing.assert_allclose(share, np.array([1, 5, 26]) / 32, atol=4 * np.sqrt(0.16 / 5000))


def test_where_nothing_can_be_wrong_nothing_is():
  answer = np.array([[A, B, EOS]], np.int32)
  only = (np.arange(VOCAB) == B)[None]
  actions, weight = corrupt(np.random.default_rng(0), answer, only, Noise(rate=1.0, max_errors=3))
  np.testing.assert_array_equal(actions[0], [B, X, A, B, B, X, EOS, PAD, PAD])
  np.testing.assert_array_equal(weight[0], [0, 1, 1, 1, 0, 1, 1, 0, 0])


def test_without_noise_the_answer_is_as_it_was():
  rng = np.random.default_rng(4)
  answer = answers(rng, 50)
  actions, weight = corrupt(rng, answer, anything(50), Noise())
  np.testing.assert_array_equal(actions, answer)
  np.testing.assert_array_equal(weight, answer != PAD)


@pytest.mark.parametrize(
  "setting, message",
  [
    ({"rate": 1.5}, r"noise.rate=1.5 must be between 0 and 1"),
    ({"rate": float("nan")}, r"noise.rate=nan must be between 0 and 1"),
    ({"rate": 0.1}, r"noise.max_errors=0 leaves no room .* at least 1"),
    ({"max_errors": -1}, r"noise.max_errors=-1 .* at least 0"),
    ({"run": 1.0}, r"noise.run=1.0 must be between 0 and 1, below 1"),
    ({"source": "model"}, "noise.source='model' is unknown; choose from uniform, prompt"),
  ],
)
def test_bad_noise_is_refused_in_a_sentence(setting, message):
  with pytest.raises(UserError, match=message):
    Noise(**setting)
