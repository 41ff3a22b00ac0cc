"""iSM: shortcut models that sample in one, a few or many steps (arXiv 2510.21250)."""


def load_pretrained(path, vae=None):
  """The exported model in the directory `path`, ready to sample: see ism_jax/model.py."""
  from ism_jax import model

  return model.load_pretrained(path, vae)
