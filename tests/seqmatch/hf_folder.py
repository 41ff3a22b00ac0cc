"""Folders as Hugging Face lays them out, of small networks with weights made from their names."""

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tests.ism.named_weights import read_oracle, tensors_of
from train_jax.storage.weights import INDEX, WHOLE, save

ENDS = {
  "gpt2": {"bos_token": "w210", "eos_token": "w210"},
  "llama": {"bos_token": "w1", "eos_token": "w2"},
}


def oracle(family: str) -> dict[str, np.ndarray]:
  """Of transformers' network: its parameters' names, `tokens` [1, 40] and their `logits`."""
  return read_oracle(f"{family}_tiny", __file__)


def tensors(family: str) -> dict[str, np.ndarray]:
  """The oracle's parameters by name, as a file has them."""
  made = tensors_of(oracle(family))
  if family == "gpt2":  # tied: the two names are one parameter, which was filled last as lm_head
    made["transformer.wte.weight"] = made.pop("lm_head.weight")
  return made


def config_of(family: str) -> dict:
  """The config.json of the oracle's network."""
  return {"model_type": family, **json.loads(str(oracle(family)["config"]))}


def write_tokenizer(folder: Path, size: int, ends: dict) -> None:
  """A tokenizer of the words w0 w1 ..., which begins and ends texts with `ends`."""
  words = {f"w{i}": i for i in range(size)}
  made = Tokenizer(models.WordLevel(words, unk_token="w0"))
  made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  made.decoder = decoders.Sequence([decoders.Fuse()])
  made.save(str(folder / "tokenizer.json"))
  (folder / "tokenizer_config.json").write_text(json.dumps(ends))


def write(folder: Path, family: str, config=None, parameters=None, files: int = 1) -> Path:
  """Writes the oracle's network, with other entries of config.json and parameters.

  Args:
    files: among which the parameters are dealt out; with more than one there is an index.
  """
  folder.mkdir(exist_ok=True)
  config = {**config_of(family), **(config or {})}
  parameters = parameters or tensors(family)
  (folder / "config.json").write_text(json.dumps(config))
  write_tokenizer(folder, config["vocab_size"], ENDS[family])
  if files == 1:
    save(folder / WHOLE, parameters, {})
    return folder
  names = list(parameters)
  of = {name: f"model-{i % files + 1:05}-of-{files:05}.safetensors" for i, name in enumerate(names)}
  for file in set(of.values()):
    save(folder / file, {name: parameters[name] for name in names if of[name] == file}, {})
  (folder / INDEX).write_text(json.dumps({"weight_map": of}))
  return folder
