"""SequenceMatch on Llama 2 7B with adapters: the setting of arXiv 2306.05426.

    ./launch.sh --mode=encode --texts=openwebtext --tokenizer=llama2 --out=tokens   # once
    ./launch.sh configs/seqmatch_llama7b.py --config.pretrained=llama2 --config.data.path=tokens \
         --config.mesh.fsdp=16
    ./launch.sh configs/seqmatch_llama7b.py:gpu ... # with cuDNN's attention
    ./launch.sh configs/seqmatch_llama7b.py:debug   # a few steps of everything on a CPU, no files

    python main.py --mode=compile --config=configs/seqmatch_llama7b.py --topology=v5e:4x4 \
         --config.mesh.fsdp=16                      # does it fit? needs no TPU and no files

`llama2` is a folder in Hugging Face's layout, of any Llama 2 or 3; its sizes replace
config.model's. Alpha 0.01, noise 0.001, gamma 0.998, LoRA and 1024 tokens are the paper's; the rank
of the adapters, the learning rate, the batch and the number of steps are ours.

Hardware (estimated, not measured): 16 chips of TPU v5e, or 8 GPUs of 80 GB. The frozen matrices are
bfloat16, 13.5 GB, split over mesh.fsdp devices. A step reads 32 rows of text and 8 of the model's
own, 41 000 tokens, and costs 8 x 6.7 G FLOP a token with recomputation (weights get no gradient):
2e15, 1.4 s on 16 v5e at half their peak; 3000 steps with their rollouts about 2 hours. Rollouts
read every frozen matrix once a token: on 80 GB GPUs leave mesh.fsdp at 1, so that none is moved.
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
  config.steps = 3000
  config.batch = 32
  config.eval_every = 1000
  config.optim.lr = 2e-4

  config.pretrained = ""  # a folder in Hugging Face's layout; "": drawn, config.model's sizes
  config.erase_bias = -5.0  # of the new <backspace>'s logit
  config.lora = ml_collections.ConfigDict()
  config.lora.rank = 16  # 0: all parameters are learned
  config.lora.alpha = 32.0
  config.lora.targets = ("all",)
  config.lora.base = "bfloat16"  # frozen matrices: float32 or bfloat16

  config.data.context = 1024
  config.data.prompt = 50
  config.data.vocab = 32_002  # of --mode=compile, which reads no tokenizer

  config.model.family = "llama"
  config.model.width = 4096
  config.model.depth = 32
  config.model.heads = 32
  config.model.hidden = 11_008
  config.model.context = 0  # rotary positions
  config.model.tied = False
  config.model.erase = True  # <backspace>'s logit has a row and a bias of its own
  config.model.dtype = "bfloat16"
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
  config.loss.warmup = 300  # steps of maximum likelihood, without noise
  config.loss.anneal = 500  # steps over which alpha grows from 0

  config.buffer = ml_collections.ConfigDict()
  config.buffer.size = 256  # the model's own trajectories
  config.buffer.refresh = 50  # steps between rollouts
  config.buffer.rollouts = 16  # at a time
  config.buffer.draw = 8  # a step

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
  config.lora.rank = 2
  config.noise.rate = 0.05
  config.eval.max_backspaces = 4
  config.eval.samples = 16
  config.model.dtype = "float32"


def gpu(config):
  """NVIDIA GPUs: cuDNN's attention."""
  config.model.attention = "cudnn"


OPTIONS = {"gpu": gpu, "debug": debug, **SEQMATCH_BASELINES}
