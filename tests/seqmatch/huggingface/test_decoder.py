"""Pretrained decoders in runs: what is learned, what is frozen, programs without weights."""

import json
import shutil
from contextlib import nullcontext

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import main
from configs import seqmatch_text
from seqmatch_jax import method as seqmatch
from seqmatch_jax.huggingface import decoder
from seqmatch_jax.huggingface.tokenizer import TextVocab
from tests.seqmatch import hf_folder
from train_jax import lora, warm_start
from train_jax import mesh as mesh_lib
from train_jax import state as state_lib
from train_jax.errors import UserError
from train_jax.state import flatten
from train_jax.step import make_train_step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return hf_folder.write(tmp_path_factory.mktemp("hf") / "model", "gpt2")


@pytest.fixture(scope="module")
def get_config(folder, tmp_path_factory):
  """keywords of config.lora -> a run on sentences of w0 w1 ..., off-policy."""
  path, rng = tmp_path_factory.mktemp("texts") / "texts.jsonl", np.random.default_rng(0)
  texts = [" ".join(f"w{i}" for i in rng.integers(0, 200, 40)) for _ in range(30)]
  path.write_text("\n".join(json.dumps({"text": text}) for text in texts))

  def make(**kwargs):
    config = seqmatch_text.get_config("bc,debug")
    config.data.path, config.data.tests, config.data.context = str(path), 8, 32
    with config.unlocked():
      config.pretrained, config.erase_bias = str(folder), -5.0
      config.lora = ConfigDict(
        {"rank": 0, "alpha": 8.0, "targets": ("q", "v"), "base": "float32", **kwargs}
      )
    return config

  return make


def first_step(config, mesh):
  """(parameters before, after one step, metrics, frozen) of a run."""
  method, metadata = seqmatch.make_method(config, mesh)
  tx = main.make_optimizer(config)
  init = state_lib.create(method, tx, {"sample": 0.9}, 0)
  shardings = mesh_lib.state_sharding(jax.eval_shape(init), mesh)
  where, given = flatten(shardings.params), seqmatch.warm_start(config, metadata).pretrained()
  given = {name: mesh_lib.to_device(a, where[name], a.dtype) for name, a in given.items()}
  state = jax.jit(init, out_shardings=shardings)(given)
  frozen = ()
  if method.frozen:
    frozen = (method.frozen.make(mesh_lib.state_sharding(method.frozen.shapes, mesh)),)
  batch = mesh_lib.to_global(next(method.stream(0, 5)), mesh)
  step = jax.jit(mesh_lib.with_mesh(mesh, make_train_step(method, tx, {"sample": 0.9}, 1.0)))
  after, metrics = step(state, batch, *frozen)
  return flatten(state.params), flatten(after.params), metrics, frozen


@pytest.mark.slow  # half a minute; the parts of it have tests of their own
def test_a_run_of_adapters_begins_where_one_of_everything_does(get_config, make_mesh, monkeypatch):
  monkeypatch.setattr(mesh_lib, "SMALL", 64)
  mesh = make_mesh(2, 2)
  whole, _, expected, none = first_step(get_config(), mesh)
  adapters = get_config(rank=2)
  adapters.optim.weight_decay = 0.0  # which moves the others, whose gradient is zero at first
  before, after, metrics, (frozen,) = first_step(adapters, mesh)
  assert none == ()
  np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
  assert set(before) == {
    *(f"blocks.qkv.{part}_{which}" for part in "qv" for which in "ab"),
    "erase.kernel",
    "erase.bias",
  }
  moved = {name for name in before if np.any(before[name] != after[name])}
  assert moved == {"blocks.qkv.q_b", "blocks.qkv.v_b", "erase.kernel", "erase.bias"}
  for name, value in flatten(frozen).items():
    np.testing.assert_array_equal(value, whole[name])
  assert {*flatten(frozen), "erase.kernel", "erase.bias"} == set(whole)


def metadata_of(config):
  vocab = TextVocab.from_file(config.pretrained)
  return decoder.make_metadata(config, {"tokenizer": vocab.metadata(), "max_length": 32})


def test_what_is_learned_is_given_and_the_rest_is_frozen(get_config, capsys):
  config = get_config(rank=2, base="bfloat16")
  metadata = json.loads(json.dumps(metadata_of(config)))
  assert set(decoder.make_init_params(config, metadata)) == {"erase.kernel", "erase.bias"}
  assert f"began from {config.pretrained}: 0.2 M parameters; 0.00 M are learned" in (
    capsys.readouterr().out
  )
  frozen = decoder.make_frozen(config, metadata)
  assert frozen.shapes["blocks"]["down"]["kernel"].dtype == "bfloat16"
  params = {"blocks": {"qkv": {"q_a": 1}}, "erase": 2}
  params = decoder.with_frozen(config, metadata, params, mesh_lib.make_mesh())
  assert params["blocks"]["qkv"]["q_a"] == 1 and params["erase"] == 2
  table = hf_folder.tensors("gpt2")["transformer.wpe.weight"]
  np.testing.assert_array_equal(params["place"]["embedding"], table.astype("bfloat16"))
  everything = get_config()
  assert decoder.make_frozen(everything, metadata) is None
  assert len(decoder.make_init_params(everything, metadata)) == len(frozen_names(frozen)) + 2


def test_a_pretrained_folder_may_be_moved_and_not_be_another(get_config, folder, tmp_path):
  config, metadata = get_config(rank=2), json.loads(json.dumps(metadata_of(get_config())))
  there = shutil.copytree(folder, tmp_path / "there")
  found, its_metadata = decoder.moved(config, metadata, str(there))
  assert found.pretrained == str(there) and config.pretrained == str(folder)
  assert its_metadata["tokenizer"].pop("path") == str(there / "tokenizer.json")
  del metadata["tokenizer"]["path"]
  assert its_metadata == metadata
  # One that was tuned further has the same sizes and tokenizer.
  tensors = hf_folder.tensors("gpt2")
  tensors["transformer.h.1.mlp.c_fc.weight"] = tensors["transformer.h.1.mlp.c_fc.weight"] + 1e-3
  other = hf_folder.write(tmp_path / "other", "gpt2", parameters=tensors)
  with pytest.raises(UserError, match=r"other is not what the run began from: its weights_sha256"):
    decoder.moved(config, metadata, str(other))
  config.pretrained = ""
  with pytest.raises(UserError, match=r"--pretrained=x is read by runs that began from one"):
    decoder.moved(config, metadata, "x")


def frozen_names(frozen):
  return list(flatten(frozen.shapes))


@pytest.mark.parametrize("rank", [0, 2])
def test_adapters_go_on_from_a_run_on_the_same_matrices_only(rank, get_config):
  config = get_config(rank=rank)
  one, other = {"metadata": {"weights_sha256": "1"}}, {"metadata": {"weights_sha256": "2"}}
  run = {"config": config.to_dict()}
  trained = warm_start.Trained("there", {}, run | one)
  must_match = seqmatch.warm_start(config, {}).must_match
  warm_start.check_alike(trained, run | one, must_match)
  expected = pytest.raises(UserError, match=r"metadata.weights_sha256='1' and this run '2'")
  with expected if rank else nullcontext():
    warm_start.check_alike(trained, run | other, must_match)
  config.pretrained = ""  # drawn: by the seed
  assert ("config.seed" in seqmatch.warm_start(config, {}).must_match) == bool(rank)


def test_without_weights_the_frozen_are_drawn(get_config):
  config = get_config(rank=2, base="bfloat16")
  config.pretrained = ""
  metadata = {"symbols": list("abc")}
  frozen = decoder.make_frozen(config, metadata)
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  drawn = frozen.make(mesh_lib.state_sharding(frozen.shapes, mesh))
  assert drawn["blocks"]["down"]["kernel"].dtype == "bfloat16"
  network = decoder.make_network(config, metadata)
  learned = jax.eval_shape(network.init, jax.random.key(1))
  token = np.array([[1, 4, 5]])
  apply = lambda *args: network.apply(lora.join(*args), token, token * 0, token * 0 + 3)  # noqa: E731
  assert jax.eval_shape(apply, learned, drawn).shape == (1, 3, 7)


def test_a_step_with_frozen_parameters_is_compiled_without_weights(get_config):
  config = get_config(rank=2, base="bfloat16")
  config.pretrained, config.data.path = "nowhere", "nowhere"
  config.mesh.fsdp = 8
  with config.unlocked():
    config.data.vocab = 300
    config.model.update(width=128, hidden=256, erase=True)
  step, generation = main.compile_for(config, "cpu:8")
  frozen = 2 * (2 * 300 * 128 + 2 * (4 * 128 * 128 + 3 * 128 * 256))  # bytes, of all chips
  np.testing.assert_allclose(8 * step.arguments["frozen"], frozen, rtol=0.1)
  assert (
    generation.arguments["parameters"] == step.arguments["frozen"] + step.arguments["parameters"]
  )
  assert generation.peak < step.peak and 0 < generation.flops < step.flops / 3
  assert step.arguments["parameters"] < 0.3 * step.arguments["frozen"]


def test_a_decoder_is_used_by_as_many_devices_as_in_training(get_config):
  config = get_config()
  config.mesh.fsdp = 4
  assert dict(decoder.mesh_of(config).shape) == {"fsdp": 1, "data": 2, "tensor": 4}
  config.mesh.tensor = 2
  assert dict(decoder.mesh_of(config).shape) == {"fsdp": 1, "data": 1, "tensor": 8}
  assert decoder.mesh_of(config, jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
  ("changes", "metadata", "message"),
  [
    ({}, {"symbols": ["a"]}, r"a tokenizer that these data were not encoded with"),
    ({}, {"max_length": 400}, r"400 tokens does not fit into the 96 positions"),
    ({"data.context": 97}, {}, r"97 tokens does not fit into the 96 positions"),
    (
      {"pretrained": "", "data.context": 97, "model.family": "gpt2", "model.context": 96},
      {"symbols": ["a"]},
      r"97 tokens does not fit into the 96 positions",
    ),
  ],
)
def test_data_that_do_not_fit_the_decoder_are_refused(changes, metadata, message, get_config):
  config = get_config()
  own = {} if "symbols" in metadata else {"tokenizer": metadata_of(config)["tokenizer"]}
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  with pytest.raises(UserError, match=message):
    decoder.make_metadata(config, {"max_length": 90, **own, **metadata})


def test_a_folder_that_is_none_is_refused(get_config, tmp_path):
  config = get_config()
  config.pretrained = str(tmp_path)
  with pytest.raises(UserError, match=r"pretrained=.*give a folder with config.json"):
    seqmatch.make_method(config, mesh_lib.make_mesh())
