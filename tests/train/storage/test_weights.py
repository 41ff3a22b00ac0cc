"""Safetensors files: names and shapes are checked, mistakes cost a sentence."""

import json
import math

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

from train_jax.errors import UserError
from train_jax.storage import lazy
from train_jax.storage.weights import INDEX, WHOLE, Weights, save


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
  with pytest.raises(UserError, match=r"has no model.safetensors and no .*rename its 'one.safe"):
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


def write_raw(path, tensors):
  """Writes a safetensors file of any formats: name -> (format, shape, bits of an element)."""
  header, end = {}, 0
  for name, (dtype, shape, bits) in tensors.items():
    size = math.prod(shape) * bits // 8
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
    end += size
  text = json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))


FLOAT = ("BF16", (4, 4), 16)


@pytest.mark.parametrize(
  ("tensors", "message"),
  [
    ({"a.weight": ("F8_E4M3", (4, 4), 8)}, r"'a.weight' is stored as F8_E4M3, and quantised"),
    ({"a.weight": ("F8_E8M0", (4, 4), 8)}, r"stored as F8_E8M0"),
    ({"a.weight": ("F6_E2M3", (4, 4), 6)}, r"stored as F6_E2M3"),
    ({"a.weight": ("F4", (4, 4), 4)}, r"stored as F4"),
    ({"a.weight": ("I8", (4, 4), 8)}, r"stored as I8, .* in float32, float16 or bfloat16"),
    ({"a.weight": ("U8", (8, 1), 8)}, r"stored as U8"),
    ({"a.weight": ("C64", (4, 4), 64)}, r"stored as C64"),
    ({"a.qweight": ("I32", (1, 4), 32)}, r"holds 'a.qweight', so 'a.weight' is quantised"),
    ({"a.weight": FLOAT, "a.weight_scale": FLOAT}, r"holds 'a.weight_scale', so 'a.weight' is"),
  ],
)
def test_quantised_weights_are_refused(tensors, message, tmp_path):
  write_raw(tmp_path / "w.safetensors", tensors)
  for read in (Weights.check, Weights.get, lazy.stored):
    with pytest.raises(UserError, match=message):
      read(Weights(tmp_path / "w.safetensors"), "a.weight", (4, 4))


def test_tensors_that_nobody_asks_for_may_have_any_format_that_can_be_read(tmp_path):
  path = tmp_path / "w.safetensors"
  write_raw(path, {"a.weight": FLOAT, "a.mask": ("BOOL", (4, 4), 8)})
  assert Weights(path).get("a.weight", (4, 4)).shape == (4, 4) and Weights(path).digest()
  write_raw(path, {"a.weight": FLOAT, "other": ("F8_E5M2", (4, 4), 8)})
  with pytest.raises(UserError, match=r"'other' is stored as F8_E5M2"):
    Weights(path).digest()


def test_the_whole_file_is_read_and_an_index_beside_it_is_not(tmp_path, caplog):
  save(tmp_path / "model.safetensors", {"a": np.ones(2)}, {})
  save(tmp_path / "part.safetensors", {"a": np.zeros(2)}, {})
  (tmp_path / INDEX).write_text('{"weight_map": {"a": "part.safetensors"}}')
  assert Weights(tmp_path).get("a", (2,)).tolist() == [1, 1]
  assert f"model.safetensors is read, and {INDEX} beside it is not" in caplog.text


def test_an_index_says_which_file_has_a_tensor(tmp_path):
  save(tmp_path / "1.safetensors", {"a": np.ones(2)}, {})
  save(tmp_path / "2.safetensors", {"a": np.zeros(2), "b": np.zeros(2)}, {})
  (tmp_path / INDEX).write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
  assert Weights(tmp_path).get("a", (2,)).tolist() == [1, 1]
  (tmp_path / INDEX).write_text('{"weight_map": {"b": "1.safetensors"}}')
  with pytest.raises(UserError, match=r"1.safetensors does not hold 'b', though .*index.json"):
    Weights(tmp_path)


@pytest.mark.parametrize(
  ("files", "message"),
  [
    (["pytorch_model.bin"], r"convert_weights.py .*pytorch_model.bin .*model.safetensors"),
    (["model-1.bin", "pytorch_model.bin.index.json"], r"\.bin files again, by transformers'"),
    (["tf_model.h5"], r"its tf_model.h5 is not read"),
    (["diffusion_pytorch_model.safetensors"], r"rename its 'diffusion_pytorch_model.safetensors'"),
    (["config.json"], r"has no model.safetensors and no .* give a folder with one of them"),
  ],
)
def test_what_to_do_about_a_folder_without_weights_is_said(files, message, tmp_path):
  for name in files:
    (tmp_path / name).touch()
  with pytest.raises(UserError, match=message):
    Weights(tmp_path)


@pytest.mark.parametrize("name", [WHOLE, INDEX])
def test_a_pointer_of_git_lfs_is_called_so(name, tmp_path):
  (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9")
  with pytest.raises(UserError, match=rf"{name} is git-LFS's pointer .* `git lfs pull`"):
    Weights(tmp_path)
