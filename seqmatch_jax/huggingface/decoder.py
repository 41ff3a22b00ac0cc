"""The decoder that a config asks for: drawn or pretrained, learned as a whole or by adapters.

    config.pretrained   a folder as Hugging Face lays it out; "": drawn, with config.model's sizes
    config.erase_bias   how far the logit of its new <backspace> is lowered
    config.lora         rank (0: all parameters are learned), alpha, targets, base

`metadata` are those saved with a checkpoint; they hold a pretrained decoder's sizes.
"""

from __future__ import annotations

import math

import jax
from jax.sharding import Mesh

from seqmatch_jax import tokens, transformer
from seqmatch_jax.huggingface import pretrained
from seqmatch_jax.tokens import TextVocab
from seqmatch_jax.transformer import TransformerConfig
from train_jax import lora
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.state import flatten
from train_jax.step import Frozen
from train_jax.storage.lazy import Lazy
from train_jax.storage.weights import Weights


def with_tokenizer(config):
  """`config`, or a copy in which the data's tokens are those of the pretrained decoder."""
  if not config.get("pretrained") or config.data.get("tokenizer"):
    return config
  pretrained.read_sizes(config.pretrained)  # a folder that is none is refused as that
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.data.tokenizer = config.pretrained
  return config


def make_metadata(config, metadata: dict) -> dict:
  """`metadata` of the data, and what identifies the pretrained decoder, if there is one.

  Raises:
    UserError: the folder is not one, or the data have other tokens than it, or longer texts.
  """
  if config.get("pretrained"):
    sizes, vocab = pretrained.read_sizes(config.pretrained), TextVocab.from_file(config.pretrained)
    if metadata.get("tokenizer", {}).get("sha256") != vocab.sha256:
      raise UserError(
        f"pretrained={config.pretrained!r} has a tokenizer that these data were not encoded with; "
        "encode them with it, or leave data.tokenizer empty."
      )
    weights = Weights(config.pretrained).digest()
    metadata = {**metadata, "sizes": sizes, "weights_sha256": weights}
  make_sizes(config, metadata).check_length(max(metadata["max_length"], config.data.context))
  return metadata


def moved(config, metadata: dict, folder: str) -> tuple:
  """`config` and `metadata` of a trained run whose pretrained decoder is in `folder` now.

  Raises:
    UserError: the run has none, or what is there is another one.
  """
  if not config.get("pretrained"):
    raise UserError(f"--pretrained={folder} is read by runs that began from one; leave it out.")
  config = config.copy_and_resolve_references()
  config.pretrained = folder
  path = TextVocab.from_file(folder).path
  here = make_metadata(config, {**metadata, "tokenizer": {**metadata["tokenizer"], "path": path}})
  for name in ("sizes", "weights_sha256"):
    if here[name] != metadata.get(name, here[name]):  # older runs do not know the weights'
      raise UserError(
        f"--pretrained={folder} is not what the run began from: its {name} are {here[name]}, and "
        f"those of the run {metadata[name]}; give that folder."
      )
  return config, here


def make_sizes(config, metadata: dict) -> TransformerConfig:
  """Sizes of the network: those of the pretrained one, if there is one, else the config's.

  `config.model.vocab` may ask for more tokens than there are, as large as some pretrained model's.
  """
  sizes, vocab = dict(config.model), tokens.from_metadata(metadata).size
  most = sizes.pop("vocab", 0)
  if "sizes" in metadata:
    sizes, most = {**sizes, **metadata["sizes"]}, 0
  if config.get("lora") and config.lora.rank:
    sizes["lora"] = lora.LoraConfig(**config.lora)
  return TransformerConfig(vocab=max(vocab, most), **sizes)


def make_network(config, metadata: dict) -> transformer.TransformerFunctions:
  """The network as functions."""
  return transformer.make_network(make_sizes(config, metadata))


def read(config, metadata: dict) -> dict[str, Lazy]:
  """All parameters of the pretrained decoder by name, checked but not read; {} without one."""
  if not config.get("pretrained"):
    return {}
  sizes, vocab = make_sizes(config, metadata), tokens.from_metadata(metadata)
  return pretrained.read(config.pretrained, sizes, vocab, config.erase_bias)


def make_init_params(config, metadata: dict) -> dict[str, Lazy]:
  """The pretrained parameters that are learned from here on, by name."""
  network, key, found = make_network(config, metadata), jax.random.key(0), read(config, metadata)
  learned = flatten(jax.eval_shape(network.init, key))
  if found and jax.process_index() == 0:
    count = sum(math.prod(a.shape) for a in found.values()) / 1e6
    own = sum(a.size for a in learned.values()) / 1e6
    print(f"began from {config.pretrained}: {count:.1f} M parameters; {own:.2f} M are learned")
  return {name: a for name, a in found.items() if name in learned}


def make_frozen(config, metadata: dict) -> Frozen | None:
  """The parameters that are not learned: pretrained, or else drawn. None without LoRA."""
  draw, key = make_network(config, metadata).frozen, jax.random.key(config.seed)
  shapes = jax.eval_shape(draw, key)
  if not shapes:
    return None

  def make(shardings):
    if not config.get("pretrained"):
      return jax.jit(draw, out_shardings=shardings)(key)
    return pretrained.to_device(read(config, metadata), shapes, shardings)

  return Frozen(shapes, make)


def mesh_of(config, devices: list | None = None) -> Mesh:
  """Where a trained decoder is used: shared by `tensor`.

  A token's activations then move from device to device, which are less than the parameters that
  `fsdp` would gather for each token.
  """
  return mesh_lib.mesh_for_inference("tensor", **config.mesh, devices=devices)


def with_frozen(config, metadata: dict, params: dict, mesh: Mesh) -> dict:
  """All of the network's parameters, laid out on `mesh`: those learned, and the frozen ones."""
  frozen = make_frozen(config, metadata)
  if not frozen:
    return params
  return lora.join(params, frozen.make(mesh_lib.state_sharding(frozen.shapes, mesh)))
