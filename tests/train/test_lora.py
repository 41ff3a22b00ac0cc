"""Adapters and frozen matrices: against plain matrix products, a part at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from train_jax import lora
from train_jax.errors import UserError
from train_jax.lora import LoraConfig

PARTS = {"q": 6, "k": 3, "v": 3}


def make(base="float32", targets=("q", "v"), dtype="float32"):
  """A layer of 5 inputs, its parameters all different from zero."""
  layer = lora.Linear(
    5, PARTS, LoraConfig(2, 6.0, targets, base), use_bias=True,
    kernel_init=nnx.initializers.normal(1.0), dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0),
  )  # fmt: skip
  rng = np.random.default_rng(0)
  for name in ("bias", "q_b", "v_b"):
    variable = getattr(layer, name, None)
    if variable is not None:
      variable[...] = rng.normal(size=variable.shape)
  return layer


@pytest.mark.parametrize("base", lora.BASES)
def test_a_layer_is_its_matrix_and_its_adapters(base):
  layer, x = make(base), np.random.default_rng(1).normal(size=(2, 4, 5)).astype(np.float32)
  get = lambda name: np.asarray(getattr(layer, name)[...], np.float64)  # noqa: E731
  assert layer.kernel.dtype == base
  kernel = get("kernel")
  expected = x @ kernel + get("bias")
  expected[..., :6] += 3 * x @ get("q_a") @ get("q_b")
  expected[..., 9:] += 3 * x @ get("v_a") @ get("v_b")
  np.testing.assert_allclose(layer(x), expected, atol=2e-5)
  parameters = {k: np.asarray(v) for k, v in nnx.to_pure_dict(nnx.state(layer)).items()}
  merged = lora.merged(parameters, PARTS, 3.0)
  np.testing.assert_allclose(x @ merged + parameters["bias"], expected, atol=2e-5)


def test_adapters_begin_without_effect_and_learn():
  layer = lora.Linear(
    5, PARTS, LoraConfig(2, 6.0, ("all",)), use_bias=False,
    kernel_init=nnx.initializers.normal(1.0), dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0),
  )  # fmt: skip
  x = np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
  np.testing.assert_array_equal(layer(x), x @ layer.kernel[...])
  slope = nnx.grad(lambda layer: jnp.sum(layer(x) ** 2))(layer)
  assert all(np.any(slope[f"{part}_b"][...] != 0) for part in PARTS)
  drawn = np.stack([getattr(layer, f"{part}_a")[...] for part in PARTS])
  assert len(np.unique(drawn)) == drawn.size and np.all(drawn != 0)
  assert 0.9 * 5**-0.5 < np.abs(drawn).max() < 5**-0.5


def test_bfloat16_is_computed_in_and_adapters_stay_float32():
  base = "bfloat16"
  layer, x = make(base, dtype="bfloat16"), np.ones((1, 5), np.float32)
  assert layer(x).dtype == jnp.bfloat16 and layer.q_a.dtype == jnp.float32
  np.testing.assert_allclose(layer(x), make(base)(x), rtol=0.05, atol=0.1)


def test_what_is_split_is_joined_again():
  params = {"a": {"kernel": 1, "q_a": 2, "q_b": 3}, "erase": {"bias": 4}, "norm": {"scale": 5}}
  learned, frozen = lora.split(params, lambda name: lora.is_adapter(name) or "erase" in name)
  assert learned == {"a": {"q_a": 2, "q_b": 3}, "erase": {"bias": 4}}
  assert frozen == {"a": {"kernel": 1}, "norm": {"scale": 5}}
  assert lora.join(learned, frozen) == params == lora.join(params)
  assert jax.tree.leaves(lora.join(learned, frozen)) == jax.tree.leaves(params)


def test_lists_of_a_config_file_are_tuples_and_all_is_a_target():
  assert LoraConfig(1, 1.0, ["q"]) == LoraConfig(1, 1.0, ("q",))
  LoraConfig(1, 1.0, ("all",)).check(tuple(PARTS))


def test_mistakes_cost_a_sentence():
  with pytest.raises(UserError, match=r"lora.rank=0 must be at least 1"):
    LoraConfig(0, 1.0, ("q",))
  with pytest.raises(UserError, match=r"lora.base='int4' is unknown; .* float32, bfloat16"):
    LoraConfig(1, 1.0, ("q",), "int4")
  for targets in (["q", "gate"], []):
    with pytest.raises(UserError, match=r"lora.targets=.* must name some of q, k, v, or all"):
      LoraConfig(1, 1.0, targets).check(tuple(PARTS))
