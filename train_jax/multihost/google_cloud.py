"""The metadata server of a Google VM."""

from __future__ import annotations

import glob
import os
import urllib.request
from contextlib import suppress
from pathlib import Path

TPUS = ("/dev/accel*", "/dev/vfio/[0-9]*")  # device files
PRODUCT = Path("/sys/class/dmi/id/product_name")


def has_tpus() -> bool:
  """Whether this host has TPUs."""
  return any(map(glob.glob, TPUS))


def expected() -> bool:
  """Whether a server is expected: on Google's machines, or if GCE_METADATA_HOST names one."""
  if os.environ.get("GCE_METADATA_HOST") or has_tpus():
    return True
  with suppress(OSError):
    return PRODUCT.read_text().startswith("Google")
  return False


def ask(key: str) -> str:
  """The value of `instance/<key>`; "" if there is no answer."""
  server = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
  url = f"http://{server}/computeMetadata/v1/instance/{key}"
  request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
  try:
    with urllib.request.urlopen(request, timeout=5) as answer:
      return answer.read().decode().strip()
  except OSError:
    return ""
