"""Which evaluation a run has: of small images, of latents, or by pretrained networks.

Dimensions: n samples.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from ism_jax import path, sample
from ism_jax.data import from_config, latents, sources
from ism_jax.evaluation import classifier, pictures, runner
from ism_jax.evaluation.features import fit_classifier
from ism_jax.evaluation.spec import EvaluationSpec, balanced_labels
from ism_jax.model import Model
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.metrics import report

# (model, the full protocol?) -> (name, number or picture) one by one
Evaluation = Callable[[Model, bool], Iterator[tuple[str, Any]]]


def make_spec(config, **choices) -> EvaluationSpec:
  """The evaluation of `config.eval`; `choices` are fields that win over it."""
  return EvaluationSpec(**{"seed": config.seed, **config.eval, **choices})


def make_evaluate(
  spec: EvaluationSpec,
  model: Model,
  source: sources.Source | latents.Latents,
  held_out: sources.Source | None = None,
  leak: Callable[[], Iterator] | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> Evaluation:
  """The evaluation of a run while it trains: pictures and numbers, a quick part of them.

  Args:
    model: of the run; its parameters are not read.
    source: what is trained on.
    held_out: images kept from training, to which samples are compared as well.
    leak: () -> the class leak of the pairing, named, once at the end; None for not at all.
    mesh: where pretrained networks are used.
  """
  leak = leak or (lambda: iter(()))
  if spec.metrics:
    return _make_large(spec, make_runner(spec, model, mesh), leak)
  if isinstance(source, latents.Latents):
    return _make_grid(spec) if model.vae else lambda model, final: iter(())
  if why := not_measurable(source):
    if jax.process_index() == 0:
      print(f"evaluation: a grid of samples, without numbers: {why}", flush=True)
    return _make_grid(spec)
  return _make_small(spec, source, held_out, leak)


def evaluate(
  model: Model, out: str | Path | None, seed: int, save_samples: bool, choices: dict
) -> dict[str, float]:
  """`Model.evaluate`: the full protocol for a trained network."""
  config, metadata = (model.record["run"][name] for name in ("config", "metadata"))
  config = ConfigDict(config)
  if choices.get("metrics") and "samples" not in choices:
    choices = {**choices, "samples": 50_000}
  if model.vae:
    choices = {**choices, "vae": model.vae}
  spec = make_spec(config, seed=seed, **choices)
  path.check_settings(spec.nfe, spec.guidance, model.w_max)
  mesh = model.mesh or mesh_lib.make_mesh(devices=jax.local_devices()[:1])
  if spec.metrics:
    large = make_runner(spec, model, mesh)
    if out is None:
      return dict(large.measure(model.params, spec.settings, spec.samples))
    return runner.report(large, model.params, model.step, Path(out), save_samples)
  for name in ("reference", "inception", "dinov2", "vae"):
    if choices.get(name):
      raise UserError(
        f"--{name}={choices[name]} is for --metrics; add --metrics=fid, or leave it out."
      )
  if model.makes_latents:
    raise UserError(
      "--mode=evaluate has no numbers for latents without --metrics; see docs/IMAGENET.md."
    )
  source, held_out = from_config.make_source(config)
  now = from_config.make_metadata(source)
  if changed := [name for name, value in now.items() if value != metadata.get(name, value)]:
    raise UserError(
      f"data.path={config.data.path!r} has other {', '.join(changed)} than the run had; put the "
      "images of that time back."
    )
  if why := not_measurable(source):
    raise UserError(f"--mode=evaluate has no numbers here without --metrics=fid,...: {why}.")
  found = make_evaluate(spec, model, source, held_out)(model, True)
  if out is None:
    return {name: value for name, value in found if not np.ndim(value)}
  about = {"step": model.step, "seed": seed, "samples": spec.samples}
  return report(about, found, Path(out))


def not_measurable(source: sources.Source) -> str:
  """Why no classifier can be fitted to the images, in a sentence; "" where one can."""
  counts = np.bincount(source.labels)
  if len(counts) > 1 and counts.min() > 1:
    return ""
  return (
    "the classifier that the numbers are taken by needs at least 2 classes of at least 2 images, "
    f"and these have {len(counts)}, the smallest of {counts.min()}"
  )


def make_runner(spec: EvaluationSpec, model: Model, mesh: jax.sharding.Mesh) -> runner.Runner:
  """The evaluation by pretrained networks made ready for a model."""
  digest = model.record["run"]["metadata"].get("vae", "")
  return runner.prepare(spec, model.apply, model.shape, len(model.names), mesh, digest)


def _make_small(spec: EvaluationSpec, source: sources.Source, held_out, leak) -> Evaluation:
  """A grid, and the metrics of classifier.py by a classifier of what is trained on."""
  reference, n = functools.cache(lambda: make_reference(source, held_out)), spec.samples

  def run(model: Model, final: bool):
    settings = _settings(spec, final)
    number = n if final else n // 4
    sized = [(nfe, w, n // 2 if final and nfe == path.FINEST else number) for nfe, w in settings]
    yield from classifier.measure(model, reference(), sized, spec.seed)
    if final:
      yield from leak()
    yield "grid", _sample_grid(model, settings, spec.seed)

  return run


def _make_grid(spec: EvaluationSpec) -> Evaluation:
  """A grid and no numbers, where the classifier of `make_reference` does not fit the images."""

  def run(model: Model, final: bool):
    yield "grid", _sample_grid(model, _settings(spec, final), spec.seed)

  return run


def _make_large(spec: EvaluationSpec, large: runner.Runner, leak) -> Evaluation:
  """A grid, and the metrics of runner.py.

  In training a quarter of the samples is drawn, and the columns say so.
  """

  def run(model: Model, final: bool):
    settings, number = _settings(spec, final), spec.samples if final else spec.samples // 4
    if jax.process_index() == 0:
      about = {"step": model.step, "samples": number, **large.metadata()}
      print(runner.header(about), flush=True)
    yield from large.measure(model.params, settings, number)
    if final:
      yield from leak()
    labels = _grid_labels(len(model.names))
    drawn = large.pictures(model.params, settings, labels)
    yield "grid", pictures.labelled_grid(drawn, settings, model.names, labels)

  return run


def _settings(spec: EvaluationSpec, final: bool) -> list[tuple[int, float]]:
  """(steps, scale) pairs, w = 0 always among them; in training those of a few steps."""
  most = path.FINEST if final else max(4, min(spec.nfe))
  guidance = tuple({0.0, *spec.guidance})
  few = dataclasses.replace(spec, nfe=[n for n in spec.nfe if n <= most], guidance=guidance)
  return few.settings


def _grid_labels(classes: int) -> np.ndarray:
  """The classes of a grid's columns."""
  return balanced_labels(min(pictures.COLUMNS, max(classes, 8)), classes)


def _sample_grid(model: Model, settings: Sequence[tuple[int, float]], seed: int) -> np.ndarray:
  labels, draw = _grid_labels(len(model.names)), model.sampler
  drawn = [sample.to_uint8(draw(model.params, seed, labels, w, nfe)) for nfe, w in settings]
  return pictures.labelled_grid(np.stack(drawn), settings, model.names, labels)


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
