"""Assembles iSM for the engine. ConfigDict ends here: below are dataclasses and plain arguments."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ism_jax import dit, loss, model, pairing, path, sample, wavelet
from ism_jax.data import latents, sources
from ism_jax.evaluation import pictures, registry, runner
from ism_jax.evaluation.spec import check_number
from ism_jax.networks import autoencoder, sit
from train_jax import mesh as mesh_lib
from train_jax.config import numbers
from train_jax.errors import UserError
from train_jax.metrics import report
from train_jax.step import AbstractCall, Method, no_augment
from train_jax.storage import exported
from train_jax.storage.faults import LIMIT


def make_source(config) -> tuple[sources.Source | latents.Latents, sources.Source | None]:
  """(the images, or latents, of `config.data`; those of them that are kept from training).

  With `data.flip` there are their mirror images as well, of those that are trained on.
  """
  source, held_out = _open_source(config), None
  flip, share = (config.data.get(name) for name in ("flip", "held_out"))  # not of latents
  if isinstance(source, latents.Latents):
    if flip or share:
      name = "flip" if flip else "held_out"
      raise UserError(
        f"data.{name}={config.data[name]} is for images; latents have their mirror images, and "
        "none is kept from training: leave it out."
      )
    return source, None
  if share:
    source, held_out = sources.hold_out(source, share)
  return sources.with_mirror_images(source) if flip else source, held_out


def _open_source(config) -> sources.Source | latents.Latents:
  kind, where, side = config.data.source, config.data.path, config.data.side
  shape = (side, side, config.data.channels)
  if kind == "digits":
    if where:
      raise UserError(
        f"data.path={where!r} is not read where data.source='digits'; choose data.source=folder, "
        "npz, tfds or latents, or leave the path empty."
      )
    return sources.digits()
  if kind not in ("folder", "npz", "tfds", "latents"):
    raise UserError(
      f"data.source={kind!r} is unknown; choose 'digits', 'folder', 'npz', 'tfds' or 'latents'."
    )
  made_up = config.data.get("made_up", 0)
  if made_up and not where:
    make = latents.made_up if kind == "latents" else sources.made_up
    return make(made_up, shape, config.data.get("classes", 10))
  if not where:
    raise UserError(
      f"data.path is empty; give --config.data.path=PATH, what data.source={kind!r} is to read."
    )
  faults = config.data.get("max_faults", LIMIT)
  if kind == "npz":
    return sources.npz(where)
  if kind == "latents":
    return latents.open_set(where, config.data.get("std", latents.STD_RANGE), faults)
  return (sources.folder if kind == "folder" else sources.tfds)(
    where, side, config.data.channels, faults
  )


def without_data(config) -> tuple[ConfigDict, int]:
  """For `--mode=compile`: `config` on made-up images, and the number of a batch.

  Where classes come from the data, there are a thousand. Pairing is a part of the data stream.
  """
  config = config.copy_and_resolve_references()
  config.pairing.pool = 0
  if config.data.source != "digits":
    config.data.path = ""
    with config.unlocked():
      config.data.made_up, config.data.classes, config.data.held_out = 2000, 1000, 0.0
      config.eval.metrics, config.eval.vae = (), ""
  return config, 0


def sampler_program(config, facts: dict, mesh) -> AbstractCall:
  """For `--mode=compile`: the sampler of `--mode=sample`, `config.batch` images at a time."""
  mesh = mesh_of(config, list(mesh.devices.flat))
  init, apply = make_network(config, facts)
  params = mesh_lib.lay_out(jax.eval_shape(init, jax.random.key(0)), mesh)
  rows = mesh_lib.batch_sharding(mesh)
  x0, label, w = (
    jax.ShapeDtypeStruct((config.batch, *shape), kind, sharding=rows)
    for shape, kind in ((facts["shape"], np.float32), ((), np.int32), ((), np.float32))
  )
  return AbstractCall(
    "sampler, one step",
    mesh_lib.within(mesh, functools.partial(sample.integrate, apply)),
    (params, x0, label, w, jax.ShapeDtypeStruct((), np.int32)),
    {"parameters": params},
    mesh.size,
    {"out_shardings": rows},
  )


def same(config) -> tuple[str, ...]:
  """What must be equal where config.init_from points (see train_jax/warm_start.py)."""
  del config
  return ("config.model.heads",)


# What may be missing there or of another size, and which published weights can be read.
FRESH = ("embed_class", "embed_guidance", "embed_step")
convert = sit.convert


def make_sizes(config, facts: dict) -> dit.DiTConfig:
  """Sizes of the network; `facts` are those saved with a checkpoint."""
  side, _, channels = facts["shape"]
  shortcuts = bool(config.loss.shares[2])  # learned in consistency rows
  return dit.DiTConfig(
    side, channels, classes=len(facts["names"]), shortcuts=shortcuts, **dict(config.model)
  )


def make_network(config, facts: dict):
  """(init, apply) of the network; `facts` are those saved with a checkpoint."""
  return dit.make_network(make_sizes(config, facts))


def make_sampled(config, facts: dict) -> Callable:
  """The network as samplers call it: a plain flow model's w is classifier-free guidance."""
  _, apply = make_network(config, facts)
  return sample.classifier_free(apply, len(facts["names"])) if _is_flow(config) else apply


def _is_flow(config) -> bool:
  return sample.is_flow(config.loss.shares, config.loss.class_dropout)


def _strongest(config) -> float:
  """The largest w that a sample may have."""
  return math.inf if _is_flow(config) else config.guidance.w_max


def make_loss_config(config, classes: int) -> loss.LossConfig:
  """The objective of `config`."""
  guidance, bands, shares = config.guidance, config.wavelet, tuple(config.loss.shares)
  loss.check_shares(shares)
  return loss.LossConfig(
    shares=shares,
    weights=tuple(config.loss.weights) or tuple(share / sum(shares) for share in shares),
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


def _check(config, source: sources.Source) -> None:
  height, width, channels = source.shape
  for name, found in (("side", height), ("channels", channels)):
    if config.data[name] != found:
      raise UserError(
        f"data.{name}={config.data[name]} but for the images of {config.data.source} it is {found}."
      )
  wavelet.check_levels(height, width, config.wavelet.levels)
  if not config.wavelet.decay > 0:
    raise UserError(f"wavelet.decay={config.wavelet.decay} must be above 0.")
  for section, name in (("loss", "class_dropout"), ("guidance", "zero")):
    if not 0 <= (chance := config[section][name]) <= 1:
      raise UserError(f"{section}.{name}={chance} is a probability; choose it between 0 and 1.")
  if not config.loss.class_dropout and (config.guidance.w_max or config.guidance.baked):
    raise UserError(
      "loss.class_dropout=0 with guidance: it needs the network without a class, which is learned "
      "in rows that lose theirs; choose loss.class_dropout=0.1, or no guidance."
    )
  group, parts = sum(config.loss.shares), config.optim.accumulate
  if config.batch % (group * parts):
    times = f" times optim.accumulate={parts}" if parts > 1 else ""
    raise UserError(
      f"batch={config.batch} is not divisible by {group}, the sum of loss.shares="
      f"{tuple(config.loss.shares)}{times}; choose a multiple of {group * parts}."
    )
  path.check_settings(config.eval.nfe, config.eval.guidance, _strongest(config))
  if config.eval.samples < 16:  # a quarter of it in training, and recall needs 4
    raise UserError(f"eval.samples={config.eval.samples} must be at least 16.")


def _warn_of_few_rows(config, mesh: jax.sharding.Mesh) -> None:
  """Says so, once, where the rows of a device are no whole groups of loss.shares."""
  parts, group = mesh_lib.batch_parts(mesh) * config.optim.accumulate, sum(config.loss.shares)
  rows = config.batch // parts
  if rows % group and jax.process_index() == 0:
    logging.warning(
      "batch=%d is %d rows at a time for each of the %s, and loss.shares=%s deals out groups of "
      "%d: rows move between devices and are filled up, up to 2.8 times the work; choose a batch "
      "that is a multiple of %d, or put part of the devices in mesh.tensor.",
      *(config.batch, rows, mesh_lib.parts_in_words(mesh)),
      *(tuple(config.loss.shares), group, group * parts),
    )


def _facts(source: sources.Source | latents.Latents) -> dict:
  """What every source says of its images, as JSON: names of the classes, shape, number."""
  return {
    "names": list(source.names),
    "shape": list(source.shape),
    "examples": len(source.labels),
  }


def _describe(config, source: sources.Source | latents.Latents, held_out: int) -> None:
  """Prints what there is to learn; warns where the classes look like parts of a data set."""
  count, names = len(source.labels), source.names
  mirrored = ", half of them mirrored" if config.data.get("flip") else ""
  mirrored += f", {held_out} more held out" if held_out else ""
  some = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
  size = "x".join(map(str, source.shape))
  print(f"data: {count} images of {size}{mirrored}; {len(names)} class(es): {some}", flush=True)
  if set(names) <= {"train", "val", "valid", "validation", "test"}:
    logging.warning("data.path=%s: is one of these the data set? Then give that.", config.data.path)


def make_method(config, mesh: jax.sharding.Mesh) -> tuple[Method, dict]:
  """Returns the method and the facts about its data that sampling needs (class names, shape).

  Raises:
    UserError: the config does not fit itself or the data.
  """
  loss_config = make_loss_config(config, classes=0)
  pair_config = pairing.PairingConfig(**config.pairing)
  source, held_out = make_source(config)
  _check(config, source)
  largest = np.bincount(source.labels).max() / len(source.labels)
  pairing.check_size(pair_config, config.batch, largest)
  _warn_of_few_rows(config, mesh)
  if jax.process_index() == 0 and not config.data.get("made_up"):
    _describe(config, source, len(held_out.labels) if held_out else 0)
  classes = len(source.names)
  loss_config = make_loss_config(config, classes)
  facts = _facts(source)
  in_latents = isinstance(source, latents.Latents)
  if in_latents:
    facts |= {"vae": source.vae, "manifest_sha256": source.manifest}
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
    index = sources.batches(source, config.batch, seed)
    return np.concatenate([index(number * pool + i) for i in range(pool)])

  def noise_of_pool(seed: int, number: int) -> np.ndarray:
    size = pool * config.batch
    # Past 2^31 rows the numbers wrap to the negative ones, which name noise as well.
    noise = (number * size + np.arange(size)).astype(np.int32)
    if not pair_config.pool:
      return noise
    rows = rows_of_pool(seed, number)
    labels = source.labels[rows]
    return pairing.pair(pair_config, noise_rng, source.images(rows), labels, noise, classes)

  def leak() -> Iterator[tuple[str, float]]:
    x0 = path.draw_noise(noise_rng, noise_of_pool(config.seed, 0), source.shape)
    labels = source.labels[rows_of_pool(config.seed, 0)]
    value = pairing.class_leak(np.asarray(x0).reshape(len(x0), -1), labels)
    if np.isfinite(value):
      yield "class_leak", value

  def stream(seed: int, position: int):
    return sources.stream(
      source,
      config.batch,
      mesh_lib.process_rows(config.batch, mesh),
      seed,
      position,
      functools.partial(noise_of_pool, seed),
      pool,
    )

  # On latents the leak would take longer to fit than the run: thousands of inputs and classes.
  measured = leak if pair_config.pool and classes > 1 and not in_latents else None
  method = Method(
    init=lambda key: (init(key), ()),
    loss=loss_fn,
    augment=latents.draw if in_latents else no_augment,
    stream=stream,
    evaluate=registry.make_evaluate(
      config, source, facts, make_sampled(config, facts), mesh, measured, held_out
    ),
  )
  return method, facts


def _settings(config, flags, nfe, guidance) -> list[tuple[int, float]]:
  """(nfe, w) pairs, a flag winning over what is given here, checked against what was trained."""
  nfe = numbers("nfe", flags.nfe, int) or nfe
  guidance = numbers("guidance", flags.guidance, float) or guidance
  path.check_settings(nfe, guidance, _strongest(config))
  return [(steps, w) for steps in nfe for w in guidance]


def mesh_of(config, devices: list | None = None) -> jax.sharding.Mesh:
  """Where a trained network is used: shared by `fsdp`, so that every device has its own images.

  Decoders and the networks of metrics are not split by `tensor`: its devices would do the same.
  """
  return mesh_lib.fitting("fsdp", **config.mesh, devices=devices)


def _labels(flags, names: list[str]) -> tuple[int, ...]:
  """The classes of --labels, by number or by name; all where there is none."""
  known = {name: i for i, name in enumerate(names)}
  try:
    found = [
      int(each) if each.lstrip("-").isdigit() else known[each] for each in flags.labels or ()
    ]
  except KeyError as err:
    some = ", ".join(f"{i} {name}" for i, name in enumerate(names[:20]))
    raise UserError(
      f"--labels={','.join(flags.labels)}: {err} is no number or name of a class; they are {some}"
      f"{', ...' if len(names) > 20 else ''}."
    ) from err
  return tuple(found) or tuple(range(len(names)))


def sample_mode(config, facts: dict, load, flags, out: Path) -> None:
  """`--mode=sample`: see pictures.write_samples. `load(mesh) -> (params, step)` comes last."""
  settings, names = _settings(config, flags, (1, 4, path.FINEST), (0.0,)), facts["names"]
  labels = _labels(flags, names)
  path.check_labels(labels, len(names))
  mesh = mesh_of(config)
  sampler = sample.make_sampler(make_sampled(config, facts), tuple(facts["shape"]), mesh)
  if "vae" in facts:
    if not flags.vae:
      raise UserError("--vae=FILE is missing: this run's samples are latents, and it decodes them.")
    sampler = autoencoder.decoding(sampler, flags.vae, facts["vae"])
  elif flags.vae:
    raise UserError(f"--vae={flags.vae} decodes latents, and this run makes images; leave it out.")
  params, _ = load(mesh)
  labels = np.resize(np.array(labels, np.int32), flags.num or 64)
  pictures.write_samples(sampler, params, names, settings, labels, flags.seed, out)


def export_mode(config, facts: dict, load, flags, out: Path) -> None:
  """`--mode=export`: the `sample` average as files that `ism_jax.load_pretrained` reads."""
  del flags
  params, step = load(mesh_of(config))
  record = {
    "method": model.METHOD,
    "step": step,
    "network": dataclasses.asdict(make_sizes(config, facts)),
    "run": {"config": config.to_dict(), "facts": facts},
  }
  exported.save(out, params, record)
  if jax.process_index() == 0:
    print(f"model: {out} (step {step}); ism_jax.load_pretrained({str(out)!r}) samples from it")


def evaluate_mode(config, facts: dict, load, flags, out: Path) -> None:
  """`--mode=evaluate`: numbers at the steps and strengths of config.eval, or --nfe and --guidance.

  With --metrics, or those of config.eval, they are `benchmark.py`'s of --num samples, which need
  none of the data; else the classifier's, with w = 0 added.
  """
  config = copy.deepcopy(config)
  settings = _settings(config, flags, config.eval.nfe, config.eval.guidance)
  config.eval.nfe = sorted({nfe for nfe, _ in settings})
  config.eval.guidance = sorted({w for _, w in settings})
  config.seed = flags.seed
  apply = make_sampled(config, facts)
  protocol, mesh = registry.make_protocol(config, flags), mesh_of(config)
  if protocol:
    n = flags.num or 50_000
    check_number(protocol.metrics, n)
    large = registry.make_benchmark(protocol, facts, apply, mesh)
    params, step = load(mesh)
    return runner.report(large, params, step, settings, n, out, flags.save_samples)
  if "vae" in facts:
    raise UserError(
      "--mode=evaluate has no numbers for latents without --metrics; see docs/IMAGENET.md."
    )
  source, held_out = make_source(config)
  if changed := [name for name, now in _facts(source).items() if now != facts.get(name, now)]:
    raise UserError(
      f"data.path={config.data.path!r} has other {', '.join(changed)} than the run had; put the "
      "images of that time back."
    )
  if why := registry.not_measurable(source):
    raise UserError(f"--mode=evaluate has no numbers here without --metrics=fid,...: {why}.")
  run = registry.make_evaluate(config, source, facts, apply, mesh, held_out=held_out)
  params, step = load(mesh)
  about = {"step": step, "seed": flags.seed, "samples": config.eval.samples}
  report(about, run(params, step, final=True), out)
