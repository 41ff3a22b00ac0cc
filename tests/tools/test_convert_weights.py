"""tools/convert_weights.py: names, dtypes and values survive; anything but tensors is refused.

What needs PyTorch is skipped where it is not installed; nothing else here uses it.
"""

import importlib.util
import os
import sys
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
  weights = Weights(target)
  assert safe_open(target, "numpy").metadata() == {"source": "w.pth"}
  assert set(weights.shapes) == set(tensors)
  for name, value in tensors.items():
    stored = weights.get(name, tuple(value.shape))
    assert stored.dtype.name == str(value.dtype).removeprefix("torch.")
    assert stored.tolist() == value.tolist()
  assert sorted(p.name for p in tmp_path.iterdir()) == ["w.pth", "w.safetensors"]


def test_others_may_read_what_they_may_read_of_any_new_file(tool, tmp_path, monkeypatch):
  monkeypatch.setattr(tool, "read", lambda path: {"w": np.ones(2)})
  monkeypatch.setitem(sys.modules, "safetensors.torch", safetensors.numpy)  # writes files alike
  assert tool.convert(tmp_path / "w.pth", tmp_path / "w.safetensors") == 1
  (tmp_path / "any").touch()
  assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode
  assert Weights(tmp_path / "w.safetensors").get("w", (2,)).tolist() == [1, 1]


def test_anything_else_is_refused(tool, tmp_path):
  torch = pytest.importorskip("torch")
  w = torch.ones(2)
  cases = {
    "the entry 'state_dict' is a dict": {"state_dict": {"w": w}},
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
