"""What main.py does with a run of SequenceMatch: what is written, and what is refused."""

import json

import jax
import numpy as np
import pytest

import main
from seqmatch_jax import Model, commands
from seqmatch_jax.tasks import questions, text
from train_jax.checkpointing.checkpoint import Checkpoints
from train_jax.errors import UserError
from train_jax.state import flatten


def call(mode, run, *flags):
  return main.main(["main.py", f"--mode={mode}", f"--workdir={run.workdir}", *map(str, flags)])


def test_every_prompt_is_gone_on_from_as_often_as_asked(questions_run, tmp_path, capsys):
  (tmp_path / "prompts").write_text("012345=9\n\nfedcba=1\n")
  flags = f"--prompts={tmp_path / 'prompts'}", "--num=3", "--temperature=1", f"--out={tmp_path}"
  call("sample", questions_run, *flags)
  rows = json.loads((tmp_path / "generations.json").read_text())
  assert [row["prompt"] for row in rows] == ["012345=9"] * 3 + ["fedcba=1"] * 3
  assert len({row["typed"] for row in rows}) > 2 and "reference" not in rows[0]
  assert any("\b" in row["typed"] for row in rows)
  out = capsys.readouterr().out
  assert "012345=9  " in out and "actions/s" in out
  page = (tmp_path / "generations.html").read_text()
  assert "fedcba=1" in page and "step 7, temperature 1.0, seed 0" in page


def test_without_prompts_the_test_questions_are_answered(questions_run, tmp_path):
  call("sample", questions_run, "--num=5", f"--out={tmp_path}", "--nobackspace", "--max_actions=2")
  rows = json.loads((tmp_path / "generations.json").read_text())
  asked = questions.make_examples(questions_run.config)[1][:5]
  assert [(row["prompt"], row["reference"]) for row in rows] == [x[:2] for x in asked]
  assert all(len(row["typed"]) <= 2 and "\b" not in row["typed"] for row in rows)


@pytest.mark.parametrize("stream", [False, True])
def test_held_out_documents_are_gone_on_from(stream, text_run, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  flags = "--num=3", "--top_p=0.9", "--max_actions=9", *["--stream"] * stream
  call("sample", text_run, *flags, f"--out={tmp_path}")
  rows = json.loads((tmp_path / "generations.json").read_text())
  _, test, vocab = text.open_documents(text_run.config.data)
  held = [vocab.decode(test.read(i, 0, text_run.config.data.prompt)) for i in range(3)]
  assert [row["prompt"] for row in rows] == held
  whole = [row["prompt"] + row["reference"] for row in rows]
  assert whole == [vocab.decode(test.read(i).tolist()) for i in range(3)]
  out = capsys.readouterr().out
  assert all(prompt in out for prompt in held) and "tokens/s" in out
  assert "top_p 0.9, max_actions 9" in (tmp_path / "generations.html").read_text()


def test_numbers_are_those_of_the_model_and_are_written(questions_run, tmp_path, capsys):
  call("evaluate", questions_run, f"--out={tmp_path}", "--seed=3")
  record = json.loads((tmp_path / "evaluation.json").read_text())
  assert "step 7, seed 3, examples 40" in capsys.readouterr().out
  known = {name: record.pop(name) for name in ("step", "seed", "examples")}
  assert known == {"step": 7, "seed": 3, "examples": 40}
  found = Model.from_run(questions_run.workdir).evaluate(seed=3)
  assert record == pytest.approx(found) and "exact/T=1" in record


def test_a_model_is_exported(questions_run, tmp_path, capsys):
  call("export", questions_run, f"--out={tmp_path / 'out'}")
  assert f"from_pretrained({str(tmp_path / 'out')!r}) generates" in capsys.readouterr().out
  found = flatten(Model.from_pretrained(tmp_path / "out").params)
  for name, value in flatten(questions_run.params).items():
    np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize(
  ("mode", "flags", "message"),
  [
    ("sample", ["--prompt=12?z"], r"'12\?z' has characters that the model does not know \('\?', "),
    ("sample", ["--prompt=12\b"], r"holds a backspace, which only the model may type"),
    ("sample", ["--prompt=" + "0" * 99], r"has 99 tokens, and the context of 11 tokens"),
    ("sample", ["--prompts=nowhere"], r"--prompts=nowhere cannot be read"),
    ("sample", ["--prompts=/dev/null"], r"--prompts=/dev/null holds no prompt"),
    ("sample", ["--prompts=a", "--prompt=b"], r"--prompt and --prompts are both given"),
    ("sample", ["--prompt=12", "--num=3"], r"--num=3 of each prompt would all be the same at"),
    ("sample", ["--temperature=-1"], r"temperature"),
    ("sample", ["--out=README.md"], r"--out=README.md cannot be written to"),
    ("sample", ["--nfe=3"], r"--nfe does nothing in --mode=sample of a run of seqmatch"),
    ("sample", ["--step=3"], r"--step=3 is not stored"),
    ("evaluate", ["--features=gpt2"], r"--features=gpt2 is for the MAUVE of texts"),
    ("evaluate", ["--pretrained=x"], r"--pretrained=x is read by runs that began from one"),
    ("export", ["--seed=1"], r"--seed does nothing in --mode=export"),
  ],
)
def test_bad_requests_are_refused_before_anything_is_loaded(
  mode, flags, message, questions_run, monkeypatch
):
  def load(*args):
    raise AssertionError("loaded a checkpoint for a request that cannot be met")

  monkeypatch.setattr(Checkpoints, "restore_ema", load)
  with pytest.raises(UserError, match=message):
    call(mode, questions_run, *flags)


def test_a_terminal_is_of_one_process_and_tokens_need_a_place(questions_run, monkeypatch, tmp_path):
  (tmp_path / "a.txt").write_text("one")
  with pytest.raises(UserError, match=r"--out is missing; --mode=encode needs --texts and --out"):
    main.main(["main.py", "--mode=encode", f"--texts={tmp_path / 'a.txt'}"])
  values = commands.COMMANDS["sample"].define()
  values(["main.py", "--stream", f"--workdir={questions_run.workdir}"])
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  with pytest.raises(UserError, match=r"--stream types into one terminal, for one process"):
    commands.sample(values)
