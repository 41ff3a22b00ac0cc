"""Features of texts: transformers' own hidden states, the mean, and devices that share the work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmatch_jax import transformer
from seqmatch_jax.actions import visible
from seqmatch_jax.evaluation import features as text_features
from seqmatch_jax.tokens import BOS, Vocab
from seqmatch_jax.transformer import TransformerConfig
from tests.seqmatch import hf_folder
from train_jax import mesh as mesh_lib

SMALL = {"width": 8, "depth": 1, "heads": 1, "hidden": 8}
VOCAB = Vocab(tuple("abcd "))
TEXTS = ["abca", "d", "", "ab cd" * 9, "abca"]


def counts(params, token, position, end):
  """As `TransformerFunctions.features`: how often each token was seen, and the position."""
  seen = visible(end).astype(np.float32) @ jax.nn.one_hot(token, VOCAB.size)
  return jnp.concatenate([params * seen, position[..., None]], axis=-1)


@pytest.mark.parametrize("last", [False, True])
def test_equal_one_text_at_a_time(last, monkeypatch):
  """Neither padding nor the batch is seen; an empty text has the state of <bos>."""
  monkeypatch.setattr(text_features, "BATCH", 2)
  found = text_features.make_features(counts, 2.0, VOCAB, last, limit=30)(TEXTS)
  assert found.shape == (5, VOCAB.size + 1) and found.dtype == np.float32
  for text, got in zip(TEXTS, found, strict=True):
    ids = (([] if last else [BOS]) + VOCAB.encode(text))[:30] or [BOS]
    states = np.array(
      [[*(2 * ids[: j + 1].count(t) for t in range(VOCAB.size)), j] for j in range(len(ids))]
    )
    np.testing.assert_allclose(got, states[-1] if last else states.mean(0), rtol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_pretrained_features_are_what_transformers_output_layer_reads(family, tmp_path):
  """At the last token, without <bos>: times the output's matrix they are its logits."""
  folder, oracle = hf_folder.write(tmp_path / "model", family), hf_folder.oracle(family)
  features = text_features.of_folder(str(folder))
  text = " ".join(f"w{i}" for i in oracle["tokens"][0])
  names = {"gpt2": "transformer.wte.weight", "llama": "lm_head.weight"}
  output = hf_folder.tensors(family)[names[family]]
  got = features([text, "w3 w4"]) @ output.T
  np.testing.assert_allclose(got[0], oracle["logits"][0, -1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 1, 4), (8, 1, 1)], ids=str)
def test_every_device_gets_features_by_parameters_that_are_split(make_mesh, monkeypatch, shape):
  """Embeddings split by width leave hidden states so, which one of two processes cannot read."""
  monkeypatch.setattr(mesh_lib, "SMALL", 64)
  sizes = {"width": 64, "depth": 1, "heads": 4, "hidden": 64}
  network = transformer.make_network(TransformerConfig(vocab=VOCAB.size, **sizes))
  params, mesh = jax.jit(network.init)(jax.random.key(0)), make_mesh(*shape)
  jit, made = mesh_lib.jit, []

  def watched(fn, mesh):
    run = jit(fn, mesh)
    return lambda *args: made.append(run(*args)) or made[-1]

  want = text_features.make_features(network.features, params, VOCAB, last=False)(TEXTS)
  split = jax.device_put(params, mesh_lib.state_sharding(params, mesh))
  monkeypatch.setattr(mesh_lib, "jit", watched)
  got = text_features.make_features(network.features, split, VOCAB, last=False, mesh=mesh)(TEXTS)
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
  (features,) = made
  assert features.is_fully_replicated and len(features.addressable_shards) == mesh.size
