"""Where a fresh run may begin (`config.init_from`): with parameters that were trained elsewhere.

They come from an exported model, from a run's newest good checkpoint (its `sample` average) or from
a file of published weights that the method can convert, and are matched by name and shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    origin: where it was found, in words.
    tensors: by dotted name; of a run, global arrays on the mesh that it was read on. Of an exported
      model they are read from its file when they are indexed.
    run: {"config": ..., "metadata": ...} of its run; {} where a file does not say.
  """

  origin: str
  tensors: dict[str, np.ndarray | jax.Array | Lazy]
  run: dict[str, Any]


class WarmStart(NamedTuple):
  """What `init_from` may be for a method.

  Attributes:
    must_match: dotted keys into config and metadata that must be equal there, such as
      "config.model.heads": no shape of a tensor shows them.
    reinitialized: names, or beginnings of names, that are drawn afresh if they are missing there or
      of another size.
    convert: Weights of a published file -> tensors by our names; None where none can be read.
    pretrained: () -> the parameters to begin with where `init_from` is empty, by dotted name.
  """

  must_match: tuple[str, ...]
  reinitialized: tuple[str, ...] = ()
  convert: Callable[[Weights], dict[str, Any]] | None = None
  pretrained: Callable[[], dict[str, Any]] = dict


def make_init_params(
  rules: WarmStart, make_network: Callable, config: dict, metadata: dict, mesh: Mesh
) -> dict[str, Any]:
  """The parameters that a fresh run begins with instead of drawn ones, by dotted name.

  They are those of `init_from`; if it is empty, the method's pretrained ones, if any.

  Args:
    make_network: (config, metadata), nested dicts -> a network's functions, `init` first.
    mesh: over which a run's parameters are spread while they are read.
  """
  if not config["init_from"]:
    return rules.pretrained()

  def abstract(config: dict, metadata: dict):
    return jax.eval_shape(make_network(config, metadata)[0], jax.random.key(0))

  trained = read(config["init_from"], config["method"], abstract, mesh, rules.convert)
  check_alike(trained, {"config": config, "metadata": metadata}, rules.must_match)
  found, line = choose(trained, abstract(config, metadata), rules.reinitialized)
  if jax.process_index() == 0:
    print(line, flush=True)
  return found


def read(
  path: str, method: str, make_network: Callable, mesh: Mesh, convert: Callable | None
) -> Trained:
  """The trained network at `path`: an exported model, a working directory, or a file.

  Args:
    make_network: (config dict, metadata) -> abstract parameters of that run's network.
    mesh: over which a run's parameters are spread while they are read.
    convert: Weights -> tensors by our names, for a method that knows published weights.

  Raises:
    UserError: nothing usable is there.
  """
  where = Path(path).expanduser()
  if (where / exported.MODEL).is_file():
    record, stored = exported.load(where, method)
    tensors = {name: lazy.stored(stored, name, shape) for name, shape in stored.shapes.items()}
    return Trained(f"{path} (step {record['step']})", tensors, record["run"])
  if where.is_file() and convert:
    return Trained(path, convert(Weights(where)), {})
  checkpoints = Checkpoints(where)
  if not checkpoints.steps():
    or_file = ", or a .safetensors file" if convert else ""
    raise UserError(
      f"init_from={path!r} holds nothing to begin from; give the directory of an exported model, "
      f"or the workdir of a run of method {method!r}{or_file}."
    )
  run = checkpoints.require_meta()
  if (found := run["config"]["method"]) != method:
    raise UserError(
      f"init_from={path!r} is a run of method {found!r} and this one is {method!r}; give a run of "
      "the same method."
    )
  params, step = checkpoints.restore_ema(
    "sample", make_network(run["config"], run["metadata"]), mesh
  )
  checkpoints.close()
  return Trained(f"{path} (step {step})", flatten(params), run)


def check_alike(trained: Trained, run: dict[str, Any], must_match: Sequence[str]) -> None:
  """Raises UserError unless the two runs agree in what the shapes of tensors do not show.

  Args:
    run: {"config": ..., "metadata": ...} of the run that begins.
    must_match: dotted keys into both, such as "config.model.heads".
  """
  there, here = flatten_config(trained.run), flatten_config(run)
  for key in must_match:
    then, now = there.get(key), here.get(key)
    if there and then != now:
      raise UserError(
        f"init_from={trained.origin} has {key}={then!r} and this run {now!r}, so that its "
        "tensors would mean something else here; set it as it was there."
      )


def choose(trained: Trained, wanted, reinitialized: Sequence[str]) -> tuple[dict[str, Any], str]:
  """(the tensors to begin with by dotted name, a line that says what was taken and what was not).

  Args:
    wanted: abstract parameters of the network that begins.
    reinitialized: names, or beginnings of names, that are drawn afresh if they are missing or of
      another size in `trained`; all others must be there.

  Raises:
    UserError: a tensor is missing, has another shape, or has no place.
  """
  wanted, found = flatten(wanted), trained.tensors
  taken, notes = {}, []
  advice = "set config.model as it was there, or leave init_from empty."
  for name, leaf in wanted.items():
    shape = found[name].shape if name in found else None
    if shape == leaf.shape:
      taken[name] = found[name]
      continue
    told = "is not there" if shape is None else f"has the shape {shape} there"
    if not any(f"{name}.".startswith(f"{part}.") for part in reinitialized):
      raise UserError(
        f"init_from={trained.origin}: {name!r} {told}, and this network needs {leaf.shape}; "
        + advice
      )
    # What is missing is told by its first name: an embedding is many tensors.
    notes.append(f"{name} {told} and {leaf.shape} here" if shape else f"{_group(name)} {told}")
  if extra := sorted(set(found) - set(wanted)):
    raise UserError(
      f"init_from={trained.origin}: {extra[0]!r} has no place in this network; " + advice
    )
  return taken, _line(trained.origin, taken, notes)


def _group(name: str) -> str:
  return name.partition(".")[0]


def _line(origin: str, taken: Mapping[str, Any], notes: Sequence[str]) -> str:
  groups = ", ".join(dict.fromkeys(map(_group, taken)))
  drawn = f"drawn afresh: {', '.join(dict.fromkeys(notes))}" if notes else "nothing drawn afresh"
  return f"began from {origin}: {len(taken)} tensors taken ({groups}); {drawn}"
