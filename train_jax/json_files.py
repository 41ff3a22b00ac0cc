"""JSON files that hold an object."""

from __future__ import annotations

import json
from pathlib import Path


def read(path: Path) -> dict:
  """The object in a file; OSError or ValueError if there is none."""
  found = json.loads(path.read_text(encoding="utf-8"))
  if not isinstance(found, dict):
    raise ValueError("it holds no object")
  return found
