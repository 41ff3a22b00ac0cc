"""A trained model: the same from a run, from files and in memory, and light to use."""

import json

import jax
import numpy as np
import pytest

import ism_jax
from ism_jax import model as model_lib
from ism_jax import path, sample
from ism_jax.model import Model, make_network
from ism_jax.networks import autoencoder
from tests.light import heavy_imports
from train_jax.checkpointing.checkpoint import Checkpoints
from train_jax.errors import UserError
from train_jax.storage import exported

ANIMALS = {"names": ["cat", "dog", "0"], "shape": [8, 8, 1]}


@pytest.fixture(scope="module")
def model(small_config, make_model):
  """Of three classes, the last of them called "0"."""
  return make_model(small_config(), ANIMALS)


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
  """Where the model is exported."""
  out = tmp_path_factory.mktemp("exported")
  model.save_pretrained(out)
  return out


def test_a_run_saved_and_opened_again_makes_the_same_images(digits_run, tmp_path, differences):
  trained = Model.from_run(digits_run, devices=jax.devices()[:1])
  trained.save_pretrained(tmp_path)
  for opened in (Model.from_pretrained(tmp_path), ism_jax.load_pretrained(tmp_path)):
    assert opened.record == {"format": exported.FORMAT, **json.loads(json.dumps(trained.record))}
    assert differences(opened.params, jax.device_get(trained.params)) == []
    images = [m.sample([3, "5"], steps=2, guidance=0.5, seed=1) for m in (trained, opened)]
    assert images[0].tobytes() == images[1].tobytes()
  assert trained.step == 2 and trained.names == tuple("0123456789")
  assert np.abs(images[0] - trained.sample([3, 4], 2, 0.5, 1)).max(axis=(1, 2, 3))[1] > 1e-3


def test_a_run_is_opened_on_all_devices_and_at_any_step(digits_run, differences):
  shared, first = Model.from_run(digits_run), Model.from_run(digits_run, step=1)
  assert dict(shared.mesh.shape) == {"fsdp": 2, "data": 4, "tensor": 1}
  one = Model.from_run(digits_run, devices=jax.devices()[:1])
  np.testing.assert_allclose(shared.sample([3, 5]), one.sample([3, 5]), atol=1e-4)
  assert (first.step, shared.step) == (1, 2)
  assert differences(*(jax.device_get(m.params) for m in (first, shared)))
  abstract = jax.eval_shape(lambda params: params, one.params)
  stored, _ = Checkpoints(digits_run).restore_ema("sample", abstract, one.mesh)
  assert differences(jax.device_get(one.params), jax.device_get(stored)) == []
  with pytest.raises(UserError, match=r"step=9 is not stored"):
    Model.from_run(digits_run, step=9)


def test_evaluation_gives_the_numbers_of_training(digits_run):
  lines = (digits_run / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  logged = {name.removeprefix("eval/"): value for row in rows[-2:] for name, value in row.items()}
  numbers = Model.from_run(digits_run).evaluate(seed=5)
  assert {"fd/nfe1_w0", "accuracy/nfe2_w1", "recall/nfe1_w0.5"} <= numbers.keys()
  assert len(numbers) == 24 and numbers == {name: logged[name] for name in numbers}
  few = Model.from_run(digits_run).evaluate(seed=5, nfe=(2,), guidance=())
  assert few == {name: value for name, value in numbers.items() if name.endswith("nfe2_w0")}
  other = Model.from_run(digits_run).evaluate(seed=6, nfe=(2,), guidance=())
  assert other.keys() == few.keys() and other["fd/nfe2_w0"] != few["fd/nfe2_w0"]


def test_says_what_it_is(model, differences):
  assert (model.step, model.w_max, model.makes_latents) == (7, 2.0, False)
  assert (model.names, model.shape) == (("cat", "dog", "0"), (8, 8, 1))
  assert len(repr(model)) < 200
  doubled = jax.tree.map(lambda a: 2 * a, model.params)
  other = model.with_params(doubled, 8)
  assert (other.step, model.step) == (8, 7) and differences(other.params, doubled) == []


def test_classes_are_asked_for_by_name_or_number(model):
  found = model.labels(["cat", 1, "1", "dog", np.int64(2), 0])
  assert found.dtype == np.int32 and found.tolist() == [0, 1, 1, 1, 2, 0]
  assert model.labels(["0", 0]).tolist() == [2, 0]  # a name wins over a number
  assert [model.labels(one).tolist() for one in ("dog", 2, np.int32(1))] == [[1], [2], [1]]
  images = model.sample(["0", "dog"], steps=1)
  np.testing.assert_array_equal(images, model.sample([2, 1], steps=1))
  assert np.abs(images - model.sample([0, 1], steps=1)).max() > 1e-3


@pytest.mark.parametrize(
  ("names", "asked", "labels", "said"),
  [
    (["1", "10", "2"], ["10", "2"], [1, 2], ""),  # "2" is the name and the number of one class
    (["1", "10", "2"], ["1"], [0], "1 is taken as the name of a class: number 0, '1'"),
    (["1", "10", "2"], [1], [1], "1 is taken as the number of a class: number 1, '10'"),
    (["1", "3", "5"], ["2"], [2], "2 is taken as the number of a class: number 2, '5'"),
    (["3", "cat"], ["1", "cat", 0], [1, 1, 0], "0 is taken as the number of a class: number 0"),
    (["0", "1"], ["0", 1], [0, 1], ""),
    (["cat", "²"], ["²", "1", 0], [1, 1, 0], ""),
  ],
)
def test_of_a_name_and_a_number_it_is_said_which_is_meant(
  names, asked, labels, said, small_config, make_model, caplog
):
  model = make_model(small_config(), {**ANIMALS, "names": names})
  model_lib._warn_once.cache_clear()
  for _ in range(2):
    assert model.labels(asked).tolist() == labels
  assert said in caplog.text and len(caplog.records) == bool(said)


def test_samples_are_those_of_the_network(small_config, model):
  labels = [0, 2, 0, 2, 0, 2]
  images = model.sample(labels, steps=4, guidance=1.0, seed=3)
  draw = sample.make_sampler(make_network(small_config(), ANIMALS)[1], (8, 8, 1))
  exact = draw(model.params, 3, labels, 1.0, 4)
  assert images.dtype == np.float32 and images.tobytes() == exact.tobytes()


def test_a_flow_model_is_guided_without_a_classifier(small_config, make_model, tmp_path):
  config = small_config("flow")
  make_model(config, ANIMALS).save_pretrained(tmp_path)
  model = Model.from_pretrained(tmp_path)
  assert model.w_max == np.inf
  images = model.sample([0, 2, 0, 2], steps=2, guidance=20.0, seed=3)
  apply = make_network(config, ANIMALS)[1]
  x, zero = path.draw_noise(jax.random.key(3), np.arange(4), (8, 8, 1)), np.zeros(4)
  for t in (0.0, 0.5):
    of_class, of_null = (
      apply(model.params, x, zero + t, zero, np.array(label), zero)
      for label in ([0, 2] * 2, [3] * 4)
    )
    x = x + (of_null + 21 * (of_class - of_null)) / 2
  np.testing.assert_allclose(images, x, atol=1e-3)
  assert np.abs(images - model.sample([0, 2, 0, 2], steps=2, seed=3)).max() > 0.05


def test_a_model_trained_with_cudnn_samples_without_it(small_config, make_model):
  settings = {"model__attention": "cudnn", "model__dtype": "bfloat16"}
  fused, plain = (
    make_model(small_config(**{**settings, "model__attention": kernel}), ANIMALS)
    for kernel in ("cudnn", "xla")
  )
  np.testing.assert_array_equal(fused.sample([0, 1, 2]), plain.sample([0, 1, 2]))


def test_latents_are_decoded_by_their_autoencoder(small_config, make_model, tmp_path, monkeypatch):
  make_model(small_config(), {**ANIMALS, "vae": "its hash"}).save_pretrained(tmp_path)

  def with_decoder(sampler, path, digest):
    assert (path, digest) == ("v.safetensors", "its hash")
    return lambda *args: np.repeat(sampler(*args), 8, axis=1)

  monkeypatch.setattr(autoencoder, "with_decoder", with_decoder)
  images = Model.from_pretrained(tmp_path, vae="v.safetensors").sample([0], steps=1)
  raw = Model.from_pretrained(tmp_path)
  assert raw.makes_latents
  np.testing.assert_array_equal(images[:, ::8], raw.sample([0], steps=1))
  with pytest.raises(UserError, match=r"no numbers for latents without --metrics"):
    raw.evaluate()


def test_sampling_imports_nothing_of_training(directory):
  use = f"""
model = ism_jax.Model.from_pretrained({str(directory)!r})
assert model.sample(["dog", 1], steps=2, guidance=0.5, batch=2).shape == (2, 8, 8, 1)
"""
  assert heavy_imports("ism_jax", use) == []


def test_an_autoencoder_is_refused_where_images_are_made(directory, digits_run):
  message = r"vae='v.safetensors' decodes latents, but this model makes images"
  for opened in (ism_jax.load_pretrained, Model.from_pretrained):
    with pytest.raises(UserError, match=message):
      opened(directory, vae="v.safetensors")
  with pytest.raises(UserError, match=message):
    Model.from_run(digits_run, vae="v.safetensors")


@pytest.mark.parametrize(
  ("request_", "message"),
  [
    ({"labels": []}, r"labels=\[\] must be whole numbers, at least one; the classes are 0 to 2\."),
    ({"labels": [1.5]}, r"labels=\[1.5\] must be whole numbers"),
    ({"labels": [3]}, r"label 3 is out of range: the classes are 0 to 2\."),
    ({"labels": ["-1"]}, r"label -1 is out of range"),
    *(({"labels": [digit]}, rf"{digit!r} is no number or name") for digit in ("²", "３", "--3")),
    ({"labels": ["dog", "cow"]}, r"'cow' is no number or name of a class; they are 0 cat, 1 dog"),
    ({"labels": [0], "steps": 300}, r"nfe=300 must be"),
    ({"labels": [0], "guidance": 2.5}, r"guidance=2.5 is outside the trained range 0 to 2"),
  ],
)
def test_what_was_not_trained_is_refused(request_, message, model):
  with pytest.raises(UserError, match=message):
    model.sample(**request_)
