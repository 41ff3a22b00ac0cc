"""Features of samples: what is kept of them, in any blocks and on any number of processes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax.evaluation import fid, stream
from tests.ism.stand_ins import PARAMS, make
from train_jax import mesh as mesh_lib


def test_features_are_not_kept_unless_precision_and_recall_ask(files):
  images = mesh_lib.to_global({"x": files.images[:8]}, mesh_lib.make_mesh())["x"]
  net = stream.load_network("inception", files.flags["inception"], mesh_lib.make_mesh())
  batches = [(jnp.arange(8), net.features(images))]
  request = stream.Request(["pool"], np.arange(0))
  assert stream.collect(batches, 8, net.sizes, request).features.size == 0
  request = stream.Request([], np.array([1, 6]))
  found = stream.collect(batches, 8, net.sizes, request)
  assert not found.moments and not found.scores.count.size
  expected = files.inception(files.images[[1, 6]])
  np.testing.assert_allclose(found.features, expected, rtol=1e-5, atol=1e-5)


def test_two_processes_statistics_are_merged_bit_for_bit(files, monkeypatch):
  """What one process would send to another, sent to itself."""
  draw = np.random.default_rng(0)
  x, logits = draw.normal(size=(20, 6)), draw.normal(size=(20, 4))

  def of(rows):
    kept = np.zeros((20, 6), np.float32)
    kept[rows] = x[rows]
    scores = fid.update_scores(fid.no_scores(2, 4), np.arange(20)[rows] // 10, logits[rows])
    return stream.Statistics({"pool": fid.update(fid.no_moments(6), x[rows])}, kept, scores)

  halves = [of(slice(0, 8)), of(slice(8, 20))]
  sent = iter(halves)

  def broadcast(bits, is_source):
    leaves = jax.tree.leaves(jax.tree.map(np.asarray, next(sent)))
    assert [len(b) for b in bits] == [leaf.nbytes for leaf in leaves]
    assert all(b.dtype == np.uint8 for b in bits)
    return [jnp.asarray(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8)) for leaf in leaves]

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(stream.multihost_utils, "broadcast_one_to_all", broadcast)
  merged, whole = stream._over_processes(halves[1]), of(slice(0, 20))
  np.testing.assert_array_equal(merged.features, whole.features)
  np.testing.assert_allclose(merged.moments["pool"].covariance, np.cov(x.T), rtol=1e-13)
  assert merged.moments["pool"].count == 20
  assert fid.score(merged.scores) == pytest.approx(fid.score(whole.scores), rel=1e-13)


def test_blocks_do_not_matter(files, monkeypatch):
  whole = dict(make(files).measure(PARAMS, [(1, 0.0)], 70))
  monkeypatch.setattr(stream, "BLOCK", 40)
  for stored in files.folder.glob("real.*-*.npz"):
    stored.unlink()
  assert dict(make(files).measure(PARAMS, [(1, 0.0)], 70)) == pytest.approx(whole, rel=1e-6)
