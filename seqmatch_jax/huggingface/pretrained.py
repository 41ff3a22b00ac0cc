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
from absl import logging
from jax.sharding import Mesh

from seqmatch_jax.huggingface import config_json
from seqmatch_jax.huggingface.tokenizer import TextVocab
from seqmatch_jax.transformer import TransformerConfig, make_network
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.state import dotted
from train_jax.storage import lazy
from train_jax.storage.lazy import Lazy
from train_jax.storage.weights import INDEX, WHOLE, Weights

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
# Ends of the names of constants that older files hold: masks and frequencies.
BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def read_sizes(folder: str | Path) -> dict:
  """The fields of TransformerConfig that the folder decides, as JSON.

  config.json decides them, but for `tied`: a file with another output than its embedding is not
  tied, as in transformers from version 5 on.

  UserError if the architecture is not supported.
  """
  kind, sizes = config_json.read_sizes(folder)
  if sizes["tied"] and _has_own_output(folder, LAYOUTS[kind]):
    logging.warning(
      "%s: its %s is not its embedding, so it is used, though config.json ties the two.",
      folder,
      OUTPUT,
    )
    sizes["tied"] = False
  without = {"kv_heads": 0, "theta": 10_000.0, "scaling": [], "context": 0}
  return {"family": kind, "erase": True, **without, **sizes}


def _has_own_output(folder: str | Path, layout: Layout) -> bool:
  """Whether the files hold an output matrix whose values are not the embedding's."""
  path = Path(folder).expanduser()
  if not any((path / name).is_file() for name in (WHOLE, INDEX)):
    return False
  weights, embedding = Weights(path), layout.tops["embed.embedding"]
  if OUTPUT not in weights:
    return False
  name, shape = _prefix(weights, layout) + embedding, weights.shapes[OUTPUT]
  if weights.shapes.get(name) != shape:
    return True
  pair = [lazy.stored(weights, name, shape) for name in (OUTPUT, name)]
  parts = ((slice(i, i + CHUNK), slice(None)) for i in range(0, shape[0], CHUNK))
  return not all(np.array_equal(*(tensor[part] for tensor in pair)) for part in parts)


def read(
  folder: str | Path, sizes: TransformerConfig, vocab: TextVocab, bias: float
) -> dict[str, Lazy]:
  """The network's parameters by dotted name: their shapes are checked, their values read later.

  Args:
    bias: of <backspace>'s logit, where the folder does not know that token.
  """
  weights, layout = Weights(folder), LAYOUTS[sizes.family]
  prefix, known = _prefix(weights, layout), {OUTPUT, BIAS}

  def matrix(name: str, inputs: int, outputs: int) -> Lazy:
    if layout.transposed:
      return lazy.transposed(lazy.stored(weights, name, (outputs, inputs)))
    return lazy.stored(weights, name, (inputs, outputs))

  def block(ours: str, theirs: tuple[str, ...], number: int) -> Lazy:
    layer, _, leaf = ours.partition(".")
    names = [prefix + layout.layer.format(number) + name for name in theirs]
    known.update(names)
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
  known.update(prefix + name for name in layout.tops.values())
  for ours, theirs in layout.tops.items():
    shape = (*first.get(ours, ()), sizes.width)
    tensors[ours] = lazy.stored(weights, prefix + theirs, shape)
  output = tensors["embed.embedding"]
  tensors["embed.embedding"] = lazy.rows(_extended(output, vocab.hf_size), vocab.hf_ids)
  if not sizes.tied:
    rows = _rows(weights, OUTPUT, sizes, vocab)
    output = lazy.stored(weights, OUTPUT, (rows, sizes.width))
    tensors["out.kernel"] = lazy.transposed(
      lazy.rows(_extended(output, vocab.hf_size), vocab.hf_ids)
    )
  _say_unembedded(weights, output, vocab)
  if unread := sorted(
    name for name in weights.shapes if name not in known and not name.endswith(BUFFERS)
  ):
    logging.warning(
      "%s: not read, because this architecture has no place for them: %d of its tensors, %s%s",
      weights.path,
      len(unread),
      ", ".join(unread[:3]),
      ", ..." if unread[3:] else "",
    )
  return {**tensors, **_erase(weights, output, vocab, bias)}


def _prefix(weights: Weights, layout: Layout) -> str:
  prefixed = any(name.startswith(layout.prefix) for name in weights.shapes)
  return layout.prefix if prefixed else ""


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
  """The number of rows of an embedding: of the tokenizer's tokens, and perhaps of padding.

  Special tokens that were added to the tokenizer may lack one, see `_extended`.
  """
  rows = weights.shapes.get(name, (vocab.hf_size, sizes.width))[0]
  if not vocab.only_special_from(rows):
    raise UserError(
      f"{vocab.path} has {vocab.hf_size} tokens and {weights.path} embeds {rows}; give the "
      "tokenizer of these weights."
    )
  return rows


def _say_unembedded(weights: Weights, output: Lazy, vocab: TextVocab) -> None:
  if (rows := output.shape[0]) < vocab.hf_size:
    logging.warning(
      "%s embeds %d tokens: special ones from there on, such as %s, begin at the mean of its rows.",
      weights.path,
      rows,
      vocab.name(vocab.hf_size - 1),
    )


def _mean(matrix: Lazy, rows: int) -> np.ndarray:
  """The mean of the first rows of a matrix."""
  width = slice(0, matrix.shape[1])
  parts = (
    matrix[slice(i, min(i + CHUNK, rows)), width].sum(0, dtype=np.float64)
    for i in range(0, rows, CHUNK)
  )
  return sum(parts) / rows


def _extended(matrix: Lazy, size: int) -> Lazy:
  """`matrix`, with the mean of its rows in place of those that it lacks of `size`."""
  if (rows := matrix.shape[0]) >= size:
    return matrix
  mean = functools.cache(lambda: _mean(matrix, rows))

  def fill(out, index):
    start, stop = index[0].start, index[0].stop
    if start < (end := min(stop, rows)):
      matrix.fill(out[: end - start], (slice(start, end), *index[1:]))
    if stop > rows:
      out[max(rows - start, 0) :] = mean()[index[1]]

  return Lazy((size, matrix.shape[1]), fill)


def _erase(weights: Weights, output: Lazy, vocab: TextVocab, bias: float) -> dict[str, Lazy]:
  """The row of <backspace> and its bias."""
  number, (rows, width) = vocab.backspace, output.shape
  known = 0 <= number < rows

  @functools.cache
  def row() -> np.ndarray:
    if known:
      return output[slice(number, number + 1), slice(0, width)][0]
    return _mean(output, min(rows, vocab.hf_size))

  def fill_row(out, index):
    out[...] = row()[index[0], None]

  def fill_bias(out, index):
    out[...] = weights.get(BIAS, (1,)) if BIAS in weights else 0.0 if known else bias

  return {"erase.kernel": Lazy((width, 1), fill_row), "erase.bias": Lazy((1,), fill_bias)}
