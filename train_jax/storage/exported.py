"""An exported model: a directory with one network and its settings, for use elsewhere.

    model.safetensors   the parameters by dotted name, such as `blocks.mlp.inner.kernel`, in float32
                        or the dtype of frozen matrices (lora.py)
    config.json         `format`, `method`, `step`, `run` (config and metadata of its run), and
                        fields of the method

config.json is removed first and written last, so a directory that has one is whole.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp

from train_jax import mesh
from train_jax.errors import UserError
from train_jax.files import read_json, write_json
from train_jax.state import dotted, flatten
from train_jax.storage import weights

FORMAT = 2
MODEL, CONFIG = "model.safetensors", "config.json"


def save(directory: Path, params, record: dict) -> None:
  """Writes `params` (nested dicts) and `record` (`method`, `step`, `run`) over an older export.

  All processes must call it; the first one writes.
  """
  params = jax.tree.map(mesh.to_host, params)
  if jax.process_index():
    return
  directory.mkdir(parents=True, exist_ok=True)
  (directory / CONFIG).unlink(missing_ok=True)
  weights.save(directory / MODEL, flatten(params), {"method": record["method"]})
  write_json(directory / CONFIG, {"format": FORMAT, **record}, indent=1)


def load(directory: str | Path, method: str) -> tuple[dict, weights.Weights]:
  """(record, weights) of an exported model; UserError unless it is whole and of `method`."""
  path = Path(directory).expanduser() / CONFIG
  try:
    record = read_json(path)
  except (OSError, ValueError) as err:
    raise UserError(
      f"{str(directory)!r} is no exported model: {path} cannot be read; make one with "
      "--mode=export --workdir=RUN."
    ) from err
  if method in record:  # a Hugging Face folder of ours has the record under the method's name
    raise UserError(
      f"{str(directory)!r} is a Hugging Face folder that --mode=export wrote; begin from it with "
      f"pretrained={str(directory)!r}."
    )
  if record.get("format") != FORMAT or record.get("method") != method:
    raise UserError(
      f"{path} is of format {record.get('format')} and method {record.get('method')!r}, where "
      f"format {FORMAT} and method {method!r} are expected; export the model again, or give "
      "another one."
    )
  return record, weights.Weights(path.with_name(MODEL))


def fill(stored: weights.Weights, abstract):
  """The tensors of `stored` as `abstract` (structure, dtypes); raises as `Weights.check` does."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.asarray(stored.get(dotted(path), leaf.shape), leaf.dtype), abstract
  )
