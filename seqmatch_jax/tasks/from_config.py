"""The task that a config names."""

from __future__ import annotations

from types import ModuleType

from seqmatch_jax.tasks import questions, text
from train_jax.errors import check_one_of


def find_task(config) -> ModuleType:
  """The module of the task (see task.py)."""
  check_one_of("data.source", config.data.source, (*questions.SOURCES, "text"))
  return text if config.data.source == "text" else questions
