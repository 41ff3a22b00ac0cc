"""Files that are whole or not there, JSON objects in them, and whether they can be written at all.

It needs the standard library only.
"""

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


def commit(partial: Path, path: Path) -> None:
  """Gives a whole file its name, once it is on the disk."""
  with partial.open("rb+") as file:
    os.fsync(file.fileno())
  os.replace(partial, path)


@contextmanager
def whole_path(path: Path) -> Iterator[Path]:
  """Where to write a file, which becomes `path` when the block has ended well, and else is gone.

  It has the mode of any new file, also where it was written by safetensors, which lets no one else
  read its files.
  """
  # A name of this process's own: several may write the same manifest.
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
  """A file to be written, which becomes `path` when the block has ended well, and else is gone."""
  with whole_path(path) as partial, partial.open("wb") as file:
    yield file


def read_json(path: Path) -> dict:
  """The object in a file; OSError or ValueError if there is none."""
  found = json.loads(path.read_text(encoding="utf-8"))
  if not isinstance(found, dict):
    raise ValueError("it holds no object")
  return found


def write_json(path: Path, value, indent: int | None = None) -> None:
  """Writes all of `value` or nothing."""
  with whole_file(path) as file:
    file.write(json.dumps(value, indent=indent).encode())


def plain_json(record: dict, indent: int | None = None) -> str:
  """`record` as JSON that any reader takes: with null for its NaNs and infinities."""

  def finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value

  plain = {name: finite(value) for name, value in record.items()}
  return json.dumps(plain, indent=indent, allow_nan=False)


def check_writable(workdir: Path, flag: str = "--workdir") -> None:
  """Raises UserError unless this process can write into `workdir`, or make it; makes nothing.

  Args:
    workdir: the directory that the option `flag` names.
  """
  there = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
  probe = there / f".write-{socket.gethostname()}-{os.getpid()}"
  try:
    probe.write_bytes(b"0")
    probe.unlink()
  except OSError as err:
    raise UserError(
      f"{flag}={workdir} cannot be written to ({err.strerror}); make room, allow it, or choose "
      "another."
    ) from err
