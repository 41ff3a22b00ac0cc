"""Image files with labels, in random access: a folder, TFDS, ArrayRecord files, tars of JPEGs.

Images are read one by one, see decode.py. Hidden files, and those that systems leave, are no data.

Dimensions: n images, s image_size.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging

from ism_jax.data.decode import SUFFIXES, Fault, square
from train_jax.errors import UserError
from train_jax.storage import records

FIELDS = {"image": bytes, "label": int}, "an encoded 'image' and an integer 'label'"  # of records

CLASSES = 10**6  # more than any set has; a larger number is no number of a class

# Files and folders that systems leave beside the user's.
_SYSTEM = {
  *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
  *("@eadir", "@recycle", "#recycle", "#snapshot", "lost+found"),
  *("$recycle.bin", "system volume information"),
}

_SPLIT = re.compile("(train|training|val|valid|validation|test|testing)[-_ ]?[0-9]*", re.IGNORECASE)


@dataclass(frozen=True)
class EncodedImages:
  """n encoded images.

  Attributes:
    size: n.
    names: one name for each class; () where the source has none.
    read: i -> (the file's bytes, its class).
    name: i -> the image's name inside the source, which does not depend on the source's place.
    left_out: suffix -> the number of files that are no images.
    content: SHA-256 of the classes and sizes of all images; "" if they are not known yet.
  """

  size: int
  names: tuple[str, ...]
  read: Callable[[int], tuple[bytes, int]]
  name: Callable[[int], str]
  left_out: Mapping[str, int] = field(default_factory=dict)
  content: str = ""


class Read(NamedTuple):
  """An image that was read.

  Attributes:
    pixels: `decode.square`, or None if it cannot be read.
    label: its class; -1 if unknown.
    why: the reason why there are no pixels, or "".
    turned: whether EXIF turned it.
  """

  pixels: np.ndarray | None
  label: int
  why: str = ""
  turned: bool = False


def is_system(name: str) -> bool:
  """Whether a file or folder is hidden, or one that systems leave: it is no data."""
  return (name.startswith(".") and name not in (".", "..")) or name.lower() in _SYSTEM


def notes(left_out: Mapping[str, int], turned: int = 0) -> str:
  """What the line that describes the data says of files; "" for nothing."""
  parts = [f"{turned} turned upright by their EXIF"] if turned else []
  if left_out:
    most = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    some = [f"{count} {suffix or 'without suffix'}" for suffix, count in most[:8]]
    parts.append(f"no images, left out: {', '.join(some)}{', ...' if len(most) > 8 else ''}")
  return "; ".join(parts)


def refuse_splits(source: str, names: Iterable[str], kind: str = "folders") -> None:
  """Raises UserError if `names`, of folders or files in `source`, are splits of a data set."""
  splits = sorted(name for name in names if _SPLIT.fullmatch(name))
  if len(splits) > 1:
    raise UserError(
      f"{source} has the {kind} {' and '.join(map(repr, splits))}, which are splits of a data set "
      "and would be mixed; choose one of them, or rename them if they are classes."
    )


def scan(top: Path) -> tuple[list[Path], Counter[str]]:
  """(the image files below a folder, sorted; the number of other files by suffix).

  Links are followed, and each folder is read once; so links back to `top` or above lead nowhere.

  Raises:
    UserError: a folder cannot be read, or holds the splits of a data set.
  """

  def refuse(err: OSError) -> None:
    raise UserError(
      f"the folder {err.filename!r} cannot be read ({err.strerror}); give it read permission, or "
      "remove it."
    ) from err

  def identity(folder) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino

  files, left_out = [], Counter()
  seen = {identity(above) for path in (top.resolve(), top.absolute()) for above in path.parents}
  for folder, inner, names in os.walk(top, onerror=refuse, followlinks=True):
    if identity(folder) in seen:
      inner.clear()
      continue
    seen.add(identity(folder))
    inner[:] = sorted(name for name in inner if not is_system(name))
    refuse_splits(f"the folder {folder!r}", inner)
    for path in (Path(folder, name) for name in names if not is_system(name)):
      if path.suffix.lower() in SUFFIXES:
        files.append(path)
      else:
        left_out[path.suffix.lower()] += 1
  return sorted(files), left_out


def file_bytes(path: Path) -> bytes:
  """The content of an image file.

  Raises:
    Fault: it cannot be read.
  """
  try:
    if path.is_file():  # reading a pipe would wait for ever
      return path.read_bytes()
    if path.is_symlink() and not path.exists():
      why = f"it is a link to {os.readlink(path)}, which is not there; restore that or remove it"
    else:
      why = "it is no regular file" if path.exists() else "it is gone"
  except OSError as err:
    why = f"reading it failed: {err.strerror}"
  raise Fault(why)


def folder(root: str, flag: str = "--images") -> EncodedImages:
  """`root/<class name>/*.png|jpg|...`; classes are numbered in the order of their names.

  If these have no images, those in `root` itself are one class of its name.

  Raises:
    UserError: no such folder, or no image; the message names the option `flag`.
  """
  top = Path(root).expanduser()
  if not top.is_dir():
    raise UserError(
      f"{flag}={root!r} is not a folder; give a folder of images, or with one sub-folder a class."
    )
  entries = [p for p in top.iterdir() if not is_system(p.name)]
  names = sorted(p.name for p in entries if p.is_dir())
  folders, loose, left_out = {*names}, [], Counter()
  for path in sorted(p for p in entries if p.name not in folders):
    if path.suffix.lower() in SUFFIXES:
      loose.append(path)
    else:
      left_out[path.suffix.lower()] += 1
  refuse_splits(f"{flag}={root!r}", names)
  files, empty = [], []
  for label, name in enumerate(names):
    found, others = scan(top / name)
    files += [(path, label) for path in found]
    left_out += others
    if not found:
      empty.append(name)
  if files and empty:
    raise UserError(
      f"{flag}={root!r}: the class {empty[0]!r} has no readable image; add some or remove it."
    )
  alone = names[0] if len(names) == 1 and _SPLIT.fullmatch(names[0]) else ""
  if alone and any(path.parent != top / alone for path, _ in files):
    raise UserError(
      f"{flag}={root!r} has one folder, {alone!r}, whose sub-folders would be one class; give "
      f"{flag}={str(Path(root) / alone)!r}."
    )
  if not files:
    names, files = [top.resolve().name], [(path, 0) for path in loose]
  elif loose:
    logging.warning("%s=%s: %d images beside its sub-folders are left out", flag, root, len(loose))
  if not files:
    some = f" ({notes(left_out)})" if left_out else ""
    raise UserError(
      f"{flag}={root!r} has no images{some}; expected {root}/<class name>/<image>.png, or "
      f"{root}/<image>.png of one class, or another suffix that Pillow reads."
    )
  return EncodedImages(
    len(files),
    tuple(names),
    lambda i: (file_bytes(files[i][0]), files[i][1]),
    lambda i: str(files[i][0].relative_to(top)),
    left_out,
  )


def _members(path: Path, left_out: Counter) -> list[tuple[Path, str, int, int, int]]:
  """(tar, key, offset, bytes, class) of each image of one tar, in its order."""
  images, classes, places, dotted = {}, {}, {}, {}
  try:
    with tarfile.open(path, "r:") as tar:  # uncompressed only: members are read by offset
      for member in tar:
        if member.isdir() or any(map(is_system, member.name.split("/"))):
          continue
        parent, _, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        key, suffix = f"{parent}/{stem}".lstrip("/"), f".{extension.lower()}"
        places[member.name] = member.offset_data, member.size
        if suffix in SUFFIXES:
          if key in images:
            raise UserError(
              f"{path} has two images of the key {key!r}, which can have one; remove one of them."
            )
          # A hard link stands for an earlier member.
          images[key] = places[member.linkname if member.islnk() else member.name]
        elif extension.lower() == "cls":
          classes[key] = _class_number(tar.extractfile(member).read(), f"{path}: {key}.cls")
        else:
          left_out[suffix if extension else ""] += 1
          if Path(base).suffix.lower() in SUFFIXES:
            dotted.setdefault(key, member.name)
      _check_end(path, tar.offset)
  except UserError:
    raise
  except (tarfile.TarError, ValueError, KeyError) as err:
    raise UserError(
      f"{path} cannot be read as a tar of KEY.jpg and KEY.cls, a class number ({err}); give whole "
      "tars that are not compressed."
    ) from err
  refuse_splits(str(path), {key.partition("/")[0] for key in images if "/" in key})
  if lost := [name for key, name in dotted.items() if key not in images]:  # else it is a mask, say
    raise UserError(
      f"{path} has {len(lost)} keys without an image but with a name such as {lost[0]!r}, and in "
      "WebDataset's layout a key ends at the first dot; write KEY.jpg and KEY.cls with no dot in "
      "KEY."
    )
  for key in images:
    if key not in classes:
      raise UserError(
        f"{path}: the image {key!r} has no {key}.cls beside it; add its class number."
      )
  return [(path, key, *place, classes[key]) for key, place in images.items()]


def _class_number(content: bytes, file: str) -> int:
  """The class that a .cls holds; UserError unless it is a number below CLASSES."""
  text = content.strip()
  if not text.isdigit() or len(text) > 18 or int(text) >= CLASSES:
    raise UserError(
      f"{file} holds {content[:40].decode(errors='replace')!r}, and must hold the class of its "
      f"image as a number from 0 to {CLASSES - 1}; number the classes from 0 on."
    )
  return int(text)


def _check_end(path: Path, offset: int) -> None:
  """Raises UserError unless a tar ends at `offset`, with a block of zeros and nothing after it.

  tarfile takes a cut or a damaged header between two members for the end.
  """
  with path.open("rb") as file:
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
      raise UserError(
        f"{path} is cut off or damaged at byte {offset}: no member begins there, and it is not the "
        "end of an archive; fetch it again."
      )
    while chunk := file.read(2**20):
      if chunk.strip(b"\0"):
        raise UserError(
          f"{path} goes on after its end, as tars do that are joined by cat, and the rest would be "
          "lost; give the tars one by one, or join them by tar --concatenate."
        )


def tars(paths: list[Path]) -> EncodedImages:
  """WebDataset's layout: uncompressed tars with `KEY.jpg` (or .png, ...) and `KEY.cls`, a number.

  Only the tars' headers are read now; images are read later by their offsets.

  Raises:
    UserError: a damaged tar, an image without its class, or no image.
  """
  left_out = Counter()
  members = [member for path in paths for member in _members(path, left_out)]
  if not members:
    some = f" ({notes(left_out)})" if left_out else ""
    raise UserError(f"{paths[0]} has no images{some}; expected members KEY.jpg and KEY.cls.")

  def read(i: int) -> tuple[bytes, int]:
    path, _, offset, size, label = members[i]
    with path.open("rb") as file:
      file.seek(offset)
      return file.read(size), label

  def name(i: int) -> str:
    return f"{members[i][0].name}:{members[i][1]}"

  known = "".join(f"{size} {label}\n" for _, _, _, size, label in members)
  content = hashlib.sha256(known.encode()).hexdigest()
  return EncodedImages(len(members), (), read, name, left_out, content)


def _from_records(source: records.Records) -> EncodedImages:
  return EncodedImages(source.size, source.classes, source.read, source.name)


def tfds(name: str, flag: str = "--images") -> EncodedImages:
  """A prepared TFDS builder with `image` and `label`, see `records.open_tfds`."""
  return _from_records(records.open_tfds(name, flag, *FIELDS))


def find(source: str) -> EncodedImages:
  """The images that `--images=SOURCE` names.

  Args:
    source: a folder of images, or of one sub-folder for each class; a directory, file or pattern
      of `.tar` or `.array_record` files; a TFDS builder's directory; or `tfds:NAME[@SPLIT]`.

  Raises:
    UserError: it is none of these.
  """
  if records.is_tfds(source):
    return tfds(source)
  path = Path(source).expanduser()
  paths = path.iterdir() if path.is_dir() else map(Path, glob.glob(str(path)))
  files = sorted(file for file in paths if file.is_file() and not is_system(file.name))
  sets = [file for file in files if file.suffix == ".tar" or ".array_record" in file.name]
  # train-000000.tar and val-000000.tar, or set-train.array_record-00000-of-01024 and its like
  words = [filter(_SPLIT.fullmatch, re.findall("[A-Za-z]+", file.name)) for file in sets]
  refuse_splits(f"--images={source!r}", {next(found, "") for found in words}, "files")
  if tar_files := [file for file in files if file.suffix == ".tar"]:
    return tars(tar_files)
  if record_files := [file for file in files if ".array_record" in file.name]:
    return _from_records(records.open_array_records(record_files, *FIELDS))
  if path.is_dir():
    return folder(source)
  raise UserError(
    f"--images={source!r} is not there; give a folder of images, or with one sub-folder a class, "
    ".tar or .array_record files, a TFDS directory, or tfds:NAME."
  )


def read_image(images: EncodedImages, i: int, image_size: int, channels: int | None = None) -> Read:
  """Image i, cut by `decode.square`."""
  label = -1
  try:
    content, label = images.read(i)
    pixels, turned = square(content, image_size, channels)
    return Read(pixels, label, turned=turned)
  except UserError:
    raise
  except (OSError, ValueError) as err:  # Fault is a ValueError
    return Read(None, label, str(err))


def read_batches(
  images: EncodedImages, rows: range, batch: int, image_size: int, pool: ThreadPoolExecutor
) -> Iterator[list[tuple[int, Read]]]:
  """Lists of (number, image) of the images `rows`: batches, with one read ahead."""

  def start(first: int) -> list:
    numbers = rows[first : first + batch]
    return [(i, pool.submit(read_image, images, i, image_size)) for i in numbers]

  futures = start(0)
  for first in range(0, len(rows), batch):
    current, futures = futures, start(first + batch)
    yield [(i, future.result()) for i, future in current]
