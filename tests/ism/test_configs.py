"""The configs of images: the published sizes, and a run of each from a clean clone."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

import main
from configs import ism_folder, ism_imagenet256
from ism_jax import method as ism
from train_jax import mesh as mesh_lib
from train_jax import state as state_lib
from train_jax.step import make_train_step

FACTS = {"names": [str(i) for i in range(1000)], "shape": [32, 32, 4]}
# DiT, table 1, and the released checkpoints: parameters, billions of multiply-adds, heads.
PUBLISHED = {
  "S/2": (33e6, 6.06, 6),
  "B/2": (130e6, 23.01, 12),
  "L/2": (458e6, 80.71, 16),
  "XL/2": (675_129_632, 118.64, 16),
}


def network(option):
  """(abstract parameters, apply) of an ImageNet config."""
  init, apply = ism.make_network(ism_imagenet256.get_config(option), FACTS)
  return jax.eval_shape(init, jax.random.key(0)), apply


def size(tree) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def multiply_adds(jaxpr) -> int:
  """Of all matrix products of a traced program; the body of a scan counts each time it runs."""
  total = 0
  for eqn in jaxpr.eqns:
    times = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
    for inner in core.jaxprs_in_params(eqn.params):
      total += times * multiply_adds(inner)
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      lhs = eqn.invars[0].aval
      total += eqn.outvars[0].aval.size * int(np.prod([lhs.shape[i] for i in contracted]))
  return total


@pytest.mark.parametrize("option", PUBLISHED)
def test_sizes_are_the_published_ones(option):
  params, _ = network(option)
  # Ours has two embeddings more (d and w), and less: the release predicts a variance too, which
  # doubles the output, and counts its fixed position table.
  width = params["out"]["kernel"].shape[0]
  more = size(params["embed_step"]) + size(params["embed_guidance"])
  less = (width + 1) * 2 * 2 * 4 + 256 * width
  found = size(params) - more + less
  published = PUBLISHED[option][0]
  assert found == published if option == "XL/2" else abs(found / published - 1) < 0.02
  assert more == 2 * (256 * width + width + width * width + width)
  assert ism_imagenet256.get_config(option).model.heads == PUBLISHED[option][2]


@pytest.mark.parametrize("option", PUBLISHED)
def test_forward_multiply_adds_are_the_published_ones(option):
  params, apply = network(option)
  image = jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32)
  scalar, label = (jax.ShapeDtypeStruct((1,), kind) for kind in (jnp.float32, jnp.int32))
  traced = jax.make_jaxpr(apply)(params, image, scalar, scalar, label, scalar)
  assert multiply_adds(traced.jaxpr) == pytest.approx(1e9 * PUBLISHED[option][1], rel=3e-3)


def test_the_defaults_are_the_papers():
  config = ism_imagenet256.get_config()
  assert config == ism_imagenet256.get_config("XL/2")
  assert (config.batch, config.steps, config.optim.lr) == (256, 800_000, 1e-4)
  assert (config.loss.w_max, config.loss.interval_start) == (3.5, 0.3)
  assert (config.loss.wavelet_levels, config.pairing.pool) == (5, 32)
  assert dict(config.ema) == {"target": 0.95, "sample": 0.9999}
  assert (config.model.dtype, config.model.remat) == ("bfloat16", "block")
  fast = ism_imagenet256.get_config("gpu").model
  assert (fast.attention, fast.unroll, fast.remat) == ("cudnn", True, "none")
  assert config.optim.name == "adamw"
  rate = main.make_schedule(config)
  assert float(rate(100_000)) == float(rate(799_999)) == pytest.approx(1e-4)


def test_parameters_stay_float32_where_the_computation_is_bfloat16():
  params, apply = network("XL/2")
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  image = jax.ShapeDtypeStruct((1, 32, 32, 4), jnp.float32)
  scalar, label = (jax.ShapeDtypeStruct((1,), kind) for kind in (jnp.float32, jnp.int32))
  assert jax.eval_shape(apply, params, image, scalar, scalar, label, scalar).dtype == jnp.float32
  text = str(jax.make_jaxpr(apply)(params, image, scalar, scalar, label, scalar))
  products = [line for line in text.splitlines() if "dot_general" in line and "bf16" in line]
  assert len(products) > 10


def test_options_combine_and_unknown_ones_are_named():
  small = ism_imagenet256.get_config("B/2,debug")
  assert small.steps == 2 and small.model.depth == 2
  config = ism_imagenet256.get_config("S/2,paper")
  paper = ism.make_loss_config(config, 1000)
  assert paper.weights == (1, 1, 1) and config.pairing.condition == "none"
  assert paper.zero_w_prob == pytest.approx(1 / (3.5 / 0.25 + 1)) and paper.w_max == 3.5
  flow = ism_imagenet256.get_config("flow,debug")
  sizes = [ism.make_sizes(config, FACTS) for config in (small, flow)]
  assert [found.shortcuts for found in sizes] == [True, False]
  pixels, (width, _, _) = ism_folder.get_config("px32,B"), ism_imagenet256.SIZES["B"]
  assert (pixels.data.image_size, pixels.model.patch, pixels.model.width) == (32, 2, width)
  for module, known in (
    (ism_imagenet256, "S/2, B/2, L/2, XL/2, gpu, paper, debug, flow, shortcut"),
    (ism_folder, "B, px32"),
  ):
    with pytest.raises(ValueError, match=rf"unknown option 'XXL/2'.*choose from {known}"):
      module.get_config("XXL/2")


@pytest.mark.parametrize(
  "module", [ism_imagenet256, pytest.param(ism_folder, marks=pytest.mark.slow)]
)
def test_debug_trains_from_a_clean_clone(module):
  config = module.get_config("debug")
  method, metadata = ism.make_method(config, mesh_lib.make_mesh())
  assert len(metadata["names"]) == 10
  tx = main.make_optimizer(config)
  decays = dict(config.ema)
  state = jax.jit(state_lib.create(method, tx, decays, seed=0))()
  step = jax.jit(make_train_step(method, tx, decays, config.optim.clip))
  first = state.params["out"]["kernel"]
  for batch in itertools.islice(method.stream(0, 0), config.steps):
    state, metrics = step(state, batch)
    assert np.isfinite(float(metrics["loss"])) and int(metrics["skipped"]) == 0
  assert int(state.step) == 2 and np.any(state.params["out"]["kernel"] != first)


def test_without_debug_a_path_is_needed():
  config = ism_folder.get_config()
  with pytest.raises(ism.UserError, match=r"data.path is empty.*'folder'"):
    ism.make_method(config, mesh_lib.make_mesh())
