"""Assembles iSM for the engine. ConfigDict ends here: below are dataclasses and plain arguments."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from ism_jax import data, dit, evaluate, loss, pairing, path, sample, wavelet
from ism_jax.features import fit_classifier
from train_jax import mesh as mesh_lib
from train_jax.config import numbers
from train_jax.errors import UserError
from train_jax.metrics import table
from train_jax.step import Method, no_augment


def make_source(config) -> data.Source:
  """The images of `config.data`."""
  if config.data.source == "digits":
    return data.digits()
  if config.data.source == "folder":
    return data.folder(config.data.path, config.data.side, config.data.channels)
  raise UserError(f"data.source={config.data.source!r} is unknown; choose 'digits' or 'folder'.")


def make_network(config, facts: dict):
  """(init, apply) of the network; `facts` are those saved with a checkpoint."""
  side, _, channels = facts["shape"]
  sizes = dict(config.model)
  return dit.make_network(
    dit.DiTConfig(side=side, channels=channels, classes=len(facts["names"]), **sizes)
  )


def make_loss_config(config, classes: int) -> loss.LossConfig:
  """The objective of `config`."""
  guidance, bands = config.guidance, config.wavelet
  return loss.LossConfig(
    shares=tuple(config.loss.shares),
    weights=tuple(config.loss.weights),
    classes=classes,
    class_dropout=config.loss.class_dropout,
    w_max=guidance.w_max,
    w_step=guidance.w_step,
    zero_w=guidance.zero,
    interval_start=guidance.start,
    baked_guidance=guidance.baked,
    levels=bands.levels,
    level_decay=bands.decay,
    norm=bands.norm,
  )


def _check(config, source: data.Source) -> None:
  height, width, channels = source.shape
  for name, found in (("side", height), ("channels", channels)):
    if config.data[name] != found:
      raise UserError(
        f"data.{name}={config.data[name]} but for the images of {config.data.source} it is {found}."
      )
  counts = np.bincount(source.labels)
  if len(counts) < 2 or counts.min() < 2:
    raise UserError(
      f"the images of {config.data.source} have {len(counts)} classes, the smallest of "
      f"{counts.min()} images; evaluation needs at least 2 classes of at least 2 images."
    )
  wavelet.check_levels(height, width, config.wavelet.levels)
  group = sum(config.loss.shares)
  if config.batch % group:
    raise UserError(
      f"batch={config.batch} is not divisible by {group}, the sum of loss.shares="
      f"{tuple(config.loss.shares)}; choose a multiple of {group}."
    )
  evaluate.check_settings(config.eval.nfe, config.eval.guidance, config.guidance.w_max)
  if config.eval.samples < 16:  # a quarter of it in training, and recall needs 4
    raise UserError(f"eval.samples={config.eval.samples} must be at least 16.")


def make_method(config, mesh: jax.sharding.Mesh) -> tuple[Method, dict]:
  """Returns the method and the facts about its data that sampling needs (class names, shape).

  Raises:
    UserError: the config does not fit itself or the data.
  """
  loss_config = make_loss_config(config, classes=0)
  pair_config = pairing.PairingConfig(**config.pairing)
  source = make_source(config)
  _check(config, source)
  classes = len(source.names)
  loss_config = make_loss_config(config, classes)
  facts = {"names": list(source.names), "shape": list(source.shape)}
  init, apply = make_network(config, facts)
  noise_rng = jax.random.fold_in(jax.random.key(config.seed), 2)

  def loss_fn(params, ema, batch, key):
    x1 = batch["image"]
    x0 = path.draw_noise(noise_rng, batch["noise"], source.shape)
    value, metrics = loss.loss(
      loss_config, apply, params, ema["target"], x0, x1, batch["label"], key
    )
    return value, {**metrics, "pair_cost": pairing.relative_cost(x0, x1)}

  pool = max(pair_config.pool, 1)

  def rows_of_pool(seed: int, number: int) -> np.ndarray:
    index = data.batches(source, config.batch, seed)
    return np.concatenate([index(number * pool + i) for i in range(pool)])

  def noise_of_pool(seed: int, number: int) -> np.ndarray:
    size = pool * config.batch
    noise = np.arange(number * size, (number + 1) * size, dtype=np.int32)
    if not pair_config.pool:
      return noise
    rows = rows_of_pool(seed, number)
    labels = source.labels[rows]
    return pairing.pair(pair_config, noise_rng, source.images(rows), labels, noise, classes)

  def leak() -> float:
    x0 = path.draw_noise(noise_rng, noise_of_pool(config.seed, 0), source.shape)
    labels = source.labels[rows_of_pool(config.seed, 0)]
    return pairing.class_leak(np.asarray(x0).reshape(len(x0), -1), labels)

  def stream(seed: int, position: int):
    return data.stream(
      source,
      config.batch,
      mesh_lib.process_rows(config.batch, mesh),
      seed,
      position,
      functools.partial(noise_of_pool, seed),
      pool,
    )

  method = Method(
    init=lambda key: (init(key), ()),
    loss=loss_fn,
    augment=no_augment,
    stream=stream,
    evaluate=make_evaluate(config, source, apply, leak if pair_config.pool else None),
  )
  return method, facts


def make_evaluate(config, source: data.Source, apply, leak=None):
  """`Method.evaluate`: a grid, and the metrics at config.eval (a quick part in training).

  `leak()` is the class leak of the pairing, measured once at the end.
  """
  sampler = sample.make_sampler(apply, source.shape)
  reference = functools.cache(lambda: make_reference(source))
  classes, n = len(source.names), config.eval.samples
  guidance = sorted({0.0, *config.eval.guidance})
  quick = max(4, min(config.eval.nfe))  # the most steps in training

  def run(params, step: int, final: bool):
    del step
    settings = [
      (nfe, w, n // 2 if nfe == path.FINEST else n) for nfe in config.eval.nfe for w in guidance
    ]
    if not final:
      settings = [(nfe, w, n // 4) for nfe, w, _ in settings if nfe <= quick]
    yield from evaluate.measure(sampler, params, reference(), classes, settings, config.seed)
    if final and leak:
      yield "class_leak", leak()
    labels = evaluate.balanced_labels(min(evaluate.COLUMNS, max(classes, 8)), classes)
    nfes = sorted({nfe for nfe, _, _ in settings})
    yield (
      "grid",
      evaluate.sample_grid(sampler, params, source.names, nfes, guidance, labels, config.seed),
    )

  return run


def make_reference(source: data.Source, limit: int = 10_000) -> evaluate.Reference:
  """Features of the data, by a classifier fitted on it; of a random 10k where there are more."""
  chosen = np.sort(np.random.default_rng(0).permutation(len(source.labels))[:limit])
  images = source.images(chosen)
  return evaluate.Reference.of(fit_classifier(images, source.labels[chosen]), images)


def _settings(config, flags) -> list[tuple[int, float]]:
  """(nfe, w) pairs that the flags ask for, checked against what was trained."""
  nfe = numbers("nfe", flags.nfe, int) or (1, 4, path.FINEST)
  guidance = numbers("guidance", flags.guidance, float) or (0.0,)
  evaluate.check_settings(nfe, guidance, config.guidance.w_max)
  return [(steps, w) for steps in nfe for w in guidance]


def sample_mode(config, facts: dict, load, flags, out: Path) -> None:
  """`--mode=sample`: see evaluate.write_samples. `load() -> (params, step)` is called last."""
  settings, names = _settings(config, flags), facts["names"]
  labels = numbers("labels", flags.labels, int) or tuple(range(len(names)))
  for label in labels:
    if not 0 <= label < len(names):
      raise UserError(f"label {label} is out of range: the classes are 0 to {len(names) - 1}.")
  _, apply = make_network(config, facts)
  sampler = sample.make_sampler(apply, tuple(facts["shape"]))
  params, _ = load()
  labels = np.resize(np.array(labels, np.int32), flags.num)
  evaluate.write_samples(sampler, params, names, settings, labels, flags.seed, out)


def evaluate_mode(config, facts: dict, load, flags, out: Path) -> None:
  """`--mode=evaluate`: the metrics of config.eval, or of --nfe and --guidance with w = 0 added."""
  config = copy.deepcopy(config)
  settings = _settings(config, flags)
  if flags.nfe:
    config.eval.nfe = sorted({nfe for nfe, _ in settings})
  if flags.guidance:
    config.eval.guidance = sorted({w for _, w in settings})
  config.seed = flags.seed
  source = make_source(config)
  _, apply = make_network(config, facts)
  run = make_evaluate(config, source, apply)
  params, step = load()
  out.mkdir(parents=True, exist_ok=True)
  results = {}
  for name, value in run(params, step, final=True):
    if np.ndim(value):
      Image.fromarray(value).save(out / f"{name}.png")
    else:
      results[name] = value
  print(table(results))
  record = {"step": step, "seed": flags.seed, "samples": config.eval.samples, **results}
  (out / "evaluation.json").write_text(json.dumps(record, indent=1))
  print(f"numbers: {out / 'evaluation.json'}")
