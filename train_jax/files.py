"""Files that are whole or not there, and JSON in them. It needs the standard library only."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from train_jax.errors import UserError

# What a message says of a file that `is_lfs_pointer`.
LFS = "is git-LFS's pointer to a file and not the file; run `git lfs pull` in its repository"


def commit(partial: Path, path: Path) -> None:
  """Renames a complete file to `path` once it is on the disk."""
  with partial.open("rb+") as file:
    os.fsync(file.fileno())
  os.replace(partial, path)


@contextmanager
def whole_path(path: Path) -> Iterator[Path]:
  """A path to write to: it becomes `path` if the block ends well, and is deleted otherwise.

  The file gets the mode of any new file. safetensors would let no other user read its files.
  """
  # The name belongs to this process alone: several may write the same manifest.
  partial = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}.partial")
  try:
    partial.unlink(missing_ok=True)
    partial.touch()
    mode = partial.stat().st_mode
    yield partial
    if partial.stat().st_mode != mode:
      partial.chmod(mode)
    commit(partial, path)
  finally:
    partial.unlink(missing_ok=True)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
  """An open file to write to; the rest is as in `whole_path`."""
  with whole_path(path) as partial, partial.open("wb") as file:
    yield file


def is_lfs_pointer(path: Path) -> bool:
  """Whether a file is only git-LFS's note of where its content is."""
  try:
    with path.open("rb") as file:
      return file.read(30).startswith(b"version https://git-lfs")
  except OSError:
    return False


def read_json(path: Path) -> dict:
  """The JSON object in a file; OSError or ValueError if there is none."""
  value = json.loads(path.read_text(encoding="utf-8"))
  if not isinstance(value, dict):
    raise ValueError("it holds no object")
  return value


def write_json(path: Path, value, indent: int | None = None) -> None:
  """Writes `value` as JSON, all of it or nothing."""
  with whole_file(path) as file:
    file.write(json.dumps(value, indent=indent).encode())


def plain_json(record: dict, indent: int | None = None) -> str:
  """`record` as JSON that any reader takes: NaN and infinity are null."""
  plain = {
    name: None if isinstance(value, float) and not math.isfinite(value) else value
    for name, value in record.items()
  }
  return json.dumps(plain, indent=indent, allow_nan=False)


def check_writable(workdir: Path, flag: str = "--workdir") -> None:
  """Raises UserError unless this process can write to the directory that `flag` names.

  The directory need not exist, and is not made.
  """
  existing = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
  probe = existing / f".write-{socket.gethostname()}-{os.getpid()}"
  try:
    probe.write_bytes(b"0")
    probe.unlink()
  except OSError as err:
    raise UserError(
      f"{flag}={workdir} cannot be written to ({err.strerror}); make room, allow it, or choose "
      "another."
    ) from err
