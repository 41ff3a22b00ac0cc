"""Images from folders, tars, ArrayRecord files and TFDS; ADM's crop."""

import io
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ism_jax.data import images, sources
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


# --- the crop -------------------------------------------------------------------------------------


def center_crop_arr(pil_image, image_size):
  """guided_diffusion/image_datasets.py, as published."""
  while min(*pil_image.size) >= 2 * image_size:
    pil_image = pil_image.resize(tuple(x // 2 for x in pil_image.size), resample=Image.BOX)
  scale = image_size / min(*pil_image.size)
  pil_image = pil_image.resize(
    tuple(round(x * scale) for x in pil_image.size), resample=Image.BICUBIC
  )
  arr = np.array(pil_image)
  crop_y = (arr.shape[0] - image_size) // 2
  crop_x = (arr.shape[1] - image_size) // 2
  return arr[crop_y : crop_y + image_size, crop_x : crop_x + image_size]


@pytest.mark.parametrize("shape", [(64, 64), (33, 64), (200, 131), (128, 257), (65, 17), (511, 90)])
def test_the_crop_is_adms(shape):
  pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
  image = Image.fromarray(pixels)
  ours = images.center_crop(image, 32)
  assert ours.shape == (32, 32, 3) and ours.dtype == np.uint8
  np.testing.assert_array_equal(ours, center_crop_arr(image, 32))


def test_grey_palette_and_alpha_become_rgb():
  for mode in ("L", "P", "RGBA", "CMYK"):
    file, colour = io.BytesIO(), Image.new("RGB", (40, 32), (200, 100, 50))
    colour.convert(mode).save(file, "jpeg" if mode == "CMYK" else "png")
    content = [file.getvalue()]
    one = images.EncodedImages(1, (), lambda i, content=content: (content[i], 5), str)
    pixels, label = images.read_image(one, 0, 32)
    assert pixels.shape == (32, 32, 3) and label == 5


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode):
  """A black square; around it nothing, under which lies black as well."""
  drawn = Image.new("RGBA", (32, 32))
  drawn.paste((0, 0, 0, 255), (8, 8, 24, 24))
  file = io.BytesIO()
  drawn.convert(mode).save(file, "png")
  one = images.EncodedImages(1, (), lambda i: (file.getvalue(), 0), str)
  wanted = np.full((32, 32, 3), 255)
  wanted[8:24, 8:24] = 0
  np.testing.assert_array_equal(images.read_image(one, 0, 32)[0], wanted)
  grey = images.area_square(Image.open(file), 32, 1)
  np.testing.assert_array_equal(grey, wanted[..., :1])


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
  values = (np.arange(256).reshape(16, 16) * 256).astype(np.uint16)
  Image.fromarray(values).save(tmp_path / "1.png")
  folder = sources.folder(str(tmp_path), image_size=16, channels=1)
  np.testing.assert_array_equal(folder.pixels[0, :, :, 0], values // 256)
  one = images.EncodedImages(1, (), lambda i: ((tmp_path / "1.png").read_bytes(), 5), str)
  for pixels in (images.read_image(one, 0, 16)[0], adm.read_square(tmp_path / "1.png", 16)):
    np.testing.assert_array_equal(pixels, np.repeat(values[..., None] // 256, 3, axis=-1))


def test_what_cannot_be_read_is_none_and_order_is_kept():
  contents = [encoded(0, "jpeg"), b"no image", encoded(2, "jpeg")[:300], encoded(3), b""]
  source = images.EncodedImages(5, (), lambda i: (contents[i], i), str)
  with ThreadPoolExecutor(2) as pool:
    batches = list(images.read_batches(source, range(5), 2, 16, pool))
  assert [[i for i, *_ in batch] for batch in batches] == [[0, 1], [2, 3], [4]]
  flat = [item for batch in batches for item in batch]
  assert [pixels is None for _, pixels, _ in flat] == [False, True, True, False, True]
  assert [label for *_, label in flat] == [0, 1, 2, 3, 4]
