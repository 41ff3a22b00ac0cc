"""iSM assembled: every config trains and is evaluated, and bad ones say what is wrong."""

import itertools
import json

import jax
import numpy as np
import optax
import pytest
from PIL import Image

from configs import ism_imagenet256
from ism_jax import loss, pairing, path
from ism_jax import method as ism
from ism_jax.evaluation import registry
from ism_jax.model import Model, make_network, make_record
from tests.ism.conftest import DIGITS
from train_jax import mesh as mesh_lib
from train_jax import state as state_lib
from train_jax.errors import UserError
from train_jax.step import make_train_step


def build(config):
  return ism.make_method(config, mesh_lib.make_mesh())


@pytest.fixture(scope="module")
def default(small_config):
  """(method, parameters) of the debug config."""
  method, metadata = build(small_config())
  assert json.loads(json.dumps(metadata)) == metadata == DIGITS
  params, aux_state = jax.jit(method.init)(jax.random.key(0))
  assert aux_state == ()
  return method, params


@pytest.fixture(scope="module")
def batches(default):
  """The first eight batches, in pools of two."""
  return list(itertools.islice(default[0].stream(0, 0), 8))


@pytest.mark.parametrize(
  ("objective", "terms"),
  [
    ("", {"velocity", "guidance", "consistency"}),
    pytest.param("flow", {"velocity"}, marks=pytest.mark.slow),
    pytest.param("shortcut", {"velocity", "consistency"}, marks=pytest.mark.slow),
  ],
)
def test_a_train_step_learns(objective, terms, small_config):
  config = small_config(objective)
  method, _ = build(config)
  tx, decays = optax.adam(3e-3), dict(config.ema)
  state = jax.jit(state_lib.create(method, tx, decays, seed=0))()
  step = jax.jit(make_train_step(method, tx, decays, clip=1.0))
  first, losses = state.params, []
  for batch in itertools.islice(method.stream(0, 0), 40):
    state, metrics = step(state, batch)
    losses.append(float(metrics["velocity"]))
  assert all(np.isfinite(float(value)) for value in metrics.values())
  assert terms == {"velocity", "guidance", "consistency"} & set(metrics)
  assert np.mean(losses[-10:]) < 0.95 * np.mean(losses[:5]) and int(state.skipped) == 0
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.params["out"], first["out"])
  assert all(moved.values()) and set(state.ema) == {"target", "sample"}


def test_batches_are_paired_within_class(batches):
  for first, second in zip(batches[::2], batches[1::2], strict=True):
    label, noise = (np.concatenate([first[k], second[k]]) for k in ("label", "noise"))
    start = noise.min()
    np.testing.assert_array_equal(np.sort(noise), np.arange(start, start + 32))
    np.testing.assert_array_equal(label[noise - start], label)
    assert np.any(noise != np.arange(start, start + 32))


@pytest.mark.parametrize("position", [2, 3])
def test_a_paired_stream_can_begin_anywhere(position, default, batches):
  again = itertools.islice(default[0].stream(0, position), 8 - position)
  for batch, expected in zip(again, batches[position:], strict=True):
    for name in ("image", "label", "noise"):
      np.testing.assert_array_equal(batch[name], expected[name])


def test_a_stream_goes_on_past_the_largest_int32(default):
  batches = itertools.islice(default[0].stream(0, 2**31 // 16 - 2), 4)
  noise = np.concatenate([batch["noise"] for batch in batches])
  assert noise.dtype == np.int32 and len(set(noise.tolist())) == 64
  assert noise[:32].min() == 2**31 - 32 and noise[32:].max() == 31 - 2**31


def test_the_loss_is_of_the_batch_s_noise_and_the_target_average(
  default, batches, small_config, perturb
):
  method, params = default
  config, batch, key = small_config(), batches[0], jax.random.key(4)
  target = jax.jit(perturb)(params)
  noise_rng = jax.random.fold_in(jax.random.key(config.seed), 2)
  x0 = path.draw_noise(noise_rng, batch["noise"], (8, 8, 1))
  apply, loss_config = make_network(config, DIGITS)[1], loss.LossConfig(**config.loss)
  args = params, target, x0, batch["image"], batch["label"], 10, key
  wanted, terms = jax.jit(lambda *args: loss.loss(loss_config, apply, *args))(*args)
  ema = {"target": target, "sample": jax.tree.map(np.zeros_like, params)}
  measure = jax.jit(lambda batch: method.loss(params, ema, batch, key))
  found, metrics = measure(batch)
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
  np.testing.assert_allclose(metrics["consistency"], terms["consistency"], rtol=1e-5)
  online = loss.loss(loss_config, apply, params, params, *args[2:])[0]
  assert abs(float(online - wanted)) > 1e-3  # it makes a difference
  # Noise goes by its number: in another order the pairs are the same, dealt anew they cost more.
  turned = {name: value[::-1] for name, value in batch.items()}
  cost = metrics["pair_cost"]
  np.testing.assert_allclose(measure(turned)[1]["pair_cost"], cost, rtol=1e-5)
  assert measure({**batch, "noise": batch["noise"][::-1]})[1]["pair_cost"] > cost


@pytest.mark.parametrize(
  ("nfe", "quick"), [((1, 8, 128), (1,)), ((8,), (8,))], ids=["few steps", "no few steps"]
)
def test_what_is_evaluated_is_what_the_config_says(nfe, quick, default, small_config, monkeypatch):
  """Steps, scales (w = 0 always), numbers of samples and the seed; the leak of training's pairs."""
  _, params = default
  asked, read, drawn = [], [], []
  monkeypatch.setattr(registry, "make_reference", lambda source, held_out: "reference")

  def measure(model, reference, settings, seed):
    asked.append((model.step, reference, settings, seed))
    yield from ()

  def make_sampler(*_):
    def sampler(params, seed, labels, w, nfe):
      drawn.append((nfe, w, seed))
      return np.zeros((len(labels), 8, 8, 1), np.float32)

    return sampler

  monkeypatch.setattr(registry.classifier, "measure", measure)
  monkeypatch.setattr(registry.sample, "make_sampler", make_sampler)
  monkeypatch.setattr(pairing, "class_leak", lambda *args: read.append(args) or 0.25)
  changes = {"eval__nfe": nfe, "eval__guidance": (0.5,), "eval__samples": 80}
  config = small_config(seed=5, **changes)
  method, _ = build(config)
  results = dict(method.evaluate(params, 1, False))
  assert results.keys() == {"grid"} and results["grid"].dtype == np.uint8
  assert dict(method.evaluate(params, 2, True))["class_leak"] == 0.25
  first = [(steps, w, 20) for steps in quick for w in (0.0, 0.5)]
  final = [(steps, w, 40 if steps == 128 else 80) for steps in nfe for w in (0.0, 0.5)]
  assert asked == [(1, "reference", first, 5), (2, "reference", final, 5)]
  assert drawn == [(steps, w, 5) for steps, w, _ in first + final]
  pool = list(itertools.islice(method.stream(5, 0), config.pairing.pool))
  noise, label = (np.concatenate([batch[name] for batch in pool]) for name in ("noise", "label"))
  x0 = path.draw_noise(jax.random.fold_in(jax.random.key(5), 2), noise, (8, 8, 1))
  ((found, labels),) = read
  np.testing.assert_array_equal(labels, label)
  np.testing.assert_allclose(found, np.asarray(x0).reshape(len(noise), -1), rtol=1e-6)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"batch": 20}, r"batch=20 is not divisible by 8, the sum of loss.split=.*multiple of 8"),
    ({"optim__grad_accum_steps": 3}, r"8, .* times optim.grad_accum_steps=3; .*multiple of 24"),
    ({"data__image_size": 32}, r"data.image_size=32 but for the images of digits it is 8"),
    ({"data__channels": 3}, r"data.channels=3 but for the images of digits it is 1"),
    (
      {"data__source": "imagenet"},
      r"data.source='imagenet' is unknown; choose from digits, folder",
    ),
    ({"data__path": "here"}, r"data.path='here' is not read where data.source='digits'"),
    ({"data__source": "folder"}, r"data.path is empty; .*which data.source='folder' reads"),
    ({"data__source": "folder", "data__path": "nowhere"}, r"data.path='nowhere' is not a folder"),
    ({"model__patch": 3}, r"model.patch=3 does not divide data.image_size=8"),
    ({"loss__wavelet_levels": 4}, r"loss.wavelet_levels=4 does not fit images of 8x8.*from 0 to 3"),
    ({"loss__level_decay": 0.0}, r"loss.level_decay=0.0 must be above 0"),
    ({"loss__norm": "l1"}, r"loss.norm='l1' is unknown"),
    ({"pairing__condition": "labels"}, r"pairing.condition='labels' is unknown"),
    ({"pairing__pool": 10**6, "pairing__condition": "none"}, r"pool=1000000 batches of 16"),
    (
      {"loss__target": "meanflow", "model__attention": "cudnn"},
      r"loss.target='meanflow' differentiates .* choose model.attention=xla",
    ),
    ({"eval__nfe": (1, 500)}, r"nfe=500 must be"),
    ({"eval__guidance": (0.0, 9.0)}, r"guidance=9 is outside the trained range"),
    ({"eval__samples": 10}, r"eval.samples=10 must be at least 16"),
  ],
)
def test_bad_configs_are_refused_in_a_sentence(changes, message, small_config):
  with pytest.raises(UserError, match=message):
    build(small_config(**changes))


@pytest.mark.parametrize(("batch", "tensor", "warned"), [(16, 1, 1), (32, 1, 0), (16, 2, 0)])
def test_a_part_of_a_group_on_a_device_is_warned_of_once(
  batch, tensor, warned, small_config, monkeypatch, caplog
):
  mesh = mesh_lib.make_mesh(tensor=tensor, devices=jax.devices()[:4])
  ism.make_method(small_config(batch=batch), mesh)
  found = [text for text in caplog.messages if "at a time for each" in text]
  assert len(found) == warned
  if warned:
    assert "batch=16 is 4 examples at a time for each of the 4 devices, and loss.split" in found[0]
    assert "a multiple of 32, or put part of the devices in mesh.tensor" in found[0]
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    caplog.clear()
    ism.make_method(small_config(batch=batch), mesh)
    assert not caplog.messages


@pytest.fixture
def photos(tmp_path, small_config):
  """(class -> number of images, **changes) -> config of a folder of them, which may be there."""
  root, rng = tmp_path / "photos", np.random.default_rng(0)

  def make(counts, **changes):
    for name, count in counts.items():
      (root / name).mkdir(exist_ok=True, parents=True)
      for i in range(count):
        pixels = rng.integers(0, 256, (9, 12, 3), np.uint8)
        Image.fromarray(pixels).save(root / name / f"{i}.png")
    folder = {"data__source": "folder", "data__path": str(root), "data__channels": 3}
    return small_config(**folder, **changes)

  return make


def test_a_folder_is_paired_and_trained_on_with_its_mirror_images(photos, monkeypatch):
  config, seen = photos({"cats": 5, "dogs": 4}, data__flip=True), []
  pair = pairing.pair

  def watched(settings, rng, pixels, *rest):
    seen.append(pixels)
    return pair(settings, rng, pixels, *rest)

  monkeypatch.setattr(pairing, "pair", watched)
  method, metadata = build(config)
  assert len(metadata.pop("sha256")) == 64
  assert metadata == {"names": ["cats", "dogs"], "shape": [8, 8, 3], "examples": 18}
  batches = list(itertools.islice(method.stream(0, 0), 2))  # a pool, and 32 rows: all of them
  trained = np.concatenate([batch["image"] for batch in batches])
  np.testing.assert_array_equal(seen[0], trained)
  assert {image.tobytes() for image in trained} == {i[:, ::-1].tobytes() for i in trained}
  config.data.flip = False
  assert build(config)[1]["examples"] == 9


@pytest.mark.parametrize("counts", [{"": 5}, {"cats": 5}, {"cats": 5, "dogs": 1}], ids=str)
def test_images_without_classes_are_trained_on_and_not_measured(counts, photos, capsys):
  config = photos(counts, eval__guidance=(0.0,))
  method, metadata = build(config)
  assert metadata["names"] == [name or "photos" for name in counts]
  data, said = capsys.readouterr().out.splitlines()
  some = f"{len(counts)} class(es): {', '.join(metadata['names'])}"
  assert data == f"data: {sum(counts.values())} images of 8x8x3; {some}"
  assert said.startswith("evaluation: a grid of samples, without numbers: the classifier")
  assert said.endswith(f"have {len(counts)}, the smallest of {min(counts.values())}")
  batch = next(method.stream(0, 0))
  params, _ = jax.jit(method.init)(jax.random.key(0))
  value = jax.jit(method.loss)(params, {"target": params}, batch, jax.random.key(0))[0]
  assert batch["image"].shape == (16, 8, 8, 3) and np.isfinite(float(value))
  ((name, picture),) = method.evaluate(params, 1, True)
  assert name == "grid" and picture.dtype == np.uint8
  model = Model.make(make_record(config.to_dict(), metadata), lambda: params)
  with pytest.raises(UserError, match=r"no numbers here without --metrics=fid.*at least 2 classes"):
    model.evaluate()


def test_a_model_is_not_evaluated_on_other_images_than_its_run_had(photos):
  config = photos({"a": 3, "b": 3})
  _, metadata = build(config)
  photos({"c": 3})  # whose label is that of no class
  with pytest.raises(UserError, match=r"has other names, examples, sha256 than the run had"):
    Model.make(make_record(config.to_dict(), metadata), dict).evaluate()


@pytest.mark.parametrize("kind", ["folder", "npz"])
def test_images_that_were_replaced_are_noticed_even_if_they_are_held_out(kind, photos, tmp_path):
  config = photos({"a": 4, "b": 4}, data__held_out=0.25)
  if kind == "npz":
    config.data.source, config.data.path = kind, str(tmp_path / "a.npz")

  def write(i: int, value: int):
    if kind == "folder":
      return Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / "photos" / "b" / f"{i}.png")
    images = np.zeros((8, 8, 8, 3), np.uint8)
    images[4 + i] = value
    return np.savez(tmp_path / "a.npz", images=images, labels=[0] * 4 + [1] * 4)

  for i in range(4):  # one of them is held out
    write(i, 1)
    _, metadata = build(config)
    write(i, 2)
    with pytest.raises(UserError, match=r"has other sha256 than the run had; restore the images"):
      Model.make(make_record(config.to_dict(), metadata), dict).evaluate()
  write(3, 1)
  _, again = build(config)
  write(3, 1)
  assert build(config)[1] == again


def test_latents_have_their_mirror_images_and_may_have_one_class():
  config = ism_imagenet256.get_config("S/2,debug")
  with config.unlocked():
    config.data.classes = 1
  assert build(config)[1]["names"] == ["0"]
  with config.unlocked():
    config.data.flip = True
  with pytest.raises(UserError, match=r"data.flip=True is for images; latents have their"):
    build(config)
