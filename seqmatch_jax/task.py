"""The seam between what is written (questions with answers, or text) and how it is learned.

A task is a module with constants for `--mode=sample` (see tasks/questions.py) and three functions:

    make_task(config, mesh) -> Task
    make_evaluate(config, metadata, model, seed, features) -> (Evaluation, number of examples)
    ask(config, metadata, texts given or [], count) -> Asked, for --mode=sample
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from seqmatch_jax.actions import Noise

# (model with the parameters of now, all of it?) -> (name, number) one by one
Evaluation = Callable[[Any, bool], Iterator[tuple[str, Any]]]


class Task(NamedTuple):
  """What there is to learn.

  Attributes:
    metadata: JSON that sampling needs: the vocabulary (see `tokens.from_metadata`), and the limits
      of a generation (see `rollout.RolloutConfig`).
    prompt: tokens of the longest prompt in a batch, <bos> included.
    stream: (noise, seed, position) -> iterator of this process's batches, see `actions.tree`; with
      prompts to roll out from: `prompt` int32 [b, prompt], `prompt_length` int32 [b].
    evaluate: (a `Model`, see model.py, and what MAUVE compares, or None) -> Evaluation.
  """

  metadata: dict
  prompt: int
  stream: Callable[[Noise, int, int], Iterator[dict[str, np.ndarray]]]
  evaluate: Callable[[Any, Callable | None], Evaluation]


class Asked(NamedTuple):
  """Prompts to go on from.

  Attributes:
    texts: as the reader sees them.
    prompt: int32 [b, p], <bos> first, PAD last.
    length: int32 [b].
    references: what the data have after each; none where the prompts are somebody's own.
  """

  texts: list[str]
  prompt: np.ndarray
  length: np.ndarray
  references: Sequence[str] = ()
