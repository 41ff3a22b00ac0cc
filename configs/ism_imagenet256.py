"""iSM on ImageNet 256x256, in the latents of sd-vae-ft-mse: SiT-XL/2 as in arXiv 2510.21250.

    ./launch.sh --mode=encode --images=imagenet/train --vae=vae.safetensors --out=latents  # once
    ./launch.sh configs/ism_imagenet256.py --config.data.path=latents      # XL/2
    ./launch.sh configs/ism_imagenet256.py:B/2 --config.data.path=latents  # or S/2, L/2
    ./launch.sh configs/ism_imagenet256.py:gpu --config.data.path=latents  # on NVIDIA GPUs
    ./launch.sh configs/ism_imagenet256.py:paper --config.data.path=latents  # see below
    ./launch.sh configs/ism_imagenet256.py:flow --config.data.path=latents  # or shortcut: baselines
    ./launch.sh configs/ism_imagenet256.py:debug  # two steps on a CPU, on synthetic data

docs/IMAGENET.md walks through all of it.

Hardware: 8 GPUs of 80 GB or a TPU slice. XL/2 keeps 24 bytes a parameter (weights, gradients,
moments, two averages), 16 GB on each device, and --config.mesh.fsdp=8 splits that over 8.
Time: an example costs 4 forward passes, 0.95 TFLOP. One H200 takes 480 examples a second with the
option `gpu` (measured, docs/PERFORMANCE.md): 5 days for 800k steps of 256 examples. 8 of them would
take 15 hours at perfect scaling.

Expected FID-50k (the paper's numbers, not ours): 5.27, 2.44, 2.05, 1.93, 1.88 at 1, 2, 4, 8, 128
steps; after 250k steps 6.56 and 2.16 at 1 and 4. The paper does not publish the split of the batch
and the warm-up: those are ours. Three defaults differ from the paper (docs/RESULTS.md says why),
and the option `paper` restores its values:
- The loss is one mean over all examples (the paper: three equal weights).
- Half of the consistency examples have w = 0 (the paper: 1 of 15).
- Noise is paired within classes (the paper: across classes, which makes noise tell the class).

These measures keep XL from diverging: The gradient is clipped to norm 1. A step with a non-finite
loss or gradient is skipped and counted, and after ten in a row the run goes back once. lr warms up.
Only products and the activations between them are bfloat16; parameters, moments, averages,
attention's softmax, the norms' statistics and the loss are float32. Blocks, d and w begin at zero
effect. If `skipped` rises after the warm-up, add --config.model.qk_norm=True, which normalises
queries and keys (the published SiT does not).
"""

import ml_collections

from configs.common import DIT_SIZES, ISM_BASELINES, apply_options, get_ism_common, ism_debug
from configs.common import gpu as gpu_options


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  config = get_ism_common()
  config.steps = 800_000
  config.batch = 256
  config.log_every = 100
  config.eval_every = 50_000
  config.save_every = 5000
  config.keep_every = 250_000  # the paper has numbers of that step, too: --step=250000
  config.optim.lr = 1e-4  # of AdamW, as in the paper; Muon's rate is not known at this size
  config.optim.warmup = 5000
  config.optim.final = 1.0  # constant
  config.optim.b2 = 0.999
  config.ema = ml_collections.ConfigDict({"target": 0.95, "sample": 0.9999})

  config.data.source = "latents"  # --mode=encode writes them, with those of mirror images
  config.data.image_size = 32
  config.data.channels = 4

  config.model.patch = 2
  config.model.width, config.model.depth, config.model.heads = DIT_SIZES["XL"]
  config.model.dtype = "bfloat16"
  config.model.remat = "block"
  config.model.unroll = False

  config.loss = ml_collections.ConfigDict()
  config.loss.split = ml_collections.ConfigDict()  # of every 8 examples
  config.loss.split.velocity = 4
  config.loss.split.guidance = 1
  config.loss.split.consistency = 3
  config.loss.target = "two_steps"  # the paper; or meanflow, improved_meanflow
  config.loss.weighting = "by_example"  # one mean; or by_term: a mean of each, added (the paper)
  config.loss.class_dropout = 0.1
  config.loss.w_max = 3.5
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

  config.eval.guidance = (0.0, 1.0)
  config.eval.samples = 50_000
  apply_options(config, arg, OPTIONS)
  return config


def size(name: str):
  """The option `name`, such as B/2: one of DIT_SIZES and a patch size."""

  def apply(config):
    letter, _, patch = name.partition("/")
    config.model.width, config.model.depth, config.model.heads = DIT_SIZES[letter]
    config.model.patch = int(patch)

  return apply


def debug(config):
  """Two steps of everything, in seconds, on synthetic latents or on those of data.path."""
  ism_debug(config)
  config.batch = 16
  config.model.heads = 4
  config.data.synthetic = 64
  config.data.std = (0.0, 100.0)  # accepts any autoencoder, even an untrained one


def paper(config):
  """The paper's values where the defaults differ."""
  config.loss.weighting = "by_term"
  config.loss.zero_w_prob = 1 / 15  # w is uniform on 0, 0.25, ..., 3.5
  config.pairing.condition = "none"


def gpu(config):
  """The fastest options on an H200 (docs/PERFORMANCE.md); 256 examples of XL/2 take 102 GiB.

  For devices of 80 GB, --config.model.unroll=False --config.model.remat=products takes 58 GiB.
  """
  gpu_options(config)
  config.model.unroll = True


OPTIONS = {name: size(name) for name in ("S/2", "B/2", "L/2", "XL/2")}
OPTIONS |= {"gpu": gpu, "paper": paper, "debug": debug, **ISM_BASELINES}
