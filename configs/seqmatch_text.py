"""SequenceMatch on text, a character at a time: a small decoder that can take characters back.

    ./launch.sh configs/seqmatch_text.py                 # English that every Python comes with
    ./launch.sh configs/seqmatch_text.py --workdir=runs/book --config.data.path=book.txt
    ./launch.sh configs/seqmatch_text.py:mle             # maximum likelihood; also: bc
    ./launch.sh configs/seqmatch_text.py:debug           # a few steps of everything

    ./launch.sh --mode=sample --workdir=runs/seqmatch_text --temperature=1 --stream \
         --prompt='Return the number of '

Hardware: 2 CPU cores; about 10 minutes.
"""

import ml_collections

from configs.common import (
  SEQMATCH_BASELINES,
  apply_options,
  get_seqmatch_text_common,
  seqmatch_debug,
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = get_seqmatch_text_common()
  config.steps = 1500
  config.batch = 16
  config.eval_every = 500
  config.optim.lr = 2e-3
  config.optim.weight_decay = 0.1
  config.ema.sample = 0.99

  config.data.context = 256
  config.data.prompt = 16

  config.model.width = 128
  config.model.depth = 3
  config.model.heads = 4
  config.model.hidden = 384

  config.noise = ml_collections.ConfigDict()
  config.noise.rate = 0.02  # eta: errors before each data action, typed and erased
  config.noise.max_errors = 8  # in one row of text
  config.noise.source = "uniform"  # or, for questions, prompt: candidates from the question
  config.noise.run = 0.0  # probability that another error follows before the erasing

  config.loss = ml_collections.ConfigDict()
  config.loss.divergence = "chi2_mixture"  # or chi2, kl, reverse_kl, js
  config.loss.alpha = 0.01
  config.loss.gamma = 0.998
  config.loss.backspace = True
  config.loss.unlikelihood = 0.0  # weight of the baseline that makes repeated tokens unlikely
  config.loss.warmup = 750  # steps of maximum likelihood, without noise
  config.loss.anneal = 250  # steps over which alpha grows from 0

  config.buffer = ml_collections.ConfigDict()
  config.buffer.size = 128  # the model's own trajectories
  config.buffer.refresh = 50  # steps between rollouts
  config.buffer.rollouts = 16  # at a time
  config.buffer.draw = 4  # a step

  config.eval.max_backspaces = 32
  apply_options(config, arg, OPTIONS)
  return config


def debug(config):
  """A few steps of everything, in seconds."""
  seqmatch_debug(config)
  config.batch = 8
  config.data.context = 64
  config.data.prompt = 4
  config.data.tests = 20
  config.model.depth = 2
  config.eval.max_backspaces = 4
  config.eval.samples = 16


OPTIONS = {"debug": debug, **SEQMATCH_BASELINES}
