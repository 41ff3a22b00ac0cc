"""The modes of main.py: whose a flag is, and one sentence for one that is nobody's here."""

import json
import sys
from types import SimpleNamespace

import pytest
from absl import logging

import main
from train_jax import command
from train_jax.command import Command, Flag
from train_jax.errors import UserError

CONFIG = "--config=configs/ism_digits.py:debug"
RUN = "workdir step out backend"
SET = "out shards backend"
FLAGS = {
  ("train", ""): "config workdir",
  ("compile", ""): "config topology",
  ("sample", "ism"): f"{RUN} seed num nfe guidance labels vae",
  ("sample", "seqmatch"): f"{RUN} seed num prompt prompts temperature top_k top_p max_actions "
  "backspace stream pretrained",
  ("evaluate", "ism"): f"{RUN} seed num nfe guidance metrics reference inception dinov2 classes "
  "save_samples vae",
  ("evaluate", "seqmatch"): f"{RUN} seed features pretrained",
  ("export", "ism"): RUN,
  ("export", "seqmatch"): f"{RUN} pretrained",
  ("encode", "ism"): f"{SET} images image_size vae",
  ("encode", "seqmatch"): f"{SET} texts tokenizer",
}


def test_each_mode_owns_its_flags():
  found = {key: {flag.name for flag in each.flags} for key, each in main.commands().items()}
  assert found == {key: {"mode", *names.split()} for key, names in FLAGS.items()}


def test_help_has_every_flag_under_its_mode_and_the_keys_of_a_config(capsys):
  main.show_help(["main.py", CONFIG])
  _, *parts = capsys.readouterr().out.split("\n--mode=")
  for (mode, method), names in FLAGS.items():
    head = f"{mode}, {method}: " if method else f"{mode}: "
    (text,) = (part for part in parts if part.startswith(head))
    assert len(text.splitlines()[0].split()) > 3  # a sentence
    assert all(f"\n  --{name}: " in text for name in names.split() if name != "config")
  assert "\n  --config.optim.lr=0.003\n" in parts[-1]


@pytest.fixture
def call(monkeypatch, tmp_path):
  """(method, arguments) -> main's; every workdir holds a run of `method`, and nothing is done."""

  def run(method, *args):
    done = []
    saved = SimpleNamespace(require_meta=lambda: {"config": {"method": method}})
    monkeypatch.setattr(main, "Checkpoints", lambda workdir: saved)
    monkeypatch.setattr(logging, "use_absl_handler", lambda: None)
    commands = {key: Command(done.append, *c.flags[1:]) for key, c in main.commands().items()}
    monkeypatch.setattr(main, "commands", lambda: commands)
    argv = ["main.py", *args]
    monkeypatch.setattr(sys, "argv", argv)
    assert main.main(argv)
    return done[0]

  return run


@pytest.mark.parametrize(
  "method, args, wanted",
  [
    ("ism", [CONFIG, "--workdir=w"], {"mode": "train", "workdir": "w"}),
    ("ism", ["--mode=sample", "--workdir=w", "--nfe=1,4"], {"nfe": ["1", "4"], "num": None}),
    ("seqmatch", ["--mode=sample", "--workdir=w", "--prompt=a", "--prompt=b"], {"seed": 0}),
    ("seqmatch", ["--mode=evaluate", "--workdir=w", "--backend=cpu"], {"backend": "cpu"}),
    (None, ["--mode=encode", "--images=d", "--vae=v"], {"image_size": 256, "shards": 0}),
    (None, ["--mode=encode", "--texts=d"], {"texts": "d"}),
    (None, ["--mode=compile", CONFIG], {"topology": "cpu:8"}),
  ],
)
def test_a_command_gets_its_flags(call, method, args, wanted):
  values = call(method, *args)
  assert {name: values[name].value for name in wanted} == wanted


SAMPLE = "--mode=sample --workdir=w"
TRAIN = f"--workdir=w {CONFIG}"


@pytest.mark.parametrize(
  "method, args, wanted",
  [
    # another mode's
    (None, f"{TRAIN} --step=3", r"--step does nothing in --mode=train; leave it out"),
    (None, f"{TRAIN} --seed=3", r"--seed .* in --mode=train; did you mean --config\.seed\?"),
    (None, f"{TRAIN} --backend=tpu", r"did you mean --config\.backend\?"),
    (None, f"--mode=compile --workdir=w {CONFIG}", r"--workdir does nothing in --mode=compile; "),
    ("ism", f"{SAMPLE} --metrics=fid", r"--metrics does nothing in --mode=sample of a run of ism"),
    ("ism", "--mode=export --workdir=w --seed=1", r"--seed does nothing in --mode=export of"),
    # another method's
    ("ism", f"{SAMPLE} --prompt=a", r"--prompt does nothing in --mode=sample of a run of ism"),
    ("seqmatch", f"{SAMPLE} --nfe=1", r"--nfe does nothing in --mode=sample of a run of seqmatch"),
    (None, "--mode=encode --images=d --tokenizer=t", "--tokenizer does nothing in --mode=encode;"),
    (None, "--mode=encode --texts=d --image_size=1", "--image_size does nothing in --mode=encode;"),
    # a config's
    ("ism", f"{SAMPLE} {CONFIG}", r"--config does nothing .* of ism: the run has its own config;"),
    ("ism", f"{SAMPLE} --config.seed=5", r"--config\.seed does nothing .* its own config; leave"),
    (
      None,
      "--workdir=w --config.steps=3",
      r"--config\.steps needs --config=configs/NAME\.py",
    ),
    # nobody's
    (None, f"{TRAIN} --bogus=1", r"flag 'bogus'; --help lists the options, .* --config\.KEY=VALUE"),
    ("ism", f"{SAMPLE} --steps=4", r"Unknown command line flag 'steps'; --help lists"),
    (None, "--workdir=w --step=2", r"--step does nothing in --mode=train; leave it out"),
    (None, "--workdir=w --bogus=1", r"flag 'bogus'; --help lists"),
    (None, "--mode=encode --images=d --side=8", r"^--side is --image_size now\.$"),
    (None, "--mode=paint --workdir=w", "--mode='paint' is unknown; choose from train, compile, s"),
    # what is not there, or out of range
    (None, CONFIG, "--workdir=DIR is missing"),
    (None, f"--workdir=gs://a/b {CONFIG}", "--workdir=gs://a/b is no directory; mount the bucket"),
    (None, "--mode=encode", "--mode=encode needs --images=SOURCE or --texts=SOURCE"),
    (None, "--mode=encode --texts=a --images=b", "--images and --texts are both given; choose one"),
    ("ism", f"{SAMPLE} --num=0", "num"),
    ("ism", f"{SAMPLE} --backend=tpu", "backend='tpu' was asked for but JAX found 'cpu'"),
    ("ism", "--mode=evaluate --workdir=w --classes=odd", "classes"),
    ("seqmatch", f"{SAMPLE} --top_p=1.5", "top_p"),
  ],
)
def test_a_flag_that_does_nothing_costs_one_sentence(call, method, args, wanted):
  with pytest.raises(UserError, match=wanted) as err:
    call(method, *args.split())
  assert "\n" not in str(err.value)


def test_training_and_compiling_need_a_config():
  for mode in main.OWN.values():
    values = mode.define()
    values(["main.py"])
    with pytest.raises(UserError, match=r"--config=configs/NAME\.py is missing"):
      mode.run(values)


@pytest.fixture
def parsed():
  """(flags, arguments) -> flag values."""

  def parse(flags, *args):
    values = Command(print, *flags).define()
    values(["main.py", *args])
    return values

  return parse


@pytest.mark.parametrize(
  "text, kind, wanted",
  [
    (None, int, ()),
    ("1,4", int, (1, 4)),
    ("0,0.5", float, (0.0, 0.5)),
    ("1,x", int, r"--n=1,x must be whole numbers separated by commas"),
    ("1.5", int, r"--n=1\.5 must be whole numbers"),
    ("a", float, "--n=a must be numbers separated"),
  ],
)
def test_lists_of_numbers(parsed, text, kind, wanted):
  values = parsed([Flag("list", "n", None, "")], *([] if text is None else [f"--n={text}"]))
  if isinstance(wanted, tuple):
    assert command.numbers(values, "n", kind) == wanted
  else:
    with pytest.raises(UserError, match=wanted):
      command.numbers(values, "n", kind)


RUN_OF = {"config": {"method": "tiny", "seed": 0, "steps": 4}, "metadata": {"classes": 3}}
LONGER = {"config": {**RUN_OF["config"], "steps": 8}, "metadata": {"classes": 3}}
OTHER = {"config": {**RUN_OF["config"], "seed": 1}, "metadata": {"classes": 3}}


@pytest.fixture
def write(parsed):
  """(out, workdir, run) -> the directory of results, in which a command of `run` made a file."""

  def make(out, workdir, run):
    values = parsed([command.WORKDIR, command.OUT], f"--workdir={workdir}", *out)
    with command.out_directory(values, "made", run) as directory:
      directory.mkdir(parents=True, exist_ok=True)
      (directory / "samples.npz").touch()
    return directory

  return make


def test_results_go_beside_the_run_or_where_they_are_asked_for(write, tmp_path):
  assert write((), tmp_path, RUN_OF) == tmp_path / "made"
  assert write([f"--out={tmp_path / 'o'}"], tmp_path, RUN_OF) == tmp_path / "o"
  with pytest.raises(UserError, match=r"--out=.*/o/samples.npz/p cannot be written to"):
    write([f"--out={tmp_path / 'o' / 'samples.npz' / 'p'}"], tmp_path, RUN_OF)


@pytest.mark.parametrize(
  "files, run, owner",
  [
    ({}, LONGER, ""),
    ({}, OTHER, "the run in .*first"),
    ({"samples.npz": None}, OTHER, ""),  # the first run's file is gone
    ({command.OWNER: {}}, RUN_OF, "another run or program"),
    ({"config.json": {"format": 2, "run": LONGER}}, RUN_OF, ""),
    ({"config.json": {"model_type": "gpt2", "tiny": {"run": LONGER}}}, RUN_OF, ""),
    ({"config.json": {"format": 2, "run": OTHER}}, RUN_OF, "another run or program"),
    ({"config.json": {"model_type": "gpt2"}}, RUN_OF, "another run or program"),
    ({"config.json": b"{"}, RUN_OF, "another run or program"),
  ],
)
def test_files_of_another_run_are_not_lost(write, tmp_path, files, run, owner):
  out = write([f"--out={tmp_path / 'out'}"], tmp_path / "first", RUN_OF)
  for name, content in files.items():
    (out / name).unlink(missing_ok=True)
    if content is not None:
      content = content if isinstance(content, bytes) else json.dumps(content).encode()
      (out / name).write_bytes(content)
  if not owner:
    write([f"--out={out}"], tmp_path / "second", run)
    return
  with pytest.raises(UserError, match=rf"--out={out} holds files of {owner} \(says .*; choose"):
    write([f"--out={out}"], tmp_path / "second", run)


def test_a_refused_command_marks_nothing(parsed, tmp_path):
  values = parsed([command.WORKDIR, command.OUT], f"--workdir={tmp_path}")
  for error, marked in ((UserError, False), (OSError, True)):
    (tmp_path / "made").mkdir(exist_ok=True)
    with pytest.raises(error), command.out_directory(values, "made", RUN_OF):
      raise error("why")
    assert (tmp_path / "made" / command.OWNER).exists() == marked
