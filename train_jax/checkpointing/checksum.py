"""Checksums of arrays: the same number for any layout, device and number of processes."""

from __future__ import annotations

import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any

GOLDEN, FIRST, SECOND = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35
BLOCK = 2**18  # words that the host hashes at a time: they stay in its cache


def _mix(h):
  h = (h ^ (h >> 16)) * np.uint32(FIRST)
  h = (h ^ (h >> 13)) * np.uint32(SECOND)
  return h ^ (h >> 16)


def _fold(h: jax.Array) -> jax.Array:
  """Adds the halves of an axis, up to three times: fewer numbers with the same sum.

  A CPU's sum of integers is scalar, and this is vectorized. Three times make eight parts that are
  read at once. More do not stay in the processor's cache.
  """
  folds = 3
  for axis in range(h.ndim):
    while folds and h.shape[axis] % 2 == 0:
      h, folds = sum(jnp.split(h, 2, axis)), folds - 1
  return h


def _of_array(a: jax.Array) -> jax.Array:
  """uint32: the sum, modulo 2^32, of a hash of every word and its place.

  The hash (MurmurHash3's finaliser) is a bijection of the word, so damage inside one word always
  changes the sum. Wider damage, also zeroed blocks of constant arrays, escapes with probability
  2^-32. Integer sums wrap, so their order and the array's layout do not matter.
  """
  if a.dtype == jnp.bool_:
    a = a.astype(jnp.uint8)
  word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[a.dtype.itemsize]
  bits = jax.lax.bitcast_convert_type(a, word).astype(jnp.uint32)
  place = jnp.zeros(a.shape, jnp.uint32)
  for axis, size in enumerate(a.shape):
    place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, a.shape, axis)
  h = _mix(bits ^ (place * jnp.uint32(GOLDEN)))
  if jax.default_backend() == "cpu":
    h = _fold(h)
  return jnp.sum(h, dtype=jnp.uint32)


_of_tree = jax.jit(lambda tree: jax.tree.map(_of_array, tree))


def start(tree: PyTree) -> dict[str, jax.Array]:
  """The checksum of each array of `tree`, by the array's path; does not wait for the values."""
  leaves = jax.tree_util.tree_leaves_with_path(_of_tree(tree))
  return {jax.tree_util.keystr(path): value for path, value in leaves}


def checksums(tree: PyTree) -> dict[str, int]:
  """The same, as integers."""
  return {path: int(value) for path, value in jax.device_get(start(tree)).items()}


def of_host(a: np.ndarray) -> int:
  """The same checksum for an array in this host's memory, without any device."""
  word = {1: np.uint8, 2: np.uint16, 4: np.uint32}[a.dtype.itemsize]
  words, total = a.reshape(-1).view(word), 0
  offsets = np.arange(min(len(words), BLOCK), dtype=np.uint32) * np.uint32(GOLDEN)
  for first in range(0, len(words), BLOCK):
    block = words[first : first + BLOCK].astype(np.uint32)
    block ^= offsets[: len(block)] + np.uint32(first * GOLDEN % 2**32)
    total += int(np.sum(_mix(block), dtype=np.uint64))
  return total % 2**32


def of_json(value: dict) -> int:
  """The checksum of a JSON object, after one round trip, which turns tuples into lists."""
  return zlib.crc32(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode())
