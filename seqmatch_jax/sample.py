"""Generations for a reader: all prompts at once, or one after the other while it is typed.

Dimensions: b prompts, a actions.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from seqmatch_jax import rollout
from seqmatch_jax.show import END, Screen, Typist, strokes
from seqmatch_jax.task import Asked
from seqmatch_jax.tokens import EOS, PAD, TextVocab, Vocab
from train_jax.errors import UserError

EVERY = 8  # actions between two looks at a generation that is shown while it is typed
KEYS_A_SECOND = 40  # as they are shown, or one sees nothing of a fast model's erasures


def prompts(flags) -> list[str]:
  """The prompts that the flags ask for, each --num times; [] if they do not."""
  if flags.prompts and flags.prompt:
    raise UserError("--prompt and --prompts are both given; choose one.")
  if flags.prompts:
    try:
      lines = Path(flags.prompts).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as err:
      raise UserError(f"--prompts={flags.prompts} cannot be read as text.") from err
    found = [line for line in lines if line.strip()]
    if not found:
      raise UserError(f"--prompts={flags.prompts} holds no prompt; write one on each line.")
  else:
    found = flags.prompt or []
  return [prompt for prompt in found for _ in range(flags.num or 1)]


def sampling_options(
  temperature: float,
  retype: bool,
  backspace: bool,
  top_k: int | None,
  top_p: float | None,
  max_actions: int | None,
) -> dict:
  """How samples are drawn: the last arguments of `rollout.make_rollout`'s function.

  Args:
    retype: whether what is drawn may type again what it has erased.
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
    "retype": retype and temperature > 0,  # a greedy one would repeat itself
    "allow_backspace": backspace,
    "top_k": top_k,
    "top_p": top_p,
    "max_actions": max_actions,
  }


def together(
  generate: Callable,
  params,
  asked: Asked,
  vocab: Vocab | TextVocab,
  key: jax.Array,
  settings: dict,
  batch: int,
  max_actions: int,
) -> tuple[list[list[str]], float]:
  """Goes on from all prompts, `batch` at a time -> (keys of each, seconds without compilation).

  Args:
    generate: see `rollout.make_rollout`; `settings` are its last arguments.
    max_actions: of a generation.
  """
  size = min(batch, len(asked.texts))

  def run(count: int, forced=None) -> np.ndarray:
    prompt, length = asked.prompt[:count], asked.length[:count]
    made = rollout.in_batches(generate, params, prompt, length, size, key, forced, **settings)
    return made.actions

  ended = np.full((size, max_actions), PAD, np.int32)
  ended[:, 0] = EOS
  run(size, ended)  # compiles, and ends at once
  start = time.perf_counter()
  actions = run(len(asked.texts))
  seconds = time.perf_counter() - start
  rows = zip(actions.tolist(), asked.prompt, asked.length, strict=True)
  return [strokes(row, vocab, prompt[:k].tolist()) for row, prompt, k in rows], seconds


def live(
  stream: Callable,
  params,
  asked: Asked,
  vocab: Vocab | TextVocab,
  key: jax.Array,
  settings: dict,
  gap: str,
) -> tuple[list[list[str]], float]:
  """Goes on from one prompt after the other and types what comes into the terminal.

  Args:
    stream: see `rollout.make_stream`.

  Returns:
    (keys of each, seconds that generation took, without compilation).
  """
  typed, seconds = [], 0.0
  next(stream(params, asked.prompt[:1], asked.length[:1], key, np.array([0]), **settings))
  for i, text in enumerate(asked.texts):
    screen, mine = Screen.of(sys.stdout), []
    screen.prompt(text + gap)
    prompt, length = asked.prompt[i : i + 1], asked.length[i : i + 1]
    typist = Typist(vocab, prompt[0, : length[0]].tolist())
    start = time.perf_counter()
    for actions in stream(params, prompt, length, key, np.array([i]), **settings):
      seconds += time.perf_counter() - start
      mine += (keys := typist.keys(actions[0].tolist()))
      for stroke in keys:
        screen.key(stroke)
        time.sleep(1 / KEYS_A_SECOND if screen.columns else 0)
      start = time.perf_counter()
    print(flush=True)
    typed.append(mine)
  return typed, seconds


def speed(typed: Sequence[Sequence[str]], seconds: float) -> str:
  """How fast that was, in words."""
  actions = sum(map(len, typed))
  tokens = sum(key not in ("\b", END) for keys in typed for key in keys)
  return (
    f"{tokens / seconds:.0f} tokens/s; with erasures and ends {actions / seconds:.0f} actions/s"
  )
