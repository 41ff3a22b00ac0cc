"""Checksums: what they see, and that they are the same wherever they are computed."""

import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train_jax import mesh as mesh_lib
from train_jax.checkpointing import checksum


def test_every_flip_in_an_array_changes_its_checksum():
  draw = random.Random(0)
  dtypes = (np.float32, jnp.bfloat16, np.int8, np.uint16)
  arrays = [np.random.default_rng(0).normal(size=(3, 5)).astype(d) for d in dtypes]
  before = checksum.checksums(arrays)
  for _ in range(50):
    flipped = [np.array(a) for a in arrays]
    for a in flipped:
      bit = draw.randrange(8 * a.nbytes)
      a.view(np.uint8).reshape(-1)[bit // 8] ^= 1 << (bit % 8)
    after = checksum.checksums(flipped)
    assert all(after[path] != before[path] for path in before)


@pytest.mark.parametrize("value", [1.0, 2.0, -0.5])
@pytest.mark.parametrize("size", [1, 64, 4096])
def test_checksum_tells_constant_arrays_apart(value, size):
  """A zeroed block is the commonest damage, and constants the likeliest to collide with it."""
  zeros, constant = checksum.checksums([jnp.zeros(size), jnp.full(size, value)]).values()
  assert zeros != constant


def test_checksum_sees_order_and_shape():
  a = jnp.arange(12.0)
  sums = checksum.checksums([a, a[::-1], a.at[:2].set(a[:2][::-1]), a > 3, a <= 3])
  assert len(set(sums.values())) == 5


def test_checksum_is_the_sum_of_a_hash_of_each_word_and_its_place():
  """Python's integers, one word at a time: checkpoints of before are judged by the same number."""
  a, total = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32), 0
  for place, word in enumerate(a.view(np.uint32).reshape(-1).tolist()):
    h = word ^ (place * 0x9E3779B1 % 2**32)
    h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
    h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
    total += h ^ (h >> 16)
  assert [checksum.of_host(a), *checksum.checksums([a]).values()] == [total % 2**32] * 2


@pytest.mark.parametrize("size", [0, 1, 7, 2**18 - 1, 2**18 + 5])
def test_host_and_device_count_the_same(size):
  draw = np.random.default_rng(size)
  arrays = [draw.normal(size=size).astype(d) for d in (np.float32, jnp.bfloat16, np.int8)]
  arrays += [arrays[0] > 0, np.float32(3), draw.normal(size=(3, 5, size % 11)).astype(np.float16)]
  arrays += [arrays[0][::2], np.asfortranarray(arrays[-1]), arrays[-1].T[1:, ::2]]
  found = [checksum.of_host(np.asarray(a)) for a in arrays]
  assert found == list(checksum.checksums(arrays).values())
  assert size < 2 or len(set(found)) == 8


def test_checksum_does_not_depend_on_the_layout(make_mesh, monkeypatch):
  monkeypatch.setattr(mesh_lib, "SMALL", 1)
  tree = {"a": jax.random.normal(jax.random.key(0), (16, 24)), "b": jnp.arange(8)}
  sums = []
  for shape in ((1, 1), (8, 1), (2, 4), (1, 8)):
    mesh = make_mesh(*shape)
    placed = jax.device_put(tree, mesh_lib.state_sharding(tree, mesh))
    assert placed["a"].is_fully_replicated == (shape[1] == 1)
    sums.append(checksum.checksums(placed))
  assert all(s == sums[0] for s in sums)
  assert sums[0] == checksum.checksums(jax.device_get(tree))


def test_json_is_the_same_before_and_after_the_disk_and_no_other():
  written, read = (
    {"b": (1, 2.5), "a": {9: "x", 10: None}},
    {"a": {"10": None, "9": "x"}, "b": [1, 2.5]},
  )
  assert checksum.of_json(written) == checksum.of_json(read)
  assert checksum.of_json(written) != checksum.of_json({**read, "b": [1, 2.25]})
