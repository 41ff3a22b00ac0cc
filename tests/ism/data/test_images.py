"""Images from folders, tars, ArrayRecord files and TFDS; ADM's crop."""

import io
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ism_jax.data import decode, images, sources
from ism_jax.evaluation import adm
from tests.train.record_files import write_array_record, write_tfds
from train_jax.errors import UserError

NAMES = ("cat", "dog", "eel")


def encoded(i: int, kind: str = "png", shape=(20, 30)) -> bytes:
  """An image whose first pixel is i, as a file's bytes."""
  pixels = np.random.default_rng(i).integers(0, 256, (*shape, 3)).astype(np.uint8)
  pixels[0, 0] = i
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, kind)
  return file.getvalue()


def add(tar, name, content):
  info = tarfile.TarInfo(name)
  info.size = len(content)
  tar.addfile(info, io.BytesIO(content))


def write_tars(top, count=7, size=3):
  """`count` images in tars of `size`, classes i mod 3."""
  for first in range(0, count, size):
    with tarfile.open(top / f"train-{first:03d}.tar", "w") as tar:
      for i in range(first, min(first + size, count)):
        add(tar, f"part/{i:05d}.json", b"{}")
        add(tar, f"part/{i:05d}.cls", str(i % 3).encode())
        add(tar, f"part/{i:05d}.png", encoded(i))
  return top


def write_folder(top, count=7):
  for i in range(count):
    (top / NAMES[i % 3]).mkdir(exist_ok=True)
    (top / NAMES[i % 3] / f"{i}.png").write_bytes(encoded(i))
  return top


def write_records(top, count=7):
  for part, numbers in enumerate(np.array_split(np.arange(count), 2)):
    examples = [{"image": encoded(i), "label": int(i % 3)} for i in numbers]
    write_array_record(top / f"train.array_record-{part:05d}-of-00002", examples)
  return top


def write_builder(top, count=7):
  features = {
    "image": tfds.features.Image(shape=(None, None, 3)),
    "label": tfds.features.ClassLabel(names=NAMES),
  }
  examples = [{"image": io.BytesIO(encoded(i)), "label": i % 3} for i in range(count)]
  return write_tfds(top, features, examples)


WRITERS = {
  "folder": write_folder,
  "tars": write_tars,
  "records": write_records,
  "tfds": write_builder,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_source_has_every_image_with_its_class(kind, tmp_path):
  found = images.find(str(WRITERS[kind](tmp_path)))
  assert found.size == 7
  assert found.names == (NAMES if kind in ("folder", "tfds") else ())
  items = [found.read(i) for i in range(7)]
  seen = {}
  for content, label in items:
    number = int(np.asarray(Image.open(io.BytesIO(content)))[0, 0, 0])
    assert content == encoded(number)
    seen[number] = label
  assert seen == {i: i % 3 for i in range(7)}
  assert len({found.name(i) for i in range(7)}) == 7


def test_tars_and_patterns_may_be_named(tmp_path):
  write_tars(tmp_path)
  assert images.find(str(tmp_path / "train-000.tar")).size == 3
  assert images.find(str(tmp_path / "train-00[36].tar")).size == 4


def test_a_folder_without_class_folders_is_one_class(tmp_path, caplog):
  top = tmp_path / "photos"
  (top / "empty").mkdir(parents=True)
  for i in range(3):
    (top / f"{i}.png").write_bytes(encoded(i))
  (top / "notes.txt").write_text("not an image")
  for found in (images.find(str(top)), images.find(f"{top}/empty/..")):
    assert found.names == ("photos",)
    assert [found.read(i) for i in range(found.size)] == [(encoded(i), 0) for i in range(3)]
  assert found.name(2) == "2.png" and not caplog.records
  (top / "empty" / "3.png").write_bytes(encoded(3))
  found = images.find(str(top))
  assert (found.names, found.size) == (("empty",), 1)
  assert "3 images beside its sub-folders are left out" in caplog.text


def test_names_do_not_depend_on_where_the_source_lies(tmp_path):
  for kind, write in WRITERS.items():
    if kind == "tfds":
      continue
    pair = []
    for place in ("a", "b"):
      top = tmp_path / kind / place
      top.mkdir(parents=True)
      found = images.find(str(write(top)))
      pair.append([found.name(i) for i in range(found.size)])
    assert pair[0] == pair[1]


def test_bad_sources_are_refused_in_a_sentence(tmp_path):
  with pytest.raises(UserError, match=r"--images='no/where' is not there; give a folder"):
    images.find("no/where")
  with pytest.raises(UserError, match=r"has no images; expected"):
    images.find(str(tmp_path))
  with pytest.raises(UserError, match=r"--images='tfds_that_is_not' is not a prepared set"):
    images.find("tfds:tfds_that_is_not")
  bad = tmp_path / "bad.tar"
  bad.write_bytes(b"not a tar" * 100)
  with pytest.raises(UserError, match=r"bad.tar cannot be read as a tar"):
    images.find(str(bad))
  with tarfile.open(bad, "w") as tar:
    add(tar, "1.jpg", encoded(1))
  with pytest.raises(UserError, match=r"the image '1' has no 1.cls beside it"):
    images.find(str(bad))
  write_array_record(tmp_path / "no_label.array_record", [{"image": encoded(1)}])
  with pytest.raises(UserError, match=r"record 0 .* an encoded 'image' and an integer 'label'"):
    images.find(str(tmp_path / "no_label.array_record"))


def test_tfds_is_a_source_of_pixels(tmp_path):
  source = sources.tfds(write_builder(tmp_path), image_size=4, channels=3)
  assert source.shape == (4, 4, 3) and source.names == NAMES
  assert sorted(source.labels.tolist()) == [0, 0, 0, 1, 1, 2, 2]
  assert np.abs(source.images(np.arange(7))).max() <= 1


# --- what is data, and what is not ----------------------------------------------------------------

SYSTEM = (
  *(
    ".ipynb_checkpoints/0.png",
    "__MACOSX/._0.png",
    "._0.png",
    "@eaDir/0.png",
    "$RECYCLE.BIN/0.png",
  ),
  *("cat/.ipynb_checkpoints/0.png", "cat/__MACOSX/0.png", "cat/._0.png", "cat/Thumbs.db"),
  *("cat/deep/@eaDir/0.png", "cat/.DS_Store", "desktop.ini"),
)


@pytest.mark.parametrize("kind", ["folder", "tars", "records"])
def test_hidden_files_and_those_of_systems_are_no_data(kind, tmp_path):
  found = images.find(str(WRITERS[kind](tmp_path)))
  names = [found.name(i) for i in range(found.size)]
  for file in SYSTEM if kind == "folder" else (f"._{p.name}" for p in [*tmp_path.iterdir()]):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_bytes(b"not an image")
  if kind == "tars":
    with tarfile.open(tmp_path / "train-000.tar", "a") as tar:
      for file in SYSTEM:
        add(tar, file, b"not an image")
  again = images.find(str(tmp_path))
  assert [again.name(i) for i in range(again.size)] == names
  assert again.names == found.names and again.left_out == found.left_out
  if kind == "folder":
    assert adm.folder_files(tmp_path) == [tmp_path / name for name in names]


@pytest.mark.parametrize(
  ("names", "words"),
  [
    (("train/cat", "val/cat"), r"has the folders 'train' and 'val', which are splits"),
    (("train2017", "Test_2017", "meta"), r"has the folders 'Test_2017' and 'train2017'"),
    (("train/cat", "train/dog"), r"one folder, 'train', .* one class; give --images='.*/train'"),
    (("test/cat", "train/cat", "eel"), r"has the folders 'test' and 'train'"),
    (("cat/Test", "cat/Train", "eel"), r"the folder '.*/cat' has the folders 'Test' and 'Train'"),
  ],
)
def test_splits_of_a_data_set_are_no_classes(names, words, tmp_path):
  for name in names:
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "0.png").write_bytes(encoded(0))
  with pytest.raises(UserError, match=words):
    images.find(str(tmp_path))
  with pytest.raises(UserError, match=words.replace("--images", "data.path")):
    sources.folder(str(tmp_path), image_size=4, channels=3)
  if "one class" not in words:  # a reference has no classes
    with pytest.raises(UserError, match=words):
      adm.folder_files(tmp_path)


def test_words_of_splits_may_name_classes(tmp_path):
  for name in ("train", "car"):  # vehicles
    (tmp_path / "a" / name).mkdir(parents=True)
    (tmp_path / "a" / name / "0.png").write_bytes(encoded(0))
  assert images.find(str(tmp_path / "a")).names == ("car", "train")
  (tmp_path / "b" / "train").mkdir(parents=True)  # images without classes
  (tmp_path / "b" / "train" / "0.png").write_bytes(encoded(0))
  assert images.find(str(tmp_path / "b")).names == ("train",)


def test_tars_and_records_of_several_splits_are_refused(tmp_path):
  write_tars(tmp_path)
  (tmp_path / "val-000.tar").write_bytes((tmp_path / "train-000.tar").read_bytes())
  with pytest.raises(UserError, match=r"has the files 'train' and 'val', which are splits"):
    images.find(str(tmp_path))
  assert images.find(str(tmp_path / "train-*.tar")).size == 7
  with tarfile.open(tmp_path / "all.tar", "w") as tar:
    for name in ("train/1", "val/1"):
      add(tar, f"{name}.cls", b"0")
      add(tar, f"{name}.jpg", encoded(1))
  with pytest.raises(UserError, match=r"all.tar has the folders 'train' and 'val'"):
    images.find(str(tmp_path / "all.tar"))


def test_links_are_followed_and_each_folder_is_read_once(tmp_path):
  top, away = tmp_path / "top", tmp_path / "away"
  for file in (top / "cat" / "0.png", top / "dog" / "1.png", away / "in" / "2.png"):
    file.parent.mkdir(parents=True)
    file.write_bytes(encoded(0))
  (top / "cat" / "more").symlink_to(away)
  (top / "cat" / "one.png").symlink_to(away / "in" / "2.png")
  for name, target in (("self", "."), ("top", ".."), ("above", "../.."), ("twice", away / "in")):
    (top / "cat" / name).symlink_to(target)
  (away / "back").symlink_to(top)
  (top / "eel").symlink_to(away)  # a class that is a link
  found = images.find(str(top))
  wanted = ["cat/0.png", "cat/more/in/2.png", "cat/one.png", "dog/1.png", "eel/in/2.png"]
  assert [found.name(i) for i in range(found.size)] == wanted
  reference = ["cat/0.png", "cat/more/in/2.png", "cat/one.png", "dog/1.png"]
  assert adm.folder_files(top) == [top / name for name in reference]


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
  def walk(top, onerror, followlinks):
    onerror(PermissionError(13, "Permission denied", "cat/secret"))

  monkeypatch.setattr(images.os, "walk", walk)
  with pytest.raises(UserError, match=r"'cat/secret' cannot be read \(Permission denied\)"):
    images.scan(tmp_path)


def test_all_that_pillow_reads_is_data_and_the_rest_is_counted(tmp_path):
  kinds = {"jfif": "jpeg", "jpe": "jpeg", "pgm": "ppm", "jp2": "jpeg2000", "TIF": "tiff", "avif": 0}
  (tmp_path / "c").mkdir()
  for suffix, kind in kinds.items():
    if f".{suffix}".lower() in decode.SUFFIXES:  # AVIF may be missing from a build of Pillow
      (tmp_path / "c" / f"0.{suffix}").write_bytes(encoded(0, kind or "avif"))
  size = len([*(tmp_path / "c").iterdir()])
  for name in ("c/a.heic", "c/b.HEIC", "c/none", "list.txt", "c/plot.eps", "c/set.h5"):
    (tmp_path / name).write_bytes(encoded(0))
  source = sources.folder(str(tmp_path), image_size=16, channels=3)
  assert len(source.labels) == size >= 5
  assert source.notes == ("no images, left out: 2 .heic, 1 without suffix, 1 .eps, 1 .h5, 1 .txt")
  with tarfile.open(tmp_path / "1.tar", "w") as tar:
    for name in ("0.cls", "0.jpg", "0.json", "0.seg.png", "README"):
      add(tar, name, b"0")
  found = images.find(str(tmp_path / "1.tar"))
  assert found.size == 1 and found.left_out == {".json": 1, ".seg.png": 1, "": 1}


def test_a_key_has_one_image_and_a_hard_link_is_the_image_it_stands_for(tmp_path):
  with tarfile.open(tmp_path / "links.tar", "w") as tar:
    for key in "01":
      add(tar, f"{key}.cls", key.encode())
    add(tar, "0.png", encoded(0))
    link = tarfile.TarInfo("1.png")
    link.type, link.linkname = tarfile.LNKTYPE, "0.png"
    tar.addfile(link)
  found = images.find(str(tmp_path / "links.tar"))
  assert [found.read(i) for i in range(2)] == [(encoded(0), 0), (encoded(0), 1)]
  with tarfile.open(tmp_path / "links.tar", "a") as tar:
    add(tar, "0.jpg", encoded(0, "jpeg"))
  with pytest.raises(UserError, match=r"has two images of the key '0', which can have one"):
    images.find(str(tmp_path / "links.tar"))
