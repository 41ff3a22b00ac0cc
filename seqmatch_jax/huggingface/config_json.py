"""config.json of a folder in Hugging Face's layout: the architecture, or a reason to refuse it."""

from __future__ import annotations

import math
from pathlib import Path

from train_jax.errors import UserError
from train_jax.files import LFS, is_lfs_pointer, read_json
from train_jax.storage.weights import PLAIN

QUANTISED = ("quantization_config", "compression_config", "quantization")  # in config.json


def read_config(folder: str | Path) -> dict:
  """The folder's config.json; UserError if it cannot be read, or is not of a whole plain model."""
  path = Path(folder).expanduser() / "config.json"
  if (adapter := path.with_name("adapter_config.json")).is_file():
    raise UserError(
      f"pretrained={str(folder)!r} has {adapter.name}, so it is a PEFT adapter and not a whole "
      "model; give a folder that its `merge_and_unload().save_pretrained(...)` wrote, or remove "
      "that file if the weights beside it are whole."
    )
  try:
    config = read_json(path)
  except (OSError, ValueError) as err:
    if is_lfs_pointer(path):
      raise UserError(f"{path} {LFS}.") from err
    raise UserError(
      f"pretrained={str(folder)!r}: {path} cannot be read as JSON; give a folder with config.json, "
      "tokenizer.json and safetensors files, as Hugging Face lays it out."
    ) from err
  for name in QUANTISED:
    if entry := config.get(name):
      kind = entry.get("quant_method") if isinstance(entry, dict) else entry
      raise UserError(
        f"{path} has {name} ({kind or entry}), and quantised weights are not read; give the folder "
        f"of this model in {PLAIN}."
      )
  return config


class _Entries:
  """The entries of a config.json, by name and kind; UserError if one is missing or of no use."""

  def __init__(self, path: Path, entries: dict):
    self.path, self.entries = path, entries

  def number(self, name: str, default: float | None = None) -> float:
    """A finite number above 0; `default` if it is missing or null."""
    value = self.entries.get(name)
    value = default if value is None else value
    if value is None:
      raise UserError(f"{self.path} does not say {name!r}; fetch it again.")
    if type(value) not in (int, float) or not 0 < value < math.inf:
      raise UserError(f"{self.path} has {name}={value!r}, which must be a number above 0.")
    return value

  def size(self, name: str, default: int | None = None) -> int:
    """A whole number above 0; `default` if it is missing or null."""
    if (value := self.number(name, default)) != int(value):
      raise UserError(f"{self.path} has {name}={value!r}, which must be a whole number.")
    return int(value)

  def switch(self, name: str, default: bool) -> bool:
    """Whether it is on; null is off."""
    return bool(self.entries.get(name, default))

  def group(self, name: str) -> _Entries | None:
    """A group of entries; None if it is missing, null or empty."""
    value = self.entries.get(name) or {}
    if not isinstance(value, dict) or any(isinstance(entry, dict) for entry in value.values()):
      raise UserError(f"{self.path} has {name}={value!r}, which must be one set of numbers.")
    return _Entries(self.path, value) if value else None


def _gpt2(config: _Entries) -> tuple[dict, dict]:
  """(entries that must be so, sizes)."""
  expected = {
    "activation_function": "gelu_new",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
  }
  return expected, {
    "width": config.size("n_embd"),
    "depth": config.size("n_layer"),
    "heads": config.size("n_head"),
    "hidden": config.size("n_inner", 4 * config.size("n_embd")),
    "context": config.size("n_positions"),
    "epsilon": config.number("layer_norm_epsilon", 1e-5),
    "tied": config.switch("tie_word_embeddings", True),
  }


def _llama(config: _Entries) -> tuple[dict, dict]:
  """(entries that must be so, sizes)."""
  width, heads = config.size("hidden_size"), config.size("num_attention_heads")
  expected = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "head_dim": width // heads,
  }
  theta, scaling = _rope(config)
  return expected, {
    "width": width,
    "depth": config.size("num_hidden_layers"),
    "heads": heads,
    "hidden": config.size("intermediate_size"),
    "kv_heads": config.size("num_key_value_heads", heads),
    "theta": theta,
    "scaling": scaling,
    "epsilon": config.number("rms_norm_eps", 1e-6),
    "tied": config.switch("tie_word_embeddings", False),
  }


def _rope(config: _Entries) -> tuple[float, list[float]]:
  """(theta, scaling) of the rotary positions, see `transformer.frequencies`.

  Newer files have rope_parameters in place of rope_scaling and rope_theta.
  """
  groups = [group for name in ("rope_parameters", "rope_scaling") if (group := config.group(name))]
  if len(groups) == 2 and any(
    groups[0].entries[name] != groups[1].entries[name]
    for name in {*groups[0].entries} & {*groups[1].entries}
  ):
    raise UserError(
      f"{config.path} has rope_parameters and rope_scaling that differ; keep the one of the model."
    )
  rope = _Entries(config.path, {k: v for group in groups for k, v in group.entries.items()})
  kind = rope.entries.get("rope_type") or rope.entries.get("type") or "default"
  if kind not in ("default", "llama3"):
    raise UserError(
      f"{config.path} has rope positions of the type {kind!r}; supported are default, llama3."
    )
  for group in (config, rope):
    if (part := group.number("partial_rotary_factor", 1.0)) != 1:
      raise UserError(
        f"{config.path} has partial_rotary_factor={part!r}, a variant of llama that is not "
        "supported; 1.0 is."
      )
  names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
  scaling = [rope.number(name) for name in names] if kind == "llama3" else []
  return float(rope.number("rope_theta", config.number("rope_theta", 10_000.0))), scaling


READERS = {"gpt2": _gpt2, "llama": _llama}


def read_sizes(folder: str | Path) -> tuple[str, dict]:
  """(model_type, the fields of TransformerConfig that config.json decides, as JSON).

  UserError if the architecture is not supported.
  """
  config = read_config(folder)
  kind = config.get("model_type")
  if kind not in READERS:
    raise UserError(
      f"pretrained={str(folder)!r} is of the architecture {kind!r}; supported are "
      f"{', '.join(READERS)}."
    )
  path = Path(folder).expanduser() / "config.json"
  expected, sizes = READERS[kind](_Entries(path, config))
  for name, value in expected.items():
    actual = config.get(name, value)
    if actual is None:  # a derived size, or a switch that is off
      actual = value if name == "head_dim" else False
    if actual != value:
      raise UserError(
        f"{path} has {name}={actual!r}, a variant of {kind} that is not supported; "
        f"{name}={value!r} is."
      )
  return kind, sizes
