"""Records with random access: tf.train.Example in ArrayRecord, and TFDS, without TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from train_jax.errors import UserError

_LISTS = {bytes: "bytes_list", int: "int64_list"}


@dataclass(frozen=True)
class Records:
  """A set of records.

  Attributes:
    size: number of records.
    read: i -> the values of record i, one for each field.
    name: i -> the record's origin, for messages.
    classes: names of the classes that an int field numbers; () if they are unknown.
  """

  size: int
  read: Callable[[int], tuple]
  name: Callable[[int], str]
  classes: tuple[str, ...] = ()


def open_array_records(paths: list[Path], fields: dict[str, type], content: str) -> Records:
  """ArrayRecord files of tf.train.Example, as TFDS writes them, as one sequence.

  Args:
    fields: bytes or int, by name.
    content: description of the fields, for messages.

  Raises:
    UserError: the files cannot be read, are empty or begin with something else; `read` raises
      ValueError for a record that is something else.
  """
  from array_record.python.array_record_data_source import ArrayRecordDataSource
  from google.protobuf.message import DecodeError
  from tensorflow_datasets.proto import tf_example_pb2

  try:
    source = ArrayRecordDataSource([str(path) for path in paths])
  except (RuntimeError, ValueError, OSError) as err:
    raise UserError(f"{paths[0]} cannot be read as ArrayRecord: {err}") from err

  def name(i: int) -> str:
    return f"record {i} from {paths[0].name} on"

  def read(i: int) -> tuple:
    try:
      feature = tf_example_pb2.Example.FromString(source[i]).features.feature
      return tuple(getattr(feature[key], _LISTS[kind]).value[0] for key, kind in fields.items())
    except (DecodeError, IndexError, RuntimeError) as err:
      raise ValueError(f"it is not a tf.train.Example with {content}") from err

  if not len(source):
    raise UserError(f"{paths[0]} has no ArrayRecord records; give whole .array_record files.")
  try:
    read(0)
  except ValueError as err:
    raise UserError(
      f"{name(0)} is not a tf.train.Example with {content}; write the records so, or give the data "
      "in another form."
    ) from err
  return Records(len(source), read, name)


def is_tfds(source: str) -> bool:
  """Whether `source` is `tfds:NAME` or the directory of a TFDS builder."""
  return source.startswith("tfds:") or (Path(source).expanduser() / "dataset_info.json").is_file()


def open_tfds(source: str, flag: str, fields: dict[str, type], content: str) -> Records:
  """A prepared set of TensorFlow Datasets; encoded fields, such as images, are not decoded.

  Args:
    source: its directory or its name, after `tfds:` or not, and `@SPLIT` (default: train).
    flag: the option that has `source`, for messages.
    fields, content: see `open_array_records`; an int must be a class.

  Raises:
    UserError: the set is not prepared, not in ArrayRecord files, or lacks a field.
  """
  import tensorflow_datasets

  name = source.removeprefix("tfds:")
  dataset, _, split = name.partition("@")
  decoders = {key: tensorflow_datasets.decode.SkipDecoding() for key in fields}
  options = {"split": split or "train", "decoders": decoders}
  try:
    if (directory := Path(dataset).expanduser()).is_dir():
      records = tensorflow_datasets.builder_from_directory(directory).as_data_source(**options)
    else:
      records = tensorflow_datasets.data_source(dataset, download=False, **options)
    features = [(records.dataset_info.features[key], kind) for key, kind in fields.items()]
    classes = tuple(name for feature, kind in features if kind is int for name in feature.names)
  except (AssertionError, AttributeError, KeyError, OSError, RuntimeError, ValueError) as err:
    reason = (str(err).strip() or type(err).__name__).splitlines()[0]
    raise UserError(
      f"{flag}={name!r} is not a prepared set with {content} in ArrayRecord files ({reason}); "
      f"prepare it with `tfds build {dataset} --file_format=array_record`."
    ) from err

  def read(i: int) -> tuple:
    record = records[i]
    return tuple(kind(record[key]) for key, kind in fields.items())

  return Records(len(records), read, lambda i: f"{dataset}@{options['split']} {i}", classes)
