"""Programs compiled for devices that are not here: bytes against the arrays themselves."""

import importlib.util

import jax
import numpy as np
import pytest

import main
from configs import ism_digits, ism_imagenet256, seqmatch_arithmetic
from tools.plan import aot, cost
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.step import AbstractCall


def size(tree) -> float:
  """Bytes of a tree on the first device, from the arrays."""
  return sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(tree))


def test_bytes_of_shapes_are_those_of_the_arrays(monkeypatch):
  monkeypatch.setattr(mesh_lib, "SMALL", 64)
  mesh = mesh_lib.make_mesh(4, 2)
  arrays = {"a": np.zeros((16, 64), np.float32), "b": np.zeros(3, np.float16)}
  placed = jax.device_put(arrays, mesh_lib.state_sharding(arrays, mesh))
  found = aot.bytes_per_chip(mesh_lib.abstract_state(jax.eval_shape(lambda: placed), mesh))
  assert found == size(placed) == 16 * 64 * 4 / 8 + 6


@pytest.mark.parametrize("fsdp, tensor", [pytest.param(1, 1, marks=pytest.mark.slow), (4, 2)])
def test_digits_are_compiled_for_eight_devices(monkeypatch, capsys, fsdp, tensor):
  monkeypatch.setattr(mesh_lib, "SMALL", 64)
  config = ism_digits.get_config("debug")
  config.mesh.fsdp, config.mesh.tensor = fsdp, tensor
  config.optim.name = "adamw"  # two moments of everything, and no products of its own
  step, sampler = main.compile_for(config, "cpu:8")
  out = capsys.readouterr().out
  assert f"cpu:8: 8 chips, fsdp={fsdp} data={8 // (fsdp * tensor)} tensor={tensor}" in out
  assert "train step: compiled in" in out and "sampler, one step: compiled in" in out
  bytes_ = step.arguments
  assert bytes_["averages"] == 2 * bytes_["parameters"]
  np.testing.assert_allclose(bytes_["optimiser"], 2 * bytes_["parameters"], rtol=1e-2)
  assert step.peak > sum(bytes_.values()) and step.fits is None
  # Every row: the gradient is two more passes, and iSM's targets cost others.
  rows = sampler.flops
  assert 3 * rows < step.flops < 6 * rows
  assert step.received["all-reduce"] > 0
  if fsdp > 1:
    assert step.received["all-gather"] > 0


def test_text_is_compiled_with_its_rollouts(capsys):
  config = seqmatch_arithmetic.get_config("two_sum,debug")
  step, generation = main.compile_for(config, "cpu:2")
  assert step.arguments["auxiliary"] > 0  # the replay buffer
  assert generation.arguments == {"parameters": step.arguments["parameters"]}
  assert generation.peak > sum(generation.arguments.values())
  out = capsys.readouterr().out
  assert "auxiliary" in out and "generation, the prompts and one action: compiled in" in out


@pytest.mark.parametrize(
  "size, text",
  [
    (0, "0 B"),
    (102, "102 B"),
    (2**10, "1.000 KiB"),
    (5 * 2**18, "1.250 MiB"),
    (2**29, "0.500 GiB"),
    (3 * 2**40, "3072.000 GiB"),
  ],
)
def test_bytes_have_a_unit_that_shows_them(size, text):
  assert aot.in_bytes(size).strip() == text


@pytest.mark.slow
def test_latents_need_no_data(capsys):
  config = ism_imagenet256.get_config("debug")
  config.data.synthetic, config.data.path = 0, "nowhere"
  assert main.compile_for(config, "cpu:2")[0].peak > 0
  assert "stimate" not in capsys.readouterr().out  # of time, without a chip


CHIP = aot.Chip(memory=100.0, bandwidth=10.0, flops=8.0, network=5.0)


def test_estimate_adds_up():
  program = aot.Program("p", {}, 50.0, True, 12.0, {"all-reduce": 6.0, "all-gather": 4.0}, 1.0)
  assert program.estimate(CHIP) == (3.0, 5.0, 2.0)
  assert "7000.0 ms = max(compute 3000.0, memory 5000.0) + network 2000.0" in aot.describe(
    program, CHIP
  )


def test_what_comes_from_other_slices_is_told_apart():
  received = {"all-reduce": 10.0, cost.BETWEEN: 1e9}
  program = aot.Program("p", {}, 50.0, True, 12.0, received, 1.0)
  assert program.estimate(CHIP)[2] == 2.0
  assert f"between slices         {1e9 / 2**30:.3f} GiB" in aot.describe(program, CHIP)


def test_what_does_not_fit_is_said():
  program = aot.Program("p", {}, 500.0, False, 12.0, {}, 1.0)
  text = aot.describe(program, CHIP)
  assert "DOES NOT FIT" in text and "estimate" not in text


@pytest.mark.parametrize("name", ["", "v5e", "v9:2x2", "cpu:0", "cpu:2x2", "v5e:4x4*0", "v5e:4,4"])
def test_unknown_topologies_are_refused(name):
  with pytest.raises(UserError, match=r"is unknown; write v5e:16x16"):
    aot.find_devices(name)


def test_more_devices_than_there_are_is_refused():
  with pytest.raises(UserError, match=r"cpu:9 is more than the 8 devices"):
    aot.find_devices("cpu:9")


def test_a_program_that_cannot_be_read_names_the_compiler_to_install(monkeypatch):
  def as_text(_):
    raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

  monkeypatch.setattr(jax.stages.Compiled, "as_text", as_text)
  with pytest.raises(UserError, match=r"jaxlib [\d.]+ cannot .* pip install 'jax\[tpu\]==[\d.]+'"):
    call = AbstractCall("it", lambda x: x, (jax.ShapeDtypeStruct((2,), "f4"),), {}, 1, {})
    aot.compile_program(call, None)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_without_libtpu_the_way_out_is_named():
  with pytest.raises(UserError, match=r"v5e:2x2 needs TPU's compiler.* pip install 'jax\[tpu\]'"):
    aot.find_devices("v5e:2x2")


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu, the compiler for TPUs, is not installed",
)
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5e:2x2*2"])
def test_a_step_is_compiled_for_a_tpu(topology):
  config = ism_digits.get_config("debug")
  step, _ = main.compile_for(config, topology)
  assert step.fits and step.received["all-reduce"] > 0
  if "*" in topology:  # each chip of a slice can bring a share of the gradients, or all of them
    gradients = step.arguments["parameters"]
    assert gradients / 4 <= step.received[cost.BETWEEN] < 2 * gradients
  else:
    assert cost.BETWEEN not in step.received
