"""Rows of packed pieces, taken apart again: every token once an epoch, and texts see no others."""

import itertools

import numpy as np
import pytest

from seqmatch_jax.actions import Noise, replay, visible
from seqmatch_jax.data import packing
from seqmatch_jax.data.documents import Documents
from seqmatch_jax.tokens import BACKSPACE, BOS, EOS, PAD, SPECIAL
from train_jax.errors import UserError

CONTEXT, ERRORS, PROMPT, BATCH, VOCAB = 24, 3, 2, 4, 5000
NOISE, QUIET = Noise(0.3, ERRORS, run=0.3), Noise(0.0, ERRORS)
LENGTHS = np.random.default_rng(0).integers(1, 60, 41)


@pytest.fixture(scope="module")
def made():
  """Documents of which every token is another one."""
  ids = np.arange(SPECIAL, SPECIAL + LENGTHS.sum(), dtype=np.int32)
  cut = 20
  parts = [ids[: LENGTHS[:cut].sum()], ids[LENGTHS[:cut].sum() :]]
  return Documents.from_parts(parts, [LENGTHS[:cut], LENGTHS[cut:]])


@pytest.fixture(scope="module")
def packed(made):
  return packing.pack(made, VOCAB, CONTEXT, ERRORS, PROMPT)


def take(packed, count, noise=NOISE, position=0, rows=range(BATCH), seed=0):
  stream = packing.stream(packed, noise, BATCH, np.array(rows), seed, position)
  return list(itertools.islice(stream, count))


def trees_of(batch):
  """(nodes of the prompt, actions, weights) of each tree of a batch, taken apart naively."""
  for row in range(len(batch["token"])):
    real = batch["action"][row] != PAD
    starts = np.flatnonzero(real & (batch["time"][row] == 0))
    for start, stop in zip(starts, [*starts[1:], real.sum()], strict=True):
      root = batch["read"][row, start]
      begin = root - batch["position"][row, root]
      prompt = batch["token"][row, begin : root + 1]
      yield prompt, batch["action"][row, start:stop], batch["weight"][row, start:stop]


def best_fit(sizes, capacity):
  """How many rows best fit takes, the largest first and one by one."""
  room = []
  for size in sorted(sizes.tolist(), reverse=True):
    fits = [i for i, free in enumerate(room) if free >= size]
    if fits:
      room[min(fits, key=room.__getitem__)] -= size
    else:
      room.append(capacity - size)
  return len(room)


def test_rows_hold_few_holes_and_no_more_than_they_can():
  rng = np.random.default_rng(1)
  random = [rng.integers(2, most, 500) for most in (33, 14)]
  # The last ones fill two rows if 4 goes where it just fits.
  for sizes in (*random, np.full(7, 32), np.full(9, 11), np.array([28, 26, 4, 3, 3])):
    row = packing.assign(sizes, 32)
    used = np.bincount(row, sizes)
    assert used.max() <= 32 and used.min() > 0
    assert len(used) == best_fit(sizes, 32)


def test_pieces_of_a_document(made):
  document, start, stop = packing.cut(made.length, 20)
  for i, length in enumerate(LENGTHS):
    mine = document == i
    assert start[mine].tolist() == list(range(0, length, 20))
    assert stop[mine].tolist() == [min(a + 20, length) for a in range(0, length, 20)]


@pytest.mark.parametrize("noise", [QUIET, NOISE], ids=["quiet", "noise"])
def test_every_token_comes_once_an_epoch(made, packed, noise):
  assert packed.rows % BATCH  # a batch spans two epochs
  batches = take(packed, packed.rows, noise)  # BATCH epochs
  for epoch in range(BATCH):
    first = epoch * packed.rows
    seen, ends = [], 0
    for number in range(first, first + packed.rows):
      row = {k: x[number % BATCH][None] for k, x in batches[number // BATCH].items()}
      for prompt, actions, _ in trees_of(row):
        text = replay(prompt, actions)[1:]
        assert prompt[0] == BOS and np.all(np.diff(text) == 1)  # of one document, in order
        assert len(prompt) == 1 + min(PROMPT, len(text))
        seen += text
        last = np.isin(text[-1], SPECIAL + np.cumsum(LENGTHS) - 1)
        assert (actions[-1] == EOS) == last
        ends += last
    assert sorted(seen) == list(range(SPECIAL, SPECIAL + LENGTHS.sum())) and ends == len(LENGTHS)


def test_a_token_sees_its_own_text_and_nothing_else(packed):
  for batch in take(packed, 5):
    sees = visible(batch["end"])
    for row, (token, position) in enumerate(zip(batch["token"], batch["position"], strict=True)):
      for node in np.flatnonzero(token != PAD):
        seen = token[sees[row, node]]
        # <bos> and then one document's tokens in order, but for wrong ones in its noise.
        assert seen[0] == BOS and not np.any(seen[1:] == BOS)
        assert len(seen) == position[node] + 1


def test_shapes_are_the_same_with_and_without_noise(packed):
  quiet, noisy = take(packed, 1, QUIET)[0], take(packed, 1)[0]
  assert {k: x.shape for k, x in quiet.items()} == {k: x.shape for k, x in noisy.items()}
  assert quiet["token"].shape == (BATCH, CONTEXT)
  assert quiet["action"].shape == (BATCH, CONTEXT + ERRORS)
  assert quiet["prompt"].shape == (BATCH, 1 + PROMPT)


def test_wrong_tokens_are_erased_carry_no_loss_and_are_at_most_so_many_a_row(packed):
  most = 0
  for batch in take(packed, 20):
    for row in range(BATCH):
      real = batch["action"][row] != PAD
      wrong = real & (batch["weight"][row] == 0)
      erased = np.sum(batch["action"][row] == BACKSPACE)
      assert wrong.sum() == erased <= ERRORS and np.all(batch["action"][row][wrong] >= SPECIAL)
      most = max(most, erased)
    prompts = [actions.size for _, actions, _ in trees_of(batch)]
    assert min(prompts) > 0
  assert most == ERRORS


def test_every_token_but_the_special_ones_may_be_the_wrong_one():
  ids = np.tile(np.arange(SPECIAL, SPECIAL + 3, dtype=np.int32), 20)
  packed = packing.pack(Documents.from_parts([ids], [[len(ids)]]), SPECIAL + 3, CONTEXT, ERRORS, 0)
  seen = set()
  for batch in take(packed, 10):
    wrong = (batch["action"] != PAD) & (batch["weight"] == 0)
    seen |= set(batch["action"][wrong].tolist())
  assert seen == {SPECIAL, SPECIAL + 1, SPECIAL + 2}


def test_prompts_are_beginnings_of_the_row_s_pieces_any_of_them(packed):
  chosen = []
  for batch in take(packed, 40):
    for row in range(BATCH):
      one = {k: x[row][None] for k, x in batch.items()}
      prompts = [prompt.tolist() for prompt, *_ in trees_of(one)]
      place = prompts.index(batch["prompt"][row, : batch["prompt_length"][row]].tolist())
      chosen.append((len(prompts), place))
  most = max(count for count, _ in chosen)
  assert most > 1 and set(chosen) == {(n, i) for n in range(1, most + 1) for i in range(n)}


def test_a_stream_can_begin_anywhere_and_seeds_differ(packed):
  whole = take(packed, 9)
  for batch, other in zip(take(packed, 4, position=5), whole[5:], strict=True):
    for name, value in batch.items():
      np.testing.assert_array_equal(value, other[name])
  assert np.any(take(packed, 1, QUIET, seed=1)[0]["token"] != take(packed, 1, QUIET)[0]["token"])


def test_the_seed_names_the_noise_too(made):
  """Of one row, which has no order."""
  short = made.select(np.argmax(LENGTHS * (LENGTHS < CONTEXT - ERRORS), keepdims=True))
  packed = packing.pack(short, VOCAB, CONTEXT, ERRORS, PROMPT)
  assert packed.rows == 1
  first, other = (take(packed, 1, seed=seed)[0]["action"] for seed in (0, 1))
  assert not np.any(np.all(first == other, axis=1))


def test_processes_share_out_the_same_global_batch(packed):
  whole = take(packed, 3)
  parts = [take(packed, 3, rows=rows) for rows in ([0, 1], [2, 3])]
  for batch, *shares in zip(whole, *parts, strict=True):
    for name, value in batch.items():
      np.testing.assert_array_equal(value, np.concatenate([share[name] for share in shares]))


def test_pieces_may_all_be_shorter_than_a_prompt():
  ids = np.arange(SPECIAL, SPECIAL + 26, dtype=np.int32)
  found = Documents.from_parts([ids], [np.array([3, 2, 3, 18])])
  packed = packing.pack(found, VOCAB, CONTEXT, ERRORS, 10)
  for batch in take(packed, 2 * packed.rows, rows=[0]):
    for prompt, actions, weight in trees_of(batch):
      assert len(prompt) + np.sum(weight * (actions > BACKSPACE)) - 1 in (3, 2, 3, 18)
  with pytest.raises(
    UserError, match=r"longest of 4 texts .* has 18 tokens.* less than 18, or give"
  ):
    packing.pack(found, VOCAB, CONTEXT, ERRORS, 18)


@pytest.mark.parametrize(
  ("context", "prompt", "message"),
  [
    (24, 20, "data.prompt=20 must be at least 0 .* data.context=24 and noise.max_errors=3, less"),
    (0, 0, "data.context=0 leaves no room for text"),
  ],
)
def test_numbers_that_do_not_fit(context, prompt, message, made):
  with pytest.raises(UserError, match=message):
    packing.pack(made, VOCAB, context, ERRORS, prompt)
