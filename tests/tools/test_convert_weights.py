"""tools/convert_weights.py: names, dtypes and values survive; anything but tensors is refused.

What needs PyTorch is skipped where it is not installed; nothing else here uses it.
"""

import importlib.util
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from train_jax.errors import UserError
from train_jax.storage.weights import Weights

SCRIPT = Path(__file__).parents[2] / "tools" / "convert_weights.py"


@pytest.fixture
def tool():
  spec = importlib.util.spec_from_file_location("convert_weights", SCRIPT)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


class Intruder:
  """Unpickled, it would make a directory."""

  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return os.mkdir, (self.path,)


def test_without_torch_the_way_out_is_named(tool, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "torch", None)  # import torch: ImportError
  monkeypatch.setattr(sys, "argv", ["tool", str(tmp_path / "w.pth"), str(tmp_path / "w")])
  assert tool.main() == 2
  assert "error: PyTorch is not installed" in capsys.readouterr().err


def test_tensors_are_kept(tool, tmp_path, monkeypatch, capsys):
  torch = pytest.importorskip("torch")
  w = torch.arange(6.0).reshape(2, 3)
  tensors = {"w": w, "tied": w, "turned": w.T, "half": w.bfloat16(), "count": torch.tensor(7)}
  torch.save(tensors, tmp_path / "w.pth")
  target = tmp_path / "w.safetensors"
  monkeypatch.setattr(sys, "argv", ["tool", str(tmp_path / "w.pth"), str(target)])
  assert tool.main() == 0
  assert "5 tensors" in capsys.readouterr().out
  file = safe_open(target, "numpy")
  assert file.metadata() == {"source": "w.pth"}
  assert set(file.keys()) == set(tensors)
  for name, value in tensors.items():
    stored = file.get_tensor(name)
    assert stored.dtype.name == str(value.dtype).removeprefix("torch.")
    assert stored.tolist() == value.tolist()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["w.pth", "w.safetensors"]


def test_others_may_read_what_they_may_read_of_any_new_file(tool, tmp_path, monkeypatch):
  monkeypatch.setattr(tool, "read", lambda path, key: {"w": np.ones(2)})
  monkeypatch.setitem(sys.modules, "safetensors.torch", safetensors.numpy)  # writes files alike
  assert tool.convert(tmp_path / "w.pth", tmp_path / "w.safetensors") == (1, [])
  (tmp_path / "any").touch()
  assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode
  assert Weights(tmp_path / "w.safetensors").get("w", (2,)).tolist() == [1, 1]


def test_anything_else_is_refused(tool, tmp_path):
  torch = pytest.importorskip("torch")
  w = torch.ones(2)
  cases = {
    "dicts of tensors under state_dict; choose one with --key=state_dict": {"state_dict": {"w": w}},
    "the entry 'step' is a int": {"w": w, "step": 3},
    "holds a list": [w],
    "no file of plain tensors": {"w": w, "code": Intruder(tmp_path / "made")},
  }
  for words, contents in cases.items():
    torch.save(contents, tmp_path / "bad.pth")
    with pytest.raises(UserError, match=words):
      tool.convert(tmp_path / "bad.pth", tmp_path / "out.safetensors")
  (tmp_path / "bad.pth").write_bytes(b"not weights")
  with pytest.raises(UserError, match="no file of plain tensors"):
    tool.read(tmp_path / "bad.pth")
  with pytest.raises(UserError, match=r"none.pth cannot be read .*No such file"):
    tool.read(tmp_path / "none.pth")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.pth"]


# --- a stand-in for PyTorch -----------------------------------------------------------------------


class Tensor(np.ndarray):
  """The little of torch.Tensor that is used."""

  is_quantized = False

  def detach(self):
    return self

  def contiguous(self):
    return self

  def clone(self):
    return self


class Quantised(Tensor):
  is_quantized = True


def tensors(*names, kind=Tensor):
  return {name: np.full(2, i, np.float32).view(kind) for i, name in enumerate(names)}


@pytest.fixture
def run(tool, tmp_path, monkeypatch, capsys):
  """(what a file holds, arguments) -> (exit status, what was printed, its tensors' names)."""

  def convert(held, *args):
    fake = types.SimpleNamespace(Tensor=Tensor, load=lambda *_, **__: held, serialization=None)
    monkeypatch.setitem(sys.modules, "torch", fake)
    monkeypatch.setitem(sys.modules, "safetensors.torch", safetensors.numpy)
    target = tmp_path / "w.safetensors"
    monkeypatch.setattr(sys, "argv", ["tool", str(tmp_path / "w.pth"), str(target), *args])
    status = tool.main()
    names = set(Weights(target).shapes) if target.is_file() else set()
    return status, "".join(capsys.readouterr()), names

  return convert


def test_one_of_several_dicts_is_chosen(run, tmp_path):
  model, ema = tensors("w"), {"w": np.full(2, 7, np.float32).view(Tensor)}
  held = {"model": model, "ema": ema, "opt": {"state": {}}, "args": 3}
  status, said, _ = run(held)
  assert status == 2 and "dicts of tensors under model, ema; choose one with --key=ema." in said
  status, said, _ = run(held, "--key=opt")
  assert status == 2 and "--key=opt is no dict of tensors in" in said and "model, ema: cho" in said
  assert run(held, "--key=ema")[::2] == (0, {"w"})
  assert Weights(tmp_path / "w.safetensors").get("w", (2,)).tolist() == [7, 7]
  assert "it holds no dicts: leave --key out" in run(model, "--key=ema")[1]


@pytest.mark.parametrize(
  ("names", "kept", "left_out"),
  [
    (("a.w", "b"), {"a.w", "b"}, ""),
    (("module.a.w", "module.b"), {"a.w", "b"}, "module."),
    (("_orig_mod.module.a.w", "_orig_mod.module.b"), {"a.w", "b"}, "_orig_mod., module."),
    (("module._orig_mod.a.w", "module._orig_mod.b"), {"a.w", "b"}, "_orig_mod., module."),
    (("a._orig_mod.w", "b"), {"a.w", "b"}, "_orig_mod."),
    (("n_averaged", "module.b"), {"b"}, "module., n_averaged"),
    (("module.b", "b"), {"module.b", "b"}, ""),
    (("_orig_mod.b", "b"), {"_orig_mod.b", "b"}, ""),
  ],
)
def test_what_wrappers_add_to_names_is_left_out_and_said(names, kept, left_out, run):
  status, said, found = run(tensors(*names))
  assert status == 0 and found == kept
  assert said.partition("left out of their names: ")[2] == left_out + "\n" * bool(left_out)


def test_quantised_tensors_are_refused(run):
  status, said, _ = run(tensors("w", kind=Quantised))
  assert status == 2 and "'w' is a quantised tensor, which is not converted; save the" in said


def test_a_pointer_of_git_lfs_is_called_so(tool, tmp_path, monkeypatch):
  def load(*args, **kwargs):
    raise RuntimeError

  fake = types.SimpleNamespace(load=load, serialization=None)
  monkeypatch.setitem(sys.modules, "torch", fake)
  (tmp_path / "w.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
  with pytest.raises(UserError, match=r"w.pth is git-LFS's pointer"):
    tool.load(tmp_path / "w.pth")
