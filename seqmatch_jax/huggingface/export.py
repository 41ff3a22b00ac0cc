"""A trained decoder in Hugging Face's layout (see pretrained.py), float32.

Adapters are added to the matrices that they adapt. <backspace> becomes a token of the tokenizer
with a row of its own. So does <bos> if the pretrained model has one token for both ends of a text,
as GPT-2 does, and training has made two rows of it.

Dimensions: v vocabulary, k width, l layers.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from seqmatch_jax.huggingface import config_json, pretrained
from seqmatch_jax.huggingface.tokenizer import TextVocab
from seqmatch_jax.tokens import BACKSPACE, BOS, EOS, NAME
from seqmatch_jax.transformer import TransformerConfig
from train_jax import lora
from train_jax import mesh as mesh_lib
from train_jax.files import read_json, write_json
from train_jax.storage import weights

LIMIT = 4 * 2**30  # bytes of tensors in one file


def write(
  folder: Path,
  params: dict,
  sizes: TransformerConfig,
  vocab: TextVocab,
  source: str | Path,
  record: dict,
) -> None:
  """Writes a folder that `pretrained.read` and other programs read; replaces an older one.

  All processes must call it, and the first one writes. It removes config.json first and writes it
  last: a folder that has one is whole.

  Args:
    params: all parameters of the network, as nested dicts of arrays.
    source: the folder that the network comes from; the other entries of its config.json are copied.
    record: see saved.py; an entry of config.json under the name of its `method`.
  """
  tops = {name: layer for name, layer in params.items() if name != "blocks"}
  params = {**params, **jax.tree.map(mesh_lib.to_host, tops)}
  blocks = (
    jax.tree.map(lambda a: mesh_lib.to_host(a[i]), params["blocks"])  # noqa: B023
    for i in range(sizes.depth)
  )
  if jax.process_index() == 0:
    _write(folder, params, blocks, sizes, vocab, source, record)
  else:  # takes part in the transfers
    collections.deque(blocks, 0)
  multihost_utils.sync_global_devices(f"{folder} is written")


def _write(folder, params, blocks, sizes, vocab, source, record) -> None:
  config = config_json.read_config(source)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").unlink(missing_ok=True)
  twins = vocab.bos == vocab.eos and not np.array_equal(*params["embed"]["embedding"][[BOS, EOS]])
  vocab = _write_tokenizer(folder, vocab, twins)
  _write_tensors(folder, _tensors(params, blocks, sizes, vocab))
  if not sizes.tied:  # the source's config.json may say otherwise of its own files
    config["tie_word_embeddings"] = False
  config |= {"vocab_size": vocab.hf_size, "bos_token_id": vocab.bos, record["method"]: record}
  config = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
  write_json(folder / "config.json", config, indent=1)


def _write_tokenizer(folder: Path, vocab: TextVocab, twins: bool) -> TextVocab:
  """Writes the tokenizer with <backspace>, and with <bos> if `twins` -> its vocabulary."""
  from tokenizers import Tokenizer

  tokenizer = Tokenizer.from_file(vocab.path)
  tokenizer.add_special_tokens([NAME, "<bos>"] if twins else [NAME])
  tokenizer.save(str(folder / "tokenizer.json"))
  beside = Path(vocab.path).with_name("tokenizer_config.json")
  config = read_json(beside) if beside.is_file() else {}
  begin = "<bos>" if twins else tokenizer.id_to_token(vocab.bos)
  config |= {"bos_token": begin, "eos_token": tokenizer.id_to_token(vocab.eos)}
  write_json(folder / "tokenizer_config.json", config, indent=1)
  return TextVocab.from_file(folder)


def _tensors(
  params: dict, blocks: Iterator[dict], sizes: TransformerConfig, vocab: TextVocab
) -> Iterator[tuple[str, np.ndarray]]:
  """The tensors with their names there, one after the other."""
  layout, embedding = pretrained.LAYOUTS[sizes.family], params["embed"]["embedding"]
  row = params["erase"]["kernel"][:, 0]
  weight = sizes.lora.alpha / sizes.lora.rank if sizes.lora else 0.0
  for ours, theirs in layout.tops.items():
    layer, leaf = ours.split(".")
    tensor = params[layer][leaf]
    if layer == "embed":
      tensor = _rows(embedding, vocab, row if sizes.tied else embedding[BACKSPACE])
    yield layout.prefix + theirs, tensor
  if not sizes.tied:
    yield pretrained.OUTPUT, _rows(params["out"]["kernel"].T, vocab, row)
  yield pretrained.BIAS, params["erase"]["bias"]
  for i, block in enumerate(blocks):
    for ours, theirs in layout.blocks.items():
      layer, leaf = ours.split(".")
      tensor, parts = block[layer][leaf], sizes.parts.get(layer, {})
      if leaf == "kernel":
        tensor = lora.merged(block[layer], parts, weight)
      ends = np.cumsum(list(parts.values()))[:-1] if len(theirs) > 1 else []
      for name, part in zip(theirs, np.split(tensor, ends, axis=-1), strict=True):
        transposed = layout.transposed and leaf == "kernel"
        yield layout.prefix + layout.layer.format(i) + name, part.T if transposed else part


def _rows(ours: np.ndarray, vocab: TextVocab, backspace: np.ndarray) -> np.ndarray:
  """Rows in our order -> in the tokenizer's."""
  theirs = np.zeros((vocab.hf_size, ours.shape[1]), np.float32)
  known = np.flatnonzero(vocab.hf_ids >= 0)
  theirs[vocab.hf_ids[known]] = ours[known]
  theirs[vocab.hf_ids[EOS]] = ours[EOS]  # of two copies, the one whose logit is used
  theirs[vocab.hf_ids[BACKSPACE]] = backspace
  return theirs


def _write_tensors(folder: Path, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
  """One file, or several of at most LIMIT with an index; removes an older export's files."""
  for old in (*folder.glob("model-?????.safetensors"), folder / weights.INDEX):
    old.unlink(missing_ok=True)
  part, size, index = {}, 0, {}

  def flush(name: str) -> None:
    weights.save(folder / name, part, {"format": "pt"})
    index.update(dict.fromkeys(part, name))
    part.clear()

  def numbered() -> str:
    return f"model-{len(set(index.values())) + 1:05}.safetensors"

  for name, tensor in tensors:
    if part and size + tensor.size * 4 > LIMIT:
      flush(numbered())
      size = 0
    part[name] = np.asarray(tensor, np.float32)
    size += tensor.size * 4
  if not index:
    return flush(weights.WHOLE)
  flush(numbered())
  (folder / weights.WHOLE).unlink(missing_ok=True)
  total = {"total_size": sum(f.stat().st_size for f in folder.glob("model-?????.safetensors"))}
  write_json(folder / weights.INDEX, {"metadata": total, "weight_map": index})
