"""main.py with a run of images: files where they were asked for, mistakes in a sentence."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

import main
from ism_jax.commands import COMMANDS
from ism_jax.model import Model
from ism_jax.sample import to_uint8
from tests.ism.conftest import DIGITS
from train_jax.checkpointing.checkpoint import Checkpoints
from train_jax.errors import UserError


@pytest.fixture
def call(digits_run, tmp_path):
  """(mode, *flags) -> exit code of main.py on the run, with --out=tmp_path/out."""

  def run(mode, *flags):
    where = (f"--workdir={digits_run}", f"--out={tmp_path / 'out'}")
    return main.run(["main.py", f"--mode={mode}", *where, *flags])

  return run


def test_samples_are_the_model_s(call, digits_run, tmp_path, capsys):
  flags = ("--nfe=1,2", "--guidance=0.5", "--labels=3,5", "--num=6", "--seed=3")
  assert call("sample", *flags) == 0, capsys.readouterr().err
  assert "images/s" in capsys.readouterr().out
  with np.load(tmp_path / "out" / "samples.npz") as saved:
    np.testing.assert_array_equal(saved["labels"], [3, 5, 3, 5, 3, 5] * 2)
    np.testing.assert_array_equal(saved["nfe"], [1] * 6 + [2] * 6)
    assert set(saved["guidance"].tolist()) == {0.5} and saved["seed"] == 3
    images = Model.from_run(digits_run).sample([3, 5, 3, 5, 3, 5], 2, 0.5, seed=3)
    np.testing.assert_array_equal(saved["arr_0"][6:], to_uint8(images))
  assert Image.open(tmp_path / "out" / "grid.png").width > 100


def test_evaluation_writes_its_numbers(call, digits_run, tmp_path, capsys):
  assert call("evaluate", "--nfe=1", "--guidance=0.5", "--step=1") == 0, capsys.readouterr().err
  record = json.loads((tmp_path / "out" / "evaluation.json").read_text())
  assert [record.pop(name) for name in ("step", "seed", "samples")] == [1, 0, 64]
  assert record == Model.from_run(digits_run, step=1).evaluate(nfe=(1,), guidance=(0.5,))
  assert {"fd/nfe1_w0", "fd/nfe1_w0.5"} <= record.keys()  # w = 0 is always there
  assert (tmp_path / "out" / "evaluation_grid.png").exists()  # grid.png is of --mode=sample
  assert "fd" in capsys.readouterr().out


def test_export_is_the_model(call, digits_run, tmp_path, capsys, differences):
  assert call("export", "--step=1") == 0
  assert "(step 1)" in capsys.readouterr().out
  params = [
    jax.device_get(model.params)
    for model in (
      Model.from_pretrained(tmp_path / "out"),
      Model.from_run(digits_run, 1, devices=jax.devices()[:1]),
    )
  ]
  assert differences(*params) == []


def test_only_the_first_process_writes_and_prints(call, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  for mode, *flags in (("sample", "--nfe=1", "--num=6"), ("evaluate", "--nfe=1"), ("export",)):
    assert call(mode, *flags) == 0
  assert not list(tmp_path.rglob("*.*"))
  assert {line.partition(" ")[0] for line in capsys.readouterr().out.splitlines()} == {"backend:"}


@pytest.mark.parametrize(
  ("mode", "flag", "message"),
  [
    ("sample", "--nfe=0", "nfe=0 must be"),
    ("sample", "--nfe=one", "--nfe=one must be whole numbers separated by commas"),
    ("sample", "--guidance=9", "guidance=9 is outside the trained range 0 to"),
    ("sample", "--labels=0,10", "label 10 is out of range: the classes are 0 to 9."),
    ("sample", "--labels=0,cat", "'cat' is no number or name of a class; they are 0 0, 1 1"),
    ("sample", "--vae=v", "vae='v' decodes latents, but this model makes images"),
    ("sample", "--num=0", "--num"),
    ("sample", "--metrics=fid", "--metrics does nothing in --mode=sample of a run of ism"),
    ("evaluate", "--nfe=129", "nfe=129 must be"),
    ("evaluate", "--num=5", "eval.samples=5 must be at least 16"),
    ("evaluate", "--classes=all", "--classes"),
    ("evaluate", "--reference=r", "--reference=r is for --metrics; add --metrics=fid, or leave it"),
    ("evaluate", "--save_samples", "--save_samples is for --metrics"),
    ("export", "--nfe=1", "--nfe does nothing in --mode=export of a run of ism"),
    ("export", "--config=configs/ism_digits.py", "the run has its own config; leave it out"),
  ],
)
def test_bad_requests_are_refused_before_anything_is_read_or_written(
  mode, flag, message, call, tmp_path, monkeypatch, capsys
):
  def restore(*args):
    raise AssertionError("parameters were read for a request that cannot be met")

  monkeypatch.setattr(Checkpoints, "restore_ema", restore)
  assert call(mode, flag) == 2
  error = capsys.readouterr().err
  assert error.startswith("error: ") and message in error
  assert not list(tmp_path.rglob("*.*"))


def test_sampling_latents_asks_for_the_decoder(small_config, make_model, monkeypatch):
  latents = make_model(small_config(), {**DIGITS, "vae": "its hash"})
  monkeypatch.setattr(Model, "from_run", lambda *args: latents)
  values = COMMANDS["sample"].define()
  values(["main.py", "--nfe=1"])
  with pytest.raises(UserError, match=r"--vae=FILE is missing: .* samples are latents"):
    COMMANDS["sample"].run(values)
