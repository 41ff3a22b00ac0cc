"""iSM: shortcut models that sample in one, a few or many steps (arXiv 2510.21250)."""


def load_pretrained(path, vae=None):
  """The exported model in the directory `path`, ready to sample: see ism_jax/loaded.py."""
  from ism_jax import loaded

  return loaded.load_pretrained(path, vae)
