"""What every run has: length, optimiser, averages, mesh; how often to log, evaluate and save."""

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
  config.optim.accumulate = 1  # parts of a batch, one after the other: less memory, same batch

  # Decays of the named averages, warmed up; `sample` is the one for inference.
  config.ema = ml_collections.ConfigDict({"sample": 0.999})

  config.mesh = ml_collections.ConfigDict()
  config.mesh.fsdp = 1  # devices that share one copy of the parameters
  config.mesh.tensor = 1  # devices that share the work of one row
  return config


def apply_options(config, arg: str, options: dict) -> None:
  """Applies `file.py:one,two` in order; raises ValueError with the known names for another one."""
  for name in filter(None, arg.split(",")):
    if name not in options:
      raise ValueError(f"unknown option {name!r} after the ':'; choose from {', '.join(options)}.")
    options[name](config)
