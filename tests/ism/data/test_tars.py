"""Tars in WebDataset's layout: every image of them, or a sentence that says what is wrong."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from ism_jax.data import encode, images
from train_jax.errors import UserError
from train_jax.files import write_json
from train_jax.storage.shards import make_missing

SAMPLE = ("png", "cls")


def png() -> bytes:
  file = io.BytesIO()
  Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(file, "png")
  return file.getvalue()


def write(path, members: dict[str, bytes]) -> bytes:
  with tarfile.open(path, "w") as tar:
    for name, content in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return path.read_bytes()


@pytest.mark.parametrize(
  "members, wanted",
  [
    ({"a.b/1.png": png(), "a.b/1.CLS": b" 7\n"}, [("1.tar:a.b/1", 7)]),
    ({"1.png": png(), "1.cls": b"0", "1.seg.png": png(), "1.v2.json": b""}, [("1.tar:1", 0)]),
    (
      {f"img.v1.{i}.{kind}": b"0" for i in (5, 6) for kind in ("jpg", "cls")}
      | {"1.png": png(), "1.cls": b"0", "im.2.png": png()},
      r"1.tar has 2 keys without an image but with a name such as 'img.v1.5.jpg', .* first dot",
    ),
    ({"1.png": png(), "1.cls": b"99999999999"}, r"1.tar: 1.cls holds '99999999999', .* to 999999;"),
    ({"1.png": png(), "1.cls": b"9" * 5000}, r"1.cls holds '9{40}', and must"),
    ({"p/1.png": png(), "p/1.cls": b"cat"}, r"p/1.cls holds 'cat', and must hold the class .* as"),
    ({"1.png": png(), "1.cls": b"-1"}, r"1.cls holds '-1'"),
    ({"1.png": png(), "1.cls": b"1_0"}, r"1.cls holds '1_0'"),
    ({"1.png": png(), "1.cls": b""}, r"1.cls holds ''"),
  ],
)
def test_keys_and_classes_are_read_right_or_refused(members, wanted, tmp_path):
  write(tmp_path / "1.tar", members)
  if isinstance(wanted, str):
    with pytest.raises(UserError, match=wanted):
      images.find(str(tmp_path))
    return
  found = images.find(str(tmp_path))
  assert [(found.name(i), found.read(i)[1]) for i in range(found.size)] == wanted


def test_a_tar_is_whole_or_refused(tmp_path):
  """Cut at every block: before the end-of-archive block there is no tar that is believed."""
  path = tmp_path / "1.tar"
  members = {f"{i}.{kind}": png() if kind == "png" else b"3" for i in range(9) for kind in SAMPLE}
  whole = write(path, members)
  end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
  for cut in (*range(0, end + 512, 512), *range(100, end, 5000), end + 511):
    path.write_bytes(whole[:cut])
    with pytest.raises(UserError, match=r"1\.tar (is cut off|cannot be read|has no images)"):
      images.find(str(path))
  for good in (whole[: end + 512], whole, whole + bytes(10240)):
    path.write_bytes(good)
    assert images.find(str(path)).size == 9
  path.write_bytes(whole + whole)
  with pytest.raises(UserError, match=r"1.tar goes on after its end, .* joined by cat"):
    images.find(str(path))
  damaged = bytearray(whole)
  damaged[4 * 1024 + 20] ^= 1  # in the header of the fifth member
  path.write_bytes(damaged)
  with pytest.raises(UserError, match=r"cut off or damaged at byte 4096: no member begins there"):
    images.find(str(path))


def test_tars_that_differ_in_a_label_are_another_set(tmp_path):
  found, manifests = [], []
  (tmp_path / "vae").write_bytes(b"weights")
  for label in (b"0", b"1"):
    write(tmp_path / "1.tar", {"1.png": png(), "1.cls": label, "2.png": png(), "2.cls": b"1"})
    found.append(encode.make_job(images.find(str(tmp_path)), str(tmp_path / "vae"), 8, 1))
    (out := tmp_path / str(label)).mkdir()
    part = {"labels": [int(label), 1], "skipped": [], "turned": 0, "sum": [1.0], "square": [2.0]}
    write_json(found[-1].paths(out, 0)[-1], {"job": {}, **part})
    encode.write_manifest(out, found[0], ("a", "b"), (1, 1, 1))
    manifests.append((out / "manifest.json").read_bytes())
  assert found[0] != found[1] and manifests[0] != manifests[1]
  write_json(found[0].paths(tmp_path, 0)[-1], {"job": found[0].metadata})
  with pytest.raises(UserError, match=r"--out=.* holds latents of another content of the images"):
    make_missing(found[1], tmp_path, None)
