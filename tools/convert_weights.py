"""Turns a PyTorch weight file into safetensors; nothing else here opens a pickle.

    python tools/convert_weights.py pt_inception-2015-12-05-6726825d.pth inception.safetensors

Only this command needs PyTorch: `pip install torch`, in any environment. It reads `.pth`, `.pt` and
`.bin` files with a dict of tensors, or several of them (`--key=ema` chooses one). It keeps dtypes,
and names but for what wrappers add (`module.`, `_orig_mod.`), and says what it left out. PyTorch's
restricted loader runs no code in the file.
"""

import argparse
import contextlib
import pickle
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from train_jax.errors import UserError
from train_jax.files import LFS, is_lfs_pointer, whole_path

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
PARALLEL, COUNTER = "module.", "n_averaged"


def load(path: Path):
  """What a PyTorch file holds; UserError without PyTorch, or if it cannot be read or holds code."""
  try:
    import torch
  except ImportError as err:
    raise UserError(
      "PyTorch is not installed, and only it reads .pth files; `pip install torch` in any "
      "environment and convert there."
    ) from err
  # Training scripts save their arguments too, as a class that does nothing.
  allow = getattr(torch.serialization, "safe_globals", lambda _: contextlib.nullcontext())
  try:
    with allow([argparse.Namespace]):
      return torch.load(path, map_location="cpu", weights_only=True)
  except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as err:
    if is_lfs_pointer(path):
      raise UserError(f"{path} {LFS}.") from err
    reason = getattr(err, "strerror", None) or "no file of plain tensors"
    raise UserError(
      f"{path} cannot be read as PyTorch weights ({reason}); give a file that holds a dict of "
      "tensors and nothing else."
    ) from err


def read(path: Path, key: str = "") -> dict:
  """The tensors of a PyTorch file, each with its own memory.

  Args:
    key: of the entry that holds them; "" if the file is a flat dict of tensors.

  Raises:
    UserError: as in `load`, or there is anything but tensors.
  """
  held = load(path)
  import torch

  def is_tensors(value) -> bool:
    return isinstance(value, dict) and any(isinstance(x, torch.Tensor) for x in value.values())

  groups = [n for n, value in held.items() if is_tensors(value)] if isinstance(held, dict) else []
  if key:
    if key not in groups:
      raise UserError(
        f"--key={key} is no dict of tensors in {path}; it holds {', '.join(groups) or 'no dicts'}: "
        f"{'choose one of them' if groups else 'leave --key out'}."
      )
    held = held[key]
  elif groups:
    raise UserError(
      f"{path} holds dicts of tensors under {', '.join(groups)}; choose one with "
      f"--key={groups[-1]}."
    )
  if not isinstance(held, dict) or not held:
    raise UserError(
      f"{path} holds a {type(held).__name__} and not a dict of tensors; save "
      "`model.state_dict()` to a file and convert that."
    )
  for name, value in held.items():
    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
      raise UserError(
        f"{path}: the entry {name!r} is a {type(value).__name__} and not a tensor; save "
        "`model.state_dict()` to a file of its own and convert that."
      )
    if value.is_quantized:
      raise UserError(
        f"{path}: {name!r} is a quantised tensor, which is not converted; save the model before it "
        "is quantised."
      )
  # safetensors refuses tensors that share memory, such as tied embeddings.
  return {name: value.detach().contiguous().clone() for name, value in held.items()}


def without_wrappers(tensors: dict) -> tuple[dict, list[str]]:
  """(the tensors by the names that the bare model gives them, what was left out).

  torch.compile and FSDP put a word of theirs anywhere into a name, and data parallelism and
  PyTorch's own averages a `module.` before all names; an average also has a counter.
  """
  found = {word for name in tensors for word in name.split(".")[:-1] if word in WRAPPERS}
  names = {name: ".".join(w for w in name.split(".") if w not in found) for name in tensors}
  left_out = [f"{word}." for word in sorted(found)]
  rest = [name for old, name in names.items() if old != COUNTER]
  if rest and all(name.startswith(PARALLEL) for name in rest):
    names = {old: name.removeprefix(PARALLEL) for old, name in names.items() if old != COUNTER}
    left_out += [PARALLEL, *([COUNTER] if COUNTER in tensors else [])]
  if len(set(names.values())) < len(names):
    return tensors, []  # they are words of the model's own
  return {new: tensors[old] for old, new in names.items()}, left_out


def convert(source: Path, target: Path, key: str = "") -> tuple[int, list[str]]:
  """Writes the tensors of `source` to `target`, whole or not at all.

  Args:
    key: see `read`.

  Returns:
    Their number, and what was left out of their names.
  """
  tensors, left_out = without_wrappers(read(source, key))
  from safetensors.torch import save_file

  with whole_path(target) as partial:
    save_file(tensors, partial, metadata={"source": source.name})
  return len(tensors), left_out


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("source", type=Path, help="a .pth, .pt or .bin file")
  parser.add_argument("target", type=Path, help="the .safetensors file to write")
  parser.add_argument("--key", default="", help="the entry of the file that holds the tensors")
  args = parser.parse_args()
  try:
    count, left_out = convert(args.source, args.target, args.key)
  except UserError as err:
    print(f"error: {err}", file=sys.stderr)
    return 2
  print(f"{args.target}: {count} tensors")
  if left_out:
    print(f"left out of their names: {', '.join(left_out)}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
