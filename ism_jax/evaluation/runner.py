"""The large-scale protocol: 50 000 samples against a reference, in numbers that can be compared.

What is measured is the business of `spec.py`. Such numbers move with the decoder, the rounding,
the classes that were asked for, the number of samples and the networks' files; so
`Runner.metadata` states all of them.

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

KEPT = 50_000  # samples whose features precision and recall hold, at most: 0.4 GB
RESIZE = {  # what `inception.py` and `dinov2.py` do to the images they are given
  "inception": "299x299, bilinear on TensorFlow 1's grid",
  "dinov2": "224x224, bicubic, antialiased (position grid offset 0.1)",
}


@dataclass(frozen=True)
class Runner:
  """An evaluation made ready: files looked at, networks loaded, nothing computed. See `prepare`.

  Attributes:
    shape: (h, w, c) of the samples as images, c = 3.
    draw: see `sample.make_image_sampler`.
    networks: those that the metrics need.
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
    """The reference's side, read or computed at the first use."""
    if self.reference is None:
      return reference_lib.Real({}, None)
    kinds = self.spec.kinds
    return reference_lib.read(self.reference, kinds, self.networks, self.mesh, self.per_device)

  def metadata(self) -> dict[str, str]:
    """What has to be known beside the numbers, but for n, NFE and w, which name them."""
    spec, image_size = self.spec, f"{self.shape[0]}x{self.shape[1]}"
    way = f"i mod {self.classes}" if spec.classes == "balanced" else "uniform, by the seed"
    metadata = {
      "vae": named(spec.vae, self.vae_digest) if spec.vae else "none: pixels",
      "rounding": "clipped to [-1, 1], rounded to the nearest of 256 levels",
      "resize": f"samples none ({image_size})",
      "classes": f"{spec.classes} ({way})",
      "seed": str(spec.seed),
      "reference": "none",
    }
    for network in self.networks:
      metadata["resize"] += f"; {network.name} {RESIZE[network.name]}"
      metadata[network.name] = named(network.file, network.digest)
    if self.reference:
      metadata["reference"] = named(self.reference.path, self.reference.digest)
      if self.reference.images and (cut := self.reference.images.cut):
        metadata["reference"] += f", cut by {cut}"
      against: dict[str, list[str]] = {}
      for metric in spec.metrics:
        if metric != "is":
          against.setdefault(self._compared(metric), []).append(metric)
      for what, metrics in against.items():
        metadata["reference"] += f"; {', '.join(metrics)} against {what}"
    return metadata

  def _compared(self, metric: str) -> str:
    kind, images = METRICS[metric][1], self.reference.images
    if self.reference.has(kind):
      return f"its {', '.join(reference_lib.keys(kind))}"
    limit = reference_lib.KEPT if metric == "pr" else images.n
    return f"{min(limit, images.n)} of its {images.n} images"

  def measure(
    self, params, settings: Sequence[tuple[int, float]], n: int, out: Path | None = None
  ) -> Iterator[tuple[str, float]]:
    """Yields ("fid-50k/nfe1_w0", value) and so on, from n samples for each (nfe, w).

    Args:
      out: where to leave the samples of each setting as an ADM .npz; None for nowhere.

    Raises:
      UserError: a sample is not finite.
    """
    check_number(self.spec.metrics, n)
    real = self.real
    for nfe, w in settings:
      found = self._statistics(params, nfe, w, n, out)
      for name, value in self._compare(real, found, n).items():
        yield f"{name}/nfe{nfe}_w{w:g}", value

  def _statistics(self, params, nfe: int, w: float, n: int, out: Path | None):
    """Draws n samples and takes what the metrics need of them."""
    metrics = self.spec.metrics
    wanted = stream.Wanted(
      moments=[METRICS[metric][1] for metric in FRECHET if metric in metrics],
      kept=np.arange(min(n, KEPT) if "pr" in metrics else 0),
      splits=SPLITS if "is" in metrics else 0,
    )
    sizes = {kind: f for network in self.networks for kind, f in network.sizes.items()}
    is_primary, labels = jax.process_index() == 0, self.spec.labels(n, self.classes)
    bar = progress_bar(n, 0, is_primary, unit="img", desc=f"nfe={nfe} w={w:g}")
    writer = nullcontext(None)
    if out is not None and is_primary:
      path = out / f"samples_nfe{nfe}_w{w:g}.npz"
      writer = adm.npz_writer(path, (n, *self.shape), {"labels": labels})
    with writer as write:
      write = write or (lambda images: None)
      batches = self._batches(params, labels, w, nfe, write if out is not None else None)
      found = stream.collect(batches, n, sizes, wanted, bar.update)
    bar.close()
    return found

  def _batches(self, params, labels, w, nfe, write) -> Iterator[tuple[jax.Array, dict]]:
    """(numbers, kind -> features) of samples of the labels; `write` gets the images in order."""
    n, b = len(labels), self.per_device * mesh_lib.batch_parts(self.mesh)
    for first in range(0, n, b):
      rows = np.minimum(np.arange(first, first + b), n - 1)  # the last batch is filled up
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

  def _compare(self, real, found: stream.Statistics, n: int) -> dict[str, float]:
    """The metrics by the names of their columns."""
    values = {}
    for metric in self.spec.metrics:
      kind = METRICS[metric][1]
      if metric in FRECHET:
        fake = found.moments[kind]
        distance = fid.frechet_distance(*real.moments[kind], fake.mean, fake.covariance)
        values[column(metric, n)] = distance
      elif metric == "is":
        values[column(metric, n)] = fid.score(found.scores)[0]
      else:
        precision, recall = fid.precision_recall(real.features, found.kept, k=3)
        values[column("precision", len(found.kept))] = precision
        values[column("recall", len(found.kept))] = recall
    return values

  def pictures(self, params, settings, labels: np.ndarray) -> np.ndarray:
    """The first samples of each (nfe, w), of these classes: uint8 [settings, labels, h, w, 3]."""
    b = self.per_device * mesh_lib.batch_parts(self.mesh)
    rows = np.minimum(np.arange(b), len(labels) - 1)
    drawn = [self.draw(params, labels[rows], w, nfe, 0)[1] for nfe, w in settings]
    whole = [multihost_utils.process_allgather(images, tiled=True) for images in drawn]
    return np.stack(whole)[:, : len(labels)]


def report(runner: Runner, params, step: int, out: Path, save: bool = False) -> dict[str, float]:
  """`Runner.measure` of its spec's settings, printed with its metadata and written to `out`.

  `out/benchmark.json` is written anew after each number: what was measured survives a run that is
  cut off.

  Args:
    save: also leave the samples in `out`, as ADM .npz.
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
  """Facts as text, one a line."""
  return "\n".join(f"{name + ':':<12}{value}" for name, value in metadata.items())


def named(file: str | Path, digest: str) -> str:
  """A file by its name and hash."""
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
  """Looks at every file and loads the networks; computes nothing.

  Args:
    apply: the network s(params, x, t, d, c, w).
    shape: (h, w, c) of what it makes: pixels where c is 1 or 3, else latents for `spec.vae`.
    encoder: SHA-256 of the autoencoder whose latents were trained on; "" takes any.
    per_device: samples of a batch on each device.

  Raises:
    UserError: whatever would go wrong later.
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
  decoder = _load_decoder(spec.vae, mesh) if latent else None
  draw = sample.make_image_sampler(apply, shape, mesh, spec.seed, decoder)
  names = dict.fromkeys(METRICS[metric][0] for metric in spec.metrics)
  networks = [stream.load_network(name, getattr(spec, name), mesh) for name in names]
  sizes = {kind: f for network in networks for kind, f in network.sizes.items()}
  image, opened = _image_shape(shape, decoder), None
  if spec.kinds:
    opened = reference_lib.open_reference(
      spec.reference, spec.kinds, sizes, image, None if latent else shape[2]
    )
  return Runner(spec, image, classes, mesh, draw, tuple(networks), opened, digest, per_device)


def _image_shape(shape: tuple[int, int, int], decoder) -> tuple[int, int, int]:
  """(h, w, 3) of the images that samples of `shape` become."""
  if decoder:
    params, decode = decoder
    shape = jax.eval_shape(decode, params, jax.ShapeDtypeStruct((1, *shape), np.float32)).shape[1:]
  return (*shape[:2], 3)


def _load_decoder(file: str, mesh: jax.sharding.Mesh) -> tuple[Any, Callable]:
  """(parameters, decode) of a VAE."""
  from ism_jax.networks import autoencoder

  loaded = autoencoder.load(file)
  return mesh_lib.replicate(loaded.params, mesh), loaded.decode
