"""SequenceMatch: autoregressive models that take back a wrong token (arXiv 2306.05426)."""


def __getattr__(name: str):
  # `import seqmatch_jax` alone stays light: importing it must not start JAX.
  if name == "Model":
    from seqmatch_jax.model import Model

    return Model
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_pretrained(path):
  """`Model.from_pretrained`: the exported model in the directory `path`, ready to generate."""
  from seqmatch_jax.model import Model

  return Model.from_pretrained(path)
