"""Turns a PyTorch weight file into safetensors; nothing else here opens a pickle.

    python tools/convert_weights.py pt_inception-2015-12-05-6726825d.pth inception.safetensors

Only this command needs PyTorch: `pip install torch`, in any environment. It reads `.pth`, `.pt` and
`.bin` files with a flat dict of tensors, and keeps names and dtypes. PyTorch's restricted loader
runs no code in the file.
"""

import argparse
import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_jax.errors import UserError
from train_jax.files import whole_path


def read(path: Path) -> dict:
  """The tensors of a PyTorch file, each with its own memory.

  Raises:
    UserError: PyTorch is not installed, or the file cannot be read or holds anything but tensors.
  """
  try:
    import torch
  except ImportError as err:
    raise UserError(
      "PyTorch is not installed, and only it reads .pth files; `pip install torch` in any "
      "environment and convert there."
    ) from err
  try:
    tensors = torch.load(path, map_location="cpu", weights_only=True)
  except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as err:
    reason = getattr(err, "strerror", None) or "no file of plain tensors"
    raise UserError(
      f"{path} cannot be read as PyTorch weights ({reason}); give a file that holds a dict of "
      "tensors and nothing else."
    ) from err
  if not isinstance(tensors, dict) or not tensors:
    raise UserError(
      f"{path} holds a {type(tensors).__name__} and not a dict of tensors; save "
      "`model.state_dict()` to a file and convert that."
    )
  for name, value in tensors.items():
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
      raise UserError(
        f"{path}: the entry {name!r} is a {type(value).__name__} and not a tensor; save the "
        "`state_dict` in it to a file of its own and convert that."
      )
  # safetensors refuses tensors that share memory, such as tied embeddings.
  return {name: value.detach().contiguous().clone() for name, value in tensors.items()}


def convert(source: Path, target: Path) -> int:
  """Writes the tensors of `source` to `target`, whole or not at all; returns their number."""
  tensors = read(source)
  from safetensors.torch import save_file

  with whole_path(target) as partial:
    save_file(tensors, partial, metadata={"source": source.name})
  return len(tensors)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("source", type=Path, help="a .pth, .pt or .bin file")
  parser.add_argument("target", type=Path, help="the .safetensors file to write")
  args = parser.parse_args()
  try:
    count = convert(args.source, args.target)
  except UserError as err:
    print(f"error: {err}", file=sys.stderr)
    return 2
  print(f"{args.target}: {count} tensors")
  return 0


if __name__ == "__main__":
  sys.exit(main())
