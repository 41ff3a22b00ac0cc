"""How fast stored latents are fed, against what the parts of it cost.

    python benchmarks/data.py [--records=16384] [--batch=256] [--seconds=5] [--cores=2]

Writes a set of random latents of 32 x 32 x 4 to a temporary directory (0.5 GB, so it is read from
the page cache), and times the stream that training pulls from: shuffled, random access, one of the
two views of each record. "plain loader" reads the same records one by one and stacks them. The
second column is what a core does that has nothing else to do.
Encoding is timed up to the autoencoder: JPEGs of 500 x 375 read, cut to 256 pixels and stacked.
"""

import argparse
import io
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ism_jax import data, encode, images, latents
from train_jax.metrics import table

SHAPE = (32, 32, 4)


def write_set(out: Path, records: int, shards: int = 8) -> None:
  """`records` random latents in `shards` files."""
  rng = np.random.default_rng(0)
  job = encode.Job(latents.VERSION, 256, "", "", records, shards)
  for shard in range(shards):
    writer, rows = encode.ShardWriter(out, latents.shard_name(shard, shards)), job.rows(shard)
    for start in range(rows.start, rows.stop, 256):
      n = min(256, rows.stop - start)
      posterior = rng.normal(0, 1 / latents.SCALE, (n, 2, 2, *SHAPE)).astype(np.float16)
      posterior[:, :, 1] = 0.1
      writer.write(posterior, ["?"] * n, [i % 1000 for i in range(start, start + n)])
    writer.finish(job, [])
  encode.write_manifest(out, job, tuple(map(str, range(1000))), SHAPE)


def rate(step, rows: int, seconds: float) -> tuple[float, float]:
  """(rows a second, rows a second of processor time) of `step()`, which handles `rows` of them."""
  step()
  start, processor, count = time.perf_counter(), time.process_time(), 0
  while time.perf_counter() - start < seconds:
    step()
    count += rows
  return count / (time.perf_counter() - start), count / (time.process_time() - processor)


def one_by_one(top: Path, index):
  """The plain loader: a read and an unpacking for each example, stacked."""
  source = ArrayRecordDataSource(sorted(top.glob("*.array_record")))
  dtype = latents.record_dtype(SHAPE)

  def step():
    records = [(np.frombuffer(source[i // 2], dtype)[0], i % 2) for i in next(index)]
    return {
      name: np.stack([record["posterior"][view, part] for record, view in records])
      for part, name in enumerate(("mean", "std"))
    }

  return step


def photo(i: int) -> bytes:
  """A JPEG of about ImageNet's size."""
  noise = np.random.default_rng(i).integers(0, 256, (24, 32, 3)).astype(np.uint8)
  file = io.BytesIO()
  Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(file, "jpeg")
  return file.getvalue()


def main(args) -> None:
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
  rows: dict[str, float] = {}
  with tempfile.TemporaryDirectory() as top:
    write_set(Path(top), args.records)
    source = latents.open_set(top)
    noise = lambda number: np.zeros(args.batch, np.int32)  # noqa: E731
    stream = data.stream(source, args.batch, slice(0, args.batch), 0, 0, noise, 1)
    order = data.batches(source, args.batch, 0)
    positions = iter(range(10**9))
    plain = one_by_one(Path(top), (order(i) for i in positions))
    jobs = {
      "stream of batches": lambda: next(stream),
      "means for the pairing": lambda: source.images(order(next(positions))),
      "plain loader": plain,
    }
    for name, job in jobs.items():
      measured = rate(job, args.batch, args.seconds)
      rows[f"latents a second/{name}"], rows[f"a second of processor time/{name}"] = measured
    stream.close()
  print(table(rows))

  jpegs = [photo(i) for i in range(64)]
  found = images.Images(10**6, (), lambda i: (jpegs[i % 64], 0), str)
  with ThreadPoolExecutor() as pool:
    reader = images.read_batches(found, range(10**6), 32, 256, pool)
    speed, busy = rate(
      lambda: np.stack([pixels for _, pixels, _ in next(reader)]), 32, args.seconds
    )
  name = "JPEG to 256 pixels"
  print(table({f"images a second/{name}": speed, f"a second of processor time/{name}": busy}))


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--records", type=int, default=16384)
  parser.add_argument("--batch", type=int, default=256)
  parser.add_argument("--seconds", type=float, default=5.0)
  parser.add_argument("--cores", type=int, default=2)
  main(parser.parse_args())
