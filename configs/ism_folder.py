"""iSM on a folder of images, 32 to 64 pixels, in pixel space: for one GPU.

    ./launch.sh configs/ism_folder.py --config.data.path=photos        # 64 pixels, 33 M parameters
    ./launch.sh configs/ism_folder.py:px32 --config.data.path=photos   # 32 pixels
    ./launch.sh configs/ism_folder.py:B --config.data.path=photos      # 131 M parameters
    ./launch.sh configs/ism_folder.py:B,gpu --config.data.path=photos  # faster on NVIDIA GPUs
    ./launch.sh configs/ism_folder.py:flow --config.data.path=photos   # or shortcut: baselines
    ./launch.sh configs/ism_folder.py:debug  # two steps of everything on a CPU, synthetic images

photos/CLASS NAME/IMAGE.jpg (or .png, .webp, ...): each sub-folder is a class. Images without
classes are photos/IMAGE.jpg; their evaluation has only grids unless --config.eval.metrics is set.
The centre square of each image is resized to data.image_size, and all are held in memory: a million
take 12 GB at 64 pixels.
--config.data.source=tfds --config.data.path=NAME_OR_DIR[@SPLIT] reads a prepared TFDS set instead.
Mirror images are examples, too: set --config.data.flip=False for digits, letters and the like.

Hardware: one GPU of 16 GB (B: 40 GB). An example costs S 4 forward passes, 48 GFLOP, so 200k steps
of 128 examples cost 1.2e18 FLOP: 4 hours on an A100 at a quarter of its bfloat16 peak, B 17 hours.
This is computed, not measured. The quality depends on the images.
"""

import ml_collections

from configs.common import DIT_SIZES, ISM_BASELINES, apply_options, get_ism_common, ism_debug
from configs.common import gpu as gpu_options


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = get_ism_common()
  config.steps = 200_000
  config.batch = 128
  config.eval_every = 20_000
  config.save_every = 5000
  config.optim.lr = 2e-4
  config.optim.warmup = 2000
  config.ema = ml_collections.ConfigDict({"target": 0.95, "sample": 0.9999})

  config.data.source = "folder"
  config.data.image_size = 64
  config.data.channels = 3
  config.data.flip = True

  config.model.patch = 4  # 256 patches at 64 pixels
  config.model.width, config.model.depth, config.model.heads = DIT_SIZES["S"]
  config.model.dtype = "bfloat16"
  config.model.remat = "products"  # none needs 24 GB
  config.model.unroll = False

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
  config.loss.wavelet_levels = 5
  config.loss.level_decay = 0.5  # weight of level l is level_decay^(l - 1)
  config.loss.norm = "l2"  # or charbonnier

  config.pairing = ml_collections.ConfigDict()
  config.pairing.pool = 32  # batches in an optimal transport pool; 0: random pairs
  config.pairing.condition = "class"  # or none (the paper)
  config.pairing.solver = "sinkhorn"  # or exact
  apply_options(config, arg, OPTIONS)
  return config


def B(config):
  """The published base size, 131 M parameters; blocks are recomputed to save memory."""
  config.model.width, config.model.depth, config.model.heads = DIT_SIZES["B"]
  config.model.remat = "block"


def px32(config):
  """32 pixels, in 256 patches of 2."""
  config.data.image_size = 32
  config.model.patch = 2


def debug(config):
  """Two steps of everything, in seconds, on synthetic images or on those of data.path."""
  ism_debug(config)
  config.batch = 16
  config.model.heads = 4
  config.data.image_size = 16
  config.loss.wavelet_levels = 3
  config.data.synthetic = 64


def gpu(config):
  """The fastest options on an H200 (docs/PERFORMANCE.md)."""
  gpu_options(config)
  config.model.unroll = True


OPTIONS = {"B": B, "px32": px32, "gpu": gpu, "debug": debug, **ISM_BASELINES}
