"""Safetensors files: names and shapes are checked, mistakes cost a sentence."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from train_jax.errors import UserError
from train_jax.storage.weights import Weights, save


@pytest.fixture
def stored(tmp_path):
  path = tmp_path / "w.safetensors"
  half = np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3)
  save(path, {"half": half, "turned": np.arange(6.0).reshape(2, 3).T}, {"kind": "test"})
  return path


def test_tensors_come_back_as_they_were(stored):
  weights = Weights(stored)
  assert safe_open(stored, "numpy").metadata() == {"kind": "test"}
  assert weights.shapes == {"half": (2, 3), "turned": (3, 2)}
  assert "half" in weights and "other" not in weights
  assert weights.get("half", (2, 3)).dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(weights.get("turned", (3, 2)), [[0, 3], [1, 4], [2, 5]])
  assert [path.name for path in stored.parent.iterdir()] == ["w.safetensors"]


def test_others_may_read_what_they_may_read_of_any_new_file(stored):
  (stored.parent / "any").touch()
  assert stored.stat().st_mode == (stored.parent / "any").stat().st_mode


@pytest.mark.parametrize(
  "name, shape, words",
  [("other", (2, 3), ("'other'", "2 others")), ("half", (3, 2), ("'half'", "(2, 3)", "(3, 2)"))],
)
def test_what_does_not_fit_is_named(stored, name, shape, words):
  with pytest.raises(UserError) as error:
    Weights(stored).get(name, shape)
  assert all(word in str(error.value) for word in words)


def test_files_that_are_no_weights(tmp_path):
  with pytest.raises(UserError, match="cannot be read"):
    Weights(tmp_path / "none.safetensors")
  (tmp_path / "bad.safetensors").write_bytes(b"x" * 64)
  with pytest.raises(UserError, match="not a whole safetensors file"):
    Weights(tmp_path / "bad.safetensors")


def test_a_folder_is_its_files_and_parts_are_read(tmp_path):
  a, b = np.arange(12.0).reshape(3, 4), np.arange(4.0)
  save(tmp_path / "one.safetensors", {"a": a}, {})
  save(tmp_path / "two.safetensors", {"b": b}, {})
  index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
  stored = Weights(tmp_path)
  assert stored.shapes == {"a": (3, 4), "b": (4,)}
  np.testing.assert_array_equal(stored.part("a", (slice(1, 3), slice(0, 2))), a[1:3, :2])
  np.testing.assert_array_equal(stored.get("b", (4,)), b)
  (tmp_path / "model.safetensors.index.json").write_text("{}")
  with pytest.raises(UserError, match=r"index.json cannot be read \(KeyError"):
    Weights(tmp_path)
  (tmp_path / "model.safetensors.index.json").unlink()
  with pytest.raises(UserError, match=r"model.safetensors' cannot be read"):
    Weights(tmp_path)


def test_a_digest_is_of_names_shapes_and_first_rows_in_any_files(tmp_path):
  def digest(*files):
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    for i, tensors in enumerate(files):
      save(folder / f"{i}.safetensors", tensors, {})
    names = {name: f"{i}.safetensors" for i, tensors in enumerate(files) for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return Weights(folder).digest()

  a, b = np.arange(12.0).reshape(3, 4), np.float32(7)
  whole = digest({"a": a, "b": b})
  assert digest({"b": b}, {"a": a}) == whole
  first, last = a.copy(), a.copy()
  first[0, 3] += 1e-6
  last[2, 3] += 1
  assert digest({"a": last, "b": b}) == whole  # reading all of it would take too long
  others = {"a": first, "b": b}, {"c": a, "b": b}, {"a": a.reshape(6, 2), "b": b}, {"a": a}
  assert len({whole, *map(digest, others)}) == 5
