"""Overrides that are wrong, configs that differ, a backend that is not there."""

import importlib
import sys
from pathlib import Path

import jax
import pytest

from train_jax import config
from train_jax.command import WORKDIR, Command, Config
from train_jax.errors import UserError

CONFIGS = [p.stem for p in Path(__file__).parents[2].glob("configs/*_*.py")]

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


def test_renamed_keys_are_answered_with_names_that_there_are():
  files = [importlib.import_module(f"configs.{name}") for name in CONFIGS]
  known = {key for file in files for key in config.flatten(file.get_config().to_dict())}
  assert len(config.RENAMED) > 10 and not known & {*config.RENAMED}
  for old, new in config.RENAMED.items():
    assert new.partition("=")[0].partition(",")[0] in known
    answer = f"the config's key {old!r} is --config.{new} now."
    assert config.explain_unknown_key(old, CONFIG) == answer


def test_flatten_joins_names_and_makes_tuples_lists():
  found = config.flatten({"a": 1, "b": {"c": (1, 2), "d": {"e": None}}})
  assert found == {"a": 1, "b.c": [1, 2], "b.d.e": None}


def test_same_config_goes_on_and_says_nothing(capsys):
  config.check_same({**CONFIG, "nfe": (1, 2)}, {**CONFIG, "nfe": [1, 2]}, "runs/a")
  assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
  "new, old, words",
  [
    (
      {"seed": 6, "model": {"width": 16}},
      {"seed": 5, "model": {"width": 16, "depth": 2}},
      r"--workdir=w .* config \(model.depth: 2 there, None here; seed: 5 there, 6 here\); choose",
    ),
    ({"method": "a"}, {"method": "b"}, "holds a run of b, and this config is of a; choose another"),
    ({"steps": 9, "seed": 2}, {"steps": 5, "seed": 1}, r"config \(seed: 1 there, 2 here\); choose"),
    (dict.fromkeys("abcde", 0), dict.fromkeys("abcde", 5), r"e: 5 there, 0 here\);"),
    (dict.fromkeys("abcdefgh", 0), dict.fromkeys("abcdefgh", 5), "e: 5 .* here; and 3 more"),
    ({"pretrained": ""}, {"pretrained": "gpt2"}, "'gpt2' there, '' here"),  # that is no path
    ({"data": {"tokenizer": "t"}}, {"data": {"tokenizer": ""}}, "'' there, 't' here"),
    ({"tokenizer": {"sha256": "2"}}, {"tokenizer": {"sha256": "1"}}, r"tokenizer\.sha256"),
  ],
)
def test_other_config_is_refused_and_says_what_differs(new, old, words, capsys):
  with pytest.raises(UserError, match=words):
    config.check_same(new, old, "w")
  assert capsys.readouterr().out == ""


def test_other_data_are_said_as_such():
  with pytest.raises(UserError, match=r"another set of data \(examples: 5 .* put the data of"):
    config.check_same({"examples": 6}, {"examples": 5}, "runs/a", "set of data")


@pytest.mark.parametrize(
  "new, old, said",
  [
    ({"steps": 9}, {"steps": 5}, "steps=9 (5 before)"),
    ({"optim": {"lr": 0.05}}, {"optim": {"lr": 0.1}}, "optim.lr=0.05 (0.1 before)"),
    ({"data": {"path": "/x/"}}, {"data": {"path": "/x"}}, "data.path='/x/' ('/x' before)"),
    ({"pretrained": "b"}, {"pretrained": "gpt2"}, "pretrained='b' ('gpt2' before)"),
  ],
)
def test_what_a_run_may_go_on_with_is_said(new, old, said, capsys):
  config.check_same(new, old, "w")
  assert capsys.readouterr().out == f"goes on with {said}\n"


def test_a_run_of_an_older_version_goes_on_and_new_keys_are_told(caplog):
  config.check_same({**CONFIG, "model": {"width": 16, "depth": 2}}, CONFIG, "runs/a")
  assert "goes on with model.depth=2" in caplog.text


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
    {"tokenizer": {"path": "b"}},
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
    {"eval": {"max_backspaces": 9}},
    {"optim": {"mu_dtype": "bfloat16"}},
    {"optim": {"name": "muon"}},
    {"data": {"image_size": 16}},
    {"model": {"width": 32}},
  ],
)
def test_what_changes_learning_may_not(bound):
  saved = CONFIG | {"seed": 0, "batch": 4, "ema": {"sample": 0.9}, "eval": {"max_backspaces": 8}}
  saved |= {"data": {"image_size": 8}, "optim": {"mu_dtype": "float32"}}
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


@pytest.fixture
def parse(tmp_path, monkeypatch):
  """(arguments) -> the config; FILE stands for a small config file."""
  file = tmp_path / "small.py"
  file.write_text(
    "from ml_collections import ConfigDict\n"
    "def get_config(arg=''):\n"
    "  if arg == 'odd':\n"
    "    raise ValueError('no such option')\n"
    "  return ConfigDict({'steps': 5, 'method': 'ism', 'optim': {'lr': 0.1}})\n"
  )

  def run(*args):
    argv = ["main.py", *(arg.replace("FILE", str(file)) for arg in args)]
    monkeypatch.setattr(sys, "argv", argv)
    values = Command(print, Config(), WORKDIR).define()
    config.parse_flags(argv, values)
    return values.config and values.config.to_dict()

  return run


def test_overrides_reach_the_config(parse):
  found = parse("--config=FILE", "--config.optim.lr=0.5", "--workdir=w")
  assert found == {"steps": 5, "method": "ism", "optim": {"lr": 0.5}}
  assert parse() is None


@pytest.mark.parametrize(
  "args, wanted",
  [
    (["--config=FILE", "--config.step=3"], r"no key 'step'; did you mean --config\.steps\?"),
    (["--config", "FILE", "--config.lr=3"], r"no key 'lr'; did you mean --config\.optim\.lr\?"),
    (["--config=FILE", "--config.optim.lr=1", "--config.x.y=3", "--config.steps=2"], "key 'x.y'"),
    (["--config=FILE", "--config.wavelet.norm=l2"], r"'wavelet.norm' is --config\.loss\.norm now"),
    (["--config=FILE", "--config.steps=abc"], "config.steps=abc"),
    (["--config=FILE", "stray"], "unexpected argument 'stray'; every option is written --name="),
    (["--config=FILE:odd"], "^no such option"),
    (["--config=nowhere.py"], r"--config=nowhere\.py cannot be read; .* here are configs/ism_"),
    (["--config", "nowhere.py", "--config.steps=1"], r"--config=nowhere\.py cannot be read"),
    (["--config=FILE", "--config=FILE"], "--config is given twice"),
    (["--config=FILE", "--config.method=x"], "--config.method belongs to the config"),
    (["--config=README.md"], r"README\.md is no config, it has no get_config; .* configs/ism_"),
  ],
)
def test_wrong_arguments_are_one_sentence(parse, args, wanted):
  with pytest.raises(UserError, match=wanted) as err:
    parse(*args)
  assert "\n" not in str(err.value)
