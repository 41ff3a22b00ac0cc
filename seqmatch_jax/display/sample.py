"""Generations for a reader: all prompts at once, or one after the other while it is typed.

Dimensions: b prompts, a actions.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import jax
import numpy as np

from seqmatch_jax import rollout
from seqmatch_jax.display import show
from seqmatch_jax.display.show import END, Screen, Typist, strokes
from seqmatch_jax.model import Model
from seqmatch_jax.task import Asked
from seqmatch_jax.tokens import EOS, PAD
from train_jax.errors import UserError

EVERY = 8  # actions between two looks at a generation that is shown while it is typed
KEYS_A_SECOND = 40  # as they are shown, or one sees nothing of a fast model's erasures


def read_prompts(prompt: list[str], prompts: str, count: int) -> list[str]:
  """Prompts to go on from, each `count` times.

  Args:
    prompt: they themselves.
    prompts: instead, a file with one on each line; "" for none.

  Raises:
    UserError: both are given, or the file cannot be read or holds none.
  """
  if prompts and prompt:
    raise UserError("--prompt and --prompts are both given; choose one.")
  if prompts:
    try:
      lines = Path(prompts).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as err:
      raise UserError(f"--prompts={prompts} cannot be read as text.") from err
    prompt = [line for line in lines if line.strip()]
    if not prompt:
      raise UserError(f"--prompts={prompts} holds no prompt; write one on each line.")
  return [each for each in prompt for _ in range(count)]


def together(
  model: Model, asked: Asked, key: jax.Array, settings: dict, gap: str, batch: int
) -> tuple[list[list[str]], float]:
  """Goes on from all prompts, `batch` at a time -> (keys of each, seconds without compilation).

  Args:
    settings: the last arguments of `rollout.make_rollout`'s function.
    gap: what is shown between a prompt and what is typed; not read here.
  """
  del gap
  size = min(batch, len(asked.texts))

  def run(count: int, forced=None) -> np.ndarray:
    prompts = asked.prompt[:count], asked.length[:count]
    return rollout.in_batches(
      model.rollout, model.params, *prompts, size, key, forced, **settings
    ).actions

  ended = np.full((size, model.limits.max_actions), PAD, np.int32)
  ended[:, 0] = EOS
  run(size, ended)  # compiles, and ends at once
  start = time.perf_counter()
  actions = run(len(asked.texts))
  seconds = time.perf_counter() - start
  rows = zip(actions.tolist(), asked.prompt, asked.length, strict=True)
  return [strokes(row, model.vocab, prompt[:k].tolist()) for row, prompt, k in rows], seconds


def live(
  model: Model, asked: Asked, key: jax.Array, settings: dict, gap: str, batch: int
) -> tuple[list[list[str]], float]:
  """Goes on from one prompt after the other and types what comes into the terminal.

  Arguments and results are those of `together`; the seconds are of the generation alone.
  """
  del batch
  stream = rollout.make_stream(model.network, model.limits, EVERY, model.mesh)
  typed, seconds = [], 0.0
  next(stream(model.params, asked.prompt[:1], asked.length[:1], key, np.array([0]), **settings))
  for i, text in enumerate(asked.texts):
    screen, mine = Screen.of(sys.stdout), []
    screen.prompt(text + gap)
    prompt, length = asked.prompt[i : i + 1], asked.length[i : i + 1]
    typist = Typist(model.vocab, prompt[0, : length[0]].tolist())
    start = time.perf_counter()
    for actions in stream(model.params, prompt, length, key, np.array([i]), **settings):
      seconds += time.perf_counter() - start
      mine += (keys := typist.keys(actions[0].tolist()))
      for stroke in keys:
        screen.key(stroke)
        time.sleep(1 / KEYS_A_SECOND if screen.columns else 0)
      start = time.perf_counter()
    print(flush=True)
    typed.append(mine)
  return typed, seconds


def print_lines(asked: Asked, typed: Sequence[Sequence[str]], gap: str, out: TextIO) -> None:
  """A line for each prompt with what was typed after it, what was erased struck through."""
  for begin, keys in zip(asked.texts, typed, strict=True):
    print(f"{begin}{gap}{show.line(keys, out.isatty())}", file=out)


def write(out: Path, chosen: dict, asked: Asked, typed: Sequence[Sequence[str]], gap: str) -> None:
  """Writes the page and the file of `show.write`, and says where.

  Args:
    chosen: settings by name, for the title; None where one was left out.
  """
  title = ", ".join(f"{name} {value}" for name, value in chosen.items() if value is not None)
  show.write(out, title, asked.texts, typed, gap, asked.references)
  print(f"watch:   {out / 'generations.html'}")
  print(f"samples: {out / 'generations.json'}")


def speed(typed: Sequence[Sequence[str]], seconds: float) -> str:
  """How fast that was, in words."""
  actions = sum(map(len, typed))
  tokens = sum(key not in ("\b", END) for keys in typed for key in keys)
  return (
    f"{tokens / seconds:.0f} tokens/s; with erasures and ends {actions / seconds:.0f} actions/s"
  )
