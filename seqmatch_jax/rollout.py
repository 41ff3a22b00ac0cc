"""Generation with <backspace>: batched, in one while_loop, on a cache that rewinds.

The cache is a stack. A <backspace> takes one off the length; the next step feeds the token that is
then on top, at its position, over an equal entry, and nothing else is recomputed. So that greedy
decoding does not retype what it has just erased, and that every trajectory ends:

- a token that was erased in a state is not typed again in that state;
- after `max_erasures` of them a trajectory has no more <backspace>s;
- a full row can only stop or erase.

Dimensions: b batch, p prompt, l text, a actions, e erasures, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqmatch_jax.tokens import BACKSPACE, EOS, PAD
from seqmatch_jax.transformer import Network
from train_jax.errors import UserError


@dataclass(frozen=True)
class RolloutConfig:
  """Static limits of generation.

  Attributes:
    max_length: tokens in the text, prompt included.
    max_actions: tokens typed, <backspace>s and <eos> together.
    max_erasures: <backspace>s in one trajectory.
  """

  max_length: int
  max_actions: int
  max_erasures: int

  def __post_init__(self):
    for name, least in (("max_length", 1), ("max_actions", 1), ("max_erasures", 0)):
      if getattr(self, name) < least:
        raise UserError(f"rollout.{name}={getattr(self, name)} must be at least {least}.")


class Rollout(NamedTuple):
  """What was done, and what is left of it.

  Attributes:
    actions: int32 [b, a], PAD after <eos>.
    tokens: int32 [b, l], the text, prompt included, without <eos>; then PAD.
    length: int32 [b], of the text.
    finished: bool [b], whether <eos> came.
  """

  actions: jax.Array
  tokens: jax.Array
  length: jax.Array
  finished: jax.Array


class State(NamedTuple):
  """The loop's carry: a Rollout so far, the cache, and each trajectory's erasures in order."""

  step: jax.Array
  rollout: Rollout
  cache: list[tuple[jax.Array, jax.Array]]
  erasures: jax.Array  # [b] how many there were
  erased: jax.Array  # [b, e] the token
  at: jax.Array  # [b, e] the text's length without it; 0 once that text is gone for good


def legal(length: jax.Array, prompt_length: jax.Array, max_length: int, vocab: int) -> jax.Array:
  """The rules: which actions there are in texts of length [b] -> bool [b, v].

  Never PAD or <bos>, <backspace> only behind the prompt, tokens only where there is room.
  """
  action, length = jnp.arange(vocab), length[:, None]
  return jnp.select(
    [action > BACKSPACE, action == BACKSPACE],
    [length < max_length, length > prompt_length[:, None]],
    action == EOS,
  )


def make_rollout(network: Network, config: RolloutConfig) -> Callable[..., Rollout]:
  """Returns `rollout(params, prompt, length, key, row, temperature, allow_backspace, forced)`."""
  slots, memory = jnp.arange(config.max_length), jnp.arange(config.max_erasures)

  def act(state: State, logits, noise, prompt_length, allow_backspace, retype, forced) -> jax.Array:
    """The next action [b]: the one that is forced, or the best of those allowed."""
    length, finished = state.rollout.length, state.rollout.finished
    vocab = jnp.arange(logits.shape[-1])
    rules = legal(length, prompt_length, config.max_length, len(vocab))
    here = (state.at == length[:, None])[..., None]
    tried = (here & (state.erased[..., None] == vocab)).any(1) & ~retype  # [b, v]
    may_erase = allow_backspace & (state.erasures < config.max_erasures)
    allowed = rules & ~tried & (may_erase[:, None] | (vocab != BACKSPACE))
    choice = jnp.argmax(jnp.where(allowed, logits + noise, -jnp.inf), axis=-1)
    now = jax.lax.dynamic_index_in_dim(forced, state.step, 1)  # [b, 1]
    action = jnp.where(jnp.take_along_axis(rules, now, 1), now, choice[:, None])[:, 0]
    return jnp.where(finished, PAD, action)

  def update(state: State, action, top, cache) -> State:
    """The state after action [b]; `top` [b, 1] is what a <backspace> erases."""
    actions, tokens, before, finished = state.rollout
    push, pop = (action > BACKSPACE)[:, None], (action == BACKSPACE)[:, None]
    length = before[:, None] + push - pop  # [b, 1]
    rollout = Rollout(
      jax.lax.dynamic_update_index_in_dim(actions, action, state.step, 1),
      jnp.where(push & (slots == before[:, None]), action[:, None], tokens),
      length[:, 0],
      finished | (action == EOS),
    )
    # A token begins a text that was not there before, and ends all that went on otherwise.
    at = jnp.where(push & (state.at >= length), 0, state.at)
    new = pop & (memory == state.erasures[:, None])
    return State(
      state.step + 1,
      rollout,
      cache,
      state.erasures + pop[:, 0],
      jnp.where(new, top, state.erased),
      jnp.where(new, length, at),
    )

  @jax.jit
  def run(params, prompt, prompt_length, key, row, temperature, allow_backspace, retype, forced):
    b, p = prompt.shape
    if p > config.max_length:
      raise UserError(
        f"prompts of {p} tokens do not fit into rollout.max_length={config.max_length}; "
        "raise it or shorten them."
      )
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, row)

    def body(state: State) -> State:
      last = state.rollout.length - 1
      top = jnp.take_along_axis(state.rollout.tokens, last[:, None], 1)  # [b, 1]
      logits, cache = network.extend(params, state.cache, top, last)
      logits = logits[:, 0]
      now = jax.vmap(jax.random.fold_in, (0, None))(keys, state.step)
      # The argmax of logits + T x Gumbel noise is a draw from softmax(logits / T).
      noise = temperature * jax.vmap(lambda k: jax.random.gumbel(k, logits.shape[1:]))(now)
      action = act(state, logits, noise, prompt_length, allow_backspace, retype, forced)
      return update(state, action, top, cache)

    def going(state: State) -> jax.Array:
      return (state.step < config.max_actions) & ~state.rollout.finished.all()

    _, cache = network.extend(
      params, network.make_cache(b, config.max_length), prompt, jnp.zeros_like(prompt_length)
    )
    start = State(
      step=jnp.zeros((), jnp.int32),
      rollout=Rollout(
        jnp.full((b, config.max_actions), PAD, jnp.int32),
        jnp.pad(prompt, ((0, 0), (0, config.max_length - p)), constant_values=PAD),
        prompt_length,
        jnp.zeros(b, bool),
      ),
      cache=cache,
      erasures=jnp.zeros(b, jnp.int32),
      erased=jnp.zeros((b, config.max_erasures), jnp.int32),
      at=jnp.zeros((b, config.max_erasures), jnp.int32),
    )
    rollout = jax.lax.while_loop(going, body, start).rollout
    tokens = jnp.where(slots < rollout.length[:, None], rollout.tokens, PAD)
    return rollout._replace(tokens=tokens)

  def rollout(
    params,
    prompt,
    length,
    key,
    row,
    temperature=1.0,
    allow_backspace=True,
    retype=False,
    forced=None,
  ) -> Rollout:
    """Continues prompts until each has its <eos>, or `max_actions`.

    A row's trajectory depends on its prompt, (key, row) and the settings: not on the batch.

    Args:
      prompt: int32 [b, p], left-aligned; never erased.
      length: int32 [b], of the prompts.
      key: the randomness; step i of a row draws from fold_in(fold_in(key, row), i).
      row: int32 [b], a number for each row.
      temperature: 0 is greedy. Traced, as `allow_backspace` is: one compilation serves all.
      allow_backspace: whether the model may erase.
      retype: whether a token may be typed again where it was erased. The policy itself does; a
        generation that does so wastes its erasures, and a greedy one repeats itself.
      forced: int32 [b, a], actions that are played at these times instead of the model's choice;
        PAD where it is free. The rules hold (`legal`), what the model may not repeat does not.
    """
    if forced is None:
      forced = jnp.full((len(prompt), config.max_actions), PAD, jnp.int32)
    # Of one type whatever they are given as, for each type would be compiled anew.
    switches = jnp.float32(temperature), jnp.bool_(allow_backspace), jnp.bool_(retype)
    return run(params, prompt, length, key, row, *switches, forced)

  return rollout
