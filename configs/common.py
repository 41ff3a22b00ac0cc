"""The shared parts of configs: engine, methods, the options after the ':', and the baselines."""

import ml_collections


def get_common() -> ml_collections.ConfigDict:
  """The engine's part of a config; each file adds its method's part and its own values."""
  config = ml_collections.ConfigDict()
  config.method = ""  # ism or seqmatch
  config.backend = ""  # cpu, gpu or tpu: refuse to run on another; "" takes any
  config.seed = 0
  config.init_from = ""  # trained parameters for step 0: an exported model, a workdir, or a file
  config.steps = 0
  config.batch = 64  # global
  config.log_every = 50
  config.eval_every = 1000  # 0: only at the end
  config.save_every = 1000
  config.keep = 2  # newest checkpoints
  config.keep_every = 0  # steps between checkpoints that are kept for good; 0: none
  config.max_skipped = 10  # non-finite steps in a row before the run goes back, then stops

  config.optim = ml_collections.ConfigDict()
  config.optim.name = "adamw"  # or muon
  config.optim.lr = 1e-3
  config.optim.muon_lr = 0.02
  config.optim.warmup = 100
  config.optim.final = 0.1  # of lr, at the end of the cosine; 1 is constant
  config.optim.b1 = 0.9
  config.optim.b2 = 0.99
  config.optim.mu_dtype = "float32"  # of the first moments; or bfloat16
  config.optim.weight_decay = 0.0
  config.optim.clip = 1.0
  config.optim.grad_accum_steps = 1  # parts of a batch, one after the other: less memory

  # Decays of the named averages, warmed up; `sample` is the one for inference.
  config.ema = ml_collections.ConfigDict({"sample": 0.999})

  config.mesh = ml_collections.ConfigDict()
  config.mesh.fsdp = 1  # devices that share one copy of the parameters
  config.mesh.tensor = 1  # devices that share the work of one example
  return config


def get_ism_common() -> ml_collections.ConfigDict:
  """What all iSM configs share: where data come from, how the network computes, what measures it.

  Each file adds its experiment: steps, rates, data, sizes, the objective and the pairing.
  """
  config = get_common()
  config.method = "ism"

  config.data = ml_collections.ConfigDict()
  config.data.source = ""  # folder: data.path/<class name>/<image>; or npz, tfds, latents, digits
  config.data.path = ""
  config.data.image_size = 0
  config.data.channels = 0
  config.data.flip = False  # mirror images are examples, too: not for digits, letters and the like
  config.data.held_out = 0.0  # share of each class that is not trained on, to compare samples with
  config.data.std = (0.5, 2.0)  # of a channel of scaled latents; another set is refused
  config.data.max_faults = 100  # records that may be unreadable before the run stops
  config.data.synthetic = 0  # random examples to train on where there is no path
  config.data.classes = 10  # of the random examples

  config.model = ml_collections.ConfigDict()
  config.model.time_scale = 1000.0  # the sinusoids see t in [0, 1) times this
  config.model.qk_norm = False
  config.model.dtype = "float32"  # or bfloat16
  config.model.remat = "none"  # or products, block: parts that the backward pass recomputes
  config.model.unroll = True
  config.model.attention = "xla"  # or cudnn: fused, for bfloat16 on NVIDIA GPUs

  config.eval = ml_collections.ConfigDict()
  config.eval.nfe = (1, 2, 4, 8, 128)
  config.eval.guidance = (0.0, 0.5, 1.0)
  config.eval.samples = 2000  # of each setting; without metrics, half of it at 128 steps
  config.eval.metrics = ()  # of fid, sfid, fd_dinov2, is, pr; (): by a classifier of the data
  config.eval.reference = ""  # of the metrics: an ADM .npz, or a folder of images
  config.eval.inception = ""  # weights: .safetensors
  config.eval.dinov2 = ""
  config.eval.vae = ""  # of latents; without metrics, it draws a grid of them in training
  config.eval.classes = "balanced"  # or random
  return config


def get_seqmatch_common() -> ml_collections.ConfigDict:
  """What all SequenceMatch configs share.

  Each file adds its experiment: steps, rates, data, sizes, noise, the objective and the replay.
  """
  config = get_common()
  config.method = "seqmatch"

  config.data = ml_collections.ConfigDict()
  config.data.source = ""  # files, add_or_sub_in_base, two_sum or text

  config.model = ml_collections.ConfigDict()
  config.model.dtype = "float32"  # or bfloat16
  config.model.remat = "none"  # or products, block: parts that the backward pass recomputes
  config.model.unroll = True

  config.eval = ml_collections.ConfigDict()
  config.eval.max_backspaces = 0  # in one generation
  return config


def get_seqmatch_text_common() -> ml_collections.ConfigDict:
  """What all SequenceMatch configs for text share."""
  config = get_seqmatch_common()
  config.data.source = "text"
  config.data.path = ""  # texts, or a directory that --mode=encode made; "": Python's own
  config.data.test = ""  # the same, for testing; "": documents of data.path are held out
  config.data.tests = 500  # documents that are held out
  config.data.tokenizer = ""  # tokenizer.json; "": that of `pretrained`, or a token a character
  config.data.context = 0  # tokens of a row, <bos> and wrong ones included
  config.data.prompt = 0  # tokens at the start of a text that carry no loss
  config.data.max_faults = 100  # texts that may be unreadable before the run stops
  config.model.attention = "xla"  # or cudnn: fused, for bfloat16 on NVIDIA GPUs
  config.eval.samples = 256  # generations
  config.eval.features = ""  # for MAUVE: a text run's workdir, or a folder of GPT-2's weights
  return config


def apply_options(config, arg: str, options: dict) -> None:
  """Applies the options of `file.py:one,two` in order; an unknown name is a ValueError."""
  for name in filter(None, arg.split(",")):
    if name not in options:
      raise ValueError(f"unknown option {name!r} after the ':'; choose from {', '.join(options)}.")
    options[name](config)


# iSM's baselines: the same loss with another split, guidance and target average.


def flow(config) -> None:
  """Flow matching: velocity examples only."""
  config.loss.split.update(velocity=1, guidance=0, consistency=0)
  config.loss.w_max = 0.0
  config.loss.wavelet_levels = 0
  config.pairing.pool = 0
  config.eval.guidance = (0.0,)


def shortcut(config) -> None:
  """Shortcut models as released: guidance 1.5 at the finest step, slow EMA."""
  flow(config)
  config.loss.split.update(velocity=7, consistency=1)
  config.loss.bootstrap_guidance = 0.5  # s(c) + 0.5 (s(c) - s(null)): "1.5" where null is 0
  config.ema.target = 0.999


def shortcut_fast_ema(config) -> None:
  """The strongest control: shortcut models with iSM's fast target average."""
  shortcut(config)
  config.ema.target = 0.95


def meanflow(config) -> None:
  """The derivative's target in place of the two half steps (arXiv 2505.13447)."""
  config.loss.target = "meanflow"
  config.model.time_scale = 16.0  # smooth enough to differentiate: not at 1000


def improved_meanflow(config) -> None:
  """The same with the network's own velocity as the tangent (arXiv 2512.02012)."""
  meanflow(config)
  config.loss.target = "improved_meanflow"


ISM_BASELINES = {
  "flow": flow,
  "shortcut": shortcut,
  "shortcut_fast_ema": shortcut_fast_ema,
  "meanflow": meanflow,
  "improved_meanflow": improved_meanflow,
}


def ism_debug(config) -> None:
  """Two steps of everything, in seconds."""
  config.steps = 2
  config.log_every = config.eval_every = config.save_every = 1
  config.pairing.pool = min(config.pairing.pool, 2)
  config.eval.nfe = (1, 2)
  config.eval.samples = 200
  config.model.width = 16
  config.model.depth = 2


# SequenceMatch's baselines: the same loss without its parts.


def mle(config) -> None:
  """Maximum likelihood without <backspace>."""
  bc(config)
  config.loss.backspace = False
  config.noise.rate = 0.0


def bc(config) -> None:
  """Behavioural cloning: maximum likelihood on noised data, with <backspace>."""
  config.loss.divergence = "chi2"
  config.loss.alpha = 0.0
  config.loss.gamma = 1.0


SEQMATCH_BASELINES = {"mle": mle, "bc": bc}


def seqmatch_debug(config) -> None:
  """A few steps of everything, in seconds."""
  config.steps = 4
  config.log_every = config.save_every = 1
  config.eval_every = 2
  config.model.width = 16
  config.loss.warmup = config.loss.anneal = 1
  config.buffer.size = 16
  config.buffer.refresh = 2
  config.buffer.rollouts = config.buffer.draw = 8


def gpu(config) -> None:
  """NVIDIA GPUs: bfloat16, cuDNN's attention, no rematerialization (docs/PERFORMANCE.md).

  256 examples of XL/2 take 102 GiB of an H200, and 58 with --config.model.remat=products.
  """
  config.model.dtype = "bfloat16"
  config.model.attention = "cudnn"
  config.model.remat = "none"


# (width, depth, heads) of the published DiT sizes (arXiv 2212.09748, table 1).
DIT_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
