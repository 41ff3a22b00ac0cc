"""The large-scale protocol, with tiny networks in the place of the pretrained ones.

The stand-ins are linear maps of the image averaged to 2x2 pixels, so that every statistic can be
computed again in a line of NumPy.
"""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ism_jax
from configs import ism_digits
from ism_jax import benchmark, extract, fid
from ism_jax import method as ism
from ism_jax.protocol import Protocol, column
from ism_jax.sample import make_sampler, to_uint8
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.weights import sha256

SIZES = {"pool": 6, "spatial": 5, "logits": 4}
SHAPE = (8, 8, 3)


def weights(path, f):
  """[12, f] from the number that the stand-in's file holds."""
  draw = np.random.default_rng(int(path.read_text()))
  return draw.normal(size=(12, f)).astype(np.float32)


def project(kernel, images):
  """Features [n, f] of uint8 images [n, h, w, 3], in JAX or NumPy."""
  n, h, w, c = images.shape
  small = images.reshape(n, 2, h // 2, 2, w // 2, c).astype("float32").mean((2, 4))
  return ((small.reshape(n, -1) - 128) / 16) @ kernel


def load_inception(path, dtype="float32"):
  params = {kind: jnp.asarray(weights(path, f), dtype) for kind, f in SIZES.items()}
  params["pool_768"] = jnp.ones((12, 3))
  return params, lambda p, images: {kind: project(kernel, images) for kind, kernel in p.items()}


def load_dinov2(path, dtype="float32", offset=0.0):
  return {"kernel": jnp.asarray(weights(path, 7), dtype)}, lambda p, x: project(p["kernel"], x)


def load_autoencoder(path, dtype="float32"):
  """Latents [b, h, w, 4] -> images of eight times the side: the first three channels, repeated."""

  def decode(params, latents):
    return jnp.tanh(params["gain"] * latents[..., :3]).repeat(8, axis=1).repeat(8, axis=2)

  return SimpleNamespace(params={"gain": jnp.float32(0.5)}, encode=None, decode=decode)


def put_stand_ins(put_module, put_attribute):
  loads = {"inception": load_inception, "dinov2": load_dinov2, "autoencoder": load_autoencoder}
  for name, load in loads.items():
    module = ModuleType(f"ism_jax.{name}")
    module.load = lambda path, *args, load=load, **kwargs: load(Path(path), *args, **kwargs)
    put_module(f"ism_jax.{name}", module)
    put_attribute(ism_jax, name, module, raising=False)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
  put_stand_ins(functools.partial(monkeypatch.setitem, sys.modules), monkeypatch.setattr)


@pytest.fixture
def files(tmp_path):
  """Weights of the stand-ins, and a reference of 300 images."""
  for i, name in enumerate(("inception", "dinov2", "vae")):
    (tmp_path / name).write_text(str(i))
  images = np.random.default_rng(9).integers(0, 256, (300, *SHAPE), np.uint8)
  np.savez(tmp_path / "real.npz", arr_0=images)
  names = {"inception": "inception", "dinov2": "dinov2", "reference": "real.npz"}
  return SimpleNamespace(
    folder=tmp_path,
    images=images,
    real=tmp_path / "real.npz",
    flags={name: str(tmp_path / file) for name, file in names.items()},
    inception=lambda x, kind="pool": project(weights(tmp_path / "inception", SIZES[kind]), x),
    dinov2=lambda x: project(weights(tmp_path / "dinov2", 7), x),
  )


def network(params, x, t, d, c, w):
  """A network that knows its inputs: brighter with the class, flatter with w."""
  del t, d
  return params["gain"] * x + (c / 10 - 0.3 - 0.1 * w)[:, None, None, None]


PARAMS = {"gain": jnp.float32(-0.5)}
ALL = ("fid", "sfid", "fd_dinov2", "is", "pr")


def make(files, metrics=ALL, shape=SHAPE, mesh=None, encoder="", per_device=4, **changes):
  protocol = Protocol(metrics, **{**files.flags, **changes})
  return benchmark.prepare(
    protocol, network, shape, 10, mesh or mesh_lib.make_mesh(), encoder, per_device
  )


def samples(n, nfe, w, labels, seed=0, shape=SHAPE):
  """The samples as the ordinary sampler draws them, 8 bits."""
  return to_uint8(make_sampler(network, shape)(PARAMS, seed, labels, w, nfe))


def frechet(x, y):
  def moments(features):
    return features.mean(0), np.cov(features.T)

  x, y = (moments(np.asarray(features, np.float64)) for features in (x, y))
  return fid.frechet_distance(*x, *y)


@pytest.mark.parametrize("classes", ["balanced", "random"])
def test_every_number_is_that_of_all_samples_at_once(classes, files):
  """70 samples in batches of 32, the last one of 6."""
  found = make(files, classes=classes, seed=5)
  results = dict(found.measure(PARAMS, [(1, 0.0), (4, 0.5)], 70))
  columns = ("fid", "sfid", "fd_dinov2", "is", "precision", "recall")
  assert set(results) == {f"{c}@70/{s}" for c in columns for s in ("nfe1_w0", "nfe4_w0.5")}

  labels = np.arange(70) % 10
  if classes == "random":
    labels = np.random.default_rng(5).integers(10, size=70)
  images = samples(70, 4, 0.5, labels, seed=5)
  drawn = found.pictures(PARAMS, [(4, 0.5)], labels[:20].astype(np.int32))[0]
  np.testing.assert_array_equal(drawn, images[:20])
  real, at = files.images, "@70/nfe4_w0.5"
  for name, f in (
    ("fid", files.inception),
    ("sfid", lambda x: files.inception(x, "spatial")),
    ("fd_dinov2", files.dinov2),
  ):
    assert results[name + at] == pytest.approx(frechet(f(real), f(images)), rel=1e-4)
  score = fid.inception_score(files.inception(images, "logits"))[0]
  assert results["is" + at] == pytest.approx(score, rel=1e-5) and score > 1.01
  expected = fid.precision_recall(files.inception(real), files.inception(images))
  assert (results["precision" + at], results["recall" + at]) == expected


def test_the_mesh_does_not_matter(files, make_mesh):
  results = []
  for mesh in (make_mesh(1, 1), make_mesh(8, 1), make_mesh(2, 4)):
    found = make(files, mesh=mesh, per_device=16 // mesh.size)
    results.append(dict(found.measure(PARAMS, [(2, 0.5)], 50)))
    for stored in files.folder.glob("real.*-*.npz"):
      stored.unlink()  # so that the reference's side is computed on each mesh
  for other in results[1:]:
    assert other == pytest.approx(results[0], rel=1e-5)


def test_features_are_not_kept_unless_precision_and_recall_ask(files):
  images = mesh_lib.to_global({"x": files.images[:8]}, mesh_lib.make_mesh())["x"]
  net = extract.load_network("inception", files.flags["inception"], mesh_lib.make_mesh())
  batches = [(jnp.arange(8), net.features(images))]
  wanted = extract.Wanted(["pool"], np.arange(0))
  assert extract.collect(batches, 8, net.sizes, wanted).kept.size == 0
  wanted = extract.Wanted([], np.array([1, 6]))
  found = extract.collect(batches, 8, net.sizes, wanted)
  assert not found.moments and not found.scores.count.size
  expected = files.inception(files.images[[1, 6]])
  np.testing.assert_allclose(found.kept, expected, rtol=1e-5, atol=1e-5)


def test_two_processes_statistics_are_merged_bit_for_bit(files, monkeypatch):
  """What one process would send to another, sent to itself."""
  draw = np.random.default_rng(0)
  x, logits = draw.normal(size=(20, 6)), draw.normal(size=(20, 4))

  def of(rows):
    kept = np.zeros((20, 6), np.float32)
    kept[rows] = x[rows]
    scores = fid.update_scores(fid.no_scores(2, 4), np.arange(20)[rows] // 10, logits[rows])
    return extract.Statistics({"pool": fid.update(fid.no_moments(6), x[rows])}, kept, scores)

  halves = [of(slice(0, 8)), of(slice(8, 20))]
  sent = iter(halves)

  def broadcast(bits, is_source):
    leaves = jax.tree.leaves(jax.tree.map(np.asarray, next(sent)))
    assert [len(b) for b in bits] == [leaf.nbytes for leaf in leaves]
    assert all(b.dtype == np.uint8 for b in bits)
    return [jnp.asarray(extract._bytes(leaf)) for leaf in leaves]

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(extract.multihost_utils, "broadcast_one_to_all", broadcast)
  merged, whole = extract._over_processes(halves[1]), of(slice(0, 20))
  np.testing.assert_array_equal(merged.kept, whole.kept)
  np.testing.assert_allclose(merged.moments["pool"].covariance, np.cov(x.T), rtol=1e-13)
  assert merged.moments["pool"].count == 20
  assert fid.score(merged.scores) == pytest.approx(fid.score(whole.scores), rel=1e-13)


@pytest.mark.parametrize(
  ("n", "name"),
  [(2000, "fid@2000"), (49_999, "fid@49999"), (50_000, "fid-50k"), (60_000, "fid@60000")],
)
def test_only_fifty_thousand_samples_are_called_50k(n, name):
  assert column("fid", n) == name


def test_the_facts_say_what_the_number_depends_on(files):
  metrics = ("fid", "fd_dinov2", "pr")
  facts = make(files, metrics, classes="random", seed=3).facts()
  digest = sha256(files.real)[:12]
  assert facts["vae"] == "none: pixels" and facts["seed"] == "3"
  assert "nearest" in facts["rounding"] and "clipped" in facts["rounding"]
  assert facts["classes"] == "random (uniform, by the seed)"
  assert facts["inception"] == f"inception sha256:{sha256(files.flags['inception'])[:12]}"
  assert facts["reference"].startswith(
    f"real.npz sha256:{digest}; fid, fd_dinov2, pr against 300 of its 300 images"
  )
  assert "299x299" in facts["resize"] and "samples none (8x8)" in facts["resize"]
  assert make(files).facts()["classes"] == "balanced (i mod 10)"


def test_latents_are_decoded(files, tmp_path):
  real = tmp_path / "large.npz"
  np.savez(real, arr_0=np.random.default_rng(1).integers(0, 256, (40, 32, 32, 3), np.uint8))
  vae = str(tmp_path / "vae")
  found = make(files, ("fid",), shape=(4, 4, 4), reference=str(real), vae=vae)
  assert found.shape == (32, 32, 3)
  assert found.facts()["vae"] == f"vae sha256:{sha256(vae)[:12]}"
  results = dict(found.measure(PARAMS, [(1, 0.0)], 30))
  latents = make_sampler(network, (4, 4, 4))(PARAMS, 0, np.arange(30) % 10, 0.0, 1)
  images = to_uint8(np.tanh(0.5 * latents[..., :3])).repeat(8, 1).repeat(8, 2)
  with np.load(real) as saved:
    expected = frechet(files.inception(saved["arr_0"]), files.inception(images))
  assert results["fid@30/nfe1_w0"] == pytest.approx(expected, rel=1e-3)


def test_grey_samples_are_three_equal_channels(files):
  found = make(files, ("fid",), shape=(8, 8, 1))
  images = found.pictures(PARAMS, [(1, 0.0)], np.arange(9, dtype=np.int32))[0]
  assert images.shape == (9, 8, 8, 3)
  np.testing.assert_array_equal(images[..., 0], images[..., 2])


def test_the_inception_score_needs_no_reference(files):
  found = make(files, ("is",), reference="")
  assert found.facts()["reference"] == "none"
  assert set(dict(found.measure(PARAMS, [(1, 0.0)], 20))) == {"is@20/nfe1_w0"}


def test_blocks_do_not_matter(files, monkeypatch):
  whole = dict(make(files).measure(PARAMS, [(1, 0.0)], 70))
  monkeypatch.setattr(extract, "BLOCK", 40)
  for stored in files.folder.glob("real.*-*.npz"):
    stored.unlink()
  assert dict(make(files).measure(PARAMS, [(1, 0.0)], 70)) == pytest.approx(whole, rel=1e-6)


def test_samples_that_are_not_finite_are_refused(files):
  found = make(files, ("fid",))
  with pytest.raises(UserError, match=r"nfe=1, guidance=0 are not finite.*earlier checkpoint"):
    list(found.measure({"gain": jnp.float32(np.nan)}, [(1, 0.0)], 20))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"metrics": ("fid", "kid")}, r"metric 'kid' is unknown; choose from fid, sfid, fd_dinov2, is"),
    ({"dinov2": ""}, r"metric 'fd_dinov2' needs the weights of a network: --dinov2=FILE"),
    ({"inception": ""}, r"metric 'fid' needs .* --inception=FILE"),
    ({"inception": "gone.safetensors"}, r"inception='gone.safetensors' is not a file"),
    ({"reference": ""}, r"no reference was given"),
    ({"reference": "gone.npz"}, r"reference='gone.npz' is not there"),
    ({"classes": "sorted"}, r"classes='sorted' is unknown; choose 'balanced' or 'random'"),
    ({"shape": (4, 4, 4)}, r"makes latents of 4x4x4 and no decoder was given: --vae=FILE"),
    ({"shape": (16, 16, 3)}, r"has images of 8x8 pixels and the samples have 16x16"),
  ],
)
def test_bad_requests_are_refused_in_a_sentence(changes, message, files):
  with pytest.raises(UserError, match=message) as error:
    make(files, **changes)
  assert str(error.value).count(". ") == 0 and str(error.value).endswith(".")


def test_another_autoencoder_than_that_of_the_latents_is_refused(files, tmp_path):
  vae = str(tmp_path / "vae")
  with pytest.raises(UserError, match=r"is not the autoencoder of this model's latents \(0123"):
    make(files, shape=(4, 4, 4), vae=vae, encoder="0123456789abcdef")


def test_a_decoder_for_pixels_is_refused(files):
  with pytest.raises(UserError, match=r"is for latents, and this model makes images of 8x8x3"):
    make(files, vae=files.flags["inception"])


@pytest.mark.parametrize(
  ("metrics", "n", "least"), [(("fid",), 1, 2), (("fid", "is"), 9, 10), (("pr", "fid"), 3, 4)]
)
def test_too_few_samples_are_refused(metrics, n, least, files):
  with pytest.raises(UserError, match=rf"{n} samples are too few for .*; draw at least {least}\."):
    next(make(files, metrics).measure(PARAMS, [(1, 0.0)], n))


PROGRAM = """
import importlib.util, json, sys
from types import SimpleNamespace
import jax
address, process, test, folder = sys.argv[1:]
jax.distributed.initialize(address, 2, int(process))
spec = importlib.util.spec_from_file_location("test_benchmark", test)
test = importlib.util.module_from_spec(spec)
spec.loader.exec_module(test)
test.put_stand_ins(sys.modules.__setitem__, lambda *args, raising: setattr(*args))
files = SimpleNamespace(flags=json.loads((test.Path(folder) / "flags").read_text()))
found = test.make(files, per_device=8)
out = test.Path(folder)
results = dict(found.measure(test.PARAMS, [(2, 0.5)], 50, out))
(out / f"results{process}").write_text(json.dumps(results))
"""


def test_two_processes_measure_what_one_does(files):
  expected = dict(make(files).measure(PARAMS, [(2, 0.5)], 50))
  for stored in files.folder.glob("real.*-*.npz"):
    stored.unlink()
  (files.folder / "flags").write_text(json.dumps(files.flags))
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
  root = str(Path(__file__).parents[2])
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", PROGRAM, address, str(i), __file__, str(files.folder)],
      cwd=root,
      env={**environment, "PYTHONPATH": root},
    )
    for i in range(2)
  ]
  try:
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
  finally:
    for process in processes:
      process.kill()
  results = [json.loads((files.folder / f"results{i}").read_text()) for i in range(2)]
  assert results[0] == results[1] == pytest.approx(expected, rel=1e-5)
  with np.load(files.folder / "samples_nfe2_w0.5.npz") as saved:
    np.testing.assert_array_equal(saved["arr_0"], samples(50, 2, 0.5, np.arange(50) % 10))


# From a checkpoint, and in training


def get_config():
  config = ism_digits.get_config("debug")
  config.batch = 16
  config.model.depth = 1
  config.eval.samples = 64
  return config


@pytest.fixture
def digits(files):
  """As flags: weights, and a reference of the digits' size."""
  return {**files.flags, "metrics": ["fid", "is", "pr", "fd_dinov2"], "classes": None, "vae": None}


FLAGS = {"nfe": ["1", "2"], "guidance": ["0.5"], "labels": None, "num": 40, "seed": 3}


def test_evaluate_mode_by_the_command_line(digits, files, tmp_path, capsys):
  facts = {"names": [str(i) for i in range(10)], "shape": [8, 8, 1]}
  params = ism.make_network(get_config(), facts)[0](jax.random.key(0))
  flags = SimpleNamespace(**FLAGS, **digits, save_samples=True)
  out = tmp_path / "out"
  ism.evaluate_mode(get_config(), facts, lambda: (params, 7), flags, out)

  record = json.loads((out / "benchmark.json").read_text())
  assert (record["step"], record["samples"], record["seed"]) == (7, 40, "3")
  assert record["vae"] == "none: pixels" and record["classes"] == "balanced (i mod 10)"
  assert f"real.npz sha256:{sha256(files.real)[:12]}" in record["reference"]
  columns = ("fid", "is", "precision", "recall", "fd_dinov2")
  settings = ("nfe1_w0.5", "nfe2_w0.5")
  assert set(record["results"]) == {f"{c}@40/{s}" for c in columns for s in settings}
  assert all(np.isfinite(value) for value in record["results"].values())
  printed = capsys.readouterr().out
  assert "fid@40" in printed and "real.npz sha256:" in printed and "50k" not in printed

  with np.load(out / "samples_nfe2_w0.5.npz") as saved:
    assert saved["arr_0"].shape == (40, 8, 8, 3) and saved["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(saved["labels"], np.arange(40) % 10)
    distance = frechet(files.inception(files.images), files.inception(saved["arr_0"]))
  assert record["results"]["fid@40/nfe2_w0.5"] == pytest.approx(distance, rel=1e-4)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"metrics": ["fid", "fdi"]}, r"metric 'fdi' is unknown"),
    ({"metrics": None}, r"--reference=.* is for --metrics; add --metrics=fid, or leave it out"),
    ({"num": 1}, r"1 samples are too few"),
    ({"nfe": ["3"]}, r"nfe=3 was not trained"),
    ({"reference": "gone"}, r"reference='gone' is not there"),
  ],
)
def test_evaluate_mode_refuses_before_anything_is_loaded(changes, message, digits, tmp_path):
  def load():
    raise AssertionError("loaded a checkpoint for a request that cannot be met")

  facts = {"names": [str(i) for i in range(10)], "shape": [8, 8, 1]}
  flags = SimpleNamespace(**{**FLAGS, **digits, "save_samples": False, **changes})
  with pytest.raises(UserError, match=message):
    ism.evaluate_mode(get_config(), facts, load, flags, tmp_path)


def test_training_evaluates_by_config(digits, capsys):
  config = get_config()
  config.eval.metrics = ("fid", "pr")
  config.eval.reference, config.eval.inception = digits["reference"], digits["inception"]
  method, _ = ism.make_method(config, mesh_lib.make_mesh())
  params, _ = jax.jit(method.init)(jax.random.key(0))
  quick = dict(method.evaluate(params, 1, False))
  assert {"fid@16/nfe1_w0", "precision@16/nfe2_w1", "grid"} <= set(quick)
  assert quick["grid"].ndim == 3 and "class_leak" not in quick
  final = dict(method.evaluate(params, 2, True))
  assert {"fid@64/nfe1_w0", "recall@64/nfe1_w0.5", "class_leak"} <= set(final)
  assert "sha256" in capsys.readouterr().out
  config.eval.metrics = ("fd_dinov2",)
  with pytest.raises(UserError, match=r"--dinov2=FILE"):
    ism.make_method(config, mesh_lib.make_mesh())
