"""The configs of images: the published sizes, and a run of each from a clean clone."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

import main
from configs import common, ism_digits, ism_folder, ism_imagenet256
from ism_jax import method as ism
from ism_jax.loss import LossConfig
from ism_jax.model import make_network, make_sizes
from train_jax import mesh as mesh_lib
from train_jax import optim
from train_jax import state as state_lib
from train_jax.step import make_train_step

METADATA = {"names": [str(i) for i in range(1000)], "shape": [32, 32, 4]}
# DiT, table 1, and the released checkpoints: parameters, billions of multiply-adds, heads.
PUBLISHED = {
  "S/2": (33e6, 6.06, 6),
  "B/2": (130e6, 23.01, 12),
  "L/2": (458e6, 80.71, 16),
  "XL/2": (675_129_632, 118.64, 16),
}


def network(option):
  """(abstract parameters, apply) of an ImageNet config."""
  init, apply = make_network(ism_imagenet256.get_config(option), METADATA)
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


def test_the_default_is_the_largest_at_a_constant_rate():
  config = ism_imagenet256.get_config()
  assert config == ism_imagenet256.get_config("XL/2")
  rate = optim.schedule(optim.OptimConfig(**config.optim), config.steps)
  assert float(rate(100_000)) == float(rate(799_999)) == pytest.approx(1e-4)


def test_baselines_differ_where_they_say():
  names = ("", "flow", "shortcut", "shortcut_fast_ema")
  ism_, flow, shortcut, fast = (ism_digits.get_config(name) for name in names)
  splits = [dict(LossConfig(**config.loss).weights) for config in (ism_, flow, shortcut)]
  assert [tuple(split.values()) for split in splits] == [
    (4 / 8, 1 / 8, 3 / 8),
    (1, 0, 0),
    (7 / 8, 0, 1 / 8),
  ]
  assert flow.pairing.pool == 0 < ism_.pairing.pool
  assert shortcut.loss.bootstrap_guidance > 0 == ism_.loss.bootstrap_guidance
  assert shortcut.ema.target > fast.ema.target == ism_.ema.target
  fast.ema.target = shortcut.ema.target
  assert fast.to_dict() == shortcut.to_dict()


def test_options_combine_and_unknown_ones_are_named():
  small = ism_imagenet256.get_config("B/2,debug")
  assert small.steps == 2 and small.model.depth == 2
  config = ism_imagenet256.get_config("S/2,paper")
  paper = LossConfig(**config.loss)
  assert set(paper.weights.values()) == {1} and config.pairing.condition == "none"
  assert paper.zero_w_prob == pytest.approx(1 / (3.5 / 0.25 + 1)) and paper.w_max == 3.5
  flow = ism_imagenet256.get_config("flow,debug")
  sizes = [make_sizes(config, METADATA) for config in (small, flow)]
  assert [found.shortcuts for found in sizes] == [True, False]
  pixels, (width, _, _) = ism_folder.get_config("px32,B"), common.DIT_SIZES["B"]
  assert (pixels.data.image_size, pixels.model.patch, pixels.model.width) == (32, 2, width)
  for module, known in (
    (ism_imagenet256, "S/2, B/2, L/2, XL/2, gpu, paper, debug, flow, shortcut"),
    (ism_folder, "B, px32"),
    (ism_digits, "flow, shortcut"),
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
