"""Exported models: they write what the run writes, and without what the run was trained with."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import seqmatch_jax
from configs import seqmatch_arithmetic, seqmatch_gpt2, seqmatch_text
from seqmatch_jax import method as seqmatch
from seqmatch_jax import model, tokens
from seqmatch_jax.show import END
from tests.light import heavy_imports
from tests.seqmatch import hf_folder
from train_jax.errors import UserError
from train_jax.storage import exported

WORDS = ["w7 w8", "w9", "w3 w4 w5"]
LIMITS = {"max_length": 20, "max_actions": 30, "max_backspaces": 5}


class Run(NamedTuple):
  """A run, and the directory of its export."""

  config: ConfigDict
  metadata: dict
  params: dict
  prompts: list[str]
  exported: Path

  def load(self, mesh):
    return self.params, 7


def arithmetic(folder):
  del folder
  config = seqmatch_arithmetic.get_config("two_sum,debug")
  return config, {"symbols": list("0123456789=abcdef"), **LIMITS}, ["012345=9", "fed=1"]


def tokenizer(folder):
  """From nothing, with the tokens of a tokenizer.json."""
  metadata = tokens.to_metadata(tokens.TextVocab.from_file(folder))
  return seqmatch_text.get_config("debug"), {**metadata, **LIMITS}, WORDS


def adapters(folder):
  """Of drawn parameters, which are kept as int8; without <backspace>."""
  del folder
  config = seqmatch_gpt2.get_config("debug")
  config.lora.base, config.loss.backspace = "int8", False
  return config, {"symbols": list(" abcdef"), **LIMITS}, ["a", "bc d"]


def weights(folder):
  """From pretrained weights, by adapters."""
  config = seqmatch_gpt2.get_config("debug")
  config.pretrained = str(folder)
  metadata = {**tokens.to_metadata(tokens.TextVocab.from_file(folder)), **LIMITS}
  return config, model.make_metadata(config, metadata), WORDS


KINDS = {make.__name__: make for make in (arithmetic, tokenizer, adapters, weights)}


@pytest.fixture(scope="module")
def get_run(perturb, tmp_path_factory):
  """kind -> its Run, made once."""
  made = {}

  def get(kind) -> Run:
    if kind not in made:
      folder = hf_folder.write(tmp_path_factory.mktemp("hf") / "model", "gpt2")
      config, metadata, prompts = KINDS[kind](folder)
      prompts *= 12  # enough for one to type again what it erased, where it may
      init = model.make_network(config, metadata).init
      params = jax.jit(lambda key: perturb(init(key)))(jax.random.key(0))
      made[kind] = Run(config, metadata, params, prompts, tmp_path_factory.mktemp(kind) / "out")
      seqmatch.export_mode(config, metadata, made[kind].load, None, made[kind].exported)
    return made[kind]

  return get


def sampled(run, out, **flags):
  """What `--mode=sample` writes."""
  known = {"prompts": None, "top_k": None, "top_p": None, "stream": False, "num": None}
  known |= {"max_actions": None, "backspace": True}
  flags = SimpleNamespace(**known, **flags, prompt=run.prompts)
  seqmatch.sample_mode(run.config, run.metadata, run.load, flags, out)
  return json.loads((out / "generations.json").read_text())


@pytest.mark.parametrize(
  "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k == "weights")) for k in KINDS]
)
def test_generations_are_those_of_the_run(kind, get_run, tmp_path):
  run = get_run(kind)
  rows = sampled(run, tmp_path, temperature=1.0, seed=3)
  elsewhere = shutil.copytree(run.exported, tmp_path / "elsewhere")
  trained = seqmatch_jax.load_pretrained(elsewhere)
  made = trained.generations(run.prompts, temperature=1.0, seed=3)
  assert ["".join(x.typed) for x in made] == [row["typed"] for row in rows]
  assert [x.text for x in made] == [row["answer"] for row in rows]
  assert [x.finished for x in made] == [row["typed"].endswith(END) for row in rows]
  assert trained.generate(run.prompts, temperature=1.0, seed=3) == [x.text for x in made]
  assert any("\b" in x.typed for x in made) == run.config.loss.backspace
  assert any(x.text for x in made)


@pytest.fixture(scope="module")
def trained(get_run):
  return seqmatch_jax.load_pretrained(get_run("arithmetic").exported)


def test_one_prompt_and_the_run_s_own_temperature(trained, get_run):
  prompts = get_run("arithmetic").prompts
  greedy, drawn = trained.generate(prompts), trained.generate(prompts, temperature=1.0)
  assert greedy == trained.generate(prompts, temperature=0.0, seed=5) != drawn
  assert trained.generate("fed=1") == [greedy[prompts.index("fed=1")]]
  assert trained.generate(["fed=1"] * 2, batch=1) == trained.generate("fed=1") * 2
  likeliest = trained.generate(prompts, temperature=1.0, top_k=1)
  assert likeliest == trained.generate(prompts, temperature=1.0, top_p=0.0) != drawn


def test_it_may_be_kept_short_and_from_erasing(trained, get_run):
  prompts, drawn = get_run("arithmetic").prompts, {"temperature": 1.0, "seed": 3}
  whole, short = (trained.generations(prompts, max_actions=n, **drawn) for n in (None, 2))
  assert [made.typed[:2] for made in whole] == [made.typed for made in short]
  assert not all(made.finished for made in short)
  kept = trained.generations(prompts, backspace=False, **drawn)
  erased = ["\b" in made.typed for made in whole]
  assert any(erased) and not any("\b" in made.typed for made in kept)


@pytest.mark.parametrize("kind", ["arithmetic", "adapters"])
def test_log_likelihoods_are_sums_of_single_steps(kind, get_run):
  run = get_run(kind)
  trained = seqmatch_jax.load_pretrained(run.exported)
  texts = ["12", "", "3"] if kind == "arithmetic" else ["ab c", "", "f"]
  prompts = run.prompts[:2] + run.prompts[:1]

  def naive(prompt, text, erases, finished):
    """One pass for each token, over the text so far."""
    before, total = [tokens.BOS, *trained.vocab.encode(prompt)], 0.0
    for i, token in enumerate([*trained.vocab.encode(text), *[tokens.EOS] * finished]):
      n = len(before)
      row = (np.array([before]), np.arange(n)[None], np.full((1, n), n))
      logits = np.asarray(trained.network.apply(trained.params, *row)[0, -1], np.float64)
      never = {tokens.PAD, tokens.BOS} | ({tokens.BACKSPACE} if not (erases and i) else set())
      legal = [logits[k] for k in range(len(logits)) if k not in never]
      total += logits[token] - np.log(np.sum(np.exp(legal)))
      before.append(token)
    return total

  for erases, finished in ((False, True), (True, True), (False, False)):
    found = trained.log_likelihoods(prompts, texts, erases, finished, batch=2)
    erases = erases and run.config.loss.backspace
    rows = zip(prompts, texts, strict=True)
    wanted = [naive(prompt, text, erases, finished) for prompt, text in rows]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
  one = trained.log_likelihoods(prompts[0], texts[0], finished=False)
  np.testing.assert_allclose(one, found[:1], rtol=1e-5)
  assert trained.log_likelihoods(prompts[0], "", finished=False) == 0


@pytest.mark.parametrize(
  ("texts", "message"),
  [
    (["1", "2"], "there are 1 prompts and 2 texts; give one of each"),
    (["1" * 20], "and its prompt take 26 tokens, and the model's context holds 20; shorten"),
    (["z"], "'z' has characters that the model does not know"),
  ],
)
def test_what_cannot_be_scored_is_refused(texts, message, trained):
  with pytest.raises(UserError, match=message):
    trained.log_likelihoods(["fed=1"], texts)


def test_says_what_it_is(trained, get_run, differences):
  run = get_run("arithmetic")
  record = trained.record
  assert (record["method"], record["step"]) == ("seqmatch", 7)
  assert record["run"] == json.loads(
    json.dumps({"config": run.config.to_dict(), "metadata": run.metadata})
  )
  assert differences(trained.params, run.params) == []
  token = np.array([[1, *trained.vocab.encode("fed=1")]])
  logits = trained.network.apply(trained.params, token, np.arange(6)[None], np.full((1, 6), 6))
  assert logits.shape == (1, 6, trained.vocab.size) and len(repr(trained)) < 200


@pytest.mark.parametrize("kind", ["arithmetic", "weights"])
def test_generating_imports_nothing_of_training(kind, get_run):
  run = get_run(kind)
  use = f"""
model = seqmatch_jax.load_pretrained({str(run.exported)!r})
assert len(model.generate({run.prompts[:2]!r}, temperature=1.0)) == 2
"""
  assert heavy_imports("seqmatch_jax", use) == []


@pytest.mark.parametrize(
  ("request_", "message"),
  [
    ({"prompts": []}, r"there are no prompts; give at least one"),
    ({"prompts": ["z"]}, r"'z' has characters that the model does not know"),
    ({"prompts": ["0" * 20]}, r"has 20 tokens, and the context of 20 tokens holds 18"),
    ({"temperature": -1.0}, r"temperature=-1.0 must be finite and at least 0"),
    ({"top_k": 0}, r"top_k=0 must be at least 1"),
    ({"top_p": 1.5}, r"top_p=1.5 must lie in \[0, 1\]"),
    ({"max_actions": 0}, r"max_actions=0 must be at least 1"),
  ],
)
def test_bad_requests_are_refused(request_, message, trained):
  with pytest.raises(UserError, match=message):
    trained.generate(**{"prompts": ["0=1"], **request_})


def test_what_is_no_export_is_refused(tmp_path):
  with pytest.raises(UserError, match="is no exported model"):
    seqmatch_jax.load_pretrained(tmp_path)
  folder = hf_folder.write(tmp_path / "hf", "gpt2")  # not written by --mode=export
  with pytest.raises(UserError, match="method None, where format 1 and method 'seqmatch'"):
    seqmatch_jax.load_pretrained(folder)


def test_an_export_in_hugging_face_s_layout_is_no_init_from(tmp_path):
  (tmp_path / "config.json").write_text('{"model_type": "gpt2", "seqmatch": {}}')
  with pytest.raises(UserError, match="begin from it with pretrained="):
    exported.load(tmp_path, "seqmatch")


@pytest.mark.parametrize("kind", [tokenizer, weights])
def test_an_export_overwrites_nothing_that_the_run_came_from(kind, tmp_path):
  folder = hf_folder.write(tmp_path / "model", "gpt2")
  config, metadata, _ = kind(folder)
  with pytest.raises(UserError, match=r"is what the run began from or has its tokenizer"):
    seqmatch.export_mode(config, metadata, None, None, folder)
