"""Which evaluation a config asks for: small images, latents, or the large-scale protocol."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import numpy as np

from ism_jax import path, sample
from ism_jax.data import latents, sources
from ism_jax.evaluation import classifier, pictures, runner
from ism_jax.evaluation.features import fit_classifier
from ism_jax.evaluation.spec import Protocol, balanced_labels, check_number
from ism_jax.networks import autoencoder
from train_jax.errors import UserError


def make_evaluate(
  config, source, facts: dict, apply, mesh, leak=None, held_out: sources.Source | None = None
) -> Callable:
  """`Method.evaluate` of a run: pictures and numbers, a quick part of them in training.

  Args:
    source: images or latents, see data/sources.py.
    facts: those saved with a checkpoint.
    apply: the network s(params, x, t, d, c, w), as samplers call it.
    leak: () -> the class leak of the pairing, named, once at the end; None for not at all.
    held_out: images kept from training, to which samples are compared as well.
  """
  if config.eval.get("metrics"):
    return _make_large(config, facts, apply, mesh, leak)
  sampler = sample.make_sampler(apply, source.shape, mesh)
  if isinstance(source, latents.Latents):
    if not config.eval.vae:
      return lambda params, step, final: iter(())
    return _make_grid(config, source, autoencoder.decoding(sampler, config.eval.vae, source.vae))
  if why := not_measurable(source):
    if jax.process_index() == 0:
      print(f"evaluation: a grid of samples, without numbers: {why}", flush=True)
    return _make_grid(config, source, sampler)
  return _make_small(config, source, sampler, leak, held_out)


def not_measurable(source: sources.Source) -> str:
  """Why no classifier can be fitted to the images, in a sentence; "" where one can."""
  counts = np.bincount(source.labels)
  if len(counts) > 1 and counts.min() > 1:
    return ""
  return (
    "the classifier that the numbers are taken by needs at least 2 classes of at least 2 images, "
    f"and these have {len(counts)}, the smallest of {counts.min()}"
  )


def _make_small(config, source: sources.Source, sampler, leak, held_out):
  """A grid, and the metrics of classifier.py by a classifier of what is trained on."""
  reference = functools.cache(lambda: make_reference(source, held_out))
  classes, n = len(source.names), config.eval.samples

  def run(params, step: int, final: bool):
    del step
    settings = _settings(config, final)
    number = n if final else n // 4
    sized = [(nfe, w, n // 2 if final and nfe == path.FINEST else number) for nfe, w in settings]
    yield from classifier.measure(sampler, params, reference(), classes, sized, config.seed)
    if final and leak:
      yield from leak()
    yield "grid", _sample_grid(sampler, params, source.names, settings, config.seed)

  return run


def _make_grid(config, source, sampler):
  """A grid and no numbers, where the classifier of `make_reference` does not fit the images."""

  def run(params, step: int, final: bool):
    del step
    settings = _settings(config, final)
    yield "grid", _sample_grid(sampler, params, source.names, settings, config.seed)

  return run


def _make_large(config, facts: dict, apply, mesh, leak):
  """A grid, and the metrics of runner.py that config.eval.metrics asks for.

  In training a quarter of the samples is drawn, and the columns say so.
  """
  protocol, n, names = make_protocol(config), config.eval.samples, facts["names"]
  check_number(protocol.metrics, n // 4)
  large = make_benchmark(protocol, facts, apply, mesh)

  def run(params, step: int, final: bool):
    settings, number = _settings(config, final), n if final else n // 4
    if jax.process_index() == 0:
      print(runner.header({"step": step, "samples": number, **large.facts()}), flush=True)
    yield from large.measure(params, settings, number)
    if final and leak:
      yield from leak()
    labels = _grid_labels(len(names))
    drawn = large.pictures(params, settings, labels)
    yield "grid", pictures.labelled_grid(drawn, settings, names, labels)

  return run


def _settings(config, final: bool) -> list[tuple[int, float]]:
  """(steps, strength) pairs, w = 0 always among them; in training those of a few steps."""
  most = path.FINEST if final else max(4, min(config.eval.nfe))
  nfes = sorted({nfe for nfe in config.eval.nfe if nfe <= most})
  return [(nfe, w) for nfe in nfes for w in sorted({0.0, *config.eval.guidance})]


def _grid_labels(classes: int) -> np.ndarray:
  """The classes of a grid's columns."""
  return balanced_labels(min(pictures.COLUMNS, max(classes, 8)), classes)


def _sample_grid(sampler, params, names, settings, seed: int) -> np.ndarray:
  labels = _grid_labels(len(names))
  drawn = [sample.to_uint8(sampler(params, seed, labels, w, nfe)) for nfe, w in settings]
  return pictures.labelled_grid(np.stack(drawn), settings, names, labels)


def make_protocol(config, flags=None) -> Protocol | None:
  """The large-scale protocol of config.eval, a flag winning over it; None if it has no metrics."""
  names = ("metrics", "reference", "inception", "dinov2", "vae", "classes")
  given = {name: getattr(flags, name, None) for name in names}
  chosen = {name: given[name] or config.eval.get(name) for name in names}  # older runs lack them
  if not chosen["metrics"]:
    for name in (*names, "num", "save_samples"):
      if value := getattr(flags, name, None):
        raise UserError(f"--{name}={value} is for --metrics; add --metrics=fid, or leave it out.")
    return None
  chosen["metrics"] = tuple(dict.fromkeys(chosen["metrics"]))
  return Protocol(seed=config.seed, **{k: v for k, v in chosen.items() if v})


def make_benchmark(protocol: Protocol, facts: dict, apply, mesh) -> runner.Benchmark:
  """The protocol made ready for the network of a run."""
  shape, classes = tuple(facts["shape"]), len(facts["names"])
  return runner.prepare(protocol, apply, shape, classes, mesh, facts.get("vae", ""))


def make_reference(
  source: sources.Source, held_out: sources.Source | None = None, limit: int = 10_000
) -> classifier.ClassifierReference:
  """Features of the data, by a classifier fitted on it; of a random 10k where there are more.

  At least two of each class are among them: `fit_classifier` needs as many.
  """
  order = np.random.default_rng(0).permutation(len(source.labels))
  by_class = order[np.argsort(source.labels[order], kind="stable")]
  labels = source.labels[by_class]
  pairs = by_class[labels != np.roll(labels, 2)]  # the first two of each class
  rest = order[~np.isin(order, pairs)]
  chosen = np.sort(np.concatenate([pairs, rest])[: max(limit, len(pairs))])
  images = source.images(chosen)
  kept = held_out.images(np.arange(len(held_out.labels))) if held_out else None
  return classifier.ClassifierReference.of(
    fit_classifier(images, source.labels[chosen]), images, kept
  )
