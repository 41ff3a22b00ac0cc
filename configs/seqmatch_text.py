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

from configs.common import SEQMATCH_BASELINES, apply_options, get_common, seqmatch_debug


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = get_common()
  config.method = "seqmatch"
  config.steps = 1500
  config.batch = 16
  config.eval_every = 500
  config.optim.lr = 2e-3
  config.optim.weight_decay = 0.1
  config.ema.sample = 0.99

  config.data = ml_collections.ConfigDict()
  config.data.source = "text"
  config.data.path = ""  # texts, or a directory that --mode=encode made; "": Python's own
  config.data.test = ""  # the same, for testing; "": documents of data.path are held out
  config.data.tests = 500  # documents that are held out
  config.data.tokenizer = ""  # tokenizer.json; "": a token for each character
  config.data.context = 256  # tokens of a row, <bos> and wrong ones included
  config.data.prompt = 16  # tokens that a text begins with and that carry no loss

  config.model = ml_collections.ConfigDict()
  config.model.width = 128
  config.model.depth = 3
  config.model.heads = 4
  config.model.hidden = 384
  config.model.dtype = "float32"  # or bfloat16
  config.model.remat = "none"
  config.model.unroll = True
  config.model.attention = "xla"  # or cudnn: fused, for bfloat16 on NVIDIA GPUs

  config.noise = ml_collections.ConfigDict()
  config.noise.rate = 0.02  # eta: errors before each token, typed and erased
  config.noise.max_errors = 8  # in one row
  config.noise.source = "uniform"
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
  config.buffer.size = 128  # the model's own texts
  config.buffer.refresh = 50  # steps between rollouts
  config.buffer.rollouts = 16  # at a time
  config.buffer.draw = 4  # a step

  config.eval = ml_collections.ConfigDict()
  config.eval.max_backspaces = 32  # <backspace>s in one generation
  config.eval.samples = 256  # generations
  config.eval.features = ""  # for MAUVE: a text run's workdir, or a folder of GPT-2's weights
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
