"""Records of tf.train.Example and of TFDS: what is read, and what is refused."""

import sys

import pytest
import tensorflow_datasets as tfds

from tests.train.record_files import write_array_record, write_tfds
from train_jax.errors import UserError
from train_jax.storage import records

FIELDS = {"word": bytes, "kind": int}
EXAMPLES = [{"word": b"one\0", "kind": 1, "more": 7}, {"word": "zwölf".encode(), "kind": 0}]
VALUES = [(b"one\0", 1), ("zwölf".encode(), 0)]


def read_all(found):
  return [found.read(i) for i in range(found.size)]


def open_files(*paths):
  return records.open_array_records(list(paths), FIELDS, "a 'word' and a 'kind'")


def open_tfds(source, fields=FIELDS):
  return records.open_tfds(source, "--words", fields, "a 'word' and a 'kind'")


@pytest.fixture
def prepared(tmp_path):
  """The directory of a builder with a text and a class."""
  features = {"word": tfds.features.Text(), "kind": tfds.features.ClassLabel(names=("a", "b"))}
  return write_tfds(tmp_path, features, [{"word": word, "kind": kind} for word, kind in VALUES])


def test_array_record_files_are_one_sequence(tmp_path):
  paths = [tmp_path / name for name in ("a", "b")]
  for path, example in zip(paths, EXAMPLES, strict=True):
    write_array_record(path, [example])
  found = open_files(*paths)
  assert read_all(found) == VALUES and found.classes == ()
  assert len({found.name(i) for i in range(2)}) == 2


def test_a_builder_is_read_by_its_directory_without_tensorflow(prepared):
  found = open_tfds(prepared)
  assert sorted(read_all(found)) == sorted(VALUES) and found.classes == ("a", "b")
  assert len({found.name(i) for i in range(2)}) == 2
  assert open_tfds(f"tfds:{prepared}@train[:1]").size == 1
  assert records.is_tfds(prepared) and records.is_tfds("tfds:x") and not records.is_tfds("x")
  assert "tensorflow" not in sys.modules


@pytest.mark.parametrize(
  "example", [{"word": b"one"}, {"word": b"one", "kind": b"1"}, {"word": 1, "kind": 1}, {}]
)
def test_examples_of_something_else_are_faults_or_refused_if_they_are_the_first(example, tmp_path):
  write_array_record(tmp_path / "a", [EXAMPLES[0], example])
  found = open_files(tmp_path / "a")
  content = "a tf.train.Example with a 'word' and a 'kind'"
  with pytest.raises(ValueError, match=f"^it is not {content}$") as error:
    found.read(1)
  assert not isinstance(error.value, UserError)  # so it is counted
  write_array_record(tmp_path / "a", [example])
  with pytest.raises(UserError, match=f"record 0 from a on is not {content}; write"):
    open_files(tmp_path / "a")


def test_files_that_are_no_records_are_refused(tmp_path):
  (tmp_path / "a").write_bytes(b"not records" * 100)
  with pytest.raises(UserError, match="a cannot be read as ArrayRecord"):
    open_files(tmp_path / "a")
  write_array_record(tmp_path / "a", [])
  with pytest.raises(UserError, match="a has no ArrayRecord records; give whole"):
    open_files(tmp_path / "a")


def test_builders_that_are_not_there_or_have_other_fields_are_refused(prepared, tmp_path):
  message = r"--words='no_such_set' is not a prepared set with a 'word' .*`tfds build no_such_set "
  with pytest.raises(UserError, match=message):
    open_tfds("tfds:no_such_set")
  with pytest.raises(UserError, match=r"--words='.*@test' is not a prepared set.*Unknown split"):
    open_tfds(f"{prepared}@test")
  (tmp_path / "empty").mkdir()
  with pytest.raises(UserError, match=r"--words='.*/empty' is not a prepared set"):
    open_tfds(str(tmp_path / "empty"))
  for fields in ({"wort": bytes}, {"word": int}):
    with pytest.raises(UserError, match="is not a prepared set"):
      open_tfds(prepared, fields)
