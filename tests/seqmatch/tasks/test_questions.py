"""The task of questions, assembled: what a run knows of its data, and how it is evaluated."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from configs import seqmatch_arithmetic
from seqmatch_jax import Model
from seqmatch_jax import method as seqmatch
from seqmatch_jax.tasks import questions
from seqmatch_jax.tokens import EOS
from train_jax.errors import UserError


@pytest.fixture
def config():
  made = seqmatch_arithmetic.get_config("two_sum,debug")
  made.data.sequences_per_row = 1
  return made


def test_a_generation_has_room_for_as_many_erasures_as_the_config_says(config, one_device):
  found = []
  for n in (3, 5):
    config.eval.max_backspaces = n
    found.append(questions.make_task(config, one_device).metadata)
  assert [x["max_backspaces"] for x in found] == [3, 5]
  assert found[1]["max_actions"] - found[0]["max_actions"] == 2 * 2  # each takes its token with it


def test_other_questions_have_other_metadata_and_are_not_evaluated_on(config, one_device, tmp_path):
  found = []
  contents = {"a": "1+2\n3\n2+2\n4\n", "b": "1+2\n3\n2+2\n4\n", "c": "1+2\n3\n2+1\n4\n"}
  for name, content in contents.items():
    (tmp_path / name).write_text(content * 2)
    train, test = str(tmp_path / name), str(tmp_path / "a")
    config.data.update(source="files", train=train, test=test)
    found.append(questions.make_task(config, one_device).metadata)
  assert found[0] == found[1] and found[0]["examples"] == found[2]["examples"]
  assert found[0].pop("examples_sha256") != found[2].pop("examples_sha256")
  assert found[0] == found[2]
  assert questions.make_prompts(config, found[0], [], 3).texts == ["1+2", "2+2", "1+2"]
  (tmp_path / "a").write_text(contents["c"])
  with pytest.raises(UserError, match=r"data.test=.* has other questions than the run had"):
    questions.make_prompts(config, found[0], [], 3)


@pytest.mark.parametrize("final", [False, True])
def test_questions_are_evaluated_as_they_say(final, config, one_device, monkeypatch):
  config.seed, asked, measured, measure = 6, [], [], questions.evaluate.measure

  def roll_out(self, prompt, length, batch, key, **how):
    asked.append((len(prompt), tuple(jax.random.key_data(key).tolist()), how))
    return SimpleNamespace(actions=np.full((len(prompt), metadata["max_actions"]), EOS, np.int32))

  monkeypatch.setattr(Model, "roll_out", roll_out)
  monkeypatch.setattr(
    questions.evaluate, "measure", lambda *args: measured.append(args) or measure(*args)
  )
  method, metadata = seqmatch.make_method(config, one_device)
  results = dict(method.evaluate(jax.jit(method.init)(jax.random.key(0))[0], 1, final))
  count = config.data.tests if final else config.data.tests // 4
  assert {(n, key) for n, key, _ in asked} == {(count, (0, 6))}
  found = {
    (how["temperature"], how["allow_retype"], how["allow_backspace"], how["forced"] is not None)
    for *_, how in asked
  }
  policies = [(0.0, False), (1.0, True), (0.5, True)]
  ways = [(True, False), (False, False), (True, True)]
  wanted = {(*how, *way) for how in policies for way in ways}
  assert found == wanted | {(1.0, False, True, False), (1.0, False, True, True)}
  ((_, _, examples, backspace, seed, noise),) = measured
  assert (len(examples.answer), backspace, seed) == (count, True, 6)
  assert noise.source == config.noise.source

  assert {"log_likelihood/data", "exact/greedy", "recovery/T=1"} <= set(results)
  text = (Path(seqmatch.__file__).parents[1] / "docs" / "METRICS.md").read_text()
  explained = text.partition("\n## Questions")[2].partition("\n## ")[0]
  assert all(f"`{name.partition('/')[0]}`" in explained for name in results)
