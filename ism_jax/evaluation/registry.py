"""Chooses the evaluation of a run: of small images, of latents, or by pretrained networks.

Dimensions: n samples.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
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
  """The settings of `config.eval`, overridden by `choices`."""
  return EvaluationSpec(**{"seed": config.seed, **config.eval, **choices})


def make_evaluate(
  spec: EvaluationSpec,
  model: Model,
  source: sources.Source | latents.Latents,
  held_out: sources.Source | None = None,
  leak: Callable[[], Iterator] | None = None,
  mesh: jax.sharding.Mesh | None = None,
) -> Evaluation:
  """The evaluation of a run in training: numbers and a grid of samples, fewer before the end.

  Args:
    model: the run's; its parameters are not read.
    source: the training data.
    held_out: images that are not trained on; samples are compared with them as well.
    leak: () -> ("class_leak", value) of the pairing, after the final numbers; None for none.
    mesh: the devices of pretrained networks.
  """
  measure, draw = None, functools.partial(_draw, model.sampler, spec.seed)
  if spec.metrics:
    large = make_runner(spec, model, mesh)
    measure, draw = functools.partial(_measure_large, large), large.pictures
  elif isinstance(source, latents.Latents):
    if not model.vae:
      return lambda model, final: iter(())
  elif why := not_measurable(source):
    if jax.process_index() == 0:
      print(f"evaluation: a grid of samples, without numbers: {why}", flush=True)
  else:
    reference = functools.cache(lambda: make_reference(source, held_out))
    measure = functools.partial(_measure_small, spec.seed, reference)

  def run(model: Model, final: bool):
    settings = _settings(spec, final)
    if measure:
      yield from measure(model, settings, spec.samples if final else spec.samples // 4, final)
      if final and leak:
        yield from leak()
    labels = balanced_labels(min(pictures.COLUMNS, max(len(model.names), 8)), len(model.names))
    images = draw(model.params, settings, labels)
    yield "grid", pictures.labelled_grid(images, settings, model.names, labels)

  return run


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
  # A run of an earlier version has no SHA-256.
  if changed := [name for name, value in now.items() if value != metadata.get(name, value)]:
    raise UserError(
      f"data.path={config.data.path!r} has other {', '.join(changed)} than the run had; restore "
      "the images of the run."
    )
  if why := not_measurable(source):
    raise UserError(f"--mode=evaluate has no numbers here without --metrics=fid,...: {why}.")
  results = make_evaluate(spec, model, source, held_out)(model, True)
  if out is None:
    return {name: value for name, value in results if not np.ndim(value)}
  return report({"step": model.step, "seed": seed, "samples": spec.samples}, results, Path(out))


def not_measurable(source: sources.Source) -> str:
  """The reason why no classifier can be fitted to the images; "" if one can."""
  counts = np.bincount(source.labels)
  if len(counts) > 1 and counts.min() > 1:
    return ""
  return (
    "the classifier behind the numbers needs at least 2 classes of at least 2 images, "
    f"and these have {len(counts)}, the smallest of {counts.min()}"
  )


def make_runner(spec: EvaluationSpec, model: Model, mesh: jax.sharding.Mesh) -> runner.Runner:
  """The evaluation of a model by pretrained networks, see `runner.prepare`."""
  digest = model.record["run"]["metadata"].get("vae", "")
  return runner.prepare(spec, model.apply, model.shape, len(model.names), mesh, digest)


def _measure_small(seed: int, reference: Callable, model: Model, settings, n: int, final: bool):
  """The metrics of classifier.py; at the end half of the samples at 128 steps."""
  sizes = [n // 2 if final and nfe == path.FINEST else n for nfe, _ in settings]
  sized = [(*setting, size) for setting, size in zip(settings, sizes, strict=True)]
  return classifier.measure(model, reference(), sized, seed)


def _measure_large(large: runner.Runner, model: Model, settings, n: int, final: bool):
  """The metrics of runner.py."""
  del final
  if jax.process_index() == 0:
    print(runner.header({"step": model.step, "samples": n, **large.metadata()}), flush=True)
  return large.measure(model.params, settings, n)


def _draw(sampler: Callable, seed: int, params, settings, labels: np.ndarray) -> np.ndarray:
  """The first samples of each setting and these classes: uint8 [settings, labels, h, w, c]."""
  groups = [sampler(params, seed, labels, w, nfe) for nfe, w in settings]
  return sample.to_uint8(np.stack(groups))


def _settings(spec: EvaluationSpec, final: bool) -> list[tuple[int, float]]:
  """(steps, scale) pairs, w = 0 among them; in training those of a few steps."""
  limit = path.FINEST if final else max(4, min(spec.nfe))
  guidance = tuple({0.0, *spec.guidance})
  few = dataclasses.replace(spec, nfe=[n for n in spec.nfe if n <= limit], guidance=guidance)
  return few.settings


def make_reference(
  source: sources.Source, held_out: sources.Source | None = None, limit: int = 10_000
) -> classifier.ClassifierReference:
  """Features of the data (at most `limit`, at random), by a classifier fitted to them.

  At least two of each class are among them, as `fit_classifier` needs.
  """
  order = np.random.default_rng(0).permutation(len(source.labels))
  by_class = order[np.argsort(source.labels[order], kind="stable")]
  labels = source.labels[by_class]
  pairs = by_class[labels != np.roll(labels, 2)]  # the first two of each class
  rest = order[~np.isin(order, pairs)]
  index = np.sort(np.concatenate([pairs, rest])[: max(limit, len(pairs))])
  images = source.images(index)
  held_out_images = held_out.images(np.arange(len(held_out.labels))) if held_out else None
  extract = fit_classifier(images, source.labels[index])
  return classifier.ClassifierReference.of(extract, images, held_out_images)
