"""The large-scale protocol: 50 000 samples against a reference, in numbers that can be compared.

    fid, sfid    Fréchet distance of Inception's pooled and spatial features (arXiv 1706.08500,
                 2103.03841)
    fd_dinov2    Fréchet distance of DINOv2's features (arXiv 2306.04675)
    is           inception score (arXiv 1606.03498)
    pr           improved precision and recall, k = 3, of Inception's pooled features (arXiv
                 1904.06991, with the features of ADM)

Such numbers move with the decoder, the rounding, the classes that were asked for and the number of
samples; so `Benchmark.facts` states all of them, and a column is called fid-50k only if it is.

Dimensions: n samples, b batch, h w image, c channel.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ism_jax import adm, evaluate, extract, fid, sample
from ism_jax import reference as reference_lib
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.metrics import progress_bar, table

# metric -> the network that it needs, and what of its features
METRICS = {
  "fid": ("inception", "pool"),
  "sfid": ("inception", "spatial"),
  "fd_dinov2": ("dinov2", "dinov2"),
  "is": ("inception", "logits"),
  "pr": ("inception", "features"),
}
FRECHET = ("fid", "sfid", "fd_dinov2")
SPLITS = 10  # of the inception score
KEPT = 50_000  # samples whose features precision and recall hold, at most: 0.4 GB
RESIZE = {
  "inception": "299x299, bilinear on TensorFlow 1's grid",
  "dinov2": "224x224, bicubic, antialiased",
}


@dataclass(frozen=True)
class Protocol:
  """What to measure against what.

  Attributes:
    metrics: of METRICS.
    reference: an ADM .npz or a folder of images.
    inception, dinov2, vae: files of weights; "" where none is needed.
    classes: balanced (sample i is of class i mod classes) or random (uniform, by the seed).
    seed: of noise and classes.
  """

  metrics: tuple[str, ...]
  reference: str = ""
  inception: str = ""
  dinov2: str = ""
  vae: str = ""
  classes: str = "balanced"
  seed: int = 0

  def __post_init__(self):
    for metric in self.metrics:
      if metric not in METRICS:
        raise UserError(f"the metric {metric!r} is unknown; choose from {', '.join(METRICS)}.")
      network = METRICS[metric][0]
      if not getattr(self, network):
        raise UserError(f"the metric {metric!r} needs the weights of a network: --{network}=FILE.")
    if not self.reference and self.metrics != ("is",):
      raise UserError(
        "no reference was given to compare with: --reference=FILE, an .npz or folder."
      )
    if self.classes not in ("balanced", "random"):
      raise UserError(f"classes={self.classes!r} is unknown; choose 'balanced' or 'random'.")
    for name in ("inception", "dinov2", "vae"):
      file = getattr(self, name)
      if file and not Path(file).expanduser().is_file():
        raise UserError(f"{name}={file!r} is not a file; give its weights as .safetensors.")


def column(metric: str, n: int) -> str:
  """How a number from n samples is called: fid-50k from 50 000, fid@2000 from 2000."""
  return f"{metric}-50k" if n == 50_000 else f"{metric}@{n}"


def check_number(metrics: Sequence[str], n: int) -> None:
  """Raises UserError if n samples are too few for the metrics."""
  least = max({"is": SPLITS, "pr": 4}.get(metric, 2) for metric in metrics)
  if n < least:
    raise UserError(f"{n} samples are too few for {', '.join(metrics)}; draw at least {least}.")


@dataclass(frozen=True)
class Benchmark:
  """A protocol made ready: files looked at, networks loaded, nothing computed. See `prepare`.

  Attributes:
    shape: (h, w, c) of the samples as images, c = 3.
    draw: see `sample.make_image_sampler`.
    networks: those that the metrics need.
  """

  protocol: Protocol
  shape: tuple[int, int, int]
  classes: int
  mesh: jax.sharding.Mesh
  draw: Callable
  networks: tuple[extract.Network, ...]
  reference: reference_lib.Reference | None
  vae_digest: str
  per_device: int

  @functools.cached_property
  def real(self) -> reference_lib.Real:
    """The reference's side, read or computed at the first use."""
    if self.reference is None:
      return reference_lib.Real({}, None)
    kinds = _kinds(self.protocol.metrics)
    return reference_lib.read(self.reference, kinds, self.networks, self.mesh, self.per_device)

  def facts(self) -> dict[str, str]:
    """What has to be known beside the numbers, but for n, NFE and w, which name them."""
    protocol, side = self.protocol, f"{self.shape[0]}x{self.shape[1]}"
    way = f"i mod {self.classes}" if protocol.classes == "balanced" else "uniform, by the seed"
    facts = {
      "vae": named(protocol.vae, self.vae_digest) if protocol.vae else "none: pixels",
      "rounding": "clipped to [-1, 1], rounded to the nearest of 256 levels",
      "resize": f"samples none ({side})",
      "classes": f"{protocol.classes} ({way})",
      "seed": str(protocol.seed),
      "reference": "none",
    }
    for network in self.networks:
      facts["resize"] += f"; {network.name} {RESIZE[network.name]}"
      facts[network.name] = named(network.file, network.digest)
    if self.reference:
      facts["reference"] = named(self.reference.path, self.reference.digest)
      for metric in protocol.metrics:
        if METRICS[metric][1] != "logits":
          facts["reference"] += f"; {metric} against {self._compared(metric)}"
    return facts

  def _compared(self, metric: str) -> str:
    kind, images = METRICS[metric][1], self.reference.images
    if self.reference.has(kind):
      return f"its {', '.join(reference_lib.keys(kind))}"
    limit = reference_lib.KEPT if metric == "pr" else images.n
    return f"{min(limit, images.n)} of its {images.n} images"

  def labels(self, n: int) -> np.ndarray:
    """The classes int32 [n] that samples are asked to be of."""
    if self.protocol.classes == "balanced":
      return evaluate.balanced_labels(n, self.classes)
    return evaluate.random_labels(n, self.classes, self.protocol.seed)

  def measure(
    self, params, settings: Sequence[tuple[int, float]], n: int, out: Path | None = None
  ) -> Iterator[tuple[str, float]]:
    """Yields ("fid-50k/nfe1_w0", value) and so on, from n samples for each (nfe, w).

    Args:
      out: where to leave the samples of each setting as an ADM .npz; None for nowhere.

    Raises:
      UserError: a sample is not finite.
    """
    check_number(self.protocol.metrics, n)
    real = self.real
    for nfe, w in settings:
      found = self._statistics(params, nfe, w, n, out)
      for name, value in self._compare(real, found, n).items():
        yield f"{name}/nfe{nfe}_w{w:g}", value

  def _statistics(self, params, nfe: int, w: float, n: int, out: Path | None):
    """Draws n samples and takes what the metrics need of them."""
    metrics = self.protocol.metrics
    wanted = extract.Wanted(
      moments=[METRICS[metric][1] for metric in FRECHET if metric in metrics],
      kept=np.arange(min(n, KEPT) if "pr" in metrics else 0),
      splits=SPLITS if "is" in metrics else 0,
    )
    sizes = {kind: f for network in self.networks for kind, f in network.sizes.items()}
    chief, labels = jax.process_index() == 0, self.labels(n)
    bar = progress_bar(n, 0, chief, unit="img", desc=f"nfe={nfe} w={w:g}")
    writer = nullcontext(None)
    if out is not None and chief:
      path = out / f"samples_nfe{nfe}_w{w:g}.npz"
      writer = adm.npz_writer(path, (n, *self.shape), {"labels": labels})
    with writer as write:
      write = write or (lambda images: None)
      batches = self._batches(params, labels, w, nfe, write if out is not None else None)
      found = extract.collect(batches, n, sizes, wanted, bar.update)
    bar.close()
    return found

  def _batches(self, params, labels, w, nfe, write) -> Iterator[tuple[jax.Array, dict]]:
    """(numbers, kind -> features) of samples of the labels; `write` gets the images in order."""
    n, b = len(labels), self.per_device * self.mesh.size
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

  def _compare(self, real, found: extract.Statistics, n: int) -> dict[str, float]:
    """The metrics by the names of their columns."""
    values = {}
    for metric in self.protocol.metrics:
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
    b = self.per_device * self.mesh.size
    rows = np.minimum(np.arange(b), len(labels) - 1)
    drawn = [self.draw(params, labels[rows], w, nfe, 0)[1] for nfe, w in settings]
    whole = [multihost_utils.process_allgather(images, tiled=True) for images in drawn]
    return np.stack(whole)[:, : len(labels)]


def report(
  benchmark: Benchmark, params, step: int, settings, n: int, out: Path, save: bool = False
) -> None:
  """`Benchmark.measure`, printed with its facts and written to `out/benchmark.json`.

  The file is written anew after each setting: what was measured survives a run that is cut off.

  Args:
    save: also leave the samples in `out`, as ADM .npz.
  """
  chief = jax.process_index() == 0
  out.mkdir(parents=True, exist_ok=True)
  record = {"step": step, "samples": n, **benchmark.facts(), "results": {}}
  for name, value in benchmark.measure(params, settings, n, out if save else None):
    record["results"][name] = value
    if chief:
      partial = out / "benchmark.json.partial"
      partial.write_text(json.dumps(record, indent=1))
      partial.replace(out / "benchmark.json")
  if chief:
    print(header({"step": step, "samples": n, **benchmark.facts()}))
    print(table(record["results"]))
    print(f"numbers: {out / 'benchmark.json'}")


def header(facts: dict) -> str:
  """Facts as text, one a line."""
  return "\n".join(f"{name + ':':<12}{value}" for name, value in facts.items())


def named(file: str | Path, digest: str) -> str:
  """A file by its name and hash."""
  return f"{Path(file).name} sha256:{digest}"


def _kinds(metrics: Sequence[str]) -> list[str]:
  """What the metrics need of a reference."""
  return [kind for metric, (_, kind) in METRICS.items() if metric in metrics and kind != "logits"]


def prepare(
  protocol: Protocol,
  apply: Callable,
  shape: tuple[int, int, int],
  classes: int,
  mesh: jax.sharding.Mesh,
  per_device: int = extract.PER_DEVICE,
) -> Benchmark:
  """Looks at every file and loads the networks; computes nothing.

  Args:
    apply: the network s(params, x, t, d, c, w).
    shape: (h, w, c) of what it makes: pixels where c is 1 or 3, else latents for `protocol.vae`.
    per_device: samples of a batch on each device.

  Raises:
    UserError: whatever would go wrong later.
  """
  latent = shape[2] not in (1, 3)
  if latent != bool(protocol.vae):
    what = "latents, which need a decoder: give --vae" if latent else "pixels: leave --vae out"
    raise UserError(f"this model makes {shape[0]}x{shape[1]}x{shape[2]} {what}.")
  decoder = _load_decoder(protocol.vae, mesh) if latent else None
  draw = sample.make_image_sampler(apply, shape, mesh, protocol.seed, decoder)
  names = dict.fromkeys(METRICS[metric][0] for metric in protocol.metrics)
  networks = [extract.load_network(name, getattr(protocol, name), mesh) for name in names]
  side = 8 * shape[0] if latent else shape[0]
  image = (side, 8 * shape[1] if latent else shape[1], 3)
  sizes = {kind: f for network in networks for kind, f in network.sizes.items()}
  opened, kinds = None, _kinds(protocol.metrics)
  if kinds:
    opened = reference_lib.open_reference(protocol.reference, kinds, sizes, image)
  digest = extract.sha256(protocol.vae) if latent else ""
  return Benchmark(
    protocol, image, classes, mesh, draw, tuple(networks), opened, digest, per_device
  )


def _load_decoder(file: str, mesh: jax.sharding.Mesh) -> tuple[Any, Callable]:
  """(parameters, decode) of a VAE."""
  from ism_jax import autoencoder

  loaded = autoencoder.load(file, "float32")
  return mesh_lib.replicate(loaded.params, mesh), loaded.decode
