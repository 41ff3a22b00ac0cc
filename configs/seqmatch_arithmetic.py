"""SequenceMatch on arithmetic: a decoder that can take tokens back.

    ./launch.sh configs/seqmatch_arithmetic.py              # add_or_sub_in_base, official files
    ./launch.sh configs/seqmatch_arithmetic.py:two_sum      # a task where a mistake is easy to see
    ./launch.sh configs/seqmatch_arithmetic.py:two_sum,mle  # maximum likelihood; also: bc
    ./launch.sh configs/seqmatch_arithmetic.py:debug        # a few steps of everything

    ./launch.sh --mode=sample --workdir=runs/seqmatch_arithmetic \
         --prompt='In base 7, what is 2 + 5?'

Hardware: 2 CPU cores; 8 minutes, first numbers after a minute and a half; two_sum about 5.
"""

import ml_collections

from configs.common import SEQMATCH_BASELINES, apply_options, get_seqmatch_common, seqmatch_debug


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = get_seqmatch_common()
  config.steps = 1500
  config.batch = 64
  config.eval_every = 500
  config.optim.name = "muon"
  config.optim.muon_lr = 0.02
  config.optim.weight_decay = 4.0  # of 5000 questions; with less they are learned by heart
  config.ema.sample = 0.99

  config.data.source = "files"  # or, generated: add_or_sub_in_base, two_sum
  config.data.train = ""  # files: question and answer on alternating lines; "": the repository's
  config.data.test = ""  # own files of mathematics_dataset's add_or_sub_in_base
  config.data.examples = 5000  # generated, for training
  config.data.tests = 1000  # generated
  config.data.seed = 0  # of the generated questions
  config.data.max_faults = 100  # records that may be unreadable before the run stops
  config.data.numbers = 6  # two_sum: numbers in a question
  config.data.modulus = 16  # two_sum
  config.data.context = 128  # most tokens of a question with its answer
  config.data.sequences_per_row = 2  # questions that share a row of a batch

  config.model.width = 128
  config.model.depth = 2
  config.model.heads = 4
  config.model.hidden = 384

  config.noise = ml_collections.ConfigDict()
  config.noise.rate = 0.3  # eta: errors before each data action, typed and erased
  config.noise.max_errors = 2  # in one answer
  config.noise.source = "uniform"  # or, for questions, prompt: candidates from the question
  config.noise.run = 0.0  # probability that another error follows before the erasing

  config.loss = ml_collections.ConfigDict()
  config.loss.divergence = "chi2_mixture"  # or chi2, kl, reverse_kl, js
  config.loss.alpha = 0.02
  config.loss.gamma = 0.998
  config.loss.backspace = True
  config.loss.unlikelihood = 0.0  # weight of the baseline that makes repeated tokens unlikely
  config.loss.warmup = 500  # steps of maximum likelihood, without noise
  config.loss.anneal = 500  # steps over which alpha grows from 0

  config.buffer = ml_collections.ConfigDict()
  config.buffer.size = 512  # the model's own trajectories
  config.buffer.refresh = 20  # steps between rollouts
  config.buffer.rollouts = 64  # at a time
  config.buffer.draw = 16  # a step

  config.eval.max_backspaces = 8
  apply_options(config, arg, OPTIONS)
  return config


def two_sum(config):
  """Six numbers modulo 16 and a target: write the two that add up to it.

  Erasing pays most at --config.data.numbers=8 --config.data.modulus=24 (docs/RESULTS.md).
  """
  config.steps = 2000
  config.optim.muon_lr = 0.01
  config.loss.warmup = config.loss.anneal = 700
  config.data.source = "two_sum"
  config.data.sequences_per_row = 1  # they are all as long
  config.noise.source = "prompt"


def debug(config):
  """A few steps of everything, in seconds, on generated questions."""
  seqmatch_debug(config)
  config.batch = 16
  config.data.source = "two_sum" if config.data.source == "two_sum" else "add_or_sub_in_base"
  config.data.examples = config.data.tests = 40


OPTIONS = {"two_sum": two_sum, "debug": debug, **SEQMATCH_BASELINES}
