"""The modes of main.py after training: their flags, and what they do with a trained model."""

from __future__ import annotations

import sys
from pathlib import Path

import jax
from absl.flags import FlagValues

from train_jax import command
from train_jax.command import Command, Flag
from train_jax.errors import UserError

# The functions import Model and all that it needs, which keeps --help quick.
FRACTION = {"lower_bound": 0, "upper_bound": 1}
PRETRAINED = Flag("string", "pretrained", None, "Where the run's config.pretrained is now.")


def _open(flags: FlagValues):
  from seqmatch_jax.model import Model

  return Model.from_run(flags.workdir, flags.step, flags.pretrained or "")


def sample(flags: FlagValues) -> None:
  """`--mode=sample`: continues prompts, with visible erasures, see `display.sample.write`."""
  from ml_collections import ConfigDict

  from seqmatch_jax.display import sample as display
  from seqmatch_jax.model import sampling_options
  from seqmatch_jax.tasks.from_config import find_task

  if flags.stream and jax.process_count() > 1:
    raise UserError("--stream types into one terminal, for one process; leave it out.")
  model = _open(flags)
  config, metadata = (model.record["run"][name] for name in ("config", "metadata"))
  config = ConfigDict(config)
  task, count = find_task(config), flags.num or 1
  texts = display.read_prompts(flags.prompt or [], flags.prompts or "", count)
  prompts = task.make_prompts(config, metadata, texts, flags.num or 64)
  temperature = task.TEMPERATURE if flags.temperature is None else flags.temperature
  if not temperature and count > 1 and texts:
    raise UserError(
      f"--num={count} of each prompt would all be the same at temperature 0; set --temperature."
    )
  erases = config.loss.backspace and flags.backspace
  limits = {name: flags[name].value for name in ("top_k", "top_p", "max_actions")}
  settings = sampling_options(temperature, task.RETYPE, erases, **limits)
  show = display.live if flags.stream else display.together
  with command.out_directory(flags, "generated", model.record["run"]) as out:
    typed, seconds = show(
      model, prompts, jax.random.key(flags.seed), settings, task.GAP, config.batch
    )
    if jax.process_index():  # every process has all of it
      return
    if not flags.stream:
      display.print_lines(prompts, typed, task.GAP, sys.stdout)
    chosen = {"step": model.step, "temperature": temperature, **limits, "seed": flags.seed}
    display.write(out, chosen, prompts, typed, task.GAP)
    print(display.speed(typed, seconds))


def evaluate(flags: FlagValues) -> None:
  """`--mode=evaluate`: every metric on all test examples, see `Model.evaluate`."""
  model = _open(flags)
  with command.out_directory(flags, "generated", model.record["run"]) as out:
    model.evaluate(out, flags.seed, flags.features or "")


def export(flags: FlagValues) -> None:
  """`--mode=export`: the `sample` average as files that `Model.from_pretrained` reads."""
  model = _open(flags)
  with command.out_directory(flags, "exported", model.record["run"]) as out:
    model.save_pretrained(out)
  if jax.process_index() == 0:
    use = f"seqmatch_jax.Model.from_pretrained({str(out)!r}) generates with it"
    start = f", --config.pretrained={out} begins from it" if model.source else ""
    print(f"exported: {out} (step {model.step}); {use}{start}")


def encode(flags: FlagValues) -> None:
  """`--mode=encode`: texts to tokens, see `data.encode.encode`."""
  from seqmatch_jax.data.encode import encode

  if not flags.out:
    raise UserError("--out is missing; --mode=encode needs --texts and --out.")
  encode(flags.texts, flags.tokenizer or "", flags.shards, Path(flags.out))


COMMANDS = {
  "sample": Command(
    sample,
    Flag("integer", "num", None, "Test questions or held-out texts; default: 64.", lower_bound=1),
    Flag("multi_string", "prompt", None, "A prompt; may be given again."),
    Flag("string", "prompts", None, "A file of prompts, one a line."),
    Flag(
      "float", "temperature", None, "0: greedy; default: 0 (questions), 1 (text).", lower_bound=0
    ),
    Flag("integer", "top_k", None, "Draw from so many likeliest tokens.", lower_bound=1),
    Flag("float", "top_p", None, "Draw from the likeliest of this probability.", **FRACTION),
    Flag(
      "integer", "max_actions", None, "Most tokens typed; default: the run's limit.", lower_bound=1
    ),
    Flag("boolean", "backspace", True, "Whether it may erase."),
    Flag("boolean", "stream", False, "Show each as it is typed and erased."),
    PRETRAINED,
    *command.DRAW_FLAGS,
  ),
  "evaluate": Command(
    evaluate,
    Flag("string", "features", None, "A run or a folder, whose features MAUVE compares."),
    PRETRAINED,
    *command.DRAW_FLAGS,
  ),
  "export": Command(export, PRETRAINED, *command.RUN_FLAGS),
  "encode": Command(
    encode,
    Flag("string", "texts", None, ".txt, .jsonl or .array_record files, or tfds:NAME."),
    Flag("string", "tokenizer", None, "tokenizer.json, or its folder; default: characters."),
    *command.DATA_FLAGS,
  ),
}
