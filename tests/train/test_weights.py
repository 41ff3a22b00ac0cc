"""Safetensors files: names and shapes are checked, mistakes cost a sentence."""

import ml_dtypes
import numpy as np
import pytest

from train_jax.errors import UserError
from train_jax.weights import Weights, save


@pytest.fixture
def stored(tmp_path):
  path = tmp_path / "w.safetensors"
  half = np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3)
  save(path, {"half": half, "turned": np.arange(6.0).reshape(2, 3).T}, {"kind": "test"})
  return path


def test_tensors_come_back_as_they_were(stored):
  weights = Weights(stored)
  assert weights.metadata == {"kind": "test"}
  assert weights.shapes == {"half": (2, 3), "turned": (3, 2)}
  assert "half" in weights and "other" not in weights
  assert weights.get("half", (2, 3)).dtype == ml_dtypes.bfloat16
  np.testing.assert_array_equal(weights.get("turned", (3, 2)), [[0, 3], [1, 4], [2, 5]])
  assert not list(stored.parent.glob("*.partial"))


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
