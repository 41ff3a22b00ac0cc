"""iSM assembled: every config trains, evaluates and samples, and bad ones say what is wrong."""

import itertools
import json
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest
from PIL import Image

from configs import ism_digits, ism_imagenet256
from ism_jax import loss, path
from ism_jax import method as ism
from ism_jax.evaluation import registry
from train_jax import mesh as mesh_lib
from train_jax import state as state_lib
from train_jax.errors import UserError
from train_jax.step import make_train_step

OBJECTIVES = ("ism", "flow", "shortcut", "shortcut_fast_ema")


def get_config(objective="ism", **changes):
  """The debug config of an objective; `section__key=value` changes a value."""
  config = ism_digits.get_config("debug" if objective == "ism" else f"{objective},debug")
  config.batch = 16
  config.model.depth = 1
  config.eval.samples = 64
  for name, value in changes.items():
    section, _, key = name.partition("__")
    if key:
      config[section][key] = value
    else:
      config[section] = value
  return config


def build(config):
  return ism.make_method(config, mesh_lib.make_mesh())


@pytest.fixture(scope="module")
def default():
  """(method, metadata, parameters) of the debug config."""
  method, metadata = build(get_config())
  params, extra = jax.jit(method.init)(jax.random.key(0))
  assert extra == ()
  return method, metadata, params


@pytest.mark.parametrize(
  "objective",
  ["ism", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flow", "shortcut"))],
)
def test_a_train_step_learns(objective):
  config = get_config(objective)
  method, _ = build(config)
  tx, decays = optax.adam(3e-3), dict(config.ema)
  state = jax.jit(state_lib.create(method, tx, decays, seed=0))()
  step = jax.jit(make_train_step(method, tx, decays, clip=1.0))
  first, losses = state.params, []
  for batch in itertools.islice(method.stream(0, 0), 40):
    state, metrics = step(state, batch)
    losses.append(float(metrics["velocity"]))
  assert all(np.isfinite(float(value)) for value in metrics.values())
  roles = {"ism": {"velocity", "guidance", "consistency"}, "flow": {"velocity"}}
  present = {"velocity", "guidance", "consistency"} & set(metrics)
  assert present == roles.get(objective, {"velocity", "consistency"})
  assert np.mean(losses[-10:]) < 0.95 * np.mean(losses[:5]) and int(state.skipped) == 0
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.params["out"], first["out"])
  assert all(moved.values())
  assert set(state.ema) == {"target", "sample"}


def test_options_differ_where_they_say():
  ism_, flow, shortcut, fast = (ism_digits.get_config("" if o == "ism" else o) for o in OBJECTIVES)
  assert flow.loss.split == (1, 0, 0) and flow.pairing.pool == 0 and ism_.pairing.pool == 32
  assert shortcut.loss.bootstrap_guidance > 0 == ism_.loss.bootstrap_guidance
  weights = [ism.make_loss_config(config, 10).weights for config in (ism_, flow, shortcut)]
  assert weights == [(4 / 8, 1 / 8, 3 / 8), (1, 0, 0), (7 / 8, 0, 1 / 8)]  # one mean over all rows
  flow.loss.weights = (2, 0, 0)
  assert ism.make_loss_config(flow, 10).weights == (2, 0, 0)
  assert (shortcut.ema.target, fast.ema.target, ism_.ema.target) == (0.999, 0.95, 0.95)
  fast.ema.target = shortcut.ema.target
  assert fast.to_dict() == shortcut.to_dict()
  with pytest.raises(ValueError, match=r"unknown option 'fast'.*choose from flow, shortcut"):
    ism_digits.get_config("flow,fast")


def test_facts_are_what_sampling_needs(default):
  _, metadata, _ = default
  assert metadata == {"names": [str(i) for i in range(10)], "shape": [8, 8, 1], "examples": 1797}
  assert json.loads(json.dumps(metadata)) == metadata


@pytest.fixture(scope="module")
def batches(default):
  """The first eight batches, in pools of two."""
  method, _, _ = default
  return list(itertools.islice(method.stream(0, 0), 8))


def test_batches_are_paired_within_class(batches):
  for first, second in zip(batches[::2], batches[1::2], strict=True):
    label, noise = (np.concatenate([first[k], second[k]]) for k in ("label", "noise"))
    start = noise.min()
    np.testing.assert_array_equal(np.sort(noise), np.arange(start, start + 32))
    np.testing.assert_array_equal(label[noise - start], label)
    assert np.any(noise != np.arange(start, start + 32))


@pytest.mark.parametrize("position", [2, 3])
def test_a_paired_stream_can_begin_anywhere(position, default, batches):
  method, _, _ = default
  again = itertools.islice(method.stream(0, position), 8 - position)
  for batch, expected in zip(again, batches[position:], strict=True):
    for name in ("image", "label", "noise"):
      np.testing.assert_array_equal(batch[name], expected[name])


def test_a_stream_goes_on_past_the_largest_int32(default):
  method, _, _ = default
  batches = list(itertools.islice(method.stream(0, 2**31 // 16 - 2), 4))
  noise = np.concatenate([batch["noise"] for batch in batches])
  assert noise.dtype == np.int32 and len(set(noise.tolist())) == 64
  assert noise[:32].min() == 2**31 - 32 and noise[32:].max() == 31 - 2**31


def test_noise_is_drawn_from_its_number_alone(default, batches):
  # The same rows in another order are the same pairs: the cost of the pairing does not change.
  method, _, params = default
  key, ema = jax.random.key(0), {"target": params}
  metrics = jax.jit(lambda batch: method.loss(params, ema, batch, key)[1])
  batch = batches[0]
  turned = {name: value[::-1] for name, value in batch.items()}
  cost = float(metrics(batch)["pair_cost"])
  np.testing.assert_allclose(float(metrics(turned)["pair_cost"]), cost, rtol=1e-5)
  random = {**batch, "noise": batch["noise"][::-1]}
  assert float(metrics(random)["pair_cost"]) > cost


@pytest.mark.parametrize(
  ("key", "value", "field"),
  [
    ("loss.split", (2, 1, 1), "split"),
    ("loss.weights", (1.0, 2.0, 3.0), "weights"),
    ("loss.class_dropout", 0.3, "class_dropout"),
    ("loss.w_max", 1.0, "w_max"),
    ("loss.w_step", 0.5, "w_step"),
    ("loss.zero_w_prob", 0.125, "zero_w_prob"),
    ("loss.interval_start", 0.4, "interval_start"),
    ("loss.bootstrap_guidance", 0.75, "bootstrap_guidance"),
    ("loss.wavelet_levels", 1, "levels"),
    ("loss.level_decay", 0.25, "level_decay"),
    ("loss.norm", "charbonnier", "norm"),
  ],
)
def test_every_setting_reaches_the_loss(key, value, field):
  config = get_config()
  before = ism.make_loss_config(config, 10)
  section, _, name = key.partition(".")
  config[section][name] = value
  after = ism.make_loss_config(config, 10)
  assert getattr(after, field) == value != getattr(before, field)
  assert after.classes == 10


def test_the_loss_is_of_the_batch_s_noise_and_the_target_average(default, batches, perturb):
  method, metadata, params = default
  config, batch, key = get_config(), batches[0], jax.random.key(4)
  target = jax.jit(perturb)(params)
  noise_rng = jax.random.fold_in(jax.random.key(config.seed), 2)
  x0 = path.draw_noise(noise_rng, batch["noise"], (8, 8, 1))
  apply, loss_config = ism.make_network(config, metadata)[1], ism.make_loss_config(config, 10)
  args = params, target, x0, batch["image"], batch["label"], key
  wanted, terms = jax.jit(lambda *args: loss.loss(loss_config, apply, *args))(*args)
  ema = {"target": target, "sample": jax.tree.map(np.zeros_like, params)}
  found, metrics = jax.jit(method.loss)(params, ema, batch, key)
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
  np.testing.assert_allclose(metrics["consistency"], terms["consistency"], rtol=1e-5)
  online = loss.loss(loss_config, apply, params, params, *args[2:])[0]
  assert abs(float(online - wanted)) > 1e-3  # it makes a difference


def test_what_is_evaluated_is_what_the_config_says(default, monkeypatch):
  """Steps, strengths, numbers of samples and the seed; the leak of the pairs of training."""
  *_, params = default
  asked, read, drawn = [], [], []
  monkeypatch.setattr(registry, "make_reference", lambda source, held_out: "reference")

  def measure(sampler, params, reference, classes, settings, seed):
    asked.append((reference, classes, settings, seed))
    yield from ()

  def make_sampler(*_):
    def sampler(params, seed, labels, w, nfe):
      drawn.append((nfe, w, seed))
      return np.zeros((len(labels), 8, 8, 1), np.float32)

    return sampler

  monkeypatch.setattr(registry.classifier, "measure", measure)
  monkeypatch.setattr(registry.sample, "make_sampler", make_sampler)
  monkeypatch.setattr(ism.pairing, "class_leak", lambda *args: read.append(args) or 0.25)
  config = get_config(seed=5, eval__nfe=(1, 8, 128), eval__guidance=(0.5,), eval__samples=80)
  method, _ = build(config)
  assert "class_leak" not in dict(method.evaluate(params, 1, False))
  assert dict(method.evaluate(params, 2, True))["class_leak"] == 0.25
  quick = [(1, 0.0, 20), (1, 0.5, 20)]
  final = [(nfe, w, 40 if nfe == 128 else 80) for nfe in (1, 8, 128) for w in (0.0, 0.5)]
  assert asked == [("reference", 10, quick, 5), ("reference", 10, final, 5)]
  assert drawn == [(nfe, w, 5) for nfe, w, _ in quick + final]
  pool = list(itertools.islice(method.stream(5, 0), config.pairing.pool))
  noise, label = (np.concatenate([batch[name] for batch in pool]) for name in ("noise", "label"))
  x0 = path.draw_noise(jax.random.fold_in(jax.random.key(5), 2), noise, (8, 8, 1))
  ((found, labels),) = read
  np.testing.assert_array_equal(labels, label)
  np.testing.assert_allclose(found, np.asarray(x0).reshape(len(noise), -1), rtol=1e-6)


def test_evaluation_always_has_w_0_and_a_grid(default):
  # Also where the config asks for guided samples only, and for none of few steps.
  method, _ = build(get_config(eval__nfe=(8,), eval__guidance=(0.5,)))
  *_, params = default
  results = dict(method.evaluate(params, 1, False))
  assert {"fd/nfe8_w0", "accuracy/nfe8_w0.5", "recall/nfe8_w0", "precision/nfe8_w0"} <= set(results)
  assert results["grid"].ndim == 3 and results["grid"].dtype == np.uint8
  numbers = [value for value in results.values() if not np.ndim(value)]
  assert len(numbers) == 8 and np.all(np.isfinite(numbers))


FLAGS = {"nfe": None, "guidance": None, "labels": None, "num": 6, "seed": 0, "vae": None}


def test_sample_mode_writes_what_was_asked_for(default, tmp_path):
  _, metadata, params = default
  flags = SimpleNamespace(
    **{**FLAGS, "nfe": ["1", "2"], "guidance": ["0.5"], "labels": ["3", "five"]}
  )
  metadata = {**metadata, "names": [*metadata["names"][:5], "five", *metadata["names"][6:]]}
  ism.sample_mode(get_config(), metadata, lambda mesh: (params, 2), flags, tmp_path)
  with np.load(tmp_path / "samples.npz") as saved:
    np.testing.assert_array_equal(saved["labels"], [3, 5, 3, 5, 3, 5] * 2)
    np.testing.assert_array_equal(saved["nfe"], [1] * 6 + [2] * 6)
    assert set(saved["guidance"].tolist()) == {0.5}
  assert (tmp_path / "grid.png").exists()


def test_evaluate_mode_writes_its_numbers(default, tmp_path):
  _, metadata, params = default
  config = get_config()
  flags = SimpleNamespace(**{**FLAGS, "nfe": ["1"], "guidance": ["0.5"], "num": None})
  ism.evaluate_mode(config, metadata, lambda mesh: (params, 2), flags, tmp_path)
  record = json.loads((tmp_path / "evaluation.json").read_text())
  assert record["step"] == 2 and record["seed"] == 0 and record["samples"] == 64
  assert {"fd/nfe1_w0", "fd/nfe1_w0.5", "accuracy/nfe1_w0"} <= set(record)
  assert (tmp_path / "evaluation_grid.png").exists()  # grid.png is of --mode=sample
  assert config.eval.nfe == (1, 2)  # the caller's config is left alone


def test_a_network_is_used_with_images_for_every_device():
  config = get_config()
  config.mesh.update(fsdp=2, tensor=2)
  assert dict(ism.mesh_of(config).shape) == {"fsdp": 4, "data": 2, "tensor": 1}
  with config.unlocked():
    del config.mesh.tensor  # a run of a version that had no such axis
  assert dict(ism.mesh_of(config).shape) == {"fsdp": 2, "data": 4, "tensor": 1}


def test_only_the_first_process_writes_and_prints(default, tmp_path, monkeypatch, capsys):
  _, metadata, params = default
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  flags = SimpleNamespace(**{**FLAGS, "nfe": ["1"], "num": None})
  for mode in (ism.sample_mode, ism.evaluate_mode, ism.export_mode):
    mode(get_config(), metadata, lambda mesh: (params, 2), flags, tmp_path)
  assert not list(tmp_path.iterdir()) and not capsys.readouterr().out


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"nfe": ["3"]}, r"nfe=3 was not trained"),
    ({"nfe": ["one"]}, r"--nfe=one must be whole numbers separated by commas"),
    ({"guidance": ["9"]}, r"guidance=9 is outside the trained range 0 to"),
    ({"labels": ["0", "10"]}, r"label 10 is out of range: the classes are 0 to 9\."),
    ({"labels": ["-1"]}, r"label -1 is out of range"),
    (
      {"labels": ["0", "cat"]},
      r"--labels=0,cat: 'cat' is no number or name of a class; .* 0 0, 1 1",
    ),
    ({"vae": "v"}, r"--vae=v decodes latents, and this run makes images; leave it out"),
  ],
)
def test_bad_requests_are_refused_before_anything_is_loaded(changes, message, default, tmp_path):
  _, metadata, _ = default

  def load(mesh):
    raise AssertionError("loaded a checkpoint for a request that cannot be met")

  flags = SimpleNamespace(**{**FLAGS, **changes})
  with pytest.raises(UserError, match=message):
    ism.sample_mode(get_config(), metadata, load, flags, tmp_path)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"batch": 20}, r"batch=20 is not divisible by 8, the sum of loss.split=.*multiple of 8"),
    ({"data__side": 32}, r"data.image_size=32 but for the images of digits it is 8"),
    ({"data__channels": 3}, r"data.channels=3 but for the images of digits it is 1"),
    ({"data__source": "imagenet"}, r"data.source='imagenet' is unknown; choose 'digits', 'folder'"),
    ({"model__patch": 3}, r"model.patch=3 does not divide the image side 8"),
    ({"model__width": 18}, r"model.width=18 must be a multiple of"),
    ({"model__depth": 0}, r"model.depth=0 must be at least 1"),
    ({"wavelet__levels": 4}, r"loss.wavelet_levels=4 does not fit images of 8x8.*from 0 to 3"),
    ({"wavelet__norm": "l1"}, r"loss.norm='l1'"),
    ({"wavelet__decay": 0.0}, r"loss.level_decay=0.0 must be above 0"),
    ({"loss__class_dropout": 1.5}, r"loss.class_dropout=1.5 is a probability"),
    ({"guidance__zero": -0.1}, r"loss.zero_w_prob=-0.1 is a probability"),
    ({"loss__class_dropout": 0.0}, r"loss.class_dropout=0 with guidance: .* choose .*=0.1"),
    ({"loss__shares": (0, 0, 0)}, r"loss.split=\(0, 0, 0\) must be three counts"),
    ({"loss__shares": (4, 1, "x")}, r"loss.split=.* must be three counts"),
    ({"guidance__start": 2.0}, r"loss.interval_start=2 must be at least 0 and below 1"),
    ({"guidance__baked": -1.0}, r"loss.bootstrap_guidance=-1 at least 0"),
    ({"eval__guidance": (0.0, "x")}, r"guidance='x' must be a number"),
    ({"pairing__condition": "labels"}, r"pairing.condition='labels' is unknown"),
    ({"pairing__pool": 10**6, "pairing__condition": "none"}, r"pool=1000000 batches of 16 rows"),
    ({"eval__nfe": (1, 5)}, r"nfe=5 was not trained"),
    ({"eval__guidance": (0.0, 9.0)}, r"guidance=9 is outside the trained range"),
    ({"eval__samples": 10}, r"eval.samples=10 must be at least 16"),
    ({"loss__shares": (4, 0, 4)}, r"0 guidance rows but loss.w_max"),
    ({"guidance__w_step": 0.3}, r"must be a multiple of loss.w_step=0.3"),
    ({"data__source": "folder", "data__path": "nowhere"}, r"data.path='nowhere' is not a folder"),
  ],
)
def test_bad_configs_are_refused_in_a_sentence(changes, message):
  with pytest.raises(UserError, match=message):
    build(get_config(**changes))


@pytest.mark.parametrize(("batch", "tensor", "warned"), [(16, 1, 1), (32, 1, 0), (16, 2, 0)])
def test_a_part_of_a_group_on_a_device_is_warned_of_once(
  batch, tensor, warned, monkeypatch, caplog
):
  mesh = mesh_lib.make_mesh(tensor=tensor, devices=jax.devices()[:4])
  ism.make_method(get_config(batch=batch), mesh)
  found = [text for text in caplog.messages if "rows at a time for each" in text]
  assert len(found) == warned
  if warned:
    assert "batch=16 is 4 rows at a time for each of the 4 devices, and loss.split=" in found[0]
    assert "a multiple of 32, or put part of the devices in mesh.tensor" in found[0]
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    caplog.clear()
    ism.make_method(get_config(batch=batch), mesh)
    assert not caplog.messages


def save_images(root, counts):
  rng = np.random.default_rng(0)
  for name, count in counts.items():
    (root / name).mkdir(exist_ok=True)
    for i in range(count):
      pixels = rng.integers(0, 256, (9, 12, 3), np.uint8)
      Image.fromarray(pixels).save(root / name / f"{i}.png")


FOLDER = {"data__source": "folder", "data__side": 8, "data__channels": 3}


def test_a_folder_of_images_will_do(tmp_path):
  save_images(tmp_path, {"cats": 5, "dogs": 4})
  method, metadata = build(get_config(**FOLDER, data__path=str(tmp_path)))
  assert metadata == {"names": ["cats", "dogs"], "shape": [8, 8, 3], "examples": 9}
  batch = next(method.stream(0, 0))
  assert batch["image"].shape == (16, 8, 8, 3) and set(batch["label"].tolist()) == {0, 1}


def test_images_are_paired_and_trained_on_with_their_mirror_images(tmp_path, monkeypatch):
  save_images(tmp_path, {"cats": 5, "dogs": 4})
  config, seen = get_config(**FOLDER, data__path=str(tmp_path), data__flip=True), []
  pair = ism.pairing.pair

  def watched(settings, rng, pixels, *rest):
    seen.append(pixels)
    return pair(settings, rng, pixels, *rest)

  monkeypatch.setattr(ism.pairing, "pair", watched)
  method, metadata = build(config)
  assert metadata["examples"] == 18
  batches = list(itertools.islice(method.stream(0, 0), 2))  # a pool, and 32 rows: all of them
  trained = np.concatenate([batch["image"] for batch in batches])
  np.testing.assert_array_equal(seen[0], trained)
  assert {image.tobytes() for image in trained} == {i[:, ::-1].tobytes() for i in trained}
  config.data.flip = False
  assert build(config)[1]["examples"] == 9


def test_latents_have_their_mirror_images_already():
  config = ism_imagenet256.get_config("S/2,debug")
  assert "flip" not in config.data
  with config.unlocked():
    config.data.flip = True
  with pytest.raises(UserError, match=r"data.flip=True is for images; latents have their"):
    build(config)


@pytest.mark.parametrize("counts", [{"": 5}, {"cats": 5}, {"cats": 5, "dogs": 1}], ids=str)
def test_images_without_classes_are_trained_on_and_not_measured(counts, tmp_path, capsys):
  root = tmp_path / "photos"
  root.mkdir()
  save_images(root, counts)
  config = get_config(**FOLDER, data__path=str(root), eval__guidance=(0.0,))
  method, metadata = build(config)
  assert metadata["names"] == [name or "photos" for name in counts]
  data, said = capsys.readouterr().out.splitlines()
  some = f"{len(counts)} class(es): {', '.join(metadata['names'])}"
  assert data == f"data: {sum(counts.values())} images of 8x8x3; {some}"
  assert said.startswith("evaluation: a grid of samples, without numbers: the classifier")
  assert said.endswith(f"have {len(counts)}, the smallest of {min(counts.values())}")
  batch = next(method.stream(0, 0))
  params, _ = jax.jit(method.init)(jax.random.key(0))
  loss = jax.jit(method.loss)(params, {"target": params}, batch, jax.random.key(0))[0]
  assert batch["image"].shape == (16, 8, 8, 3) and np.isfinite(float(loss))
  ((name, picture),) = method.evaluate(params, 1, True)
  assert name == "grid" and picture.dtype == np.uint8

  def load(mesh):
    raise AssertionError("loaded a checkpoint for a request that cannot be met")

  flags = SimpleNamespace(**{**FLAGS, "num": None})
  with pytest.raises(UserError, match=r"no numbers here without --metrics=fid.*at least 2 classes"):
    ism.evaluate_mode(config, metadata, load, flags, tmp_path)


def test_evaluate_mode_refuses_other_images_than_the_run_had(tmp_path):
  root = tmp_path / "photos"
  root.mkdir()
  save_images(root, {"a": 3, "b": 3})
  config = get_config(**FOLDER, data__path=str(root))
  _, metadata = build(config)
  save_images(root, {"c": 3})  # whose label is that of no class
  flags = SimpleNamespace(**{**FLAGS, "num": None})
  with pytest.raises(UserError, match=r"has other names, examples than the run had"):
    ism.evaluate_mode(config, metadata, None, flags, tmp_path)


def test_latents_of_one_class_will_do():
  config = ism_imagenet256.get_config("S/2,debug")
  with config.unlocked():
    config.data.classes = 1
  _, metadata = build(config)
  assert metadata["names"] == ["0"]
