"""A run's lock on its workdir, which keeps a second run out.

It is a lock of the operating system on the file `.lock`, so it ends with its process, however that
ends. The file stays, and names the process that took the lock last. On a shared disk the lock holds
between machines, too, if the disk passes locks on (NFS does, unless mounted with `local_lock`).
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import jax
from absl import logging

from train_jax.errors import UserError
from train_jax.multihost.distributed import all_agree

NAME = ".lock"


@contextmanager
def held(workdir: Path) -> Iterator[None]:
  """Holds the lock of `workdir`, which is made, until the block ends.

  The first process of a run holds it for all. All of them must call it.

  Raises:
    UserError: another run holds it; the message names its process.
  """
  path, free = Path(workdir) / NAME, True
  with ExitStack() as stack:
    if jax.process_index() == 0:
      if not path.parent.exists():
        stack.callback(_remove_if_unused, path)
      free = _take(path, stack)
    if not all_agree(free):
      holder = "another process"
      with suppress(OSError):
        holder = path.read_text().strip() or holder
      raise UserError(
        f"--workdir={workdir} is in use by {holder}; wait for its end, stop it, or choose another "
        "--workdir."
      )
    yield


def check_free(workdir: Path) -> None:
  """Raises UserError if another run holds `workdir`; all processes must call it. Makes nothing."""
  if not all_agree(not (Path(workdir) / NAME).exists()):
    with held(workdir):
      pass


def _remove_if_unused(path: Path) -> None:
  """Removes the lock and its directory where a run has left nothing else."""
  with suppress(OSError):
    if os.listdir(path.parent) == [NAME]:
      path.unlink()
      path.parent.rmdir()


def _take(path: Path, stack: ExitStack) -> bool:
  """Takes the lock for as long as `stack` lasts; False if another process has it."""
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    file = stack.enter_context(path.open("a"))
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError as err:  # some network disks have no locks
    logging.warning("%s: no lock (%s); a second run here would not be noticed", path, err.strerror)
    return True
  with suppress(OSError):  # a full disk: the lock holds without a name
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}\n")
    file.flush()
  return True
