"""The program as its users meet it: `python main.py` in a process of its own."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

import ism_jax
import seqmatch_jax

ROOT = Path(__file__).parents[1]
CONFIG = "--config=configs/ism_digits.py:debug"
RUN = (CONFIG, "--config.steps=12", "--config.save_every=3", "--config.eval_every=0")
ONE = "--xla_force_host_platform_device_count=1"  # of two such flags the last counts
ENVIRONMENT = {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {ONE}"}


# Imports the program once, and forks for each line: its arguments, and files for what it prints.
RUNS = """
import json, os, sys
import ism_jax.method, main, seqmatch_jax.method  # and so all that they import
from train_jax.multihost import distributed
for line in sys.stdin:
  args, *files = json.loads(line)
  if not (child := os.fork()):
    for number, file in enumerate(files, 1):
      os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["main.py", *args]
    sys.exit(distributed.leave(main.run(sys.argv)))
  print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def start(*args: str) -> subprocess.Popen:
  command = [sys.executable, "main.py", *map(str, args)]
  pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
  return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, text=True, **pipes)


@pytest.fixture(scope="module")
def call(tmp_path_factory):
  """(*args) -> (exit code, stdout, stderr) of `python main.py args`."""
  pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
  runs = subprocess.Popen([sys.executable, "-c", RUNS], cwd=ROOT, env=ENVIRONMENT, **pipes)

  def run(*args: str) -> tuple[int, str, str]:
    top = tmp_path_factory.mktemp("printed")
    files = [top / "out", top / "err"]
    print(json.dumps([[*map(str, args)], *map(str, files)]), file=runs.stdin, flush=True)
    code = int(runs.stdout.readline())
    return code, *(file.read_text() for file in files)

  yield run
  runs.communicate()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, call):
  """The working directory of a run that nobody disturbed, and what it printed."""
  workdir = tmp_path_factory.mktemp("finished")
  code, out, err = call(*RUN, f"--workdir={workdir}")
  assert code == 0, err
  return workdir, out


def test_every_number_is_explained(finished):
  lines = (finished[0] / "metrics.jsonl").read_text().splitlines()
  names = {
    name.removeprefix("eval/").partition("/")[0] for line in lines for name in json.loads(line)
  }
  explained = (ROOT / "docs" / "METRICS.md").read_text()
  assert len(names) > 10
  assert sorted(name for name in names if f"`{name}`" not in explained) == ["step"]


def test_run_says_where_it_ran_and_what_it_left(finished):
  workdir, out = finished
  assert "backend: cpu, 1 device(s)" in out
  for line in ("samples:", "metrics:", "checkpoint:"):
    path = next(row for row in out.splitlines() if row.startswith(line)).split()[1]
    assert Path(path).exists()
  last = [json.loads(row) for row in (workdir / "metrics.jsonl").read_text().splitlines()][-1]
  assert last["step"] == 12 and any(name.startswith("eval/fd") for name in last)


def test_samples_come_from_a_copied_directory(finished, tmp_path, call):
  moved = tmp_path / "elsewhere"
  shutil.copytree(finished[0], moved)
  flags = ("--nfe=1,2,128", "--guidance=0,0.5", "--num=6", "--labels=0,3,5", "--seed=3")
  code, out, err = call(f"--workdir={moved}", "--mode=sample", f"--out={tmp_path / 'o'}", *flags)
  assert code == 0, err
  assert "images/s" in out
  with np.load(next((tmp_path / "o").glob("*.npz"))) as saved:
    assert saved["arr_0"].dtype == np.uint8 and saved["arr_0"].shape == (36, 8, 8, 1)
    assert saved["labels"].tolist() == [0, 3, 5] * 12
    assert saved["nfe"].tolist() == [1] * 12 + [2] * 12 + [128] * 12
    assert saved["guidance"].tolist() == ([0.0] * 6 + [0.5] * 6) * 3
    assert saved["seed"] == 3
  assert Image.open(next((tmp_path / "o").glob("*.png"))).width > 100


def test_exported_model_is_the_checkpoint_and_is_gone_on_from(finished, tmp_path, call):
  out = tmp_path / "out"
  code, _, err = call(f"--workdir={finished[0]}", "--mode=export", f"--out={out}")
  assert code == 0, err
  model = ism_jax.Model.from_pretrained(out)
  tree = ocp.StandardCheckpointer().restore(finished[0] / "checkpoints" / "12" / "ema_sample")
  for name, leaf in ocp.tree.to_flat_dict(tree, sep=".").items():
    found = functools.reduce(lambda node, key: node[key], name.split("."), model.params)
    np.testing.assert_array_equal(found, leaf)
  assert model.step == 12 and model.sample([0, 3], steps=4, batch=2).std() > 0.1

  code, text, err = call(CONFIG, f"--workdir={tmp_path / 'w'}", f"--config.init_from={out}")
  assert code == 0, err
  assert f"began from {out} (step 12): 29 tensors taken" in text and "drawn afresh" in text


def test_help_lists_flags_and_the_config_s_keys():
  process = start(CONFIG, "--help")
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert "\n--mode=sample, ism: " in out and "\n  --nfe: " in out and "--config.optim.lr=" in out


def test_evaluation_needs_no_config(finished, tmp_path, call):
  code, out, err = call(f"--workdir={finished[0]}", "--mode=evaluate", f"--out={tmp_path}")
  assert code == 0, err
  assert "fd" in out and json.loads((tmp_path / "evaluation.json").read_text())["step"] == 12


def test_an_older_step_is_evaluated(finished, tmp_path, call):
  flags = ("--mode=evaluate", "--nfe=1", f"--out={tmp_path}")
  code, _, err = call(f"--workdir={finished[0]}", *flags, "--step=9")
  assert code == 0, err
  assert json.loads((tmp_path / "evaluation.json").read_text())["step"] == 9


def test_ctrl_c_while_sampling_is_no_traceback(finished, tmp_path):
  flags = ("--mode=sample", "--nfe=128", "--num=100000", f"--out={tmp_path}")
  # What bash starts in the background is deaf to Ctrl-C, and so is all that it starts.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  process = start(f"--workdir={finished[0]}", *flags)
  signal.signal(signal.SIGINT, before)
  assert process.stdout.readline().startswith("backend:")
  process.send_signal(signal.SIGINT)
  _, err = process.communicate(timeout=300)
  assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err


@pytest.mark.parametrize(
  "flags, words",
  [
    ((CONFIG, "--config.stepz=3"), ("stepz", "--config.steps")),
    ((CONFIG, "--config.optim.accumulate=2"), ("'optim.accumulate' is --config.optim.grad_accum",)),
    ((CONFIG, "--config.backend=tpu"), ("tpu", "cpu")),
    ((CONFIG, "--config.model.patch=3"), ("patch", "3", "8")),
    ((CONFIG, "--config.batch=0"), ("batch=0",)),
    ((CONFIG, "--steps=10"), ("--steps does nothing", "did you mean --config.steps?")),
    ((CONFIG, "--paint=10"), ("'paint'", "--config.KEY=VALUE")),
    ((CONFIG, "--config.optim.lr=-1"), ("optim.lr=-1", "above 0")),
    ((CONFIG, "--config.data.path=photos"), ("data.path='photos'", "data.source=folder")),
    (("--config=configs/none.py",), ("configs/none.py", "ism_digits")),
    ((CONFIG, "--config.init_from=nowhere"), ("init_from='nowhere'", "exported")),
    ((CONFIG, "extra"), ("unexpected argument 'extra'",)),
    ((CONFIG, "--step=3"), ("--step does nothing in --mode=train",)),
    ((CONFIG, "--seed=3"), ("--seed", "--mode=train", "--config.seed")),
    (("--mode=sample",), ("no checkpoint",)),
    ((), ("--config=configs/NAME.py is missing",)),
  ],
)
def test_mistakes_cost_one_sentence_and_exit_code_2(flags, words, tmp_path, call):
  code, out, err = call(f"--workdir={tmp_path / 'w'}", *flags)
  assert code == 2
  assert "Traceback" not in out + err
  sentence = [line for line in err.splitlines() if line.startswith("error: ")]
  assert len(sentence) == 1 and all(word in sentence[0] for word in words), err
  assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
  "flags, words",
  [
    ((*RUN, "--config.batch=16"), ("batch", "16")),
    ((*RUN, "--config.init_from=other"), ("init_from='other'", "would not read")),
    (("--mode=sample", "--nfe=200"), ("nfe", "200")),
    (("--mode=sample", "--backend=tpu"), ("backend='tpu' was asked for", "'cpu'")),
    (("--mode=export", "--step=10"), ("--step=10 is not stored", "[12, 9]")),
    (("--mode=sample", "--guidance=9"), ("9", "0 to 2")),
    (("--mode=sample", "--labels=10"), ("label 10", "0 to 9")),
    (("--mode=sample", "--out=README.md"), ("--out=README.md cannot be written to",)),
    (("--mode=evaluate", "--prompt=12"), ("--prompt does nothing", "a run of ism")),
    (("--mode=evaluate", CONFIG), ("--config does nothing", "the run has its own config")),
  ],
)
def test_mistakes_about_a_run_change_nothing_in_it(flags, words, finished, call):
  before = sorted(str(path) for path in finished[0].rglob("*"))
  code, out, err = call(f"--workdir={finished[0]}", *flags)
  assert code == 2 and "Traceback" not in out + err
  assert all(word in err for word in words), err
  assert sorted(str(path) for path in finished[0].rglob("*")) == before


@pytest.fixture(scope="module")
def writer(tmp_path_factory, call):
  """The working directory of a finished text run."""
  workdir = tmp_path_factory.mktemp("writer")
  code, out, err = call(
    "--config=configs/seqmatch_arithmetic.py:two_sum,debug", f"--workdir={workdir}"
  )
  assert code == 0, err
  assert "exact" in out and "recovery" in out
  return workdir


def test_prompts_are_answered(writer, tmp_path, call):
  flags = ("--prompt=a13f06=4", "--temperature=1", f"--out={tmp_path}")
  code, out, err = call(f"--workdir={writer}", "--mode=sample", *flags)
  assert code == 0, err
  assert any(line.startswith("a13f06=4  ") for line in out.splitlines())
  (row,) = json.loads((tmp_path / "generations.json").read_text())
  assert row["prompt"] == "a13f06=4"
  assert "<script>" in (tmp_path / "generations.html").read_text()

  model = tmp_path / "model"
  code, out, err = call(f"--workdir={writer}", "--mode=export", f"--out={model}")
  assert code == 0 and f"Model.from_pretrained({str(model)!r})" in out, err
  (made,) = seqmatch_jax.Model.from_pretrained(model).generations("a13f06=4", temperature=1.0)
  assert (made.text, "".join(made.typed)) == (row["answer"], row["typed"])


@pytest.mark.parametrize(
  "flags, words",
  [
    (("--mode=sample", "--prompt=12?"), ("'?'",)),
    (("--mode=sample", "--prompts=nowhere"), ("nowhere",)),
    (("--mode=sample", "--temperature=-1"), ("temperature",)),
  ],
)
def test_bad_prompts_cost_one_sentence(flags, words, writer, call):
  code, out, err = call(f"--workdir={writer}", *flags)
  assert code == 2 and "Traceback" not in out + err
  assert all(word in err for word in words), err


def test_texts_are_encoded_and_images_are_not_texts(tmp_path, call):
  (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo")
  texts, out = f"--texts={tmp_path / 'a.txt'}", f"--out={tmp_path / 'tokens'}"
  code, text, err = call("--mode=encode", texts, out)
  assert code == 0, err
  assert "6 of 2 documents" in text and (tmp_path / "tokens" / "manifest.json").exists()
  for more, words in (
    ("--images=photos", "--images and --texts are both given"),
    ("--side=17", "--side is --image_size now."),
    ("--image_size=17", "--image_size does nothing in --mode=encode; leave it out."),
  ):
    code, _, err = call("--mode=encode", texts, out, more)
    assert code == 2 and f"error: {words}" in err and "Traceback" not in err
