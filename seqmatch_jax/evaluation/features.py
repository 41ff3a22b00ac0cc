"""Features of texts for MAUVE: hidden states of a decoder, before its output layer.

Of pretrained weights it is the state at a text's last token, no <bos> before it, as in the
mauve-text package (which has GPT-2 large). Of a run of ours it is the mean over the text: small
models of characters end all texts in about the same state, after the same full stop.

Dimensions: m texts, b of them at a time, l tokens, k width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from seqmatch_jax import tokens, transformer
from seqmatch_jax.huggingface import pretrained
from seqmatch_jax.tokens import BOS, PAD, TextVocab, Vocab
from seqmatch_jax.transformer import TransformerConfig
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.multihost.signals import pause

BATCH = 32
CONTEXT = 1024  # tokens of a text that are read, at most

Features = Callable[[Sequence[str]], np.ndarray]


def check_vocabulary(path: str, known: Vocab | TextVocab, vocab: Vocab | TextVocab) -> None:
  """Raises UserError unless the run at `path`, of tokens `known`, can read all of `vocab`."""
  if not isinstance(known, Vocab):
    return
  # A tokenizer may write any character.
  unknown = {*vocab.symbols} - {*known.symbols} if isinstance(vocab, Vocab) else {"\ufffd"}
  if unknown:
    raise UserError(
      f"eval.features={path!r} is a run that does not know all that may be written here, such as "
      f"{min(unknown)!r}; give one on these texts, or a folder of GPT-2's weights."
    )


def of_folder(folder: str) -> Features:
  """Those of a Hugging Face folder; UserError where it is none."""
  if not (Path(folder).expanduser() / "config.json").is_file():
    raise UserError(
      f"eval.features={folder!r} holds no network; give the workdir of a run on text, or a folder "
      "with config.json, tokenizer.json and safetensors files, as Hugging Face lays it out."
    )
  vocab = TextVocab.from_file(folder)
  sizes = TransformerConfig(vocab=vocab.size, **pretrained.read_sizes(folder))
  network = transformer.make_network(sizes)
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  mesh = mesh_lib.make_mesh()
  shardings = mesh_lib.state_sharding(shapes, mesh)
  params = pretrained.to_device(pretrained.read(folder, sizes, vocab, 0.0), shapes, shardings)
  most = min(CONTEXT, sizes.context or CONTEXT)
  return make_features(network.features, params, vocab, last=True, most=most, mesh=mesh)


def _readable(text: str) -> str:
  """What a model may have typed as characters, and no text may hold, left out."""
  return text.replace("\b", "").replace(tokens.NAME, "")


def make_features(
  hidden: Callable,
  params,
  vocab: Vocab | TextVocab,
  last: bool,
  most: int = CONTEXT,
  mesh: Mesh | None = None,
) -> Features:
  """`hidden` (see `TransformerFunctions.features`) as texts -> float32 [m, k].

  Args:
    last: the state at the last token, without <bos>; otherwise the mean over tokens, <bos> too.
    most: tokens that are read of a text.
    mesh: where `params` are; its devices share the texts out.
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
    encoded = [[*begin, *vocab.encode(_readable(text))][:most] or [BOS] for text in texts]
    # One shape for all batches, and few for all calls.
    width = min(most, -(-max(map(len, encoded)) // 64) * 64)
    token = np.full((-(-len(texts) // BATCH) * BATCH, width), PAD, np.int32)
    length = np.ones(len(token), np.int32)
    for i, ids in enumerate(encoded):
      token[i, : len(ids)], length[i] = ids, len(ids)
    found = []
    for i in range(0, len(token), BATCH):
      row = slice(i, i + BATCH)
      found.append(np.asarray(pooled(params, token[row], length[row])))
      pause()
    return np.concatenate(found)[: len(texts)]

  return features
