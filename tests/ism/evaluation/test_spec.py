"""What may be measured, and how the numbers are named."""

import numpy as np
import pytest

from ism_jax.evaluation.spec import balanced_labels, column, random_labels
from tests.ism.stand_ins import PARAMS, make
from train_jax.errors import UserError


@pytest.mark.parametrize(
  ("n", "name"),
  [(2000, "fid@2000"), (49_999, "fid@49999"), (50_000, "fid-50k"), (60_000, "fid@60000")],
)
def test_only_fifty_thousand_samples_are_called_50k(n, name):
  assert column("fid", n) == name


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      {"metrics": ("fid", "kid")},
      r"eval.metrics='kid' is unknown; choose from fid, sfid, fd_dinov2, is",
    ),
    ({"dinov2": ""}, r"metric 'fd_dinov2' needs the weights of a network: --dinov2=FILE"),
    ({"inception": ""}, r"metric 'fid' needs .* --inception=FILE"),
    ({"inception": "gone.safetensors"}, r"inception='gone.safetensors' is not a file"),
    ({"reference": ""}, r"no reference was given"),
    ({"reference": "gone.npz"}, r"reference='gone.npz' is not there"),
    ({"classes": "sorted"}, r"eval.classes='sorted' is unknown; choose from balanced, random"),
    ({"shape": (4, 4, 4)}, r"makes latents of 4x4x4 and no decoder was given: --vae=FILE"),
    ({"samples": 7}, r"1 samples are too few for fid, .*; draw at least 10"),
    ({"metrics": (), "samples": 15}, r"eval.samples=15 must be at least 16"),
    ({"vae": "any"}, r"is for latents, and this model makes images of 8x8x3"),
    (
      {"shape": (4, 4, 4), "vae": "any", "encoder": "0123456789abcdef"},
      r"is not the autoencoder of this model's latents \(0123",
    ),
    ({"shape": (16, 16, 3)}, r"has images of 8x8 pixels and the samples have 16x16"),
  ],
)
def test_bad_requests_are_refused_in_a_sentence(changes, message, files):
  if changes.get("vae") == "any":
    changes = {**changes, "vae": str(files.folder / "vae")}
  with pytest.raises(UserError, match=message) as error:
    make(files, **changes)
  assert str(error.value).count(". ") == 0 and str(error.value).endswith(".")


@pytest.mark.parametrize(
  ("metrics", "n", "least"), [(("fid",), 1, 2), (("fid", "is"), 9, 10), (("pr", "fid"), 3, 4)]
)
def test_too_few_samples_are_refused(metrics, n, least, files):
  with pytest.raises(UserError, match=rf"{n} samples are too few for .*; draw at least {least}\."):
    next(make(files, metrics).measure(PARAMS, [(1, 0.0)], n))


def test_labels_are_balanced():
  labels = balanced_labels(23, 10)
  assert labels.dtype == np.int32 and labels[13] == 3
  counts = np.bincount(labels)
  assert len(counts) == 10 and counts.max() - counts.min() <= 1


def test_random_labels_are_uniform_by_the_seed_and_begin_alike():
  labels = random_labels(20_000, 10, seed=1)
  assert labels.dtype == np.int32 and set(labels.tolist()) == set(range(10))
  assert np.abs(np.bincount(labels) - 2000).max() < 6 * np.sqrt(2000)
  np.testing.assert_array_equal(random_labels(77, 10, seed=1), labels[:77])
  assert np.any(random_labels(77, 10, seed=2) != labels[:77])
