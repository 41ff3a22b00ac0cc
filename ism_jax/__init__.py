"""iSM: shortcut models that sample in one, a few or many steps (arXiv 2510.21250)."""


def __getattr__(name: str):
  # `import ism_jax` alone stays light: importing it must not start JAX.
  if name == "Model":
    from ism_jax.model import Model

    return Model
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_pretrained(path, vae=""):
  """`Model.from_pretrained`: the exported model in the directory `path`, ready to sample."""
  from ism_jax.model import Model

  return Model.from_pretrained(path, vae)
