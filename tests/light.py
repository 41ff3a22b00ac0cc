"""What a trained model imports when it is used: none of what it was trained with."""

import subprocess
import sys
from pathlib import Path

HEAVY = (
  "orbax grain ott ml_collections tensorflow_datasets tensorflow sklearn scipy matplotlib torch"
)


def heavy_imports(package: str, use: str) -> list[str]:
  """Those of HEAVY that a new process has imported after `import package` and the statement `use`.

  The import alone must not even import JAX.
  """
  code = f"""
import sys, {package}
assert "jax" not in sys.modules
{use}
print(*{{name.partition(".")[0] for name in sys.modules}} & set({HEAVY!r}.split()))
"""
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=Path(__file__).parents[1],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.split()
