"""iSM on scikit-learn's handwritten digits, 8x8 pixels, 10 classes: the whole method in minutes.

    ./launch.sh                                          # this file
    ./launch.sh configs/ism_digits.py:shortcut           # the original shortcut model
    ./launch.sh configs/ism_digits.py:shortcut_fast_ema  # ... with iSM's fast target average
    ./launch.sh configs/ism_digits.py:flow               # plain flow matching
    ./launch.sh configs/ism_digits.py:debug              # two steps of everything

Hardware: 2 CPU cores, about 3 minutes.
"""

import ml_collections

from configs.common import ISM_BASELINES, apply_options, get_common, ism_debug


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = get_common()
  config.method = "ism"
  config.steps = 3000
  config.optim.name = "muon"
  config.optim.lr = 3e-3
  config.ema = ml_collections.ConfigDict({"target": 0.95, "sample": 0.999})

  config.data = ml_collections.ConfigDict()
  config.data.source = "digits"  # or folder: data.path/<class name>/<image>; npz, tfds
  config.data.path = ""
  config.data.image_size = 8
  config.data.channels = 1
  config.data.flip = False  # of each image its mirror image too; not where it means another thing
  config.data.held_out = 0.0  # share of each class that is not trained on, to compare samples with
  config.data.max_faults = 100  # records that may be unreadable before the run stops

  config.model = ml_collections.ConfigDict()
  config.model.patch = 2
  config.model.width = 64
  config.model.depth = 4
  config.model.heads = 4
  config.model.time_scale = 1000.0  # t in [0, 1) times this is what the sinusoids see
  config.model.qk_norm = False
  config.model.dtype = "float32"  # or bfloat16
  config.model.remat = "none"  # or products, block: what the backward pass computes again
  config.model.unroll = True
  config.model.attention = "xla"  # or cudnn: fused, for bfloat16 on NVIDIA GPUs

  config.loss = ml_collections.ConfigDict()
  config.loss.split = ml_collections.ConfigDict()  # of every 8 examples
  config.loss.split.velocity = 4
  config.loss.split.guidance = 1
  config.loss.split.consistency = 3
  config.loss.weighting = "by_example"  # one mean; or by_term: a mean of each, added (the paper)
  config.loss.class_dropout = 0.1
  config.loss.w_max = 2.0  # 3.5 in the paper; scales that are never used cost capacity
  config.loss.w_step = 0.25
  config.loss.zero_w_prob = 0.5  # of w = 0 in consistency examples
  config.loss.interval_start = 0.3  # guidance acts at t >= interval_start
  config.loss.bootstrap_guidance = 0.0  # the original shortcut model's fixed scale
  config.loss.wavelet_levels = 3
  config.loss.level_decay = 0.5  # weight of level l is level_decay^(l - 1)
  config.loss.norm = "l2"  # or charbonnier

  config.pairing = ml_collections.ConfigDict()
  config.pairing.pool = 32  # batches in an optimal transport pool; 0: random pairs
  config.pairing.condition = "class"  # or none (the paper)
  config.pairing.solver = "sinkhorn"  # or exact

  config.eval = ml_collections.ConfigDict()
  config.eval.nfe = (1, 2, 4, 8, 128)
  config.eval.guidance = (0.0, 0.5, 1.0)
  config.eval.samples = 2000  # half of it at 128 steps
  config.eval.metrics = ()  # of fid, sfid, fd_dinov2, is, pr; (): by a classifier of the data
  config.eval.reference = ""  # of the metrics: an ADM .npz, or a folder of images
  config.eval.inception = ""  # weights: .safetensors
  config.eval.dinov2 = ""
  config.eval.vae = ""  # of latents; without metrics, it draws a grid of them in training
  config.eval.classes = "balanced"  # or random
  apply_options(config, arg, OPTIONS)
  return config


OPTIONS = {**ISM_BASELINES, "debug": ism_debug}
