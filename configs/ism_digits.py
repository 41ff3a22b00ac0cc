"""iSM on scikit-learn's handwritten digits, 8x8 pixels, 10 classes: the whole method in minutes.

    ./launch.sh                                          # this file
    ./launch.sh configs/ism_digits.py:shortcut           # the original shortcut model
    ./launch.sh configs/ism_digits.py:shortcut_fast_ema  # ... with iSM's fast target average
    ./launch.sh configs/ism_digits.py:meanflow           # a derivative in place of two half steps
    ./launch.sh configs/ism_digits.py:flow               # plain flow matching
    ./launch.sh configs/ism_digits.py:debug              # two steps of everything

configs/common.py explains every setting. Hardware: 2 CPU cores, about 3 minutes.
"""

import ml_collections

from configs.common import ISM_BASELINES, apply_options, get_ism_common, ism_debug


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = get_ism_common()
  config.steps = 3000
  config.optim.name = "muon"
  config.optim.lr = 3e-3
  config.ema = ml_collections.ConfigDict({"target": 0.95, "sample": 0.999})

  config.data.source = "digits"
  config.data.image_size = 8
  config.data.channels = 1

  config.model.patch = 2
  config.model.width = 64
  config.model.depth = 4
  config.model.heads = 4

  config.loss = ml_collections.ConfigDict()
  config.loss.split = ml_collections.ConfigDict()  # of every 8 examples
  config.loss.split.velocity = 4
  config.loss.split.guidance = 1
  config.loss.split.consistency = 3
  config.loss.target = "two_steps"  # the paper; or meanflow, improved_meanflow
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
  apply_options(config, arg, OPTIONS)
  return config


OPTIONS = {**ISM_BASELINES, "debug": ism_debug}
