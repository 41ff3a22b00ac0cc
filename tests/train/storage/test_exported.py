"""Exported models: two files that are whole or not there."""

import json
import os
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from train_jax.errors import UserError
from train_jax.storage import exported

PARAMS = {"a": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "b": jnp.ones(4)}
RECORD = {"method": "tiny", "step": 7, "run": {"config": {"lr": 0.1}, "metadata": {}}}


@pytest.fixture
def directory(tmp_path):
  exported.save(tmp_path / "deep" / "out", PARAMS, RECORD)
  return tmp_path / "deep" / "out"


def test_files_are_readable_without_this_program(directory):
  tensors = load_file(directory / "model.safetensors")
  assert set(tensors) == {"a.kernel", "b"}
  np.testing.assert_array_equal(tensors["a.kernel"], [[0, 1, 2], [3, 4, 5]])
  assert json.loads((directory / "config.json").read_text()) == {"format": 2, **RECORD}
  modes = {stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
  assert len(modes) == 1 and len(list(directory.iterdir())) == 2


def test_comes_back_as_it_was(directory, differences):
  record, stored = exported.load(directory, "tiny")
  assert record == {"format": 2, **RECORD}
  assert differences(exported.fill(stored, jax.eval_shape(lambda: PARAMS)), PARAMS) == []


def test_killed_export_leaves_no_model(directory, monkeypatch):
  def killed(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(os, "replace", killed)  # the last act of writing either file
  with pytest.raises(KeyboardInterrupt):
    exported.save(directory, PARAMS, {**RECORD, "step": 8})
  monkeypatch.undo()
  with pytest.raises(UserError, match="is no exported model"):
    exported.load(directory, "tiny")
  exported.save(directory, PARAMS, {**RECORD, "step": 8})
  assert exported.load(directory, "tiny")[0]["step"] == 8


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda d: (d / "config.json").unlink(), "config.json cannot be read; make one with --mode"),
    (lambda d: (d / "config.json").write_text("{"), "is no exported model"),
    (lambda d: (d / "config.json").write_text("[]"), "is no exported model"),
    (lambda d: (d / "config.json").write_bytes(b"\xff\xfe"), "is no exported model"),
    (lambda d: exported.save(d, PARAMS, {**RECORD, "method": "else"}), "method 'else', where"),
    (lambda d: (d / "config.json").write_text('{"format": 1, "method": "tiny"}'), "of format 1"),
    (lambda d: (d / "model.safetensors").unlink(), "model.safetensors' cannot be read"),
  ],
)
def test_what_is_no_model_is_refused(change, message, directory):
  change(directory)
  with pytest.raises(UserError, match=message):
    exported.load(directory, "tiny")


def test_tensor_that_does_not_fit_is_named(directory):
  _, stored = exported.load(directory, "tiny")
  with pytest.raises(UserError, match="'b' has the shape"):
    exported.fill(stored, {"b": jax.ShapeDtypeStruct((5,), jnp.float32)})
