"""SequenceMatch on a pretrained GPT-2, with the objective of arXiv 2306.05426 and adapters.

    ./launch.sh --mode=encode --texts=openwebtext --tokenizer=gpt2 --out=tokens     # once
    ./launch.sh configs/seqmatch_gpt2.py --config.pretrained=gpt2 --config.data.path=tokens
    ./launch.sh configs/seqmatch_gpt2.py:mle --config.pretrained=gpt2 --config.data.path=tokens
    ./launch.sh configs/seqmatch_gpt2.py:gpu ...  # in bfloat16, with cuDNN's attention
    ./launch.sh configs/seqmatch_gpt2.py:debug    # a few steps of everything on a CPU, no files

`gpt2` is a folder in Hugging Face's layout (config.json, model.safetensors, tokenizer.json), of
any GPT-2 from 124 M to 1.5 B parameters; its sizes replace config.model's. Texts are .txt, .jsonl
or .array_record files, or tfds:NAME. Without data.path it trains on Python's own documentation.

Alpha 0.01, noise 0.001 and gamma 0.998 are the paper's; the rank of the adapters, the learning
rate, the batch and the number of steps are ours.

Hardware (all of this is estimated, not measured): one GPU of 40 GB. A step reads 8 rows of text and
4 of the model's own, 12 000 tokens, and costs 6 x 124 M FLOP a token: 1e13, a fifth of a second on
an A100 at 30% of its TF32 peak. Rollouts of 1000 tokens, 8 rows every 50 steps, take some 10 s
each, as long as the steps between them: half an hour for 5000 steps.
"""

import ml_collections

from configs.common import (
  SEQMATCH_BASELINES,
  apply_options,
  get_seqmatch_text_common,
  gpu,
  seqmatch_debug,
)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = get_seqmatch_text_common()
  config.steps = 5000
  config.batch = 8
  config.eval_every = 1000
  config.optim.lr = 2e-4

  config.pretrained = ""  # a folder in Hugging Face's layout; "": drawn, config.model's sizes
  config.erase_bias = -5.0  # of the new <backspace>'s logit
  config.lora = ml_collections.ConfigDict()
  config.lora.rank = 16  # 0: all parameters are learned
  config.lora.alpha = 32.0
  config.lora.targets = ("all",)
  config.lora.base = "float32"  # frozen matrices: float32 or bfloat16

  config.data.context = 1024
  config.data.prompt = 50
  config.data.vocab = 50_260  # of --mode=compile, which reads no tokenizer

  config.model.family = "gpt2"
  config.model.width = 768
  config.model.depth = 12
  config.model.heads = 12
  config.model.hidden = 3072
  config.model.context = 1024  # learned positions
  config.model.tied = True
  config.model.erase = True  # <backspace>'s logit has a row and a bias of its own
  config.model.remat = "block"
  config.model.unroll = False

  config.noise = ml_collections.ConfigDict()
  config.noise.rate = 0.001  # eta: errors before each data action, typed and erased
  config.noise.max_errors = 8  # in one row of text
  config.noise.source = "uniform"  # or, for questions, prompt: candidates from the question
  config.noise.run = 0.0  # probability that another error follows before the erasing

  config.loss = ml_collections.ConfigDict()
  config.loss.divergence = "chi2_mixture"  # or chi2, kl, reverse_kl, js
  config.loss.alpha = 0.01
  config.loss.gamma = 0.998
  config.loss.backspace = True
  config.loss.unlikelihood = 0.0  # weight of the baseline that makes repeated tokens unlikely
  config.loss.warmup = 500  # steps of maximum likelihood, without noise
  config.loss.anneal = 1000  # steps over which alpha grows from 0

  config.buffer = ml_collections.ConfigDict()
  config.buffer.size = 128  # the model's own trajectories
  config.buffer.refresh = 50  # steps between rollouts
  config.buffer.rollouts = 8  # at a time
  config.buffer.draw = 4  # a step

  config.eval.max_backspaces = 64
  apply_options(config, arg, OPTIONS)
  return config


def debug(config):
  """A few steps of everything, in seconds, with random weights and no files."""
  seqmatch_debug(config)
  config.batch = 8
  config.data.context = 64
  config.data.prompt = 4
  config.data.tests = 20
  config.data.vocab = 100
  config.model.depth = 2
  config.model.heads = 2
  config.model.hidden = 32
  config.model.context = config.data.context
  config.lora.rank = 2
  config.noise.rate = 0.05
  config.eval.max_backspaces = 4
  config.eval.samples = 16


OPTIONS = {"gpu": gpu, "debug": debug, **SEQMATCH_BASELINES}
