"""Small files of records: tf.train.Example in ArrayRecord, and the directory of a TFDS builder."""

from pathlib import Path

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2


def write_array_record(path: Path, examples: list[dict[str, bytes | int]]) -> None:
  """One file of these examples."""
  writer = ArrayRecordWriter(str(path), "group_size:1")
  for values in examples:
    example = tf_example_pb2.Example()
    for name, value in values.items():
      feature = example.features.feature[name]
      kind = feature.int64_list if isinstance(value, int) else feature.bytes_list
      kind.value.append(value)
    writer.write(example.SerializeToString())
  writer.close()


def write_tfds(top: Path, features: dict, examples: list[dict]) -> str:
  """A prepared builder under `top` with one split, train; returns its directory."""

  class Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      yield from enumerate(examples)

  builder = Small(data_dir=str(top), file_format="array_record")
  builder.download_and_prepare()
  return str(builder.data_dir)
