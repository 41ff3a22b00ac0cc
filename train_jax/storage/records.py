"""Examples in random access: tf.train.Example in ArrayRecord, and TFDS, both without TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from train_jax.errors import UserError

_LISTS = {bytes: "bytes_list", int: "int64_list"}


@dataclass(frozen=True)
class Records:
  """Examples.

  Attributes:
    size: how many.
    read: i -> the values of the fields that were asked for, in their order.
    name: i -> where it is from.
    classes: names of the classes that are numbered in an int field; () where they are unknown.
  """

  size: int
  read: Callable[[int], tuple]
  name: Callable[[int], str]
  classes: tuple[str, ...] = ()


def open_array_records(paths: list[Path], fields: dict[str, type], wanted: str) -> Records:
  """ArrayRecord files of tf.train.Example, as TFDS writes them; all of them as one sequence.

  Args:
    fields: bytes or int, by name.
    wanted: what the fields are, for errors.

  Raises:
    UserError: the files cannot be read, or hold nothing or something else; `read` raises it, too.
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
    except (DecodeError, IndexError) as err:
      raise UserError(
        f"{name(i)} is not a tf.train.Example with {wanted}; write the records so, or give what "
        "they hold in another form."
      ) from err

  if not len(source):
    raise UserError(f"{paths[0]} has no ArrayRecord records; give whole .array_record files.")
  read(0)
  return Records(len(source), read, name)


def is_tfds(source: str) -> bool:
  """Whether `source` is `tfds:NAME`, or the directory of a TFDS builder."""
  return source.startswith("tfds:") or (Path(source).expanduser() / "dataset_info.json").is_file()


def open_tfds(source: str, flag: str, fields: dict[str, type], wanted: str) -> Records:
  """A prepared TensorFlow Datasets builder; what is encoded in it, such as images, stays so.

  Args:
    source: its directory, or its name with or without `tfds:`; `@SPLIT` after it (train).
    flag: the option that named it.
    fields, wanted: see `open_array_records`; an int must be a class.

  Raises:
    UserError: not prepared, not in ArrayRecord files, or without the fields.
  """
  import tensorflow_datasets

  name = source.removeprefix("tfds:")
  where, _, split = name.partition("@")
  stored = {key: tensorflow_datasets.decode.SkipDecoding() for key in fields}
  options = {"split": split or "train", "decoders": stored}
  try:
    if (directory := Path(where).expanduser()).is_dir():
      found = tensorflow_datasets.builder_from_directory(directory).as_data_source(**options)
    else:
      found = tensorflow_datasets.data_source(where, download=False, **options)
    features = [(found.dataset_info.features[key], kind) for key, kind in fields.items()]
    classes = tuple(each for feature, kind in features if kind is int for each in feature.names)
  except (AssertionError, AttributeError, KeyError, OSError, RuntimeError, ValueError) as err:
    reason = (str(err).strip() or type(err).__name__).splitlines()[0]
    raise UserError(
      f"{flag}={name!r} is not a prepared set with {wanted} in ArrayRecord files ({reason}); "
      f"prepare it with `tfds build {where} --file_format=array_record`."
    ) from err

  def read(i: int) -> tuple:
    example = found[i]
    return tuple(kind(example[key]) for key, kind in fields.items())

  return Records(len(found), read, lambda i: f"{where}@{options['split']} {i}", classes)
