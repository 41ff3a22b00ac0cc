"""What all configs share: the engine's part, the options after the ':', and the baselines."""

import ml_collections


def get_common() -> ml_collections.ConfigDict:
  """The engine's part of a config; each config file adds its method's part and its own values."""
  config = ml_collections.ConfigDict()
  config.method = ""  # ism or seqmatch
  config.backend = ""  # cpu, gpu or tpu: refuse to run on another; "" takes what is there
  config.seed = 0
  config.init_from = ""  # trained parameters for step 0: an exported model, a workdir, or a file
  config.steps = 0
  config.batch = 64  # global
  config.log_every = 50
  config.eval_every = 1000  # 0: only at the end
  config.save_every = 1000
  config.keep = 2  # newest checkpoints
  config.keep_every = 0  # steps between those that are kept for good as well; 0: none
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


def apply_options(config, arg: str, options: dict) -> None:
  """Applies `file.py:one,two` in order; raises ValueError with the known names for another one."""
  for name in filter(None, arg.split(",")):
    if name not in options:
      raise ValueError(f"unknown option {name!r} after the ':'; choose from {', '.join(options)}.")
    options[name](config)


# iSM's baselines: the same call with another split, guidance and target average.


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


ISM_BASELINES = {"flow": flow, "shortcut": shortcut, "shortcut_fast_ema": shortcut_fast_ema}


def ism_debug(config) -> None:
  """Two steps of everything, in seconds."""
  config.steps = 2
  config.log_every = config.eval_every = config.save_every = 1
  config.pairing.pool = min(config.pairing.pool, 2)
  config.eval.nfe = (1, 2)
  config.eval.samples = 200
  config.model.width = 16
  config.model.depth = 2


# SequenceMatch's baselines: the same call with everything switched off.


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
  """NVIDIA GPUs: bfloat16, cuDNN's attention, and nothing is computed again (docs/PERFORMANCE.md).

  256 examples of XL/2 take 102 GiB of an H200 so; --config.model.remat=products takes 58.
  """
  config.model.dtype = "bfloat16"
  config.model.attention = "cudnn"
  config.model.remat = "none"


# (width, depth, heads) of the published DiT sizes (arXiv 2212.09748, table 1).
DIT_SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
