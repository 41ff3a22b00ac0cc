"""A data set that many processes make in shards; after a kill the same command goes on.

Each process makes its own shards, without communication. A file has another name until it is whole
(files.py), and a shard is done when all its files are there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax

from train_jax.errors import UserError
from train_jax.files import read_json
from train_jax.metrics import progress_bar

PER_SHARD = 8192  # items; the latents of 8192 images are about 270 MB


def shard_name(file: str, shard: int, shards: int) -> str:
  """The file name in a shard: "part.json" -> "part-00003-of-00157.json"."""
  kind, _, suffix = file.partition(".")
  return f"{kind}-{shard:05d}-of-{shards:05d}.{suffix}"


@dataclass(frozen=True)
class Job:
  """A data set to be made.

  Attributes:
    items, unit: names of the items, in messages and in the progress bar.
    files: files of each shard. The first has the name of the result. The last is JSON with
      `metadata` as "job", and what the manifest needs.
    size, shards: number of items and of shards.
    metadata: must be equal for all runs into one directory: the layout's `version`, and flags.
  """

  items: str
  unit: str
  files: tuple[str, ...]
  size: int
  shards: int
  metadata: dict[str, int | str]

  def rows(self, shard: int) -> range:
    """Indices of a shard's items."""
    return range(self.size * shard // self.shards, self.size * (shard + 1) // self.shards)

  def paths(self, out: Path, shard: int) -> list[Path]:
    """Paths of a shard's `files`."""
    return [out / shard_name(file, shard, self.shards) for file in self.files]

  def parts(self, out: Path) -> list[dict]:
    """The JSON of each shard."""
    return [_read(self.paths(out, i)[-1]) for i in range(self.shards)]


def _read(path: Path) -> dict:
  """A shard's JSON; UserError if it is damaged."""
  try:
    part = read_json(path)
    if isinstance(part.get("job"), dict):
      return part
  except ValueError:
    pass
  raise UserError(f"{path} is damaged; delete it, and the same command makes its shard again.")


def make_job(kind: tuple, version: int, source, shards: int, flags: dict[str, int | str]) -> Job:
  """The job for a source with `size` and `name(i)`, in `shards` shards (0: a suitable number).

  Args:
    kind: `items`, `unit` and `files` of a Job; the option `--ITEMS` names the source.
    flags: values of other options by name, or the SHA-256 of their files.
  """
  if not 0 <= shards <= source.size:
    raise UserError(f"--shards={shards} must be between 1 and the {source.size} {kind[0]}.")
  shards = shards or min(source.size, max(-(-source.size // PER_SHARD), jax.process_count()))
  names = hashlib.sha256()
  for i in range(source.size):
    names.update(source.name(i).encode() + b"\0")
  metadata = {"version": version, kind[0]: names.hexdigest(), **flags}
  return Job(*kind, source.size, shards, {**metadata, "size": source.size, "shards": shards})


def _check_same(job: Job, out: Path) -> None:
  """Raises UserError if `out` holds shards of another job."""
  words = {"version": "layout version", "size": f"number of {job.items}"}
  words |= {name: f"{name} of the {job.items}" for name in ("cut", "content")}
  for path in sorted(out.glob(job.files[-1].replace(".", "-*."))):
    other = _read(path)["job"]
    differ = [words.get(k, f"--{k}") for k, value in job.metadata.items() if other.get(k) != value]
    if differ:
      result = job.files[0].partition(".")[0]
      raise UserError(
        f"--out={out} holds {result} of another {' and '.join(differ)} ({path.name}); choose "
        "another directory, or give what those were made with to go on."
      )


def make_missing(job: Job, out: Path, prepare: Callable) -> bool:
  """Makes the missing ones of this process's shards.

  Args:
    prepare: numbers of the missing shards -> `make(shard, progress)`, which makes a shard and calls
      progress(n) after n items. It is called only if a shard is missing.

  Returns:
    Whether every shard is there. If not, a line says that other processes are still at work.

  Raises:
    UserError: `out` holds shards of another job.
  """

  def missing(shards: range) -> list[int]:
    return [i for i in shards if not all(path.exists() for path in job.paths(out, i))]

  out.mkdir(parents=True, exist_ok=True)
  _check_same(job, out)
  own_shards = range(jax.process_index(), job.shards, jax.process_count())
  if todo := missing(own_shards):
    make = prepare(todo)
    total, left = (sum(len(job.rows(shard)) for shard in part) for part in (own_shards, todo))
    with progress_bar(total, total - left, unit=job.unit, desc="encoding") as bar:
      for shard in todo:
        make(shard, bar.update)
  if missing(range(job.shards)):
    print(f"this process's shards are done; others are still at work in {out}")
    return False
  return True
