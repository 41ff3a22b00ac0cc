"""Generation with <backspace>: batched, on a cache that rewinds, in one while_loop or in chunks.

The cache is a stack. A <backspace> takes one off the length. The next step feeds the token that is
then on top, at its position, over an equal entry, and nothing else is recomputed. Three rules keep
greedy decoding from retyping what it has just erased, and make every trajectory end:

- a token that was erased in a state is not typed again in that state;
- after `max_backspaces` of them a trajectory has no more <backspace>s;
- a full row can only stop or erase; where texts are `open_ended` it ends there.

Dimensions: b batch, p prompt, l text, a actions, e erasures, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from seqmatch_jax.tokens import BACKSPACE, EOS, PAD
from seqmatch_jax.transformer import TransformerFunctions
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError, check_at_least


@dataclass(frozen=True)
class RolloutConfig:
  """Static limits of generation.

  Attributes:
    max_length: tokens in the text, prompt included.
    max_actions: tokens typed, <backspace>s and <eos> together.
    max_backspaces: <backspace>s in one trajectory.
    open_ended: whether a trajectory breaks off, without <eos>, where its row is full. In training
      longer texts are broken off there, so the model does not learn what to do: if it may only stop
      or erase, it mostly erases, and fills the row again.
  """

  max_length: int
  max_actions: int
  max_backspaces: int
  open_ended: bool = False

  def __post_init__(self):
    for name, least in (("max_length", 1), ("max_actions", 1), ("max_backspaces", 0)):
      check_at_least(f"rollout.{name}", getattr(self, name), least)


class Rollout(NamedTuple):
  """Trajectories, and the texts that they leave.

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


def is_over(config: RolloutConfig, rollout: Rollout) -> jax.Array:
  """bool [b]: which trajectories have come to their end before `max_actions`."""
  return rollout.finished | (config.open_ended & (rollout.length >= config.max_length))


class State(NamedTuple):
  """The loop's carry: a Rollout so far, the cache, and each trajectory's erasures in order."""

  step: jax.Array
  rollout: Rollout
  cache: list[tuple[jax.Array, jax.Array]]
  backspaces: jax.Array  # [b] their number
  erased: jax.Array  # [b, e] the token
  erased_at: jax.Array  # [b, e] the text's length without it; 0 once that text is gone for good


class Settings(NamedTuple):
  """How the next action is chosen; all of it is traced, so one compilation serves all values.

  Attributes:
    key, row: the randomness: step i of row r draws from fold_in(fold_in(key, r), i); row int32 [b].
    temperature: 0 is greedy.
    allow_backspace: whether the model may erase.
    allow_retype: whether a token may be typed again where it was erased. The policy itself does; a
      generation that does so wastes its erasures, and a greedy one repeats itself.
    forced: int32 [b, a], actions that replace the model's choice at these times; PAD where it is
      free. They obey the rules of `legal`, and may type again what was erased.
    max_actions: the most actions of a trajectory.
    nucleus: None, or (top_k, top_p): only the actions of `nucleus` are drawn.
  """

  key: jax.Array
  row: jax.Array
  temperature: jax.Array
  allow_backspace: jax.Array
  allow_retype: jax.Array
  forced: jax.Array
  max_actions: jax.Array
  nucleus: tuple[jax.Array, jax.Array] | None


def make_settings(
  config: RolloutConfig,
  key,
  row,
  temperature=1.0,
  allow_backspace=True,
  allow_retype=False,
  forced=None,
  top_k: int | None = None,
  top_p: float | None = None,
  max_actions: int | None = None,
) -> Settings:
  """The `Settings` of a rollout; their types do not depend on those of the arguments."""
  if forced is None:
    forced = np.full((len(row), config.max_actions), PAD, np.int32)  # jnp's would be compiled
  best = None
  if top_k is not None or top_p is not None:
    best = jnp.int32(top_k or np.iinfo(np.int32).max), jnp.float32(1 if top_p is None else top_p)
  switches = jnp.float32(temperature), jnp.bool_(allow_backspace), jnp.bool_(allow_retype)
  limit = jnp.int32(min(max_actions or config.max_actions, config.max_actions))
  return Settings(key, jnp.asarray(row), *switches, jnp.asarray(forced), limit, best)


def legal(length: jax.Array, prompt_length: jax.Array, max_length: int, vocab: int) -> jax.Array:
  """The legal actions in texts of `length` [b] -> bool [b, v].

  PAD and <bos> are never legal, <backspace> only behind the prompt, tokens only where there is
  room.
  """
  action, length = jnp.arange(vocab), length[:, None]
  return jnp.select(
    [action > BACKSPACE, action == BACKSPACE],
    [length < max_length, length > prompt_length[:, None]],
    action == EOS,
  )


def nucleus(score: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
  """The likeliest actions, bool [b, v], of scores [b, v]: log-probabilities up to a constant.

  These are the best of the `top_k` best, as many as the probability `top_p` needs, and at least
  one (arXiv 1904.09751); more where scores are equal.
  """
  best = jnp.sort(score, axis=-1, descending=True)
  share = jax.nn.softmax(best)
  before = jnp.cumsum(share, axis=-1) - share
  place = jnp.arange(score.shape[-1])
  kept = (place < top_k) & (before < top_p) | (place == 0)
  return score >= jnp.min(jnp.where(kept, best, jnp.inf), axis=-1, keepdims=True)


def make_steps(network: TransformerFunctions, config: RolloutConfig) -> tuple[Callable, Callable]:
  """Returns `begin(params, prompt, length) -> State`, and `advance`.

  `advance(params, state, prompt_length, settings, until) -> State` goes on until every row is over,
  or to action number `until`.
  """
  slots, memory = jnp.arange(config.max_length), jnp.arange(config.max_backspaces)

  def act(state: State, logits, noise, prompt_length, settings: Settings) -> jax.Array:
    """The next action [b]: the forced one, or the best of those allowed."""
    length, vocab = state.rollout.length, jnp.arange(logits.shape[-1])
    rules = legal(length, prompt_length, config.max_length, len(vocab))
    here = (state.erased_at == length[:, None])[..., None]
    tried = (here & (state.erased[..., None] == vocab)).any(1) & ~settings.allow_retype  # [b, v]
    may_erase = settings.allow_backspace & (state.backspaces < config.max_backspaces)
    allowed = rules & ~tried & (may_erase[:, None] | (vocab != BACKSPACE))
    if settings.nucleus:
      score = logits / jnp.where(settings.temperature > 0, settings.temperature, 1)
      allowed &= nucleus(jnp.where(allowed, score, -jnp.inf), *settings.nucleus)
    choice = jnp.argmax(jnp.where(allowed, logits + noise, -jnp.inf), axis=-1)
    now = jax.lax.dynamic_index_in_dim(settings.forced, state.step, 1)  # [b, 1]
    action = jnp.where(jnp.take_along_axis(rules, now, 1), now, choice[:, None])[:, 0]
    return jnp.where(is_over(config, state.rollout), PAD, action)

  def update(state: State, action, top, cache) -> State:
    """The state after action [b]; a <backspace> erases `top` [b, 1]."""
    actions, tokens, before, finished = state.rollout
    push, pop = (action > BACKSPACE)[:, None], (action == BACKSPACE)[:, None]
    length = before[:, None] + push - pop  # [b, 1]
    rollout = Rollout(
      jax.lax.dynamic_update_index_in_dim(actions, action, state.step, 1),
      jnp.where(push & (slots == before[:, None]), action[:, None], tokens),
      length[:, 0],
      finished | (action == EOS),
    )
    # A token begins a new text. All erasures in texts that went on otherwise are void.
    erased_at = jnp.where(push & (state.erased_at >= length), 0, state.erased_at)
    new = pop & (memory == state.backspaces[:, None])
    return State(
      state.step + 1,
      rollout,
      cache,
      state.backspaces + pop[:, 0],
      jnp.where(new, top, state.erased),
      jnp.where(new, length, erased_at),
    )

  def begin(params, prompt, prompt_length) -> State:
    b, p = prompt.shape
    if p > config.max_length:
      raise UserError(
        f"prompts of {p} tokens do not fit into rollout.max_length={config.max_length}; "
        "raise it or shorten them."
      )
    return State(
      step=jnp.zeros((), jnp.int32),
      rollout=Rollout(
        jnp.full((b, config.max_actions), PAD, jnp.int32),
        jnp.pad(prompt, ((0, 0), (0, config.max_length - p)), constant_values=PAD),
        prompt_length,
        jnp.zeros(b, bool),
      ),
      cache=network.read(params, prompt, config.max_length),
      backspaces=jnp.zeros(b, jnp.int32),
      erased=jnp.zeros((b, config.max_backspaces), jnp.int32),
      erased_at=jnp.zeros((b, config.max_backspaces), jnp.int32),
    )

  def advance(params, state: State, prompt_length, settings: Settings, until) -> State:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(settings.key, settings.row)

    def body(state: State) -> State:
      last = state.rollout.length - 1
      top = jnp.take_along_axis(state.rollout.tokens, last[:, None], 1)  # [b, 1]
      logits, cache = network.extend(params, state.cache, top[:, 0], last)
      now = jax.vmap(jax.random.fold_in, (0, None))(keys, state.step)
      # The argmax of logits + T x Gumbel noise is a draw from softmax(logits / T).
      draw = jax.vmap(lambda k: jax.random.gumbel(k, logits.shape[1:]))(now)
      action = act(state, logits, settings.temperature * draw, prompt_length, settings)
      return update(state, action, top, cache)

    def going(state: State) -> jax.Array:
      return (state.step < until) & ~is_over(config, state.rollout).all()

    return jax.lax.while_loop(going, body, state)

  return begin, advance


def make_rollout(
  network: TransformerFunctions, config: RolloutConfig, mesh: Mesh | None = None
) -> Callable[..., Rollout]:
  """Returns `rollout(params, prompt, length, key, row, ...)`, which continues prompts in one go.

  Each row goes on until it is over, see `is_over`, or has its most actions. Its trajectory depends
  on its prompt, (key, row) and the settings, but not on the batch. One compilation serves all
  settings, and another one those with `top_k` or `top_p`. The arguments:

    prompt: int32 [b, p], left-aligned; never erased.
    length: int32 [b], of the prompts.
    key, row, ...: the arguments of `make_settings`, which become `Settings`.

  Args:
    mesh: its devices share the rows, and each then has all outputs; None leaves that to the caller,
      who traces `rollout`.
  """
  begin, advance = make_steps(network, config)

  def run(params, prompt, prompt_length, settings: Settings) -> Rollout:
    n = len(prompt)
    prompt, prompt_length, row, forced = mesh_lib.fill_rows(
      (prompt, prompt_length, settings.row, settings.forced)
    )
    settings = settings._replace(row=row, forced=forced)
    state = begin(params, prompt, prompt_length)
    rollout = advance(params, state, prompt_length, settings, settings.max_actions).rollout
    inside = jnp.arange(config.max_length) < rollout.length[:, None]
    rollout = rollout._replace(tokens=jnp.where(inside, rollout.tokens, PAD))
    return jax.tree.map(lambda x: x[:n], rollout)

  run = mesh_lib.jit(run, mesh)

  def rollout(params, prompt, length, key, row, *args, **kwargs) -> Rollout:
    return run(params, prompt, length, make_settings(config, key, row, *args, **kwargs))

  return rollout
