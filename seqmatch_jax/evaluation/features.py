"""Features of texts for MAUVE: hidden states of a decoder, before its output layer.

For pretrained weights it is the state at a text's last token, without <bos>, as in the mauve-text
package (which has GPT-2 large). For a run of ours it is the mean over the text: small models of
characters end all texts in about the same state, after the same full stop.

Dimensions: m texts, b of them at a time, l tokens, k width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from seqmatch_jax import tokens
from seqmatch_jax.huggingface import pretrained
from seqmatch_jax.huggingface.tokenizer import TextVocab
from seqmatch_jax.tokens import BOS, PAD, Vocab
from seqmatch_jax.transformer import TransformerConfig
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError

BATCH = 32
CONTEXT = 1024  # most tokens of a text that are read

Features = Callable[[Sequence[str]], np.ndarray]


def check_vocabulary(path: str, own: Vocab | TextVocab, vocab: Vocab | TextVocab) -> None:
  """Raises UserError unless the run at `path`, whose tokens are `own`, can read all of `vocab`."""
  if not isinstance(own, Vocab):
    return
  # A tokenizer may write any character.
  unknown = {*vocab.symbols} - {*own.symbols} if isinstance(vocab, Vocab) else {"\ufffd"}
  if unknown:
    raise UserError(
      f"eval.features={path!r} is a run that does not know all that may be written here, such as "
      f"{min(unknown)!r}; give one on these texts, or a folder of GPT-2's weights."
    )


def of_folder(folder: str) -> Features:
  """The features of a Hugging Face folder; UserError if it holds no network."""
  if not (Path(folder).expanduser() / "config.json").is_file():
    raise UserError(
      f"eval.features={folder!r} holds no network; give the workdir of a run on text, or a folder "
      "with config.json, tokenizer.json and safetensors files, as Hugging Face lays it out."
    )
  vocab = TextVocab.from_file(folder)
  sizes = TransformerConfig(vocab=vocab.size, **pretrained.read_sizes(folder))
  mesh = mesh_lib.make_mesh()
  network, params = pretrained.load(folder, sizes, vocab, mesh)
  limit = min(CONTEXT, sizes.context or CONTEXT)
  return make_features(network.features, params, vocab, last=True, limit=limit, mesh=mesh)


def _readable(text: str) -> str:
  """The text without backspaces, which a model may type as characters and no text may hold."""
  return text.replace("\b", "").replace(tokens.NAME, "")


def make_features(
  hidden: Callable,
  params,
  vocab: Vocab | TextVocab,
  last: bool,
  limit: int = CONTEXT,
  mesh: Mesh | None = None,
) -> Features:
  """`hidden` (see `TransformerFunctions.features`) as texts -> float32 [m, k].

  Args:
    last: the state at the last token, without <bos>; otherwise the mean over tokens, <bos> too.
    limit: most tokens of a text that are read.
    mesh: of `params`; its devices share the texts.
  """

  def pooled(params, token, length):
    index = jnp.arange(token.shape[1])
    inside = index < length[:, None]
    end = jnp.where(inside, length[:, None], index + 1)
    state = hidden(params, token, jnp.where(inside, index, 0), end)  # [b, l, k]
    weight = (index == length[:, None] - 1) if last else inside / length[:, None]
    return jnp.einsum("bl,blk->bk", weight.astype(state.dtype), state)

  pooled = mesh_lib.jit(pooled, mesh)

  def features(texts: Sequence[str]) -> np.ndarray:
    begin = [] if last else [BOS]
    encoded = [[*begin, *vocab.encode(_readable(text))][:limit] or [BOS] for text in texts]
    # One shape for all batches, and few for all calls.
    width = min(limit, -(-max(map(len, encoded)) // 64) * 64)
    token = np.full((-(-len(texts) // BATCH) * BATCH, width), PAD, np.int32)
    length = np.ones(len(token), np.int32)
    for i, ids in enumerate(encoded):
      token[i, : len(ids)], length[i] = ids, len(ids)
    outputs = []
    for i in range(0, len(token), BATCH):
      batch = slice(i, i + BATCH)
      outputs.append(np.asarray(pooled(params, token[batch], length[batch])))
    return np.concatenate(outputs)[: len(texts)]

  return features
