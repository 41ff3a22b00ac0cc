"""The large-scale protocol: comparable numbers from 50 000 samples and a reference.

`spec.py` defines the metrics. Their values depend on the decoder, the rounding, the classes, the
number of samples and the networks' files; `Runner.metadata` states all of them.

Dimensions: n samples, b batch, h w image, c channel.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ism_jax import sample
from ism_jax.evaluation import adm, fid, stream
from ism_jax.evaluation import reference as reference_lib
from ism_jax.evaluation.spec import FRECHET, METRICS, SPLITS, EvaluationSpec, check_number, column
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.files import write_json
from train_jax.metrics import progress_bar, table
from train_jax.storage.weights import sha256

MAX_FEATURES = 50_000  # samples whose features precision and recall hold: 0.4 GB
RESIZE = {  # of images in `inception.py` and `dinov2.py`
  "inception": "299x299, bilinear on TensorFlow 1's grid",
  "dinov2": "224x224, bicubic, antialiased (position grid offset 0.1)",
}


@dataclass(frozen=True)
class Runner:
  """An evaluation that is ready to run; `prepare` makes it.

  Attributes:
    shape: (h, w, c) of the samples as images, c = 3.
    draw: see `sample.make_image_sampler`.
    networks: those of the metrics.
  """

  spec: EvaluationSpec
  shape: tuple[int, int, int]
  classes: int
  mesh: jax.sharding.Mesh
  draw: Callable
  networks: tuple[stream.FeatureNetwork, ...]
  reference: reference_lib.OpenedReference | None
  vae_digest: str
  per_device: int

  @functools.cached_property
  def real(self) -> reference_lib.Real:
    """The statistics of the reference, read or computed at the first use."""
    if self.reference is None:
      return reference_lib.Real({}, None)
    kinds = self.spec.kinds
    return reference_lib.read(self.reference, kinds, self.networks, self.mesh, self.per_device)

  def metadata(self) -> dict[str, str]:
    """Everything that the numbers depend on, except n, NFE and w, which are in their names."""
    spec, image_size = self.spec, f"{self.shape[0]}x{self.shape[1]}"
    way = f"i mod {self.classes}" if spec.classes == "balanced" else "uniform, by the seed"
    metadata = {
      "vae": file_label(spec.vae, self.vae_digest) if spec.vae else "none: pixels",
      "rounding": "clipped to [-1, 1], rounded to the nearest of 256 levels",
      "resize": f"samples none ({image_size})",
      "classes": f"{spec.classes} ({way})",
      "seed": str(spec.seed),
      "reference": "none",
    }
    for network in self.networks:
      metadata["resize"] += f"; {network.name} {RESIZE[network.name]}"
      metadata[network.name] = file_label(network.file, network.digest)
    if self.reference:
      metadata["reference"] = file_label(self.reference.path, self.reference.digest)
      if self.reference.images and (cut := self.reference.images.cut):
        metadata["reference"] += f", cut by {cut}"
      origins: dict[str, list[str]] = {}
      for metric in spec.metrics:
        if metric != "is":
          origins.setdefault(self._origin(metric), []).append(metric)
      for origin, metrics in origins.items():
        metadata["reference"] += f"; {', '.join(metrics)} against {origin}"
    return metadata

  def _origin(self, metric: str) -> str:
    """The part of the reference that a metric is compared with, in words."""
    kind, images = METRICS[metric][1], self.reference.images
    if self.reference.has(kind):
      return f"its {', '.join(reference_lib.keys(kind))}"
    limit = reference_lib.MAX_FEATURES if metric == "pr" else images.n
    return f"{min(limit, images.n)} of its {images.n} images"

  def measure(
    self, params, settings: Sequence[tuple[int, float]], n: int, out: Path | None = None
  ) -> Iterator[tuple[str, float]]:
    """Yields ("fid-50k/nfe1_w0", value) and so on, from n samples for each (nfe, w).

    Args:
      out: a directory for the samples of each setting, as an ADM .npz; None for none.

    Raises:
      UserError: a sample is not finite.
    """
    check_number(self.spec.metrics, n)
    real = self.real
    for nfe, w in settings:
      statistics = self._statistics(params, nfe, w, n, out)
      for name, value in self._compare(real, statistics, n).items():
        yield f"{name}/nfe{nfe}_w{w:g}", value

  def _statistics(self, params, nfe: int, w: float, n: int, out: Path | None):
    """The statistics of n samples that the metrics need."""
    metrics = self.spec.metrics
    request = stream.Request(
      moments=[METRICS[metric][1] for metric in FRECHET if metric in metrics],
      features=np.arange(min(n, MAX_FEATURES) if "pr" in metrics else 0),
      splits=SPLITS if "is" in metrics else 0,
    )
    sizes = _feature_sizes(self.networks)
    is_primary, labels = jax.process_index() == 0, self.spec.labels(n, self.classes)
    bar = progress_bar(n, 0, is_primary, unit="img", desc=f"nfe={nfe} w={w:g}")
    # All processes gather images to be saved, and the first writes them.
    writer = nullcontext(None if out is None else lambda images: None)
    if out is not None and is_primary:
      path = out / f"samples_nfe{nfe}_w{w:g}.npz"
      writer = adm.npz_writer(path, (n, *self.shape), {"labels": labels})
    with bar, writer as write:
      batches = self._batches(params, labels, w, nfe, write)
      return stream.collect(batches, n, sizes, request, bar.update)

  def _batches(self, params, labels, w, nfe, write) -> Iterator[tuple[jax.Array, dict]]:
    """(numbers, kind -> features) of samples of the labels; `write` gets the images in order."""
    n, b = len(labels), self.per_device * mesh_lib.batch_parts(self.mesh)
    for first in range(0, n, b):
      rows = np.minimum(np.arange(first, first + b), n - 1)  # pads the last batch
      numbers, images, finite = self.draw(params, labels[rows], w, nfe, first)
      features: dict[str, Any] = {}
      for network in self.networks:
        features |= network.features(images)
      yield numbers, features
      if not mesh_lib.to_local(finite).all():
        raise UserError(
          f"samples of nfe={nfe}, guidance={w:g} are not finite; the network has diverged: go back "
          "to an earlier checkpoint."
        )
      if write:
        write(multihost_utils.process_allgather(images, tiled=True)[: n - first])

  def _compare(self, real, fake: stream.Statistics, n: int) -> dict[str, float]:
    """The metrics by the names of their columns."""
    values = {}
    for metric in self.spec.metrics:
      kind = METRICS[metric][1]
      if metric in FRECHET:
        mean, covariance = fake.moments[kind].mean, fake.moments[kind].covariance
        values[column(metric, n)] = fid.frechet_distance(*real.moments[kind], mean, covariance)
      elif metric == "is":
        values[column(metric, n)] = fid.score(fake.scores)[0]
      else:
        precision, recall = fid.precision_recall(real.features, fake.features, k=3)
        values[column("precision", len(fake.features))] = precision
        values[column("recall", len(fake.features))] = recall
    return values

  def pictures(self, params, settings, labels: np.ndarray) -> np.ndarray:
    """The first samples of each setting and these classes: uint8 [settings, labels, h, w, 3]."""
    b = self.per_device * mesh_lib.batch_parts(self.mesh)
    rows = np.minimum(np.arange(b), len(labels) - 1)
    batches = [self.draw(params, labels[rows], w, nfe, 0)[1] for nfe, w in settings]
    images = [multihost_utils.process_allgather(batch, tiled=True) for batch in batches]
    return np.stack(images)[:, : len(labels)]


def report(runner: Runner, params, step: int, out: Path, save: bool = False) -> dict[str, float]:
  """Prints `Runner.measure` of its spec's settings with its metadata, and writes them to `out`.

  `out/benchmark.json` is rewritten after each number, so finished numbers survive a killed run.

  Args:
    save: also write the samples to `out`, as ADM .npz.
  """
  is_primary, n = jax.process_index() == 0, runner.spec.samples
  out.mkdir(parents=True, exist_ok=True)
  metadata = {"step": step, "samples": n, **runner.metadata()}
  if is_primary:
    print(header(metadata), flush=True)
  record = {**metadata, "results": {}}
  for name, value in runner.measure(params, runner.spec.settings, n, out if save else None):
    record["results"][name] = value
    if is_primary:
      write_json(out / "benchmark.json", record, indent=1)
  if is_primary:
    print(table(record["results"]))
    print(f"numbers: {out / 'benchmark.json'}")
  return record["results"]


def header(metadata: dict) -> str:
  """Metadata as text, one entry a line."""
  return "\n".join(f"{name + ':':<12}{value}" for name, value in metadata.items())


def file_label(file: str | Path, digest: str) -> str:
  """The name and hash of a file."""
  return f"{Path(file).name} sha256:{digest}"


def prepare(
  spec: EvaluationSpec,
  apply: Callable,
  shape: tuple[int, int, int],
  classes: int,
  mesh: jax.sharding.Mesh,
  encoder: str = "",
  per_device: int = stream.PER_DEVICE,
) -> Runner:
  """Checks every file and loads the networks; computes nothing.

  Args:
    apply: the network s(params, x, t, d, c, w).
    shape: (h, w, c) of its output: pixels if c is 1 or 3, else latents for `spec.vae`.
    encoder: SHA-256 of the autoencoder of the training latents; "" takes any.
    per_device: samples of a batch on each device.

  Raises:
    UserError: a file is missing or does not fit the model or the metrics.
  """
  latent = shape[2] not in (1, 3)
  size = "x".join(map(str, shape))
  if latent and not spec.vae:
    raise UserError(f"this model makes latents of {size} and no decoder was given: --vae=FILE.")
  if spec.vae and not latent:
    raise UserError(f"vae={spec.vae!r} is for latents, and this model makes images of {size}.")
  digest = sha256(spec.vae)[: stream.DIGITS] if latent else ""
  if encoder and not encoder.startswith(digest):
    raise UserError(
      f"vae={spec.vae!r} (SHA-256 {digest}) is not the autoencoder of this model's latents "
      f"({encoder[:12]}); give that one."
    )
  decoder, image = None, shape
  if latent:
    from ism_jax.networks import autoencoder

    loaded = autoencoder.load(spec.vae)
    decoder = mesh_lib.replicate(loaded.params, mesh), loaded.decode
    batch = jax.ShapeDtypeStruct((1, *shape), np.float32)
    image = jax.eval_shape(loaded.decode, loaded.params, batch).shape[1:]
  image = (*image[:2], 3)  # grey images get three equal channels
  draw = sample.make_image_sampler(apply, shape, mesh, spec.seed, decoder)
  names = dict.fromkeys(METRICS[metric][0] for metric in spec.metrics)
  networks = tuple(stream.load_network(name, getattr(spec, name), mesh) for name in names)
  reference = None
  if spec.kinds:
    channels, sizes = None if latent else shape[2], _feature_sizes(networks)
    reference = reference_lib.open_reference(spec.reference, spec.kinds, sizes, image, channels)
  return Runner(spec, image, classes, mesh, draw, networks, reference, digest, per_device)


def _feature_sizes(networks: Sequence[stream.FeatureNetwork]) -> dict[str, int]:
  return {kind: f for network in networks for kind, f in network.sizes.items()}
