"""Beginning from trained parameters: where they are found, what is taken, what is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train_jax import loop, warm_start
from train_jax.checkpointing.checkpoint import Checkpoints
from train_jax.errors import UserError
from train_jax.state import flatten
from train_jax.storage import exported

DECAYS = {"target": 0.05, "sample": 0.99}  # apart from the first step on
RUN = {"config": {"method": "tiny", "model": {"heads": 2}}, "metadata": {"symbols": ["a", "b"]}}


@pytest.fixture(scope="module")
def abstract(method):
  return jax.eval_shape(method.init, jax.random.key(0))[0]


@pytest.fixture(scope="module")
def workdir(method, one_device, settings, tmp_path_factory):
  path = tmp_path_factory.mktemp("run")
  engine = optax.adam(0.1), optax.constant_schedule(0.1), DECAYS, settings(), one_device
  assert loop.train(method, *engine, path, RUN)
  return path


@pytest.fixture(scope="module")
def read(abstract, one_device):
  """path -> what is found there by a run of method `tiny`."""
  return lambda path, convert=None: warm_start.read(
    str(path), "tiny", lambda *_: abstract, one_device, convert
  )


def test_run_gives_its_sample_average(workdir, read, abstract, one_device, differences):
  checkpoints = Checkpoints(workdir)
  average, _ = checkpoints.restore_ema("sample", abstract, one_device)
  checkpoints.close()
  trained = read(workdir)
  assert differences(trained.tensors, flatten(average)) == []
  assert trained.origin == f"{workdir} (step 4)" and trained.run["config"] == RUN["config"]


def test_run_is_read_as_the_mesh_shares_it_out(workdir, abstract, make_mesh, monkeypatch):
  """A whole parameter may be more than a device has room for."""
  monkeypatch.setattr("train_jax.mesh.SMALL", 1)
  mesh = make_mesh(1, 4)
  tensors = warm_start.read(str(workdir), "tiny", lambda *_: abstract, mesh, None).tensors
  for name, share in (("layer.kernel", (1, 3)), ("layer.bias", (3,))):
    assert {s.data.shape for s in tensors[name].addressable_shards} == {share}


def test_export_and_file_give_their_tensors(tmp_path, read):
  params = {"layer": {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}}
  exported.save(tmp_path, params, {"method": "tiny", "step": 9, "run": RUN})
  trained = read(tmp_path)
  kernel = trained.tensors["layer.kernel"][:2, 1:]  # not read before it is asked for
  np.testing.assert_array_equal(kernel, params["layer"]["kernel"][:2, 1:])
  assert trained.origin == f"{tmp_path} (step 9)" and trained.run == RUN

  file = tmp_path / "model.safetensors"
  trained = read(file, lambda weights: {"kernel": weights.get("layer.kernel", (4, 3))})
  np.testing.assert_array_equal(trained.tensors["kernel"], params["layer"]["kernel"])
  assert trained.run == {}
  with pytest.raises(UserError, match="holds nothing to begin from"):
    read(file)  # of a method that knows no published weights


def test_other_places_are_refused(tmp_path, workdir, abstract, one_device, read):
  with pytest.raises(UserError, match=r"init_from=.*holds nothing to begin from; give the dir"):
    read(tmp_path / "nowhere")
  with pytest.raises(UserError, match="holds a run of method 'tiny', where one of 'else' is"):
    warm_start.read(str(workdir), "else", lambda *_: abstract, one_device, None)
  assert not (tmp_path / "nowhere").exists()


WANTED = {
  "blocks": {"kernel": jax.ShapeDtypeStruct((2, 4), jnp.float32)},
  "embed": {"table": jax.ShapeDtypeStruct((5, 4), jnp.float32)},
  "embedding": jax.ShapeDtypeStruct((3,), jnp.float32),
}
FOUND = {
  "blocks.kernel": np.ones((2, 4), np.float16),
  "embed.table": np.ones((5, 4), np.float32),
  "embedding": np.ones(3, np.float32),
}


def choose(changes, fresh=()):
  found = {name: a for name, a in {**FOUND, **changes}.items() if a is not None}
  return warm_start.choose(warm_start.Trained("there", found, {}), WANTED, fresh)


def test_everything_is_taken_where_everything_fits():
  init_params, line = choose({})
  assert set(init_params) == set(FOUND) and all(init_params[name] is FOUND[name] for name in FOUND)
  assert line == (
    "began from there: 3 tensors taken (blocks, embed, embedding); nothing drawn afresh"
  )


@pytest.mark.parametrize(
  ("table", "told"),
  [
    (None, "drawn afresh: embed is not there$"),
    (np.ones((9, 4)), r"shape \(9, 4\) there and \(5, 4\) here"),
  ],
)
def test_what_may_differ_is_drawn_afresh_and_said(table, told):
  init_params, line = choose({"embed.table": table}, fresh=("embed",))
  assert set(init_params) == {"blocks.kernel", "embedding"}
  assert re.search(told, line)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"blocks.kernel": np.ones((3, 4))}, r"'blocks.kernel' has the shape \(3, 4\).*needs \(2, 4\)"),
    ({"blocks.kernel": None}, r"'blocks.kernel' is not there, and this network needs \(2, 4\)"),
    ({"embedding": None}, r"'embedding' is not there"),  # `embed` is another tensor's name
    ({"more.bias": np.ones(2)}, r"'more.bias' has no place in this network; set config.model"),
  ],
)
def test_what_must_fit_is_named(changes, message):
  with pytest.raises(UserError, match=message):
    choose(changes, fresh=("embed",))


def test_what_shapes_do_not_show_must_be_equal():
  same = ("config.model.heads", "metadata.symbols")
  trained = warm_start.Trained("there", {}, RUN)
  warm_start.check_alike(trained, RUN, same)
  warm_start.check_alike(warm_start.Trained("file", {}, {}), RUN, same)  # a file says nothing
  other = {**RUN, "config": {"model": {"heads": 4}}}
  with pytest.raises(UserError, match=r"there has config.model.heads=2 and this run 4"):
    warm_start.check_alike(trained, other, same)
  with pytest.raises(UserError, match=r"metadata.symbols=\['a', 'b'\] and this run \['b', 'a'\]"):
    warm_start.check_alike(trained, {**RUN, "metadata": {"symbols": ["b", "a"]}}, same)
