"""Pictures: grids of samples, their spectra, and the files of `--mode=sample`.

Dimensions: n samples, h w image, c channel.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import matplotlib
import numpy as np
from matplotlib import font_manager, ft2font
from matplotlib import pyplot as plt
from PIL import Image

from ism_jax.model import Model
from ism_jax.sample import BATCH, to_uint8
from train_jax.metrics import progress_bar

matplotlib.use("Agg")

COLUMNS = 16  # of a grid at most
FONT_SIZE = 8  # points


def grid(
  images: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str = ""
) -> np.ndarray:
  """Draws images uint8 [rows, columns, h, w, c] with their names -> uint8 [height, width, 3]."""
  n_rows, n_columns = images.shape[:2]
  title_height = 0.3 if title else 0.0  # inches
  lines = max(name.count("\n") for name in columns)  # below the first
  size = 0.62 * n_columns + 1.1, 0.62 * n_rows + 0.6 + 0.13 * lines + title_height
  figure, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, dpi=100)
  for i, j in np.ndindex(n_rows, n_columns):
    axis = axes[i, j]
    rgb = np.broadcast_to(images[i, j], (*images.shape[2:4], 3))  # a colour map would round greys
    axis.imshow(rgb, interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    if i == 0:
      axis.set_title(columns[j], fontsize=FONT_SIZE, parse_math=False)  # $ is a letter of a name
    if j == 0:
      axis.set_ylabel(rows[i], fontsize=FONT_SIZE, rotation=0, ha="right", va="center")
  if title:
    figure.suptitle(title, fontsize=9)
  figure.tight_layout(pad=0.3, h_pad=0.15, w_pad=0.15, rect=(0, 0, 1, 1 - title_height / size[1]))
  return _pixels(figure)


def radial_power(images: np.ndarray) -> np.ndarray:
  """Power spectrum of images [n, h, w, c] minus their mean, by ring -> [1 + min(h, w) // 2].

  Entry k is the mean power at spatial frequencies of k cycles an image. By Parseval the powers of
  all frequencies add up to the variance over pixels.
  """
  _, height, width, _ = images.shape
  spectrum = np.abs(np.fft.fft2(images - images.mean(), axes=(1, 2))) ** 2 / (height * width) ** 2
  rows, columns = np.fft.fftfreq(height, 1 / height), np.fft.fftfreq(width, 1 / width)
  ring = np.rint(np.hypot(rows[:, None], columns[None])).astype(int)  # [h, w]
  power = spectrum.mean(axis=(0, 3))
  return np.array([power[ring == k].mean() for k in range(1 + min(height, width) // 2)])


def spectrum_figure(real: np.ndarray, samples: dict[str, np.ndarray]) -> np.ndarray:
  """Spectra of samples relative to real images, by ring -> picture uint8 [height, width, 3].

  A line below 1 at the right is missing detail, the frequency bias that the wavelet loss corrects.
  """
  figure, axis = plt.subplots(figsize=(6, 3.5), dpi=100)
  reference = radial_power(real)
  for name, images in samples.items():
    axis.plot(radial_power(images) / reference, marker="o", label=name)
  axis.axhline(1, color="black", linewidth=0.8)
  axis.set(xlabel="cycles an image", ylabel="power of samples / power of data")
  axis.legend(fontsize=8)
  figure.tight_layout()
  return _pixels(figure)


def _pixels(figure) -> np.ndarray:
  """Renders a figure to uint8 [height, width, 3] and closes it."""
  figure.canvas.draw()
  pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].copy()
  plt.close(figure)
  return pixels


def row_name(nfe: int, w: float) -> str:
  """The label of a grid's row."""
  return f"{nfe} step{'s' * (nfe > 1)}, w={w:g}"


@functools.cache
def _font() -> ft2font.FT2Font:
  """The font of figures, with lengths in units of 1/64 point; matplotlib's own changes its size."""
  font = ft2font.FT2Font(font_manager.findfont(font_manager.FontProperties()))
  font.set_size(FONT_SIZE, 72)
  return font


def column_name(name: str, label: int, width: float = 42) -> str:
  """A class's name as the label of a grid's column: one or two lines of `width` points at most.

  A name keeps its first and its last letters, in which long names differ. One that the font cannot
  draw becomes the class's number.
  """
  font = _font()
  if not name.strip() or any(not c.isprintable() or not font.get_char_index(ord(c)) for c in name):
    return f"class {label}"

  def fits(text: str) -> bool:
    font.set_text(text)
    return font.get_width_height()[0] / 64 <= width

  if fits(name):
    return name
  first = next(name[:n] for n in range(len(name), 0, -1) if fits(name[:n]))
  first, rest = first.strip(), name[len(first) :].strip()
  if not fits(rest):
    rest = next(f"…{rest[-n:]}" for n in range(len(rest) - 1, 0, -1) if fits(f"…{rest[-n:]}"))
  return f"{first}\n{rest}"


def labelled_grid(
  images: np.ndarray,
  settings: Sequence[tuple[int, float]],
  names: Sequence[str],
  labels: np.ndarray,
  title: str = "",
) -> np.ndarray:
  """`grid` of images [settings, labels, h, w, c], labelled with (nfe, w) and class."""
  rows = [row_name(*setting) for setting in settings]
  return grid(images, rows, [column_name(names[label], label) for label in labels], title)


def write_samples(
  model: Model, settings: Sequence[tuple[int, float]], labels: np.ndarray, seed: int, out: Path
) -> None:
  """Writes `out/samples.npz` and the labelled `out/grid.png`; prints images/s.

  Every process draws the samples, and the first writes and prints. The .npz has ADM's layout:
  `arr_0` uint8 [n, h, w, c], and beside it `labels`, `nfe` and `guidance` [n], and the `seed`.

  Args:
    settings: (nfe, w) pairs.
    labels: int32, the class of each image of one setting.
  """
  out.mkdir(parents=True, exist_ok=True)
  is_primary = jax.process_index() == 0
  sample = functools.partial(model.sampler, model.params, seed)
  # One batch with one step pays for the compilation, which the speeds below leave out.
  sample(labels[:BATCH], 0.0, 1)
  groups = []
  for nfe, w in settings:
    with progress_bar(len(labels), 0, is_primary, unit="img", desc=f"nfe={nfe} w={w:g}") as bar:
      groups.append(to_uint8(sample(labels, w, nfe, progress=bar.update)))
    if is_primary:
      print(f"nfe={nfe:<4} w={w:<5g} {len(labels) / bar.format_dict['elapsed']:10.1f} images/s")
  if not is_primary:
    return
  np.savez_compressed(
    out / "samples.npz",
    arr_0=np.concatenate(groups),
    labels=np.tile(labels, len(settings)),
    nfe=np.repeat([nfe for nfe, _ in settings], len(labels)),
    guidance=np.repeat([w for _, w in settings], len(labels)),
    seed=np.int64(seed),
  )
  columns = np.argsort(labels[:COLUMNS], kind="stable")  # sorted by class
  images = np.stack([group[columns] for group in groups])
  picture = labelled_grid(images, settings, model.names, labels[columns], f"seed {seed}")
  Image.fromarray(picture).save(out / "grid.png")
  print(f"grid:    {out / 'grid.png'}\nsamples: {out / 'samples.npz'}")
