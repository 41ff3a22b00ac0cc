"""Generations for a reader: all prompts at once, or one after the other while it is typed.

Dimensions: b prompts, a actions.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import jax
import numpy as np
from jax.sharding import Mesh

from seqmatch_jax import rollout
from seqmatch_jax.display import show
from seqmatch_jax.display.show import END, Screen, Typist
from seqmatch_jax.rollout import RolloutConfig
from seqmatch_jax.tasks.task import Prompts
from seqmatch_jax.tokens import EOS, PAD
from seqmatch_jax.transformer import TransformerFunctions
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError

if TYPE_CHECKING:
  from seqmatch_jax.model import Model

CHUNK = 8  # actions between two looks at a generation that is shown while it is typed
KEYS_PER_SECOND = 40  # slow enough that one sees the erasures of a fast model


def read_prompts(prompt: list[str], prompts: str, count: int) -> list[str]:
  """Prompts to continue, each `count` times.

  Args:
    prompt: the prompts themselves.
    prompts: instead of them, a file with one on each line; "" for none.

  Raises:
    UserError: both are there, or the file cannot be read or holds no prompt.
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
  model: Model, prompts: Prompts, key: jax.Array, settings: dict, gap: str, batch: int
) -> tuple[list[list[str]], float]:
  """Continues all prompts, `batch` at a time -> (keys of each, seconds without compilation).

  Args:
    settings: the last arguments of `rollout.make_settings`.
    gap: the text between a prompt and the keys; only `live` shows it.
  """
  del gap
  size = min(batch, len(prompts.texts))

  def run(count: int, forced=None) -> np.ndarray:
    encoded = prompts.prompt[:count], prompts.length[:count]
    return model.roll_out(*encoded, size, key, forced, **settings).actions

  ended = np.full((size, model.limits.max_actions), PAD, np.int32)
  ended[:, 0] = EOS
  run(size, ended)  # compiles, and ends at once
  start = time.perf_counter()
  actions = run(len(prompts.texts))
  seconds = time.perf_counter() - start
  rows = zip(actions.tolist(), prompts.prompt, prompts.length, strict=True)
  return [Typist(model.vocab, prompt[:k].tolist()).keys(row) for row, prompt, k in rows], seconds


def make_stream(
  network: TransformerFunctions, config: RolloutConfig, every: int, mesh: Mesh | None = None
) -> Callable[..., Iterator]:
  """Returns `stream`: the function of `rollout.make_rollout`, but as an iterator.

  It yields the new actions int32 [b, n], n <= `every`, as soon as they are there.
  """
  begin, advance = rollout.make_steps(network, config)
  if mesh:  # not mesh_lib.jit: the state stays spread over the devices
    begin, advance = mesh_lib.with_mesh(mesh, begin), mesh_lib.with_mesh(mesh, advance)
  begin, advance = jax.jit(begin), jax.jit(advance, donate_argnums=1)

  def stream(params, prompt, length, key, row, *args, **kwargs) -> Iterator[np.ndarray]:
    settings = rollout.make_settings(config, key, row, *args, **kwargs)
    state, done = begin(params, prompt, length), 0
    while done < (limit := int(settings.max_actions)):
      state = advance(params, state, length, settings, min(done + every, limit))
      step, over = int(state.step), bool(rollout.is_over(config, state.rollout).all())
      yield np.asarray(state.rollout.actions)[:, done:step]  # a slice in JAX would be compiled
      if over:
        return
      done = step

  return stream


def live(
  model: Model, prompts: Prompts, key: jax.Array, settings: dict, gap: str, batch: int
) -> tuple[list[list[str]], float]:
  """Continues one prompt after the other, and types the keys into the terminal as they come.

  Arguments and results are those of `together`; the seconds are of the generation alone.
  """
  del batch
  stream = make_stream(model.network, model.limits, CHUNK, model.mesh)
  typed, seconds = [], 0.0
  next(stream(model.params, prompts.prompt[:1], prompts.length[:1], key, np.array([0]), **settings))
  for i, text in enumerate(prompts.texts):
    screen, keys = Screen.of(sys.stdout), []
    screen.prompt(text + gap)
    prompt, length = prompts.prompt[i : i + 1], prompts.length[i : i + 1]
    typist = Typist(model.vocab, prompt[0, : length[0]].tolist())
    start = time.perf_counter()
    for actions in stream(model.params, prompt, length, key, np.array([i]), **settings):
      seconds += time.perf_counter() - start
      new = typist.keys(actions[0].tolist())
      keys += new
      for stroke in new:
        screen.key(stroke)
        time.sleep(1 / KEYS_PER_SECOND if screen.columns else 0)
      start = time.perf_counter()
    print(flush=True)
    typed.append(keys)
  return typed, seconds


def print_lines(prompts: Prompts, typed: Sequence[Sequence[str]], gap: str, out: TextIO) -> None:
  """A line for each prompt and the keys after it, with the erased ones struck through."""
  for prompt, keys in zip(prompts.texts, typed, strict=True):
    print(f"{prompt}{gap}{show.line(keys, out.isatty())}", file=out)


def write(
  out: Path, chosen: dict, prompts: Prompts, typed: Sequence[Sequence[str]], gap: str
) -> None:
  """Writes the page and the file of `show.write`, and prints their paths.

  Args:
    chosen: settings by name, for the title; those that are None are left out.
  """
  title = ", ".join(f"{name} {value}" for name, value in chosen.items() if value is not None)
  show.write(out, title, prompts.texts, typed, gap, prompts.references)
  print(f"watch:   {out / 'generations.html'}")
  print(f"samples: {out / 'generations.json'}")


def speed(typed: Sequence[Sequence[str]], seconds: float) -> str:
  """The speed of the generation, in words."""
  actions = sum(map(len, typed))
  tokens = sum(key not in ("\b", END) for keys in typed for key in keys)
  return (
    f"{tokens / seconds:.0f} tokens/s; with erasures and ends {actions / seconds:.0f} actions/s"
  )
