"""`config.init_from`: trained parameters that a fresh run begins with.

They come from an exported model, from a run's newest good checkpoint (its `sample` average) or from
published weights that the method can convert. They are matched by name and shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from train_jax.checkpointing.checkpoint import Checkpoints
from train_jax.config import flatten as flatten_config
from train_jax.errors import UserError
from train_jax.state import flatten
from train_jax.storage import exported, lazy
from train_jax.storage.lazy import Lazy
from train_jax.storage.weights import Weights


class Trained(NamedTuple):
  """A trained network.

  Attributes:
    origin: its source, for messages.
    tensors: by dotted name. A run has global arrays. Tensors of an exported model are read from its
      file when they are indexed.
    run: {"config": ..., "metadata": ...} of its run; {} if it is unknown.
  """

  origin: str
  tensors: dict[str, np.ndarray | jax.Array | Lazy]
  run: dict[str, Any]


class WarmStart(NamedTuple):
  """A method's rules for `init_from`.

  Attributes:
    must_match: dotted keys into config and metadata that must be equal in both runs, such as
      "config.model.heads", which no shape of a tensor shows.
    reinitialized: names of parameters, or of groups, that are drawn afresh if they are missing in
      `init_from` or have another shape.
    convert: Weights of a published file -> tensors by our names; None if there are no such files.
    pretrained: () -> parameters by dotted name to begin with if `init_from` is empty.
  """

  must_match: tuple[str, ...]
  reinitialized: tuple[str, ...] = ()
  convert: Callable[[Weights], dict[str, Any]] | None = None
  pretrained: Callable[[], dict[str, Any]] = dict


def make_init_params(
  rules: WarmStart, make_network: Callable, config: dict, metadata: dict, mesh: Mesh
) -> dict[str, Any]:
  """Parameters by dotted name that replace drawn ones in a fresh run.

  They come from `init_from`, or from the method's pretrained model if that is empty.

  Args:
    make_network: (config, metadata), nested dicts -> a network's functions, `init` first.
    mesh: a run's parameters are spread over it while they are read.
  """
  if not config["init_from"]:
    return rules.pretrained()

  def abstract(config: dict, metadata: dict):
    return jax.eval_shape(make_network(config, metadata)[0], jax.random.key(0))

  trained = read(config["init_from"], config["method"], abstract, mesh, rules.convert)
  check_alike(trained, {"config": config, "metadata": metadata}, rules.must_match)
  tensors, summary = choose(trained, abstract(config, metadata), rules.reinitialized)
  if jax.process_index() == 0:
    print(summary, flush=True)
  return tensors


def read(
  path: str, method: str, make_network: Callable, mesh: Mesh, convert: Callable | None
) -> Trained:
  """The trained network at `path`: an exported model, a working directory, or a file.

  Args:
    make_network: (config, metadata) -> abstract parameters of a run's network.
    mesh, convert: see `make_init_params` and WarmStart.

  Raises:
    UserError: nothing usable is there.
  """
  source = Path(path).expanduser()
  if (source / exported.MODEL).is_file():
    record, stored = exported.load(source, method)
    tensors = {name: lazy.stored(stored, name, shape) for name, shape in stored.shapes.items()}
    return Trained(f"{path} (step {record['step']})", tensors, record["run"])
  if source.is_file() and convert:
    return Trained(path, convert(Weights(source)), {})
  checkpoints = Checkpoints(source)
  if not checkpoints.steps():
    or_file = ", or a .safetensors file" if convert else ""
    raise UserError(
      f"init_from={path!r} holds nothing to begin from; give the directory of an exported model, "
      f"or the workdir of a run of method {method!r}{or_file}."
    )
  config, metadata, _ = checkpoints.require_run(method)
  params, step = checkpoints.restore_ema("sample", make_network(config, metadata), mesh)
  run = {"config": config, "metadata": metadata}
  return Trained(f"{path} (step {step})", flatten(params), run)


def check_alike(trained: Trained, run: dict[str, Any], must_match: Sequence[str]) -> None:
  """Raises UserError unless two runs agree in the keys `must_match` (see WarmStart).

  Args:
    run: {"config": ..., "metadata": ...} of the run that begins.
  """
  old, new = flatten_config(trained.run), flatten_config(run)
  for key in must_match if old else ():
    if old.get(key) != new.get(key):
      raise UserError(
        f"init_from={trained.origin} has {key}={old.get(key)!r} and this run {new.get(key)!r}, so "
        "its tensors would mean something else here; set it as it was there."
      )


def choose(trained: Trained, abstract, reinitialized: Sequence[str]) -> tuple[dict[str, Any], str]:
  """(tensors by dotted name that the network begins with, a one-line summary).

  Args:
    abstract: abstract parameters of the network that begins.
    reinitialized: see WarmStart; all other tensors must be in `trained`.

  Raises:
    UserError: a tensor is missing, has another shape, or has no place.
  """
  leaves, tensors, notes = flatten(abstract), {}, []
  advice = "set config.model as it was there, or leave init_from empty."
  for name, leaf in leaves.items():
    shape = trained.tensors[name].shape if name in trained.tensors else None
    if shape == leaf.shape:
      tensors[name] = trained.tensors[name]
      continue
    problem = "is not there" if shape is None else f"has the shape {shape} there"
    if not any(f"{name}.".startswith(f"{part}.") for part in reinitialized):
      raise UserError(
        f"init_from={trained.origin}: {name!r} {problem}, and this network needs {leaf.shape}; "
        + advice
      )
    # A missing group, such as an embedding, is many tensors and one note.
    notes.append(
      f"{name} {problem} and {leaf.shape} here" if shape else f"{_group(name)} {problem}"
    )
  if extra := sorted(set(trained.tensors) - set(leaves)):
    raise UserError(
      f"init_from={trained.origin}: {extra[0]!r} has no place in this network; " + advice
    )
  groups = ", ".join(dict.fromkeys(map(_group, tensors)))
  drawn = f"drawn afresh: {', '.join(dict.fromkeys(notes))}" if notes else "nothing drawn afresh"
  summary = f"began from {trained.origin}: {len(tensors)} tensors taken ({groups}); {drawn}"
  return tensors, summary


def _group(name: str) -> str:
  return name.partition(".")[0]
