"""Files: whole or not there, of the usual mode, and refused where none can be written."""

import json

import pytest

from train_jax.errors import UserError
from train_jax.files import check_writable, whole_file, whole_path, write_json


def test_a_file_that_breaks_off_leaves_the_one_before(tmp_path):
  write_json(tmp_path / "a.json", [1])
  with pytest.raises(OSError, match="full"), whole_file(tmp_path / "a.json") as file:
    file.write(b"[2")
    raise OSError("full")
  assert json.loads((tmp_path / "a.json").read_text()) == [1]
  assert [path.name for path in tmp_path.iterdir()] == ["a.json"]  # and nothing that fills the disk


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_file_has_the_mode_of_any_new_one(tmp_path, mode):
  """Also where what writes it puts another file in its place, as safetensors does."""
  (tmp_path / "any").touch()
  with whole_path(tmp_path / "a") as partial:
    partial.unlink()
    partial.touch(mode)
    partial.write_text("whole")
  assert (tmp_path / "a").stat().st_mode == (tmp_path / "any").stat().st_mode
  assert (tmp_path / "a").read_text() == "whole"


def test_directory_that_cannot_be_written_to_is_refused(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(UserError, match=r"file/run cannot be written to .Not a directory"):
    check_writable(tmp_path / "file" / "run")
  check_writable(tmp_path / "a" / "b")
  assert [p.name for p in tmp_path.iterdir()] == ["file"]
