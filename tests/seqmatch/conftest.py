"""Double precision, batches of a few trajectories, and small runs as they lie on disk."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import seqmatch_arithmetic, seqmatch_text
from seqmatch_jax.actions import replay, tree
from seqmatch_jax.huggingface import decoder
from seqmatch_jax.tasks.from_config import find_task
from seqmatch_jax.tokens import BACKSPACE, BOS, PAD
from train_jax.checkpointing.checkpoint import Checkpoints
from train_jax.state import TrainState


@pytest.fixture
def float64():
  """Double precision for one test."""
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope="session")
def make_batch():
  """(rows of trajectories of actions, prompt) -> the batch, and the text of each node [b][s]."""

  def make(rows, prompt=(BOS, 6, 8)):
    group, length = max(map(len, rows)), max(len(t) for row in rows for t in row)
    actions = np.full((len(rows), group, length), PAD, np.int32)
    texts = []
    for i, row in enumerate(rows):
      nodes = [None] * (len(prompt) - 1) + [()]
      for j, trajectory in enumerate(row):
        actions[i, j, : len(trajectory)] = trajectory
        typed = [n for n, action in enumerate(trajectory, 1) if action > BACKSPACE]
        nodes += [tuple(replay([], trajectory[:n])) for n in typed]
      texts.append(nodes)
    size = max(map(len, texts)) + 1
    prompts = np.tile(np.int32(prompt), (len(rows), 1))
    batch = tree(prompts, np.full(len(rows), len(prompt), np.int32), actions, size)
    return batch, [nodes + [None] * (size - len(nodes)) for nodes in texts]

  return make


class Run(NamedTuple):
  """A run on disk: a checkpoint of step 7, whose `sample` average is `params`."""

  workdir: Path
  config: ConfigDict
  metadata: dict
  params: dict


@pytest.fixture(scope="session")
def save_run(perturb):
  """(workdir, config, metadata) -> the Run, of parameters that make every action likely."""

  def save(workdir, config, metadata) -> Run:
    init = decoder.make_network(config, metadata).init
    params = jax.jit(lambda key: perturb(init(key)))(jax.random.key(0))
    zeros = jax.tree.map(jnp.zeros_like, params)  # what is not the average is not to be read
    numbers = jnp.int32(7), jnp.int32(0)
    state = TrainState(*numbers, zeros, (), {"sample": params}, (), jnp.zeros(2, jnp.uint32))
    checkpoints = Checkpoints(workdir)
    record = {"config": config.to_dict(), "metadata": metadata}
    checkpoints.save(state, {**record, "step": 7, "position": 7, "rollbacks": 0})
    checkpoints.wait()
    checkpoints.close()
    return Run(workdir, config, metadata, params)

  return save


def _metadata(config, mesh) -> dict:
  return decoder.make_metadata(config, find_task(config).make_task(config, mesh).metadata)


@pytest.fixture(scope="session")
def questions_run(save_run, one_device, tmp_path_factory):
  """A run on questions (two_sum)."""
  config = seqmatch_arithmetic.get_config("two_sum,debug")
  config.seed = 6
  return save_run(tmp_path_factory.mktemp("questions"), config, _metadata(config, one_device))


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
  """A file of 60 short documents."""
  path = tmp_path_factory.mktemp("corpus") / "texts.txt"
  texts = [f"{i} is {i * i}.\nfine" * (1 + i % 9) for i in range(60)]
  path.write_text("\n<|endoftext|>\n".join(texts))
  return str(path)


@pytest.fixture(scope="session")
def text_run(save_run, one_device, corpus_file, tmp_path_factory):
  """A run on the documents of `corpus_file`."""
  config = seqmatch_text.get_config("debug")
  config.data.path, config.seed, config.loss.warmup = corpus_file, 6, 0
  return save_run(tmp_path_factory.mktemp("text"), config, _metadata(config, one_device))
