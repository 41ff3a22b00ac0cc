"""The form of a task: a module with constants for `--mode=sample` (see questions.py), and with

make_task(config, mesh) -> Task
make_evaluate(config, metadata, model, seed, features) -> (Evaluation, number of examples)
make_prompts(config, metadata, prompts or [], count) -> Prompts, for --mode=sample
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from seqmatch_jax.actions import Noise

# (model with the current parameters, whether it is the last time) -> (name, number) one by one
Evaluation = Callable[[Any, bool], Iterator[tuple[str, Any]]]


class Task(NamedTuple):
  """The data of a run, and the evaluation on them.

  Attributes:
    metadata: JSON that sampling needs: the vocabulary (see `tokenizer.from_metadata`), and the
      limits of a generation (see `rollout.RolloutConfig`).
    prompt: tokens of the longest prompt in a batch, <bos> included.
    stream: (noise, seed, position) -> iterator of this process's batches, see `actions.tree`. Their
      prompts for rollouts are `prompt` int32 [b, prompt] and `prompt_length` int32 [b].
    evaluate: (a `Model`, see model.py, and the features for MAUVE, or None) -> Evaluation.
  """

  metadata: dict
  prompt: int
  stream: Callable[[Noise, int, int], Iterator[dict[str, np.ndarray]]]
  evaluate: Callable[[Any, Callable | None], Evaluation]


class Prompts(NamedTuple):
  """Prompts to continue.

  Attributes:
    texts: as the reader sees them.
    prompt: int32 [b, p], <bos> first, PAD last.
    length: int32 [b].
    references: the data's text after each prompt; none for the user's own prompts.
  """

  texts: list[str]
  prompt: np.ndarray
  length: np.ndarray
  references: Sequence[str] = ()
