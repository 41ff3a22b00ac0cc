"""SequenceMatch on a pretrained GPT-2, with the objective of arXiv 2306.05426 and adapters.

    ./launch.sh --mode=encode --texts=openwebtext --tokenizer=gpt2 --out=tokens     # once
    ./launch.sh configs/seqmatch_gpt2.py --config.pretrained=gpt2 --config.data.path=tokens
    ./launch.sh configs/seqmatch_gpt2.py:mle --config.pretrained=gpt2 --config.data.path=tokens
    ./launch.sh configs/seqmatch_gpt2.py:gpu ...  # in bfloat16, with cuDNN's attention
    ./launch.sh configs/seqmatch_gpt2.py:debug    # a few steps of everything on a CPU, no files

`gpt2` is a folder as Hugging Face lays it out (config.json, model.safetensors, tokenizer.json), of
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

from configs import seqmatch_text
from configs.common import apply_options


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = seqmatch_text.get_config()
  config.steps = 5000
  config.batch = 8
  config.eval_every = 1000
  config.optim.lr = 2e-4
  config.optim.weight_decay = 0.0
  config.ema.sample = 0.999

  config.pretrained = ""  # a folder as Hugging Face lays it out; "": drawn, config.model's sizes
  config.erase_bias = -5.0  # how far the logit of the new <backspace> is lowered
  config.lora = ml_collections.ConfigDict()
  config.lora.rank = 16  # 0: all parameters are learned
  config.lora.alpha = 32.0
  config.lora.targets = ("all",)
  config.lora.base = "float32"  # frozen matrices: float32, bfloat16 or int8

  config.data.context = 1024
  config.data.prompt = 50
  config.data.vocab = 50_260  # --mode=compile, which reads no tokenizer

  config.model.family = "gpt2"
  config.model.width = 768
  config.model.depth = 12
  config.model.heads = 12
  config.model.hidden = 3072
  config.model.context = 1024
  config.model.tied = config.model.erase = True
  config.model.remat = "block"
  config.model.unroll = False

  config.noise.rate = 0.001
  config.loss.alpha = 0.01
  config.loss.gamma = 0.998
  config.loss.warmup = 500
  config.loss.anneal = 1000
  config.buffer.rollouts = 8
  config.buffer.draw = 4
  config.eval.erasures = 64
  apply_options(config, arg, OPTIONS)
  return config


def debug(config):
  """A few steps of everything, in seconds, with random weights and no files."""
  seqmatch_text.debug(config)
  config.model.heads = 2
  config.model.hidden = 32
  config.model.context = config.data.context
  config.lora.rank = 2
  config.data.vocab = 100
  config.noise.rate = 0.05


def gpu(config):
  """One NVIDIA GPU: bfloat16 with cuDNN's attention, and nothing is computed again."""
  config.model.dtype = "bfloat16"
  config.model.attention = "cudnn"
  config.model.remat = "none"


OPTIONS = {"mle": seqmatch_text.mle, "bc": seqmatch_text.bc, "gpu": gpu, "debug": debug}
