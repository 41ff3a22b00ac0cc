"""The settings of an evaluation, its metrics, and the names of its numbers.

    fid, sfid    Fréchet distance of Inception's pooled and spatial features (arXiv 1706.08500,
                 2103.03841)
    fd_dinov2    Fréchet distance of DINOv2's features (arXiv 2306.04675)
    is           inception score (arXiv 1606.03498)
    pr           improved precision and recall, k = 3, of Inception's pooled features (arXiv
                 1904.06991, with the features of ADM)

Dimension: n samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from train_jax.errors import UserError, check_at_least, check_one_of

# metric -> the network that it needs, and the kind of its features (stream.py)
METRICS = {
  "fid": ("inception", "pool"),
  "sfid": ("inception", "spatial"),
  "fd_dinov2": ("dinov2", "dinov2"),
  "is": ("inception", "logits"),
  "pr": ("inception", "features"),
}
FRECHET = ("fid", "sfid", "fd_dinov2")
SPLITS = 10  # of the inception score


def balanced_labels(n: int, classes: int) -> np.ndarray:
  """Class i mod `classes` for sample i: int32 [n]."""
  return (np.arange(n) % classes).astype(np.int32)


def random_labels(n: int, classes: int, seed: int) -> np.ndarray:
  """Uniform draws int32 [n]; the first ones do not depend on n."""
  return np.random.default_rng(seed).integers(classes, size=n).astype(np.int32)


@dataclass(frozen=True)
class EvaluationSpec:
  """The settings of an evaluation: `config.eval`, and a seed.

  Attributes:
    nfe, guidance: numbers of steps and guidance scales; each pair of them is a setting.
    samples: of each setting; a quarter of them in training.
    metrics: names in METRICS; () for those of classifier.py.
    reference: an ADM .npz or a folder of images.
    inception, dinov2, vae: files of weights; "" for none.
    classes: balanced (sample i is of class i mod classes) or random (uniform, by the seed).
    seed: of noise and classes.
  """

  nfe: tuple[int, ...]
  guidance: tuple[float, ...]
  samples: int
  metrics: tuple[str, ...] = ()
  reference: str = ""
  inception: str = ""
  dinov2: str = ""
  vae: str = ""
  classes: str = "balanced"
  seed: int = 0

  def __post_init__(self):
    for name in ("nfe", "guidance"):
      object.__setattr__(self, name, tuple(sorted(set(getattr(self, name)))))
    object.__setattr__(self, "metrics", tuple(dict.fromkeys(self.metrics)))
    check_one_of("eval.classes", self.classes, ("balanced", "random"))
    for metric in self.metrics:
      check_one_of("eval.metrics", metric, METRICS)
      network = METRICS[metric][0]
      if not getattr(self, network):
        raise UserError(
          f"the metric {metric!r} needs the weights of a network: --{network}=FILE, in "
          f"training --config.eval.{network}=FILE."
        )
    if self.metrics and not self.reference and self.metrics != ("is",):
      raise UserError(
        "no reference was given to compare with: --reference=FILE, an .npz or folder, in training "
        "--config.eval.reference=FILE."
      )
    for name in ("inception", "dinov2", "vae"):
      file = getattr(self, name)
      if file and not Path(file).expanduser().is_file():
        raise UserError(f"{name}={file!r} is not a file; give its weights as .safetensors.")
    if self.metrics:
      check_number(self.metrics, self.samples // 4)
    else:  # a quarter of it in training, and recall needs 4
      check_at_least("eval.samples", self.samples, 16)

  @property
  def settings(self) -> list[tuple[int, float]]:
    """(nfe, w) pairs."""
    return [(nfe, w) for nfe in self.nfe for w in self.guidance]

  @property
  def kinds(self) -> list[str]:
    """The statistics needed of the reference: kinds of moments, and `features` for `pr`."""
    return [METRICS[metric][1] for metric in self.metrics if metric != "is"]

  def labels(self, n: int, classes: int) -> np.ndarray:
    """The classes int32 [n] of n samples."""
    if self.classes == "balanced":
      return balanced_labels(n, classes)
    return random_labels(n, classes, self.seed)


def column(metric: str, n: int) -> str:
  """The name of a number from n samples: fid-50k from 50 000, fid@2000 from 2000."""
  return f"{metric}-50k" if n == 50_000 else f"{metric}@{n}"


def check_number(metrics: Sequence[str], n: int) -> None:
  """Raises UserError if n samples are too few for the metrics."""
  least = max({"is": SPLITS, "pr": 4}.get(metric, 2) for metric in metrics)
  if n < least:
    raise UserError(f"{n} samples are too few for {', '.join(metrics)}; draw at least {least}.")
