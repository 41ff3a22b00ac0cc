"""The decoder of a config: drawn or pretrained, learned as a whole or by adapters.

    config.pretrained   a folder in Hugging Face's layout; "": drawn, with config.model's sizes
    config.erase_bias   the bias of the new <backspace>'s logit
    config.lora         rank (0: all parameters are learned), alpha, targets, base

The `metadata` saved with a checkpoint hold a pretrained decoder's sizes.
"""

from __future__ import annotations

import math

import jax
from jax.sharding import Mesh

from seqmatch_jax import transformer
from seqmatch_jax.huggingface import pretrained, tokenizer
from seqmatch_jax.huggingface.tokenizer import TextVocab
from seqmatch_jax.transformer import TransformerConfig
from train_jax import lora
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.state import flatten
from train_jax.step import Frozen
from train_jax.storage.lazy import Lazy
from train_jax.storage.weights import Weights


def with_tokenizer(config):
  """`config`, in which the data's tokens are those of the pretrained decoder, if there is one."""
  if not config.get("pretrained") or config.data.get("tokenizer"):
    return config
  pretrained.read_sizes(config.pretrained)  # raises a clearer error than the tokenizer would
  config = config.copy_and_resolve_references()
  with config.unlocked():
    config.data.tokenizer = config.pretrained
  return config


def make_metadata(config, metadata: dict) -> dict:
  """The data's `metadata`, with sizes and digest of the pretrained decoder, if there is one."""
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
  """`config` and `metadata` of a trained run whose pretrained decoder was moved to `folder`."""
  if not config.get("pretrained"):
    raise UserError(f"--pretrained={folder} is read by runs that began from one; leave it out.")
  config = config.copy_and_resolve_references()
  config.pretrained = folder
  path = TextVocab.from_file(folder).path
  here = make_metadata(config, {**metadata, "tokenizer": {**metadata["tokenizer"], "path": path}})
  for name in ("sizes", "weights_sha256"):
    if here[name] != metadata[name]:
      raise UserError(
        f"--pretrained={folder} is not what the run began from: its {name} are {here[name]}, and "
        f"those of the run {metadata[name]}; give that folder."
      )
  return config, here


def make_sizes(config, metadata: dict) -> TransformerConfig:
  """Sizes of the network: the pretrained one's, or else those of `config.model`.

  `config.model.vocab` may be more than the tokens that there are, to compile a larger model.
  """
  sizes, vocab = dict(config.model), tokenizer.from_metadata(metadata).size
  larger = sizes.pop("vocab", 0)
  if "sizes" in metadata:
    sizes |= metadata["sizes"]
  else:
    vocab = max(vocab, larger)
  if config.get("lora") and config.lora.rank:
    sizes["lora"] = lora.LoraConfig(**config.lora)
  return TransformerConfig(vocab=vocab, **sizes)


def make_network(config, metadata: dict) -> transformer.TransformerFunctions:
  """The functions of the config's network."""
  return transformer.make_network(make_sizes(config, metadata))


def read(config, metadata: dict) -> dict[str, Lazy]:
  """The parameters of the pretrained decoder by name, checked but not read; {} without one."""
  if not config.get("pretrained"):
    return {}
  sizes, vocab = make_sizes(config, metadata), tokenizer.from_metadata(metadata)
  return pretrained.read(config.pretrained, sizes, vocab, config.erase_bias)


def make_init_params(config, metadata: dict) -> dict[str, Lazy]:
  """The pretrained parameters that are learned from here on, by name."""
  network, tensors = make_network(config, metadata), read(config, metadata)
  learned = flatten(jax.eval_shape(network.init, jax.random.key(0)))
  if tensors and jax.process_index() == 0:
    total = sum(math.prod(tensor.shape) for tensor in tensors.values()) / 1e6
    own = sum(leaf.size for leaf in learned.values()) / 1e6
    print(f"began from {config.pretrained}: {total:.1f} M parameters; {own:.2f} M are learned")
  return {name: tensor for name, tensor in tensors.items() if name in learned}


def make_frozen(config, metadata: dict) -> Frozen | None:
  """The parameters that are not learned, pretrained or drawn; None without LoRA."""
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
  """The mesh on which a trained decoder is used: `tensor` over all devices.

  It moves the activations of a token. `fsdp` would gather the parameters for each token.
  """
  return mesh_lib.mesh_for_inference("tensor", **config.mesh, devices=devices)


def with_frozen(config, metadata: dict, params: dict, mesh: Mesh) -> dict:
  """All of the network's parameters on `mesh`: the learned ones, and the frozen ones."""
  frozen = make_frozen(config, metadata)
  if not frozen:
    return params
  return lora.join(params, frozen.make(mesh_lib.state_sharding(frozen.shapes, mesh)))
