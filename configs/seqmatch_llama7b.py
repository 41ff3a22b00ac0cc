"""SequenceMatch on Llama 2 7B with adapters: the setting of arXiv 2306.05426.

    ./launch.sh --mode=encode --texts=openwebtext --tokenizer=llama2 --out=tokens   # once
    ./launch.sh configs/seqmatch_llama7b.py --config.pretrained=llama2 --config.data.path=tokens \
         --config.mesh.fsdp=16
    ./launch.sh configs/seqmatch_llama7b.py:gpu ... # with cuDNN's attention
    ./launch.sh configs/seqmatch_llama7b.py:debug   # a few steps of everything on a CPU, no files

    python main.py --mode=compile --config=configs/seqmatch_llama7b.py --topology=v5e:4x4 \
         --config.mesh.fsdp=16                      # does it fit? needs no TPU and no files

`llama2` is a folder as Hugging Face lays it out, of any Llama 2 or 3; its sizes replace
config.model's. Alpha 0.01, noise 0.001, gamma 0.998, LoRA and 1024 tokens are the paper's; the rank
of the adapters, the learning rate, the batch and the number of steps are ours.

Hardware (estimated, not measured): 16 chips of TPU v5e, or 8 GPUs of 80 GB. The frozen matrices are
bfloat16, 13.5 GB, split over mesh.fsdp devices. A step reads 32 rows of text and 8 of the model's
own, 41 000 tokens, and costs 8 x 6.7 G FLOP a token with recomputation (weights get no gradient):
2e15, 1.4 s on 16 v5e at half their peak; 3000 steps with their rollouts about 2 hours. Rollouts
read every frozen matrix once a token: on 80 GB GPUs leave mesh.fsdp at 1, so that none is moved.
"""

import ml_collections

from configs import seqmatch_gpt2, seqmatch_text
from configs.common import apply_options


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = seqmatch_gpt2.get_config()
  config.steps = 3000
  config.batch = 32
  config.lora.base = "bfloat16"
  config.data.vocab = 32_002

  config.model.family = "llama"
  config.model.width = 4096
  config.model.depth = 32
  config.model.heads = 32
  config.model.hidden = 11_008
  config.model.context = 0
  config.model.tied = False
  config.model.dtype = "bfloat16"

  config.loss.warmup = 300
  config.loss.anneal = 500
  config.buffer.rows = 256
  config.buffer.rollouts = 16
  config.buffer.draw = 8
  apply_options(config, arg, OPTIONS)
  return config


def debug(config):
  """A few steps of everything, in seconds, with random weights and no files."""
  seqmatch_gpt2.debug(config)
  config.model.context = 0
  config.model.dtype = "float32"


def gpu(config):
  """NVIDIA GPUs: cuDNN's attention."""
  config.model.attention = "cudnn"


OPTIONS = {"mle": seqmatch_text.mle, "bc": seqmatch_text.bc, "gpu": gpu, "debug": debug}
