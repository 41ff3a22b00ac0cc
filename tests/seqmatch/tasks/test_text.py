"""The task of text, assembled: a run of a few steps, its numbers against naive ones, bad input."""

import json

import jax
import numpy as np
import optax
import pytest

from configs import seqmatch_gpt2, seqmatch_llama7b, seqmatch_text
from seqmatch_jax import Model
from seqmatch_jax import method as seqmatch
from seqmatch_jax.data import encode
from seqmatch_jax.huggingface import tokenizer
from seqmatch_jax.tasks import text
from seqmatch_jax.tokens import BACKSPACE, BOS, EOS
from train_jax import state as state_lib
from train_jax.errors import UserError
from train_jax.step import make_train_step


@pytest.fixture(scope="module")
def config(corpus_file):
  made = seqmatch_text.get_config("debug")
  made.data.path = corpus_file
  made.loss.warmup = 0
  return made


@pytest.fixture(scope="module")
def run(config, one_device):
  """(method, metadata, state after two steps, metrics)."""
  method, metadata = seqmatch.make_method(config, one_device)
  tx = optax.adam(1e-2)
  state = jax.jit(state_lib.create(method, tx, {"sample": 0.9}, 0))()
  step = jax.jit(make_train_step(method, tx, {"sample": 0.9}, clip=1.0))
  stream = method.stream(0, 0)
  for _ in range(2):
    state, metrics = step(state, next(stream))
  return method, metadata, state, metrics


def test_a_run_rolls_out_from_its_prompts(run, config):
  method, metadata, state, metrics = run
  assert np.isfinite(metrics["loss"]) and float(metrics["penalty_model"]) != 0
  batch = next(method.stream(0, 0))
  memory = jax.device_get(state.aux_state)
  assert memory["filled"] == config.buffer.rollouts
  np.testing.assert_array_equal(memory["prompt"][:8], batch["prompt"])
  assert metadata["max_length"] == config.data.context - config.noise.max_errors
  assert tokenizer.from_metadata(json.loads(json.dumps(metadata))).size == 4 + len(
    set("0123456789 is.\nfine")
  )


def test_perplexity_is_that_of_one_document_after_the_other(run, config):
  method, metadata, state, _ = run
  found = dict(method.evaluate(state.params, 2, True))
  network = seqmatch.make_network(config, metadata)
  _, test, vocab = text.open_documents(config.data)
  most, k = config.data.context - config.noise.max_errors - 1, config.data.prompt
  pieces = []  # padded to one length, so that one compilation does
  for i in range(len(test.length)):
    ids = [*test.read(i).tolist(), EOS]
    cut = [ids[a : a + most] for a in range(0, len(ids) - 1, most)]
    if cut[-1][-1] != EOS:
      cut[-1] = [*cut[-1], EOS]
    pieces += cut
  width = most + 2
  rows = np.zeros((len(pieces), width), np.int32)
  for row, piece in zip(rows, pieces, strict=True):
    row[: 1 + len(piece)] = [BOS, *piece]
  place = np.broadcast_to(np.arange(width), rows.shape)
  logits = np.array(jax.jit(network.apply)(state.params, rows, place, np.full_like(rows, width)))
  total, forbidden, count, characters = 0.0, 0.0, 0, 0
  for row, piece in zip(logits.astype(np.float64), pieces, strict=True):
    for i, token in enumerate(piece):
      if i >= k or token == EOS:
        row[i, [0, 1]] = -np.inf
        if i <= min(k, len(piece) - 1):
          row[i, BACKSPACE] = -np.inf  # at the prompt
        total += row[i, token] - np.log(np.exp(row[i]).sum())
        row[i, BACKSPACE] = -np.inf
        forbidden += row[i, token] - np.log(np.exp(row[i]).sum())
        count += 1
    characters += len(vocab.decode(piece[k:]))
  for name, nats in (("", total), (", forbidden", forbidden)):
    a_token, a_character = (np.exp(-nats / n) for n in (count, characters))
    np.testing.assert_allclose(found[f"perplexity/token{name}"], a_token, rtol=1e-4)
    np.testing.assert_allclose(found[f"perplexity/character{name}"], a_character, rtol=1e-4)
  assert forbidden > total
  assert found["backspaces/T=1, forbidden"] == 0 < found["backspaces/T=1"] < 1
  assert 0 <= found["finished/T=1"] <= 1


def test_adapters_are_evaluated_on_the_parameters_that_they_were_trained_with(
  save_run, one_device, tmp_path
):
  """Whatever the seed, which is that of the generations: drawn ones are of the run's own seed."""
  config = seqmatch_gpt2.get_config("debug")
  config.data.context = config.model.context = 24
  config.eval.samples, config.eval.max_backspaces, config.seed = 2, 1, 5
  _, metadata = seqmatch.make_method(config, one_device)
  save_run(tmp_path, config, metadata)
  model = Model.from_run(tmp_path, devices=jax.devices()[:1])
  first, second = (model.evaluate(seed=seed)["perplexity/token"] for seed in (0, 1))
  assert first == second
  config.seed = 6
  save_run(tmp_path / "other", config, metadata)
  other = Model.from_run(tmp_path / "other", devices=jax.devices()[:1])
  assert other.evaluate()["perplexity/token"] != first


def test_a_book_is_a_corpus(config, one_device, tmp_path):
  """A single document: its end is held out, and gone on from at several places."""
  book, other = tmp_path / "book.txt", config.copy_and_resolve_references()
  book.write_text(" ".join(str(i) for i in range(1000)))
  other.data.path = str(book)
  found = text.make_task(other, one_device)
  assert found.metadata["documents"] == 1
  asked = text.make_prompts(other, found.metadata, [], 5)
  whole = [prompt + rest for prompt, rest in zip(asked.texts, asked.references, strict=True)]
  assert len(set(asked.texts)) == 5 and all(book.read_text().endswith(x) for x in whole)
  _, metadata = seqmatch.make_method(other, one_device)
  assert metadata["documents"] == 1


@pytest.mark.parametrize("test", [False, True])
def test_what_is_held_out_must_be_what_the_run_held_out(test, config, one_device, tmp_path):
  files = [tmp_path / name for name in ("train.txt", "test.txt")]
  documents = [str(i) * (2 + i) for i in range(10)]
  write = lambda file, texts: file.write_text("\n<|endoftext|>\n".join(texts))  # noqa: E731
  write(files[0], documents)
  write(files[1], documents)
  own = config.copy_and_resolve_references()
  own.data.path, own.data.tests, own.data.prompt = str(files[0]), 3, 1
  own.data.test = str(files[1]) if test else ""
  metadata = text.make_task(own, one_device).metadata
  text.make_prompts(own, metadata, [], 2)
  write(files[test], documents[1:] + documents[:1])
  with pytest.raises(UserError, match="others or in another order; put the texts"):
    text.make_prompts(own, metadata, [], 2)


def test_a_line_without_text_is_a_fault_of_the_data(config, one_device, tmp_path, caplog):
  own, file = config.copy_and_resolve_references(), tmp_path / "a.jsonl"
  rows = [json.dumps({"text": f"text {i}"}) for i in range(12)]
  file.write_text("\n".join([*rows, "null"]))
  own.data.path, own.data.tests, own.data.max_faults = str(file), 2, 1
  assert text.make_task(own, one_device).metadata["documents"] == 10
  assert "skipped: cannot read a.jsonl:13 (it is not a JSON object" in caplog.text
  own.data.max_faults = 0
  with pytest.raises(
    UserError, match=r"more than data.max_faults=0 records of data.path='.*a.json"
  ):
    text.make_task(own, one_device)


@pytest.mark.parametrize("kind", ["train", "test"])
def test_texts_replaced_by_others_as_long_are_noticed(kind, config, one_device, tmp_path):
  own = config.copy_and_resolve_references()
  own.data.path, own.data.test = (str(tmp_path / f"{name}.txt") for name in ("train", "test"))
  for name in ("train", "test"):
    (tmp_path / f"{name}.txt").write_text("abcabcabcb")
  metadata = text.make_task(own, one_device).metadata
  text.make_prompts(own, metadata, [], 1)
  (tmp_path / f"{kind}.txt").write_text("abcabcabca")
  with pytest.raises(UserError, match="others or in another order; put the texts"):
    text.make_prompts(own, metadata, [], 1)


@pytest.mark.parametrize(("prompt", "share", "warned"), [(2, "75%", 0), (6, "25%", 1)])
def test_how_much_there_is_to_learn_is_told(
  prompt, share, warned, one_device, tmp_path, capsys, caplog
):
  path, config = tmp_path / "texts.txt", seqmatch_text.get_config("debug")
  path.write_text("\n<|endoftext|>\n".join(["abcdefgh"] * 5))
  config.data.update(path=str(path), tests=1, prompt=prompt)
  text.make_task(config, one_device)
  assert "data: 4 documents, 32 tokens in" in (said := capsys.readouterr().out)
  assert f"{share} of the tokens are learned" in said
  found = [line for line in caplog.messages if "takes most of these texts" in line]
  assert len(found) == warned


def test_other_texts_have_other_metadata(config, one_device, tmp_path):
  found = []
  for name, words in (("a", "ab cd"), ("b", "ab dc"), ("c", "abc d")):
    folder = tmp_path / name
    folder.mkdir()
    for i, word in enumerate(words.split()):
      (folder / f"{i}.txt").write_text(word)
    (folder / "2.txt").write_text("held out")
    (folder / "3.txt").write_text("more")
    other = config.copy_and_resolve_references()
    other.data.path, other.data.tests, other.data.prompt = str(folder), 1, 1
    found.append(text.make_task(other, one_device).metadata)
  assert found[0].pop("content") != found[1].pop("content") and found[0] == found[1]
  assert found[0]["documents"] == found[2]["documents"]
  assert found[0]["lengths_sha256"] != found[2]["lengths_sha256"]


def test_stored_documents_are_the_same_run(run, config, corpus_file, one_device, tmp_path):
  method, metadata, _, _ = run
  encode.encode(corpus_file, "", 2, tmp_path)
  stored = config.copy_and_resolve_references()
  stored.data.path = str(tmp_path)
  other, its_metadata = seqmatch.make_method(stored, one_device)
  assert its_metadata == metadata
  batches = [next(m.stream(3, 7)) for m in (method, other)]
  for name, value in batches[0].items():
    np.testing.assert_array_equal(value, batches[1][name])


@pytest.mark.parametrize("source", [seqmatch_gpt2, seqmatch_llama7b])
def test_configs_of_pretrained_decoders_build_without_weights(source, one_device):
  compiled, position = seqmatch.without_data(source.get_config("debug"))
  assert position == 1 and compiled.model.vocab == 100
  for made in (source.get_config("debug"), compiled):
    method, _ = seqmatch.make_method(made, one_device)
    params, _ = jax.eval_shape(method.init, jax.random.key(0))
    assert any("_a" in name for name in state_lib.flatten(params))
    batch = next(method.stream(0, 0)) | {"alpha_scale": 1.0}
    loss, _ = jax.eval_shape(
      method.loss, params, {}, batch, jax.random.key(0), method.frozen.shapes
    )
    assert loss.shape == ()


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"data.path": "nowhere"}, r"data.path='nowhere' is not there"),
    ({"data.test": "nowhere"}, r"data.test='nowhere' is not there"),
    ({"data.tests": 60}, r"data.tests=60 must be at least 1 and less than the 60 documents"),
    ({"data.prompt": 60}, r"data.prompt=60 must be at least 0"),
    ({"data.tokenizer": "nowhere"}, "nowhere"),
    ({"eval.samples": 0}, r"eval.samples=0 must be at least 1\."),
    ({"eval.samples": 99, "eval.features": "x"}, r"eval.samples=99 must be at least 100 for MAUVE"),
    ({"eval.samples": 100, "eval.features": "x"}, r"\d+ pieces of text are held out, and MAUVE"),
    ({"noise.source": "prompt"}, r"noise.source='prompt' is for questions"),
  ],
)
def test_bad_configs_are_refused_in_a_sentence(changes, message, config, one_device):
  config = config.copy_and_resolve_references()
  config.update_from_flattened_dict(changes)
  with pytest.raises(UserError, match=message):
    seqmatch.make_method(config, one_device)
