"""iSM on MNIST, 28x28 pixels, 10 classes: digits that anyone would recognise, in one step.

    ./launch.sh configs/ism_mnist.py --config.data.path=mnist.npz           # images and labels
    ./launch.sh configs/ism_mnist.py --config.data.source=tfds --config.data.path=mnist  # prepared
    ./launch.sh configs/ism_mnist.py:shortcut --config.data.path=mnist.npz  # or flow: baselines
    ./launch.sh configs/ism_mnist.py:debug    # two steps of everything, images made up

mnist.npz: images under image(s), x_train or arr_0, labels under label(s) or y_train, as Keras'
mnist.npz has them. Any other set of small grey images goes as well: set data.image_size.

Hardware: 2 CPU cores, about 15 minutes.
"""

import ml_collections

from configs.common import ISM_BASELINES, apply_options, get_common, ism_debug


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = get_common()
  config.method = "ism"
  config.steps = 7000
  config.batch = 32  # more steps of fewer images: better than 64 at the same time (docs/RESULTS.md)
  config.eval_every = 1000
  config.optim.name = "muon"
  config.optim.lr = 3e-3
  config.ema = ml_collections.ConfigDict({"target": 0.95, "sample": 0.999})

  config.data = ml_collections.ConfigDict()
  config.data.source = "npz"  # or tfds, folder
  config.data.path = ""
  config.data.image_size = 28
  config.data.channels = 1
  config.data.flip = False
  config.data.held_out = 0.1  # share of each class that is not trained on, to compare samples with
  config.data.max_faults = 100  # records that may be unreadable before the run stops
  config.data.synthetic = 0  # random images to train on where there is no path

  config.model = ml_collections.ConfigDict()
  config.model.patch = 4  # 49 patches
  config.model.width = 96
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
  config.loss.w_max = 2.0
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

  config.eval = ml_collections.ConfigDict()
  config.eval.nfe = (1, 2, 4, 8)
  config.eval.guidance = (0.0, 0.5, 1.0)
  config.eval.samples = 1000
  config.eval.metrics = ()  # of fid, sfid, fd_dinov2, is, pr; (): by a classifier of the data
  config.eval.reference = ""  # of the metrics: an ADM .npz, or a folder of images
  config.eval.inception = ""  # weights: .safetensors
  config.eval.dinov2 = ""
  config.eval.vae = ""  # of latents; without metrics, it draws a grid of them in training
  config.eval.classes = "balanced"  # or random
  apply_options(config, arg, OPTIONS)
  return config


def debug(config):
  """Two steps of everything, in seconds: on made-up images, or on those of --config.data.path."""
  ism_debug(config)
  config.data.synthetic = 100


OPTIONS = {**ISM_BASELINES, "debug": debug}
