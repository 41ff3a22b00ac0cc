"""Pretrained decoders: folders in Hugging Face's layout, read as our parameters.

    config.json                     the architecture
    model.safetensors               the tensors; or model.safetensors.index.json and its files
    tokenizer.json, tokenizer_config.json

Our tokens are in another order (see tokenizer.py), so the rows of the embedding and the output
move. q, k, v are one matrix here, and so are gate, up. <backspace> has a row and a bias of its own
(`erase`): at first the row is the mean of the output's rows, and the bias lowers its logit. In a
folder that was written here <backspace> is a token like any other, and its bias is the tensor
`backspace_bias`, which other programs ignore.

Dimensions: v vocabulary, k width, l layers.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from seqmatch_jax.huggingface.tokenizer import TextVocab
from seqmatch_jax.transformer import TransformerConfig, make_network
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.files import read_json
from train_jax.state import dotted
from train_jax.storage import lazy
from train_jax.storage.lazy import Lazy
from train_jax.storage.weights import Weights

BIAS = "backspace_bias"
CHUNK = 8192  # rows of the output that are averaged at a time


class Layout(NamedTuple):
  """A family's names and layout of its tensors.

  Attributes:
    prefix: of all names but the output's; files of GPT-2 may lack it.
    tops: our names of the tensors outside the blocks -> theirs.
    layer: prefix of a layer's tensors, with its number.
    blocks: our names of a block's tensors -> theirs, side by side.
    transposed: whether their matrices are [out, in].
  """

  prefix: str
  tops: dict[str, str]
  layer: str
  blocks: dict[str, tuple[str, ...]]
  transposed: bool


def _affine(ours: str, theirs: str, first: str) -> dict[str, tuple[str, ...]]:
  return {f"{ours}.{first}": (f"{theirs}.weight",), f"{ours}.bias": (f"{theirs}.bias",)}


LAYOUTS = {
  "gpt2": Layout(
    "transformer.",
    {
      "embed.embedding": "wte.weight",
      "place.embedding": "wpe.weight",
      "norm.scale": "ln_f.weight",
      "norm.bias": "ln_f.bias",
    },
    "h.{}.",
    {
      **_affine("norm1", "ln_1", "scale"),
      **_affine("qkv", "attn.c_attn", "kernel"),
      **_affine("out", "attn.c_proj", "kernel"),
      **_affine("norm2", "ln_2", "scale"),
      **_affine("up", "mlp.c_fc", "kernel"),
      **_affine("down", "mlp.c_proj", "kernel"),
    },
    transposed=False,
  ),
  "llama": Layout(
    "model.",
    {"embed.embedding": "embed_tokens.weight", "norm.scale": "norm.weight"},
    "layers.{}.",
    {
      "norm1.scale": ("input_layernorm.weight",),
      "qkv.kernel": tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
      "out.kernel": ("self_attn.o_proj.weight",),
      "norm2.scale": ("post_attention_layernorm.weight",),
      "gate_up.kernel": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
      "down.kernel": ("mlp.down_proj.weight",),
    },
    transposed=True,
  ),
}
OUTPUT = "lm_head.weight"


def read_config(folder: str | Path) -> dict:
  """The folder's config.json; UserError if it cannot be read."""
  path = Path(folder).expanduser() / "config.json"
  try:
    return read_json(path)
  except (OSError, ValueError) as err:
    raise UserError(
      f"pretrained={str(folder)!r}: {path} cannot be read as JSON; give a folder with config.json, "
      "tokenizer.json and safetensors files, as Hugging Face lays it out."
    ) from err


def read_sizes(folder: str | Path) -> dict:
  """The fields of TransformerConfig that the folder's config.json decides, as JSON.

  UserError if the architecture is not supported.
  """
  config = read_config(folder)
  readers = {"gpt2": _gpt2, "llama": _llama}
  kind = config.get("model_type")
  if kind not in readers:
    raise UserError(
      f"pretrained={str(folder)!r} is of the architecture {kind!r}; supported are "
      f"{', '.join(readers)}."
    )
  try:
    expected, sizes = readers[kind](config)
  except KeyError as err:
    raise UserError(f"{folder}/config.json does not say {err}; fetch it again.") from err
  for name, value in expected.items():
    if (actual := config.get(name, value)) not in (value, None):
      raise UserError(
        f"{folder}/config.json has {name}={actual!r}, a variant of {kind} that is not supported; "
        f"{name}={value!r} is."
      )
  without = {"kv_heads": 0, "theta": 10_000.0, "scaling": [], "context": 0}
  return {"family": kind, "erase": True, **without, **sizes}


def _gpt2(config: dict) -> tuple[dict, dict]:
  """(entries that must be so, sizes)."""
  expected = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
  }
  return expected, {
    "width": config["n_embd"],
    "depth": config["n_layer"],
    "heads": config["n_head"],
    "hidden": config.get("n_inner") or 4 * config["n_embd"],
    "context": config["n_positions"],
    "epsilon": config.get("layer_norm_epsilon", 1e-5),
    "tied": True,
  }


def _llama(config: dict) -> tuple[dict, dict]:
  """(entries that must be so, sizes)."""
  width, heads = config["hidden_size"], config["num_attention_heads"]
  expected = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "head_dim": width // heads,
  }
  # Newer files have rope_parameters in place of rope_scaling and rope_theta.
  rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
  kind = rope.get("rope_type", rope.get("type", "default"))
  if kind not in ("default", "llama3"):
    raise UserError(
      f"config.json has rope positions of the type {kind!r}; supported are default, llama3."
    )
  names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
  return expected, {
    "width": width,
    "depth": config["num_hidden_layers"],
    "heads": heads,
    "hidden": config["intermediate_size"],
    "kv_heads": config.get("num_key_value_heads") or heads,
    "theta": float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
    "scaling": [rope[name] for name in names] if kind == "llama3" else [],
    "epsilon": config.get("rms_norm_eps", 1e-6),
    "tied": config.get("tie_word_embeddings", False),
  }


def read(
  folder: str | Path, sizes: TransformerConfig, vocab: TextVocab, bias: float
) -> dict[str, Lazy]:
  """The network's parameters by dotted name: their shapes are checked, their values read later.

  Args:
    bias: of <backspace>'s logit, where the folder does not know that token.
  """
  weights, layout = Weights(folder), LAYOUTS[sizes.family]
  prefixed = any(name.startswith(layout.prefix) for name in weights.shapes)
  prefix = layout.prefix if prefixed else ""

  def matrix(name: str, inputs: int, outputs: int) -> Lazy:
    if layout.transposed:
      return lazy.transposed(lazy.stored(weights, name, (outputs, inputs)))
    return lazy.stored(weights, name, (inputs, outputs))

  def block(ours: str, theirs: tuple[str, ...], number: int) -> Lazy:
    layer, _, leaf = ours.partition(".")
    names = [prefix + layout.layer.format(number) + name for name in theirs]
    parts = list(sizes.parts.get(layer, {"": sizes.width}).values())
    if leaf != "kernel":
      return lazy.stored(weights, names[0], (sum(parts),))
    outputs = parts if len(names) > 1 else [sum(parts)]
    inputs = sizes.hidden if layer == "down" else sizes.width
    pairs = zip(names, outputs, strict=True)
    return lazy.concatenated([matrix(name, inputs, size) for name, size in pairs])

  tensors = {
    f"blocks.{ours}": lazy.stacked([block(ours, theirs, i) for i in range(sizes.depth)])
    for ours, theirs in layout.blocks.items()
  }
  embed = prefix + layout.tops["embed.embedding"]
  first = {
    "embed.embedding": (_rows(weights, embed, sizes, vocab),),
    "place.embedding": (sizes.context,),
  }
  for ours, theirs in layout.tops.items():
    shape = (*first.get(ours, ()), sizes.width)
    tensors[ours] = lazy.stored(weights, prefix + theirs, shape)
  output = tensors["embed.embedding"]
  tensors["embed.embedding"] = lazy.rows(output, vocab.hf_ids)
  if not sizes.tied:
    rows = _rows(weights, OUTPUT, sizes, vocab)
    output = lazy.stored(weights, OUTPUT, (rows, sizes.width))
    tensors["out.kernel"] = lazy.transposed(lazy.rows(output, vocab.hf_ids))
  return {**tensors, **_erase(weights, output, vocab, bias)}


def load(folder: str | Path, sizes: TransformerConfig, vocab: TextVocab, mesh: Mesh) -> tuple:
  """(network, its parameters on `mesh`) of a folder; a new <backspace> has the bias 0."""
  network = make_network(sizes)
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  tensors = read(folder, sizes, vocab, 0.0)
  return network, to_device(tensors, shapes, mesh_lib.state_sharding(shapes, mesh))


def to_device(tensors: dict[str, Lazy], shapes: dict, shardings: dict) -> dict:
  """The `tensors` that are named in `shapes`, nested dicts of abstract arrays, on the devices."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf, sharding: mesh_lib.to_device(tensors[dotted(path)], sharding, leaf.dtype),
    shapes,
    shardings,
  )


def _rows(weights: Weights, name: str, sizes: TransformerConfig, vocab: TextVocab) -> int:
  """The embedding's number of rows: the tokenizer's tokens, and perhaps padding."""
  rows = weights.shapes.get(name, (vocab.hf_size, sizes.width))[0]
  if rows < vocab.hf_size:
    raise UserError(
      f"{vocab.path} has {vocab.hf_size} tokens and {weights.path} embeds {rows}; give the "
      "tokenizer of these weights."
    )
  return rows


def _erase(weights: Weights, output: Lazy, vocab: TextVocab, bias: float) -> dict[str, Lazy]:
  """The row of <backspace> and its bias."""
  number, width = vocab.backspace, output.shape[1]

  @functools.cache
  def row() -> np.ndarray:
    if number >= 0:
      return output[slice(number, number + 1), slice(0, width)][0]
    parts = (
      output[slice(i, min(i + CHUNK, vocab.hf_size)), slice(0, width)].sum(0, dtype=np.float64)
      for i in range(0, vocab.hf_size, CHUNK)
    )
    return sum(parts) / vocab.hf_size

  def fill_row(out, index):
    out[...] = row()[index[0], None]

  def fill_bias(out, index):
    out[...] = weights.get(BIAS, (1,)) if BIAS in weights else 0.0 if number >= 0 else bias

  return {"erase.kernel": Lazy((width, 1), fill_row), "erase.bias": Lazy((1,), fill_bias)}
