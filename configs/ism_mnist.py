"""iSM on MNIST, 28x28 pixels, 10 classes: recognisable digits in one step.

    ./launch.sh configs/ism_mnist.py --config.data.path=mnist.npz           # images and labels
    ./launch.sh configs/ism_mnist.py --config.data.source=tfds --config.data.path=mnist  # prepared
    ./launch.sh configs/ism_mnist.py:shortcut --config.data.path=mnist.npz  # or flow: baselines
    ./launch.sh configs/ism_mnist.py:debug    # two steps of everything on synthetic images

mnist.npz holds images as image(s), x_train or arr_0 and labels as label(s) or y_train; Keras'
mnist.npz does. Any other set of small grey images works as well: set data.image_size.

Hardware: 2 CPU cores, about 15 minutes.
"""

import ml_collections

from configs.common import ISM_BASELINES, apply_options, get_ism_common, ism_debug


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = get_ism_common()
  config.steps = 7000
  config.batch = 32  # better than 64 in the same time (docs/RESULTS.md)
  config.optim.name = "muon"
  config.optim.muon_lr = 0.01
  config.optim.lr = 3e-3
  config.ema = ml_collections.ConfigDict({"target": 0.95, "sample": 0.999})

  config.data.source = "npz"
  config.data.image_size = 28
  config.data.channels = 1
  config.data.held_out = 0.1

  config.model.patch = 4  # 49 patches
  config.model.width = 96
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
  config.loss.wavelet_levels = 2  # 28 = 4 x 7
  config.loss.level_decay = 0.5  # weight of level l is level_decay^(l - 1)
  config.loss.norm = "l2"  # or charbonnier

  config.pairing = ml_collections.ConfigDict()
  config.pairing.pool = 32  # batches in an optimal transport pool; 0: random pairs
  config.pairing.condition = "class"  # or none (the paper)
  config.pairing.solver = "sinkhorn"  # or exact

  config.eval.nfe = (1, 2, 4, 8)
  config.eval.samples = 1000
  apply_options(config, arg, OPTIONS)
  return config


def debug(config):
  """Two steps of everything, in seconds, on synthetic images or on those of data.path."""
  ism_debug(config)
  config.data.synthetic = 100


OPTIONS = {**ISM_BASELINES, "debug": debug}
