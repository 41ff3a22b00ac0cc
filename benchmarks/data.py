"""How fast each pipeline feeds, against what its parts cost, and what training waits for it.

    python benchmarks/data.py [--records=16384] [--batch=256] [--seconds=5] [--cores=2] [--steps=20]

Latents: writes a set of random latents of 32 x 32 x 4 to a temporary directory (0.5 GB, so it is
read from the page cache), and times the stream that training pulls from: shuffled, random access,
one of the two views of each record. "plain loader" reads the same records one by one and stacks
them. The second column is what a core does that has nothing else to do.
Encoding is timed up to the autoencoder: JPEGs of 500 x 375 read, cut to 256 pixels and stacked.
Questions and texts: with noise, as trees in batches. The last table trains on each pipeline and on
one batch again and again, in turn; with random pairs, as sinkhorn.py has what pairing adds.
"""

import argparse
import io
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from PIL import Image
from timing import in_turn, show
from train_step import Step, get_config

from ism_jax.data import encode, images, latents, sources
from train_jax import mesh as mesh_lib

SHAPE = (32, 32, 4)
TRAINED = "ism_digits;seqmatch_arithmetic;seqmatch_text"


def write_set(out: Path, records: int, shards: int = 8) -> None:
  """`records` random latents in `shards` files."""
  rng = np.random.default_rng(0)
  metadata = {"version": latents.VERSION, "vae": "", "shards": shards}
  job = encode.Job(*encode.KIND, records, shards, metadata)
  for shard in range(shards):
    writer, rows = encode.ShardWriter(out, job, shard), job.rows(shard)
    for start in range(rows.start, rows.stop, 256):
      n = min(256, rows.stop - start)
      posterior = rng.normal(0, 1 / latents.SCALE, (n, 2, 2, *SHAPE)).astype(np.float16)
      posterior[:, :, 1] = 0.1
      writer.write(posterior, ["?"] * n, [i % 1000 for i in range(start, start + n)])
    writer.finish([])
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


def latent_rates(args) -> dict[str, float]:
  """Rows of the first table: latents a second, of wall time and of processor time."""
  rows: dict[str, float] = {}
  with tempfile.TemporaryDirectory() as top:
    write_set(Path(top), args.records)
    source = latents.open_set(top)
    noise = lambda number: np.zeros(args.batch, np.int32)  # noqa: E731
    stream = sources.stream(source, args.batch, slice(0, args.batch), 0, 0, noise, 1)
    order = sources.batches(source, args.batch, 0)
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
  return rows


def image_rates(args) -> dict[str, float]:
  """JPEGs read and cut a second."""
  jpegs = [photo(i) for i in range(64)]
  found = images.EncodedImages(10**6, (), lambda i: (jpegs[i % 64], 0), str)
  with ThreadPoolExecutor() as pool:
    reader = images.read_batches(found, range(10**6), 32, 256, pool)
    job = lambda: np.stack([image.pixels for _, image in next(reader)])  # noqa: E731
    speed, busy = rate(job, 32, args.seconds)
  name = "JPEG to 256 pixels"
  return {f"images a second/{name}": speed, f"a second of processor time/{name}": busy}


def token_rates(steps: dict[str, Step], seconds: float) -> dict[str, float]:
  """Nodes of the trees a second, padding not counted."""
  rows = {}
  for name, step in steps.items():
    tokens = int(np.sum(np.asarray(step.batch["token"]) > 0))
    measured = rate(lambda step=step: next(step.stream), tokens, seconds)
    rows[f"tokens a second/{name}"], rows[f"a second of processor time/{name}"] = measured
  return rows


def make_step(name: str, n: int) -> Step:
  """A config whose rollouts, if it has any, come once in `n` steps."""
  config = get_config(name)
  if config.method == "seqmatch":
    config.buffer.refresh = n
  return Step(config)


def waiting(steps: dict[str, Step], rounds: int, n: int) -> dict[str, float]:
  """Milliseconds a step on data and on one batch, and their ratio."""

  def on_data(step: Step):
    for _ in range(n):
      batch = mesh_lib.to_global(next(step.stream), step.mesh)
      step.state, _ = step.step(step.state, batch)
    return step.state

  rows = {}
  for name, step in steps.items():
    jobs = {"one batch": lambda step=step: step.run(n), "data": lambda step=step: on_data(step)}
    seconds = in_turn(jobs, rounds)
    for job, value in seconds.items():
      rows[f"ms a step/{name}, {job}"] = 1e3 * value / n
      rows[f"ratio/{name}, {job}"] = value / seconds["one batch"]
  return rows


def main(args) -> None:
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.cores])
  tables = {"latents": latent_rates(args), "images to encode": image_rates(args)}
  steps = {name: make_step(name, args.steps) for name in args.configs.split(";")}
  texts = {name: step for name, step in steps.items() if step.config.method == "seqmatch"}
  tables["questions and texts"] = token_rates(texts, args.seconds)
  tables["training"] = waiting(steps, args.rounds, args.steps)
  show("data", tables)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--records", type=int, default=16384)
  parser.add_argument("--batch", type=int, default=256)
  parser.add_argument("--seconds", type=float, default=5.0)
  parser.add_argument("--cores", type=int, default=2)
  parser.add_argument("--configs", default=TRAINED, help="NAME[:OPTIONS], separated by ;")
  parser.add_argument("--rounds", type=int, default=4)
  parser.add_argument("--steps", type=int, default=20, help="in each turn of a round")
  main(parser.parse_args())
