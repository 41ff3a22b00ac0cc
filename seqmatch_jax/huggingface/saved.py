"""The files of a trained model: ours, or a Hugging Face folder for one from pretrained weights.

A record goes with the parameters, as JSON: sizes, step, limits of a generation, and config and
metadata of the run. In a Hugging Face folder it is an entry of config.json.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import jax

from seqmatch_jax import transformer
from seqmatch_jax.huggingface import export, pretrained, tokenizer
from seqmatch_jax.huggingface.tokenizer import TextVocab
from seqmatch_jax.rollout import RolloutConfig
from seqmatch_jax.tokens import Vocab
from seqmatch_jax.transformer import TransformerConfig
from train_jax import lora
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.files import read_json
from train_jax.storage import exported

METHOD, TOKENIZER = "seqmatch", "tokenizer.json"


def make_limits(metadata: dict, task) -> RolloutConfig:
  """The limits of a generation; `task` is a module of the form in tasks/task.py."""
  numbers = {name: metadata[name] for name in ("max_length", "max_actions", "max_backspaces")}
  return RolloutConfig(**numbers, open_ended=task.OPEN_ENDED)


def make_record(config, metadata: dict, sizes: TransformerConfig, task, step: int = 0) -> dict:
  """All of a `Model` but its parameters, as JSON: it is saved with an export.

  Args:
    config, metadata: those saved with a checkpoint; `config` a ConfigDict.
    task: a module of the form in tasks/task.py.
  """
  generation = {
    **dataclasses.asdict(make_limits(metadata, task)),
    "temperature": task.TEMPERATURE,
    "allow_retype": task.RETYPE,
    "backspace": config.loss.backspace,
  }
  return {
    "method": METHOD,
    "step": step,
    "network": dataclasses.asdict(sizes),
    "generation": generation,
    "run": {"config": config.to_dict(), "metadata": metadata},
  }


def limits_of(record: dict) -> RolloutConfig:
  """The limits of a generation."""
  names = (field.name for field in dataclasses.fields(RolloutConfig))
  return RolloutConfig(**{name: record["generation"][name] for name in names})


def sizes_of(record: dict) -> TransformerConfig:
  """The sizes of the network."""
  sizes = record["network"]
  return TransformerConfig(**{**sizes, "lora": sizes["lora"] and lora.LoraConfig(**sizes["lora"])})


def write(
  out: Path, record: dict, load: Callable[[], dict], vocab: Vocab | TextVocab, source: str
) -> None:
  """Writes files that `read` reads; all processes must call it, the first writes.

  Args:
    load: () -> all of the network's parameters, called once `out` may be written.
    source: the Hugging Face folder that the network comes from; "" for one that was drawn.
  """
  sources = [source] if source else []
  sources += [Path(vocab.path).parent] if isinstance(vocab, TextVocab) else []
  if out.resolve() in (Path(path).expanduser().resolve() for path in sources):
    raise UserError(
      f"--out={out} is what the run began from or has its tokenizer; choose another directory."
    )
  if source:
    export.write(out, load(), sizes_of(record), vocab, source, record)
    return
  if isinstance(vocab, TextVocab) and jax.process_index() == 0:
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(vocab.path, out / TOKENIZER)
  exported.save(out, load(), record)


def read(folder: Path) -> tuple:
  """(record, vocabulary, network, parameters, source) of the model that `write` wrote."""
  try:
    record = read_json(folder / exported.CONFIG).get(METHOD)
  except (OSError, ValueError):
    record = None  # exported.load says what is wrong
  if record is None:
    return *_read_exported(folder), ""
  sizes = TransformerConfig(**{**record["network"], "lora": None})
  vocab, mesh = TextVocab.from_file(folder), mesh_lib.make_mesh(devices=jax.local_devices()[:1])
  return record, vocab, *pretrained.load(folder, sizes, vocab, mesh), str(folder)


def _read_exported(folder: Path) -> tuple:
  """(record, vocabulary, network, parameters) of a network that was drawn."""
  record, stored = exported.load(folder, METHOD)
  metadata = record["run"]["metadata"]
  if "tokenizer" in metadata:
    metadata = {"tokenizer": {**metadata["tokenizer"], "path": str(folder / TOKENIZER)}}
  network = transformer.make_network(sizes_of(record))

  def whole(key):
    return lora.join(network.init(key), network.frozen(key))

  params = exported.fill(stored, jax.eval_shape(whole, jax.random.key(0)))
  return record, tokenizer.from_metadata(metadata), network, params
