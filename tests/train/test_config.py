"""Overrides that are wrong, configs that differ, a backend that is not there."""

import sys

import jax
import pytest
from absl import flags
from absl.testing import flagsaver
from ml_collections import config_flags

from train_jax import config
from train_jax.errors import UserError

CONFIG = {"steps": 5, "optim": {"lr": 0.1, "clip": 1.0}, "model": {"width": 16}}


@pytest.mark.parametrize(
  "key, nearest",
  [
    ("stepz", "steps"),
    ("model.widht", "model.width"),
    ("lr", "optim.lr"),  # the right leaf in the wrong place
    ("model.lr", "optim.lr"),
    ("optim.clipping", "optim.clip"),
    ("zzzz", "steps"),  # nothing is near: some key that there is
  ],
)
def test_unknown_key_names_the_nearest(key, nearest):
  sentence = config.explain_unknown_key(key, CONFIG)
  assert sentence.startswith(f"the config has no key {key!r}; did you mean --config.{nearest}?")
  section = key.rpartition(".")[0]
  assert sentence.endswith(f"({section} has {', '.join(CONFIG[section])})" if section else "?")


def test_flatten_joins_names_and_makes_tuples_lists():
  found = config.flatten({"a": 1, "b": {"c": (1, 2), "d": {"e": None}}})
  assert found == {"a": 1, "b.c": [1, 2], "b.d.e": None}


def test_same_config_goes_on():
  config.check_same({**CONFIG, "shares": (1, 2)}, {**CONFIG, "shares": [1, 2]}, "runs/a")


def test_other_config_is_refused_and_says_what_differs():
  saved = {**CONFIG, "model": {"width": 16, "depth": 2}}
  with pytest.raises(UserError) as err:
    config.check_same({**CONFIG, "seed": 6}, {**saved, "seed": 5}, "runs/a")
  assert "--workdir=runs/a" in str(err.value)
  assert "(model.depth: 2 there, None here; seed: 5 there, 6 here)" in str(err.value)


def test_a_run_of_the_other_method_and_other_data_are_said_as_such():
  with pytest.raises(
    UserError, match=r"holds a run of ism, and this config is of seqmatch; choose"
  ):
    config.check_same({**CONFIG, "method": "seqmatch"}, {**CONFIG, "method": "ism"}, "runs/a")
  with pytest.raises(UserError, match=r"another set of data \(examples: 5 .* put the data of"):
    config.check_same({"examples": 6}, {"examples": 5}, "runs/a", "set of data")


def test_a_run_may_be_lengthened_and_its_optimiser_changed_and_says_so(capsys):
  config.check_same(CONFIG, CONFIG, "w")
  assert capsys.readouterr().out == ""
  config.check_same({**CONFIG, "steps": 9, "optim": {"lr": 0.05, "clip": 1.0}}, CONFIG, "w")
  said = ["goes on with optim.lr=0.05 (0.1 before)", "goes on with steps=9 (5 before)"]
  assert capsys.readouterr().out.splitlines() == said
  with pytest.raises(UserError, match=r"config \(seed: 1 there, 2 here\); choose"):
    config.check_same({**CONFIG, "steps": 9, "seed": 2}, {**CONFIG, "seed": 1}, "w")
  assert capsys.readouterr().out == ""


def test_a_run_of_an_older_version_goes_on_and_new_keys_are_told(caplog):
  config.check_same({**CONFIG, "model": {"width": 16, "depth": 2}}, CONFIG, "runs/a")
  assert "goes on with model.depth=2" in caplog.text


def test_many_differences_are_counted_not_listed():
  with pytest.raises(UserError, match="e: 5 there, 0 here; and 3 more"):
    config.check_same(dict.fromkeys("abcdefgh", 0), dict.fromkeys("abcdefgh", 5), "w")
  with pytest.raises(UserError, match=r"e: 5 there, 0 here\);"):
    config.check_same(dict.fromkeys("abcde", 0), dict.fromkeys("abcde", 5), "w")


def test_paths_may_be_others_and_the_facts_say_whether_the_same_is_there(capsys):
  saved = {"data": {"path": "/x", "tokenizer": ""}, "pretrained": "gpt2"}
  config.check_same({"data": {"path": "/x/", "tokenizer": ""}, "pretrained": "b"}, saved, "w")
  said = [
    "goes on with data.path='/x/' ('/x' before)",
    "goes on with pretrained='b' ('gpt2' before)",
  ]
  assert capsys.readouterr().out.splitlines() == said
  for other in ({**saved, "pretrained": ""}, {**saved, "data": {"path": "/x", "tokenizer": "t"}}):
    with pytest.raises(UserError, match=r"'' (there|here)"):  # that is no path
      config.check_same(other, saved, "w")
  metadata = {"documents": 5, "tokenizer": {"path": "a", "sha256": "1"}}
  config.check_same({**metadata, "tokenizer": {"path": "b", "sha256": "1"}}, metadata, "w")
  assert capsys.readouterr().out == ""
  with pytest.raises(UserError, match=r"tokenizer\.sha256"):
    config.check_same({**metadata, "tokenizer": {"path": "b", "sha256": "2"}}, metadata, "w")


@pytest.mark.parametrize(
  "free",
  [
    {"backend": "tpu"},
    {"log_every": 7},
    {"eval_every": 7},
    {"save_every": 7},
    {"keep": 9},
    {"keep_every": 9},
    {"max_skipped": 1},
    {"mesh": {"fsdp": 4}},
    {"eval": {"samples": 9}},
    {"init_from": "elsewhere"},
    {"data": {"max_faults": 7}},
    {"model": {"width": 16, "remat": "block", "unroll": True, "attention": "cudnn"}},
  ],
)
def test_what_does_not_change_learning_may_differ(free, caplog):
  config.check_same(CONFIG, {**CONFIG, **free}, "w")
  config.check_same({**CONFIG, **free}, CONFIG, "w")
  assert not caplog.messages  # nor is it worth a word


@pytest.mark.parametrize(
  "bound",
  [
    {"seed": 1},
    {"batch": 8},
    {"ema": {"sample": 0.5}},
    {"eval": {"erasures": 9}},
    {"optim": {"mu_dtype": "bfloat16"}},
    {"optim": {"name": "muon"}},
    {"data": {"side": 16}},
    {"model": {"width": 32}},
  ],
)
def test_what_changes_learning_may_not(bound):
  saved = CONFIG | {"seed": 0, "batch": 4, "ema": {"sample": 0.9}, "eval": {"erasures": 8}}
  saved |= {"data": {"side": 8}, "optim": {"mu_dtype": "float32"}}
  with pytest.raises(UserError, match=next(iter(bound))):
    config.check_same(saved | bound, saved, "w")


def test_backend_is_printed(capsys, monkeypatch):
  config.check_backend("")
  config.check_backend("cpu")
  assert capsys.readouterr().out == "backend: cpu, 8 device(s) (cpu)\n" * 2
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "device_count", lambda: 16)
  config.check_backend("cpu")
  assert capsys.readouterr().out == "backend: cpu, 16 device(s) (cpu), 2 processes\n"


def test_backend_that_is_not_there_is_refused():
  with pytest.raises(UserError, match="backend='tpu' was asked for but JAX found 'cpu'"):
    config.check_backend("tpu")


def test_backend_that_cannot_start_is_a_sentence(monkeypatch):
  def fail():
    raise RuntimeError("no driver")

  monkeypatch.setattr(jax, "default_backend", fail)
  with pytest.raises(UserError, match="JAX cannot start a backend: no driver"):
    config.check_backend("gpu")


def test_numbers():
  assert config.numbers("nfe", ["1", "4"], int) == (1, 4)
  assert config.numbers("w", ["0", "0.5"], float) == (0.0, 0.5)
  assert config.numbers("nfe", None, int) == ()
  with pytest.raises(UserError, match="--nfe=1,x must be whole numbers separated by commas"):
    config.numbers("nfe", ["1", "x"], int)
  with pytest.raises(UserError, match=r"--nfe=1\.5 must be whole numbers"):
    config.numbers("nfe", ["1.5"], int)
  with pytest.raises(UserError, match="--w=a must be numbers"):
    config.numbers("w", ["a"], float)


@pytest.fixture
def parse(tmp_path, monkeypatch):
  """(arguments) -> what is left of them; FILE stands for a small config file."""
  file = tmp_path / "small.py"
  file.write_text(
    "from ml_collections import ConfigDict\n"
    "def get_config(arg=''):\n"
    "  if arg == 'odd':\n"
    "    raise ValueError('no such option')\n"
    "  return ConfigDict({'steps': 5, 'method': 'ism', 'optim': {'lr': 0.1}})\n"
  )
  if "config" not in flags.FLAGS:
    config_flags.DEFINE_config_file("config", None, "")

  def run(*args):
    argv = ["main.py", *(arg.replace("FILE", str(file)) for arg in args)]
    monkeypatch.setattr(sys, "argv", argv)
    with flagsaver.flagsaver():
      left = config.parse_flags(argv)
      return left[1:], flags.FLAGS.config and flags.FLAGS.config.to_dict()

  return run


def test_overrides_reach_the_config(parse):
  left, found = parse("--config=FILE", "--config.optim.lr=0.5", "stray")
  assert left == ["stray"]
  assert found == {"steps": 5, "method": "ism", "optim": {"lr": 0.5}}
  assert parse() == ([], None)


@pytest.mark.parametrize(
  "args, wanted",
  [
    (["--config=FILE", "--config.step=3"], r"no key 'step'; did you mean --config\.steps\?"),
    (["--config", "FILE", "--config.lr=3"], r"no key 'lr'; did you mean --config\.optim\.lr\?"),
    (["--config=FILE", "--config.optim.lr=1", "--config.x.y=3", "--config.steps=2"], "key 'x.y'"),
    (["--config=FILE", "--config.steps=abc"], "config.steps=abc"),
    (["--config=FILE", "--bogus=1"], "bogus.*; --help lists the options"),
    (["--config=FILE:odd"], "^no such option"),
    (["--config=nowhere.py"], r"--config=nowhere\.py cannot be read; .* here are configs/ism_"),
    (["--config", "nowhere.py", "--config.steps=1"], r"--config=nowhere\.py cannot be read"),
    (["--config=FILE", "--config=FILE"], "--config is given twice"),
    (["--config=FILE", "--config.method=x"], "--config.method belongs to the config"),
    (["--config=README.md"], r"README\.md is no config, it has no get_config; .* configs/ism_"),
    (["--config.steps=3"], r"--config\.KEY=VALUE needs --config=configs/NAME\.py beside it"),
  ],
)
def test_wrong_arguments_are_one_sentence(parse, args, wanted):
  with pytest.raises(UserError, match=wanted) as err:
    parse(*args)
  assert "\n" not in str(err.value)
