"""A trained model from its run, saved and opened elsewhere: the same texts and the same numbers."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

import main
import seqmatch_jax
from configs import seqmatch_arithmetic, seqmatch_gpt2, seqmatch_text
from seqmatch_jax import Model, tokens
from seqmatch_jax import method as seqmatch
from seqmatch_jax.display.show import END
from seqmatch_jax.huggingface import decoder
from seqmatch_jax.huggingface.tokenizer import TextVocab, to_metadata
from seqmatch_jax.model import load_features
from tests.light import heavy_imports
from tests.seqmatch import hf_folder
from train_jax.errors import UserError
from train_jax.storage import exported

WORDS = ["w7 w8", "w9", "w3 w4 w5"]
LIMITS = {"max_length": 20, "max_actions": 30, "max_backspaces": 5}


class Saved(NamedTuple):
  """A run, its model on all devices, and the directory that the model was saved to."""

  workdir: Path
  config: ConfigDict
  metadata: dict
  params: dict
  model: Model
  prompts: list[str]
  exported: Path


def arithmetic(folder):
  del folder
  config = seqmatch_arithmetic.get_config("two_sum,debug")
  return config, {"symbols": list("0123456789=abcdef"), **LIMITS}, ["012345=9", "fed=1"]


def tokenizer(folder):
  """From nothing, with the tokens of a tokenizer.json."""
  metadata = to_metadata(TextVocab.from_file(folder))
  return seqmatch_text.get_config("debug"), {**metadata, **LIMITS}, WORDS


def adapters(folder):
  """Of drawn parameters, which are kept as bfloat16; without <backspace>."""
  del folder
  config = seqmatch_gpt2.get_config("debug")
  config.lora.base, config.loss.backspace = "bfloat16", False
  return config, {"symbols": list(" abcdef"), **LIMITS}, ["a", "bc d"]


def weights(folder):
  """From pretrained weights, by adapters."""
  config = seqmatch_gpt2.get_config("debug")
  config.pretrained = str(folder)
  metadata = {**to_metadata(TextVocab.from_file(folder)), **LIMITS}
  return config, decoder.make_metadata(config, metadata), WORDS


KINDS = {make.__name__: make for make in (arithmetic, tokenizer, adapters, weights)}


@pytest.fixture(scope="module")
def get_run(save_run, tmp_path_factory):
  """kind -> what was Saved of it, made once."""
  made = {}

  def get(kind) -> Saved:
    if kind not in made:
      folder = hf_folder.write(tmp_path_factory.mktemp("hf") / "model", "gpt2")
      *what, prompts = KINDS[kind](folder)
      prompts *= 12  # enough for one to type again what it erased, where it may
      run, out = save_run(tmp_path_factory.mktemp(kind), *what), tmp_path_factory.mktemp("out")
      model = Model.from_run(run.workdir)
      model.save_pretrained(out)
      made[kind] = Saved(*run, model, prompts, out)
    return made[kind]

  return get


@pytest.fixture(scope="module")
def trained(get_run):
  return seqmatch_jax.load_pretrained(get_run("arithmetic").exported)


@pytest.mark.parametrize(
  "kind", [pytest.param(k, marks=[pytest.mark.slow] * (k == "weights")) for k in KINDS]
)
def test_the_run_its_model_and_what_was_saved_of_it_write_the_same(kind, get_run, tmp_path):
  run = get_run(kind)
  (tmp_path / "prompts").write_text("\n".join(run.prompts))
  flags = (f"--prompts={tmp_path / 'prompts'}", "--temperature=1", "--seed=3")
  main.main(["", "--mode=sample", f"--workdir={run.workdir}", f"--out={tmp_path}", *flags])
  rows = json.loads((tmp_path / "generations.json").read_text())
  elsewhere = Model.from_pretrained(shutil.copytree(run.exported, tmp_path / "elsewhere"))
  drawn = {"temperature": 1.0, "seed": 3, "batch": run.config.batch}
  for model in (run.model, elsewhere):
    made = model.generations(run.prompts, **drawn)
    assert ["".join(x.typed) for x in made] == [row["typed"] for row in rows]
    assert [x.text for x in made] == [row["answer"] for row in rows]
    assert [x.finished for x in made] == [row["typed"].endswith(END) for row in rows]
  assert elsewhere.generate(run.prompts, **drawn) == [x.text for x in made]
  assert any("\b" in x.typed for x in made) == run.config.loss.backspace
  assert any(x.text for x in made)


@pytest.mark.parametrize("task", ["questions", "text"])
def test_training_measures_what_the_saved_model_does(task, request, one_device):
  """At the seed of the run: the same numbers under the same names; at another one, others."""
  run = request.getfixturevalue(f"{task}_run")
  method, _ = seqmatch.make_method(run.config, one_device)
  training = dict(method.evaluate(run.params, 7, True))
  model = Model.from_run(run.workdir, devices=jax.devices()[:1])
  assert model.step == 7 and model.evaluate(seed=run.config.seed) == training
  other = model.evaluate(seed=run.config.seed + 1)
  assert other.keys() == training.keys() and other != training


def test_texts_are_compared_by_the_features_that_are_asked_for(text_run, monkeypatch):
  """Of a workdir, in training as in Model.evaluate."""
  model, path = Model.from_run(text_run.workdir, devices=jax.devices()[:1]), str(text_run.workdir)
  with pytest.raises(UserError, match=r"pieces of text are held out, and MAUVE, .* needs 100: "):
    model.evaluate(features=path)
  monkeypatch.setattr("seqmatch_jax.evaluation.mauve.LEAST", 4)
  found = model.evaluate(seed=6, features=path)
  plain = model.evaluate(seed=6)
  assert {name.partition("/")[0] for name in found.keys() - plain.keys()} == {
    "mauve",
    "mauve_spread",
    "mauve_star",
  }
  assert all(0 < found[f"mauve/{way}"] <= 1 for way in ("T=1", "p=0.95", "T=1, forbidden"))


def test_features_are_of_a_run_or_of_a_folder(text_run, questions_run, tmp_path):
  model = Model.from_run(text_run.workdir)
  texts = ["1 is 1.", "fine"]
  found = load_features(str(text_run.workdir), model.vocab)(texts)
  for text, got in zip(texts, found, strict=True):
    token = np.array([[tokens.BOS, *model.vocab.encode(text)]])
    n = token.shape[1]
    args = token, np.arange(n)[None], np.full((1, n), n)
    want = model.network.features(model.params, *args)[0].mean(0)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
  folder = hf_folder.write(tmp_path / "model", "gpt2")
  assert load_features(str(folder), model.vocab)(texts).shape == (2, 64)
  with pytest.raises(UserError, match=r"eval.features=.* does not know all .* such as"):
    load_features(str(questions_run.workdir), model.vocab)
  with pytest.raises(UserError, match=r"eval\.features=.* holds no network; give the workdir"):
    load_features(str(tmp_path), model.vocab)


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


def test_says_what_it_is_and_takes_other_parameters(trained, get_run, differences):
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
  zero = trained.with_params(jax.tree.map(np.zeros_like, trained.params), 9)
  assert (zero.step, trained.step) == (9, 7) and zero.rollout is trained.rollout
  np.testing.assert_allclose(
    zero.log_likelihoods("fed=1", "12"), -np.log(trained.vocab.size - 3.0) * 3, rtol=1e-6
  )


@pytest.mark.parametrize("kind", ["arithmetic", "weights"])
def test_generating_imports_nothing_of_training(kind, get_run):
  run = get_run(kind)
  use = f"""
model = seqmatch_jax.load_pretrained({str(run.exported)!r})
assert len(model.generate({run.prompts[:2]!r}, temperature=1.0)) == 2
"""
  assert heavy_imports("seqmatch_jax", use) == []


@pytest.mark.parametrize(
  ("ask", "message"),
  [
    (lambda m: m.generate([]), r"there are no prompts; give at least one"),
    (lambda m: m.generate("z"), r"'z' has characters that the model does not know"),
    (lambda m: m.generate("0" * 20), r"has 20 tokens, and the context of 20 tokens holds 18"),
    (lambda m: m.generate("0=1", temperature=-1.0), r"temperature=-1.0 must be finite and at"),
    (lambda m: m.generate("0=1", top_k=0), r"top_k=0 must be at least 1"),
    (lambda m: m.generate("0=1", top_p=1.5), r"top_p=1.5 must be between 0 and 1"),
    (lambda m: m.generate("0=1", max_actions=0), r"max_actions=0 must be at least 1"),
    (lambda m: m.log_likelihoods("0=1", ["1", "2"]), r"there are 1 prompts and 2 texts; give one"),
    (
      lambda m: m.log_likelihoods("fed=1", "1" * 20),
      r"and its prompt take 26 tokens, and the model's context holds 20; shorten",
    ),
    (lambda m: m.log_likelihoods("fed=1", "z"), r"'z' has characters that the model does not know"),
    (lambda m: m.evaluate(features="gpt2"), r"--features=gpt2 is for the MAUVE of texts"),
    (lambda m: Model.from_pretrained("nowhere"), r"'nowhere' is no exported model"),
    (lambda m: Model.from_run("nowhere"), r"no checkpoint found: looked for .*nowhere"),
  ],
)
def test_what_cannot_be_is_refused_in_a_sentence(ask, message, trained):
  with pytest.raises(UserError, match=message):
    ask(trained)


def test_what_came_from_elsewhere_is_refused(get_run, save_run, tmp_path):
  run = get_run("arithmetic")
  with pytest.raises(UserError, match=r"--step=3 is not stored; choose one of \[7\]"):
    Model.from_run(run.workdir, step=3)
  with pytest.raises(UserError, match=r"--pretrained=x is read by runs that began from one"):
    Model.from_run(run.workdir, pretrained="x")
  config = run.config.copy_and_resolve_references()
  config.method = "ism"
  save_run(tmp_path / "ism", config, run.metadata)
  with pytest.raises(UserError, match="ism holds a run of method 'ism', where one of 'seqmatch'"):
    Model.from_run(tmp_path / "ism")
  folder = hf_folder.write(tmp_path / "hf", "gpt2")  # not written by save_pretrained
  with pytest.raises(UserError, match="method None, where format 2 and method 'seqmatch'"):
    Model.from_pretrained(folder)
  (tmp_path / "config.json").write_text('{"model_type": "gpt2", "seqmatch": {}}')
  with pytest.raises(UserError, match="begin from it with pretrained="):
    exported.load(tmp_path, "seqmatch")


@pytest.mark.parametrize("kind", ["tokenizer", "weights"])
def test_nothing_that_the_run_came_from_is_overwritten(kind, get_run):
  model = get_run(kind).model
  with pytest.raises(UserError, match=r"is what the run began from or has its tokenizer"):
    model.save_pretrained(Path(model.vocab.path).parent)
