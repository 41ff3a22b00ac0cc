"""Generation with <backspace>: batched, on a cache that rewinds, in one while_loop or in chunks.

The cache is a stack. A <backspace> takes one off the length; the next step feeds the token that is
then on top, at its position, over an equal entry, and nothing else is recomputed. So that greedy
decoding does not allow_retype what it has just erased, and that every trajectory ends:

- a token that was erased in a state is not typed again in that state;
- after `max_backspaces` of them a trajectory has no more <backspace>s;
- a full row can only stop or erase; where texts are `open_ended` it ends there.

Dimensions: b batch, p prompt, l text, a actions, e erasures, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from seqmatch_jax.tokens import BACKSPACE, EOS, PAD
from seqmatch_jax.transformer import TransformerFunctions
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.multihost.signals import pause


@dataclass(frozen=True)
class RolloutConfig:
  """Static limits of generation.

  Attributes:
    max_length: tokens in the text, prompt included.
    max_actions: tokens typed, <backspace>s and <eos> together.
    max_backspaces: <backspace>s in one trajectory.
    open_ended: whether a trajectory breaks off, without <eos>, where its row is full. Longer texts
      are broken off so in training, and what to do there is not learned: a model that may only
      stop or erase mostly erases, and fills the row again.
  """

  max_length: int
  max_actions: int
  max_backspaces: int
  open_ended: bool = False

  def __post_init__(self):
    for name, least in (("max_length", 1), ("max_actions", 1), ("max_backspaces", 0)):
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


def is_over(config: RolloutConfig, rollout: Rollout) -> jax.Array:
  """bool [b]: which trajectories have come to their end before `max_actions`."""
  return rollout.finished | (config.open_ended & (rollout.length >= config.max_length))


class State(NamedTuple):
  """The loop's carry: a Rollout so far, the cache, and each trajectory's erasures in order."""

  step: jax.Array
  rollout: Rollout
  cache: list[tuple[jax.Array, jax.Array]]
  backspaces: jax.Array  # [b] how many there were
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


class Settings(NamedTuple):
  """How the next action is chosen; all of it traced, so that one compilation serves all values.

  Attributes:
    key, row: the randomness: step i of row r draws from fold_in(fold_in(key, r), i); row int32 [b].
    temperature: 0 is greedy.
    allow_backspace: whether the model may erase.
    allow_retype: whether a token may be typed again where it was erased.
    forced: int32 [b, a], see `make_rollout`.
    most: actions of a trajectory, at most.
    nucleus: None, or (top_k, top_p), see `nucleus`.
  """

  key: jax.Array
  row: jax.Array
  temperature: jax.Array
  allow_backspace: jax.Array
  allow_retype: jax.Array
  forced: jax.Array
  most: jax.Array
  nucleus: tuple[jax.Array, jax.Array] | None


def nucleus(score: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
  """The likeliest actions, bool [b, v], of scores [b, v] up to a constant log-probabilities.

  The `top_k` best, and of these as many of the best as are needed for the probability `top_p`, at
  least one (arXiv 1904.09751); more where scores are equal.
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
    """The next action [b]: the one that is forced, or the best of those allowed."""
    length, vocab = state.rollout.length, jnp.arange(logits.shape[-1])
    rules = legal(length, prompt_length, config.max_length, len(vocab))
    here = (state.at == length[:, None])[..., None]
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
    new = pop & (memory == state.backspaces[:, None])
    return State(
      state.step + 1,
      rollout,
      cache,
      state.backspaces + pop[:, 0],
      jnp.where(new, top, state.erased),
      jnp.where(new, length, at),
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
      at=jnp.zeros((b, config.max_backspaces), jnp.int32),
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
  """The settings of a rollout, see `make_rollout`; of one type whatever they are given as."""
  if forced is None:
    forced = np.full((len(row), config.max_actions), PAD, np.int32)  # jnp's would be compiled
  best = None
  if top_k is not None or top_p is not None:
    best = jnp.int32(top_k or np.iinfo(np.int32).max), jnp.float32(1 if top_p is None else top_p)
  switches = jnp.float32(temperature), jnp.bool_(allow_backspace), jnp.bool_(allow_retype)
  most = jnp.int32(min(max_actions or config.max_actions, config.max_actions))
  return Settings(key, jnp.asarray(row), *switches, jnp.asarray(forced), most, best)


def sampling_options(
  temperature: float,
  allow_retype: bool,
  backspace: bool,
  top_k: int | None,
  top_p: float | None,
  max_actions: int | None,
) -> dict:
  """How samples are drawn: the last arguments of `make_rollout`'s function.

  Args:
    allow_retype: whether what is drawn may type again what it has erased.
    backspace: whether the model has learned to erase, and may.

  Raises:
    UserError: a temperature below 0, top_k or max_actions below 1, or top_p outside [0, 1].
  """
  if not 0 <= temperature < math.inf:
    raise UserError(f"temperature={temperature} must be finite and at least 0; 0 is greedy.")
  if top_k is not None and top_k < 1:
    raise UserError(f"top_k={top_k} must be at least 1; None leaves all tokens.")
  if top_p is not None and not 0 <= top_p <= 1:
    raise UserError(f"top_p={top_p} must lie in [0, 1]; None leaves all tokens.")
  if max_actions is not None and max_actions < 1:
    raise UserError(f"max_actions={max_actions} must be at least 1; None leaves the model's limit.")
  return {
    "temperature": temperature,
    "allow_retype": allow_retype and temperature > 0,  # a greedy one would repeat itself
    "allow_backspace": backspace,
    "top_k": top_k,
    "top_p": top_p,
    "max_actions": max_actions,
  }


def make_rollout(
  network: TransformerFunctions, config: RolloutConfig, mesh: Mesh | None = None
) -> Callable[..., Rollout]:
  """Returns `rollout(params, prompt, length, key, row, ...)`: continues prompts in one go.

  It goes on until each is over, see `is_over`, or has its most actions. A row's trajectory depends
  on its prompt, (key, row) and the settings: not on the batch. One compilation serves all settings,
  and another one those with `top_k` or `top_p`. The arguments:

    prompt: int32 [b, p], left-aligned; never erased.
    length: int32 [b], of the prompts.
    key: the randomness; step i of a row draws from fold_in(fold_in(key, row), i).
    row: int32 [b], a number for each row.
    temperature: 0 is greedy.
    allow_backspace: whether the model may erase.
    allow_retype: whether a token may be typed again where it was erased. The policy itself does; a
      generation that does so wastes its erasures, and a greedy one repeats itself.
    forced: int32 [b, a], actions that are played at these times instead of the model's choice;
      PAD where it is free. The rules hold (`legal`), what the model may not repeat does not.
    top_k, top_p: what is drawn is among the likeliest actions only, see `nucleus`.
    max_actions: the most, if not those of `config`, which are also the limit.

  Args:
    mesh: of the devices that share the rows out, each of which then has all that was made; None
      leaves that to whoever traces it.
  """
  begin, advance = make_steps(network, config)

  def run(params, prompt, prompt_length, settings: Settings) -> Rollout:
    n, (row, forced) = len(prompt), (settings.row, settings.forced)
    rows = mesh_lib.fill_rows((prompt, prompt_length, row, forced))
    prompt, prompt_length, row, forced = rows
    settings = settings._replace(row=row, forced=forced)
    state = begin(params, prompt, prompt_length)
    made = advance(params, state, prompt_length, settings, settings.most).rollout
    inside = jnp.arange(config.max_length) < made.length[:, None]
    made = made._replace(tokens=jnp.where(inside, made.tokens, PAD))
    return jax.tree.map(lambda x: x[:n], made)

  run = mesh_lib.jit(run, mesh)

  def rollout(params, prompt, length, key, row, *args, **kwargs) -> Rollout:
    return run(params, prompt, length, make_settings(config, key, row, *args, **kwargs))

  return rollout


def in_batches(
  generate: Callable,
  params,
  prompt: np.ndarray,
  length: np.ndarray,
  batch: int,
  key: jax.Array,
  forced: np.ndarray | None = None,
  **settings,
) -> Rollout:
  """Goes on from any number of prompts [m, p], `batch` at a time; NumPy arrays.

  Args:
    generate: see `make_rollout`; `forced` [m, a] and `settings` are its last arguments.
  """
  made, m = [], len(prompt)
  for start in range(0, m, batch):
    row = np.arange(start, start + batch)
    chosen = row % m  # the last batch is filled: one shape, one compilation
    played = None if forced is None else forced[chosen]
    out = generate(params, prompt[chosen], length[chosen], key, row, forced=played, **settings)
    made.append([mesh_lib.to_host(x) for x in out])
    pause()
  return Rollout(*(np.concatenate(parts)[:m] for parts in zip(*made, strict=True)))


def make_stream(
  network: TransformerFunctions, config: RolloutConfig, every: int, mesh: Mesh | None = None
) -> Callable[..., Iterator]:
  """Returns `stream`: what `make_rollout` returns, but an iterator.

  It yields the new actions int32 [b, n], n <= `every`, as soon as they are made.
  """
  begin, advance = make_steps(network, config)
  if mesh:  # not mesh_lib.jit: the state stays spread over the devices
    begin, advance = mesh_lib.with_mesh(mesh, begin), mesh_lib.with_mesh(mesh, advance)
  begin, advance = jax.jit(begin), jax.jit(advance, donate_argnums=1)

  def stream(params, prompt, length, key, row, *args, **kwargs) -> Iterator[np.ndarray]:
    settings = make_settings(config, key, row, *args, **kwargs)
    state, done = begin(params, prompt, length), 0
    while done < (most := int(settings.most)):
      state = advance(params, state, length, settings, min(done + every, most))
      step, over = int(state.step), bool(is_over(config, state.rollout).all())
      yield np.asarray(state.rollout.actions)[:, done:step]  # a slice in JAX would be compiled
      if over:
        return
      done = step

  return stream
