"""iSM on a folder of images, 32 to 64 pixels, in pixel space: for one GPU.

    ./launch.sh configs/ism_folder.py --config.data.path=photos        # 64 pixels, 33 M parameters
    ./launch.sh configs/ism_folder.py:px32 --config.data.path=photos   # 32 pixels
    ./launch.sh configs/ism_folder.py:B --config.data.path=photos      # 131 M parameters
    ./launch.sh configs/ism_folder.py:B,gpu --config.data.path=photos  # faster on NVIDIA GPUs
    ./launch.sh configs/ism_folder.py:flow --config.data.path=photos   # or shortcut: baselines
    ./launch.sh configs/ism_folder.py:debug  # two steps of everything on a CPU, images made up

photos/CLASS NAME/IMAGE.jpg (or .png, .webp, ...): a sub-folder is a class. Images without classes:
photos/IMAGE.jpg; numbers need --config.eval.metrics then, else there are only grids. The centre
square of each image is resized to data.side, and all are held in memory: at 64 pixels a million
take 12 GB.
--config.data.source=tfds --config.data.path=NAME_OR_DIR[@SPLIT] reads a prepared TFDS set instead.
Mirror images are examples too: --config.data.flip=False for digits, letters and the like.

Hardware: one GPU of 16 GB (B: 40 GB). A row of S costs 4 forward passes, 48 GFLOP, so 200k steps of
128 rows cost 1.2e18 FLOP: 4 hours on an A100 at a quarter of its bfloat16 peak, B 17. Computed, not
measured. What quality to expect depends on the images; evaluation uses a classifier fitted to them.
"""

import ml_collections

from configs import ism_digits
from configs.common import apply_options
from configs.ism_imagenet256 import SIZES, gpu


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = ism_digits.get_config()
  config.steps = 200_000
  config.batch = 128
  config.eval_every = 20_000
  config.save_every = 5000
  config.optim.name = "adamw"
  config.optim.lr = 2e-4
  config.optim.warmup = 2000
  config.ema = ml_collections.ConfigDict({"target": 0.95, "sample": 0.9999})

  config.data.source = "folder"
  config.data.path = ""
  config.data.side = 64
  config.data.channels = 3
  config.data.flip = True
  config.data.made_up = 0  # random images to train on where there is no path

  config.model.width, config.model.depth, config.model.heads = SIZES["S"]
  config.model.patch = 4  # 256 patches at 64 pixels
  config.model.dtype = "bfloat16"
  config.model.unroll = False
  config.model.remat = "products"  # none needs 24 GB
  config.wavelet.levels = 5
  apply_options(config, arg, OPTIONS)
  return config


def B(config):
  """The published base size, 131 M parameters; blocks recomputed to save memory."""
  config.model.width, config.model.depth, config.model.heads = SIZES["B"]
  config.model.remat = "block"


def px32(config):
  """32 pixels, in 256 patches of 2."""
  config.data.side = 32
  config.model.patch = 2


def debug(config):
  """Two steps of everything, in seconds: on made-up images, or on those of --config.data.path."""
  ism_digits.debug(config)
  config.batch = 16
  config.model.heads = 4
  config.data.side = 16
  config.wavelet.levels = 3
  config.data.made_up = 64


OPTIONS = {option.__name__: option for option in (B, px32, gpu, debug)} | ism_digits.BASELINES
