"""Hugging Face's folders: transformers' outputs, what is read of them, mistakes, and the way back.

Dimensions: b batch, s nodes, v vocabulary.
"""

import json
from contextlib import nullcontext

import jax
import ml_dtypes
import numpy as np
import pytest
from tokenizers import Tokenizer

from seqmatch_jax import transformer
from seqmatch_jax.huggingface import config_json, export, pretrained
from seqmatch_jax.huggingface.tokenizer import TextVocab
from seqmatch_jax.tokens import BACKSPACE, BOS, EOS, PAD
from seqmatch_jax.transformer import TransformerConfig
from tests.seqmatch import hf_folder
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.lora import LoraConfig, join
from train_jax.state import dotted, flatten
from train_jax.storage.weights import INDEX, Weights

KEY = jax.random.key(0)
BOTH = pytest.mark.parametrize("family", ["gpt2", "llama"])


def load(folder, mesh=None, lora=None, bias=-3.0):
  """(network, all of its parameters, vocabulary, sizes) of a folder."""
  vocab = TextVocab.from_file(folder)
  sizes = TransformerConfig(vocab=vocab.size, lora=lora, **pretrained.read_sizes(folder))
  network = transformer.make_network(sizes)
  tensors = pretrained.read(folder, sizes, vocab, bias)
  mesh = mesh or mesh_lib.make_mesh(devices=jax.devices()[:1])
  shapes = jax.eval_shape(network.init, KEY)
  params = shapes if lora is None else jax.jit(network.init)(KEY)
  if lora is None:
    params = pretrained.to_device(tensors, shapes, mesh_lib.state_sharding(shapes, mesh))
  else:
    frozen = jax.eval_shape(network.frozen, KEY)
    params["erase"] = {
      name: tensors[f"erase.{name}"][tuple(map(slice, a.shape))]
      for name, a in params["erase"].items()
    }
    params = join(
      params, pretrained.to_device(tensors, frozen, mesh_lib.state_sharding(frozen, mesh))
    )
  return network._replace(apply=jax.jit(network.apply)), params, vocab, sizes


def map_named(fn, params):
  """fn(dotted name, leaf) for each leaf of nested dicts."""
  return jax.tree_util.tree_map_with_path(lambda path, a: fn(dotted(path), a), params)


def ours(vocab, tokens):
  """The tokenizer's numbers -> ours."""
  return np.array(vocab.encode(" ".join(f"w{i}" for i in np.ravel(tokens)))).reshape(tokens.shape)


def logits_of(network, params, vocab, tokens):
  """Logits at the tokenizer's own `tokens` [b, s] -> [b, s, v] in our order."""
  token = ours(vocab, tokens)
  position = np.broadcast_to(np.arange(token.shape[1]), token.shape)
  return np.asarray(network.apply(params, token, position, np.full_like(token, token.shape[1])))


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def loaded(request, tmp_path_factory):
  """(family, folder, network, parameters, vocabulary, sizes, oracle) of both families."""
  folder = hf_folder.write(tmp_path_factory.mktemp("hf") / "model", request.param)
  return request.param, folder, *load(folder), hf_folder.oracle(request.param)


def check(network, params, vocab, oracle, atol):
  known = vocab.hf_ids >= 0
  found = logits_of(network, params, vocab, oracle["tokens"])[..., known]
  np.testing.assert_allclose(found, oracle["logits"][..., vocab.hf_ids[known]], rtol=0, atol=atol)


def test_logits_are_those_of_transformers(loaded):
  _, _, network, params, vocab, _, oracle = loaded
  check(network, params, vocab, oracle, 2e-5)


def test_backspace_begins_at_the_mean_logit_and_below_it(loaded):
  _, _, network, params, vocab, _, oracle = loaded
  found = logits_of(network, params, vocab, oracle["tokens"])[..., BACKSPACE]
  np.testing.assert_allclose(found, oracle["logits"].mean(-1) - 3, rtol=0, atol=2e-5)


def test_rows_follow_our_order_and_tokens_that_are_not_there_have_zeros(loaded):
  family, _, _, params, *_ = loaded
  name = {"gpt2": "transformer.wte.weight", "llama": "model.embed_tokens.weight"}[family]
  table, embedding = hf_folder.tensors(family)[name], np.asarray(params["embed"]["embedding"])
  bos, eos = {"gpt2": (210, 210), "llama": (1, 2)}[family]
  np.testing.assert_array_equal(embedding[[BOS, EOS]], table[[bos, eos]])
  np.testing.assert_array_equal(embedding[[PAD, BACKSPACE]], 0)
  np.testing.assert_array_equal(embedding[4:7], table[[0, 1, 2] if family == "gpt2" else [0, 3, 4]])


def test_shards_of_a_mesh_and_of_files_and_half_precision_change_nothing(
  loaded, tmp_path, monkeypatch
):
  family, _, _, params, _, _, _ = loaded
  monkeypatch.setattr(mesh_lib, "SMALL", 64)
  coarse = {
    name: value.astype(ml_dtypes.bfloat16) for name, value in hf_folder.tensors(family).items()
  }
  if family == "gpt2":  # as in OpenAI's own files
    coarse = {name.removeprefix("transformer."): value for name, value in coarse.items()}
  folder = hf_folder.write(tmp_path / "m", family, parameters=coarse, files=3)
  _, spread, _, _ = load(folder, mesh_lib.make_mesh(2, 2))
  kernel = spread["blocks"]["qkv"]["kernel"]
  assert kernel.addressable_shards[0].data.size == kernel.size // 4
  for name, value in flatten(spread).items():
    whole = np.asarray(flatten(params)[name])
    if not name.startswith("erase"):
      whole = whole.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_allclose(value, whole, rtol=0, atol=1e-3 if "erase" in name else 0)


def test_no_more_than_a_devices_share_is_read_at_a_time(loaded, monkeypatch):
  _, folder, _, _, vocab, sizes, _ = loaded
  read = []
  part = Weights.part
  monkeypatch.setattr(
    Weights, "part", lambda self, *args: read.append(part(self, *args)) or read[-1]
  )
  kernel = pretrained.read(folder, sizes, vocab, 0.0)["blocks.qkv.kernel"]
  found = kernel[slice(1, 3), slice(0, 32), slice(60, 100)]
  assert found.shape == (2, 32, 40) and sum(a.size for a in read) == found.size


@BOTH
def test_padded_rows_of_weights_are_left_out(family, tmp_path):
  more = np.full((5, 64), 9.0, np.float32)
  padded = {
    name: np.concatenate([a, more]) if len(a) > 200 and ".h." not in name else a
    for name, a in hf_folder.tensors(family).items()
  }
  folder = hf_folder.write(tmp_path / "m", family, parameters=padded)
  network, params, vocab, _ = load(folder)
  check(network, params, vocab, hf_folder.oracle(family), 2e-5)
  np.testing.assert_allclose(params["erase"]["kernel"].max(), 0, atol=1)


@BOTH
@pytest.mark.parametrize("special", [True, False])
def test_added_special_tokens_without_rows_begin_at_the_mean(family, special, tmp_path, caplog):
  folder = hf_folder.write(tmp_path / "m", family)
  rows = TextVocab.from_file(folder).hf_size
  made = Tokenizer.from_file(str(folder / "tokenizer.json"))
  made.add_special_tokens(["<user>", "<end>"])
  (made.add_special_tokens if special else made.add_tokens)(["<mine>"])
  made.save(str(folder / "tokenizer.json"))
  ends = {**hf_folder.ENDS[family], "eos_token": "<end>"}  # as chat models end a turn
  (folder / "tokenizer_config.json").write_text(json.dumps(ends))
  if not special:  # texts may hold it
    with pytest.raises(UserError, match=rf"has {rows + 3} tokens and .* embeds {rows}; give"):
      load(folder)
    return
  network, params, vocab, _ = load(folder)
  assert vocab.hf_size == rows + 3 and "such as '<mine>', begin at the mean" in caplog.text
  oracle = hf_folder.oracle(family)
  found = logits_of(network, params, vocab, oracle["tokens"])
  old = (vocab.hf_ids >= 0) & (vocab.hf_ids < rows)
  expected = oracle["logits"]
  np.testing.assert_allclose(found[..., old], expected[..., vocab.hf_ids[old]], rtol=0, atol=2e-5)
  for token, below in ((EOS, 0), (vocab.size - 1, 0), (BACKSPACE, 3)):
    np.testing.assert_allclose(found[..., token], expected.mean(-1) - below, rtol=0, atol=2e-5)
  embedding = np.asarray(params["embed"]["embedding"])
  name = {"gpt2": "transformer.wte.weight", "llama": "model.embed_tokens.weight"}[family]
  mean = hf_folder.tensors(family)[name].mean(0)
  np.testing.assert_allclose(embedding[[EOS, -1]], [mean] * 2, rtol=0, atol=1e-6)


# --- rotary positions of Llama 3 ------------------------------------------------------------------


def test_llama_3_stretches_long_waves_only():
  factor, low, high, original = 8.0, 1.0, 4.0, 8192
  found = transformer.frequencies(128, 500_000.0, (factor, low, high, original))
  for i, value in enumerate(found):  # as in Meta's llama-models, one frequency at a time
    frequency = 1 / 500_000.0 ** (2 * i / 128)
    wavelength = 2 * np.pi / frequency
    if wavelength < original / high:
      expected = frequency
    elif wavelength > original / low:
      expected = frequency / factor
    else:
      smooth = (original / wavelength - low) / (high - low)
      expected = (1 - smooth) * frequency / factor + smooth * frequency
    assert value == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_both_spellings_of_rope_scaling_are_read(key, tmp_path):
  rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
  rope |= {"original_max_position_embeddings": 8192}
  rope |= {"rope_theta": 5e5} if key == "rope_parameters" else {}
  folder = hf_folder.write(tmp_path / "m", "llama", {key: rope, "rope_theta": 5e5})
  sizes = pretrained.read_sizes(folder)
  assert sizes["scaling"] == [8.0, 1.0, 4.0, 8192] and sizes["theta"] == 5e5
  assert TransformerConfig(vocab=9, **json.loads(json.dumps(sizes))).kv_heads == 2


# --- adapters -------------------------------------------------------------------------------------


def kept(name, value, base):
  """What is computed with a parameter of that name that is frozen as `base`."""
  if base != "float32" and name.endswith(("kernel", "embedding")) and "erase" not in name:
    return value.astype("bfloat16").astype("float32")
  return value


@pytest.mark.parametrize("base", ["float32", "bfloat16"])
def test_at_step_0_adapters_change_nothing(loaded, base):
  _, folder, network, params, vocab, _, oracle = loaded
  other, adapted, _, _ = load(folder, lora=LoraConfig(4, 8.0, ("all",), base))
  assert adapted["blocks"]["qkv"]["kernel"].dtype == base
  rounded = map_named(lambda name, a: kept(name, a, base), params)
  expected = logits_of(network, rounded, vocab, oracle["tokens"])
  found = logits_of(other, adapted, vocab, oracle["tokens"])
  np.testing.assert_array_equal(found, expected)
  exact = logits_of(network, params, vocab, oracle["tokens"])
  assert np.abs(found - exact).max() <= {"float32": 0, "bfloat16": 0.1}[base]


# --- the way back ---------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["", "bfloat16"])
def test_an_export_computes_the_same(loaded, base, tmp_path, perturb, monkeypatch):
  family, folder, *_ = loaded
  lora = LoraConfig(3, 6.0, ("q", "v", "up"), base) if base else None
  network, params, vocab, sizes = load(folder, lora=lora)
  learned = flatten(jax.eval_shape(network.init, KEY))
  params = map_named(lambda name, a: perturb(a) if name in learned else a, params)
  monkeypatch.setattr(export, "LIMIT", 300_000)
  export.write(tmp_path / "out", params, sizes, vocab, folder, {"method": "seqmatch", "step": 7})
  assert config_json.read_config(tmp_path / "out")["seqmatch"]["step"] == 7
  assert (tmp_path / "out" / INDEX).is_file()
  again, stored, known, _ = load(tmp_path / "out", bias=77.0)
  assert known.hf_size == vocab.hf_size + 1 + (family == "gpt2" and not base)
  assert known.size == vocab.size and np.array_equal(known.hf_ids[4:], vocab.hf_ids[4:])

  token = np.array([[BOS, *range(20, 35)]])
  args = (token, np.arange(16)[None], np.full((1, 16), 16))
  expected = np.array(network.apply(params, *args))
  found = np.array(again.apply(stored, *args))
  chosen = [EOS, *range(BACKSPACE, vocab.size)]
  np.testing.assert_allclose(found[..., chosen], expected[..., chosen], rtol=0, atol=1e-5)


# --- mistakes -------------------------------------------------------------------------------------


K = "model.layers.2.self_attn.k_proj.weight"


@pytest.mark.parametrize(
  ("family", "config", "tensors", "message"),
  [
    ("llama", {}, {K: None}, rf"no tensor '{K}'"),
    ("llama", {}, {K: (64, 64)}, r"k_proj.weight' has the shape \(64, 64\), .* expects \(32, 64\)"),
    (
      "llama",
      {"vocab_size": 230},
      {},
      r"tokenizer.json has 230 tokens and .* embeds 223",
    ),
    ("llama", {"model_type": "mamba"}, {}, r"architecture 'mamba'; supported are gpt2, llama"),
    ("llama", {"hidden_act": "gelu"}, {}, r"hidden_act='gelu', a variant of llama that"),
    ("llama", {"rope_scaling": {"rope_type": "yarn"}}, {}, r"rope positions of the type 'yarn'"),
    ("llama", {"head_dim": 32}, {}, r"head_dim=32, a variant"),
    ("llama", {"partial_rotary_factor": 0.5}, {}, r"partial_rotary_factor=0.5, a variant of llama"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, {}, r"partial_rotary_factor=0"),
    (
      "llama",
      {"rope_parameters": {"full": {"rope_theta": 5.0}}},
      {},
      r"must be one set of numbers",
    ),
    (
      "llama",
      {"rope_parameters": {"rope_theta": 5.0}, "rope_scaling": {"rope_theta": 6.0}},
      {},
      r"rope_parameters and rope_scaling that differ",
    ),
    ("llama", {"rope_theta": "1e4"}, {}, r"rope_theta='1e4', which must be a number above 0"),
    ("llama", {"hidden_size": None}, {}, r"config.json does not say 'hidden_size'"),
    ("llama", {"num_attention_heads": 0}, {}, r"num_attention_heads=0, which must be a number"),
    ("llama", {"num_hidden_layers": 2.5}, {}, r"num_hidden_layers=2.5, which must be a whole"),
    ("gpt2", {"scale_attn_weights": None}, {}, r"scale_attn_weights=False, a variant of gpt2"),
    (
      "llama",
      {"quantization_config": {"quant_method": "fp8"}},
      {},
      r"quantization_config \(fp8\), and quantised weights are not read; give .* float32, float16",
    ),
    ("gpt2", {"quantization": {"bits": 4}}, {}, r"config.json has quantization \({'bits': 4}\)"),
    ("gpt2", {"activation_function": "relu"}, {}, r"activation_function='relu', a variant of gpt2"),
  ],
)
def test_folders_that_do_not_fit_are_refused(family, config, tensors, message, tmp_path):
  parameters = {name: a for name, a in hf_folder.tensors(family).items() if name not in tensors}
  parameters |= {name: np.zeros(a, np.float32) for name, a in tensors.items() if a}
  folder = hf_folder.write(tmp_path / "m", family, config, parameters)
  with pytest.raises(UserError, match=message):
    load(folder)


@pytest.mark.parametrize(
  ("family", "config"),
  [
    ("llama", {"rope_theta": None}),
    ("llama", {"rms_norm_eps": None, "tie_word_embeddings": None, "head_dim": None}),
    ("llama", {"rope_scaling": {"rope_type": None}, "partial_rotary_factor": 1.0}),
    ("gpt2", {"layer_norm_epsilon": None, "n_inner": None, "quantization_config": None}),
  ],
)
def test_null_is_the_default(family, config, tmp_path):
  folder, plain = tmp_path / "m", hf_folder.config_of(family)
  hf_folder.write(folder, family, {name: None for name in config if name not in plain})
  expected = pretrained.read_sizes(folder)
  hf_folder.write(folder, family, config)
  found = pretrained.read_sizes(folder)
  assert found | {"theta": 0, "epsilon": 0} == expected | {"theta": 0, "epsilon": 0}
  assert found["theta"] == 10_000 or config.get("rope_theta", 0) is not None
  assert 0 < found["epsilon"] < 1e-4


def test_tensors_that_have_no_place_are_named(tmp_path, caplog):
  parameters = hf_folder.tensors("llama")
  parameters |= {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
  load(hf_folder.write(tmp_path / "m", "llama", parameters=parameters))
  assert "not read" not in caplog.text
  parameters |= {"model.layers.0.self_attn.q_proj.bias": np.ones(64, np.float32)}
  load(hf_folder.write(tmp_path / "m", "llama", parameters=parameters))
  assert "no place for them: 1 of its" in caplog.text and "self_attn.q_proj.bias" in caplog.text


@BOTH
@pytest.mark.parametrize("own", [False, True])
def test_an_output_of_its_own_is_used_although_the_config_ties_it(family, own, tmp_path, caplog):
  """As transformers does from version 5 on; older ones tie."""
  parameters, oracle = hf_folder.tensors(family), hf_folder.oracle(family)
  name = {"gpt2": "transformer.wte.weight", "llama": "model.embed_tokens.weight"}[family]
  head = parameters.get("lm_head.weight", -2 * parameters[name]) if own else parameters[name]
  parameters["lm_head.weight"] = head
  config = {"tie_word_embeddings": True}
  folder = hf_folder.write(tmp_path / "m", family, config, parameters)
  network, params, vocab, sizes = load(folder)
  assert sizes.tied is not own and ("lm_head.weight is not its embedding" in caplog.text) is own
  if own:
    scale = {"gpt2": -2, "llama": 1}[family]
    check(network, params, vocab, {**oracle, "logits": scale * oracle["logits"]}, 5e-5)
    export.write(tmp_path / "out", params, sizes, vocab, folder, {"method": "seqmatch"})
    assert config_json.read_config(tmp_path / "out")["tie_word_embeddings"] is False
    assert not pretrained.read_sizes(tmp_path / "out")["tied"]


def test_an_adapter_or_a_pointer_is_no_model(tmp_path):
  (tmp_path / "config.json").write_text("version https://git-lfs.github.com/spec/v1\n")
  with pytest.raises(UserError, match=r"config.json is git-LFS's pointer"):
    pretrained.read_sizes(tmp_path)
  (tmp_path / "adapter_config.json").write_text("{}")
  with pytest.raises(UserError, match=r"PEFT adapter and not a whole model; give .*merge_and_unl"):
    pretrained.read_sizes(tmp_path)


def test_folders_that_are_not_whole_are_refused(tmp_path):
  folder = hf_folder.write(tmp_path / "sharded", "llama", files=2)
  (folder / "model-00002-of-00002.safetensors").unlink()
  with pytest.raises(UserError, match=r"'model-00002-of-00002.safetensors', one of the 2 files"):
    load(folder)
  with pytest.raises(UserError, match=r"pretrained='.*nowhere.*give a folder with config.json"):
    pretrained.read_sizes(tmp_path / "nowhere")
  (folder / "config.json").write_text("[]")
  with pytest.raises(UserError, match=r"config.json cannot be read as JSON; give a folder"):
    pretrained.read_sizes(folder)


def test_a_text_longer_than_learned_positions_is_refused(loaded):
  family, _, network, params, *_ = loaded
  network.read(params, np.array([[BOS]]), 96)
  with (
    pytest.raises(UserError, match=r"97 tokens does not fit into the 96 positions")
    if (family == "gpt2")
    else nullcontext()
  ):
    network.read(params, np.array([[BOS]]), 97)
