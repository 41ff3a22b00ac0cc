"""SequenceMatch: autoregressive models that take back a wrong token (arXiv 2306.05426)."""


def load_pretrained(path):
  """The exported model in the directory `path`, ready to generate: see seqmatch_jax/loaded.py."""
  from seqmatch_jax import loaded

  return loaded.load_pretrained(path)
