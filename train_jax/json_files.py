"""JSON files: objects, read as such, and written so that any reader takes them."""

from __future__ import annotations

import json
import math
from pathlib import Path


def read(path: Path) -> dict:
  """The object in a file; OSError or ValueError if there is none."""
  found = json.loads(path.read_text(encoding="utf-8"))
  if not isinstance(found, dict):
    raise ValueError("it holds no object")
  return found


def dumps(record: dict, indent: int | None = None) -> str:
  """`record` as JSON, with null for its NaNs and infinities, which JSON does not have."""

  def finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value

  plain = {name: finite(value) for name, value in record.items()}
  return json.dumps(plain, indent=indent, allow_nan=False)
