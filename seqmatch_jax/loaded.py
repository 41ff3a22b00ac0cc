"""A trained model without its training stack: written by `--mode=export`, used from anywhere.

    import seqmatch_jax
    model = seqmatch_jax.load_pretrained("exported")
    texts = model.generate(["a prompt"], temperature=1.0, seed=0)

Needs jax, flax, numpy and safetensors, and tokenizers for a model that has a tokenizer. A run from
nothing is exported as train_jax/storage/exported.py says, its tokenizer.json beside it; one from
pretrained weights as a Hugging Face folder (export.py), whose config.json has the same record as an
entry.

Dimensions: b prompts.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from seqmatch_jax import loss, rollout, sample, show, tokens, transformer
from seqmatch_jax.actions import tree
from seqmatch_jax.huggingface import pretrained
from seqmatch_jax.tokens import EOS, TextVocab, Vocab
from seqmatch_jax.transformer import TransformerConfig
from train_jax import lora
from train_jax.errors import UserError
from train_jax.files import read_json
from train_jax.storage import exported

METHOD, TOKENIZER = "seqmatch", "tokenizer.json"


def make_record(step: int, sizes: TransformerConfig, generation: dict, run: dict) -> dict:
  """What is exported beside the parameters, as JSON.

  Args:
    step: at which the parameters were averaged.
    generation: the fields of `rollout.RolloutConfig`, and of the task `temperature` (where none is
      asked for), `retype` and `backspace` (see `sample.sampling_options`).
    run: {"config": ..., "facts": ...} of the run they come from.
  """
  known = {"method": METHOD, "step": step, "network": dataclasses.asdict(sizes)}
  return {**known, "generation": generation, "run": run}


def write(directory: Path, params: dict, vocab: Vocab | TextVocab, record: dict) -> None:
  """Writes a model that `load_pretrained` reads; all processes must call it, the first one writes.

  Args:
    params: all parameters of the network.
  """
  if isinstance(vocab, TextVocab) and jax.process_index() == 0:
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(vocab.path, directory / TOKENIZER)
  exported.save(directory, params, record)


class Generation(NamedTuple):
  """What a model has made of a prompt.

  Attributes:
    text: what is left after the prompt, nothing of what was erased.
    typed: what was typed, key by key: text, "\\b" for <backspace>, "\\x04" for <eos>. Characters
      that would move a cursor are shown as pictures, as in the terminal; see `show.line`.
    finished: whether <eos> came, before there was no more room.
  """

  text: str
  typed: list[str]
  finished: bool


@dataclass(frozen=True)
class Loaded:
  """A trained model.

  Attributes:
    vocab: its tokens.
    record: sizes, step, limits of a generation, and config and facts of the run.
    params: the network's parameters, nested dicts of arrays.
    network: its functions of them (see transformer.py).
    rollout: see `rollout.make_rollout`.
  """

  vocab: Vocab | TextVocab = field(repr=False)
  record: dict = field(repr=False)
  params: dict = field(repr=False)
  network: transformer.TransformerFunctions = field(repr=False)
  rollout: Callable = field(repr=False)

  def generate(self, prompts: str | Sequence[str], **settings) -> list[str]:
    """What is left after each prompt, nothing erased; the arguments are those of `generations`.

    It breaks off where there is no more room: `Generation.finished` says so.
    """
    return [made.text for made in self.generations(prompts, **settings)]

  def generations(
    self,
    prompts: str | Sequence[str],
    temperature: float | None = None,
    seed: int = 0,
    top_k: int | None = None,
    top_p: float | None = None,
    max_actions: int | None = None,
    backspace: bool = True,
    batch: int = 64,
  ) -> list[Generation]:
    """Goes on from each prompt, as `--mode=sample` does with the same prompts, settings and seed.

    Up to rounding: where several devices or other batches round otherwise, a draw may fall the
    other way.

    Args:
      prompts: [b].
      temperature: 0 is greedy; None is 0 for questions and 1 for text.
      seed: of the draws, which depend on a prompt's place among the prompts.
      top_k, top_p: only of so many likeliest, only of the likeliest that have this probability.
      max_actions: tokens typed after a prompt, at most, <backspace>s and <eos> among them; None, or
        more than there is room for: until there is no more.
      backspace: whether a model that has learned to erase may.
      batch: prompts at a time, at most.

    Raises:
      UserError: a prompt is too long or has characters that the model does not know, or a setting
        is out of range.
    """
    prompts, how = _listed(prompts), self.record["generation"]
    temperature = how["temperature"] if temperature is None else temperature
    erases = how["backspace"] and backspace
    settings = sample.sampling_options(
      temperature, how["retype"], erases, top_k, top_p, max_actions
    )
    prompt, length = tokens.encode_prompts(prompts, self.vocab, how["max_length"])
    size, key = min(batch, len(prompts)), jax.random.key(seed)
    made = rollout.in_batches(self.rollout, self.params, prompt, length, size, key, **settings)

    def generation(begin: int, actions, text, end: int, finished) -> Generation:
      text = text[:end].tolist()
      left = "".join(self.vocab.pieces(text)[begin:])
      return Generation(
        left, show.strokes(actions.tolist(), self.vocab, text[:begin]), bool(finished)
      )

    return [generation(*row) for row in zip(length, *made, strict=True)]

  def log_likelihoods(
    self,
    prompts: str | Sequence[str],
    texts: str | Sequence[str],
    backspace: bool = False,
    finished: bool = True,
    batch: int = 8,
  ) -> np.ndarray:
    """log p(text | prompt) of each pair, in nats: typed token by token, with nothing erased.

    Args:
      prompts, texts: [b]; a text is encoded apart from its prompt.
      backspace: whether a model that has learned to erase may. Then each token counts without the
        probability of <backspace> in its place, which no text holds; see `questions.policies`.
      finished: whether <eos> after the text counts too.
      batch: pairs at a time, at most.

    Returns:
      float32 [b].

    Raises:
      UserError: not as many texts as prompts, one that is too long with its prompt, or one that has
        characters that the model does not know.
    """
    prompts, texts = _listed(prompts), _listed(texts)
    if len(prompts) != len(texts):
      raise UserError(f"there are {len(prompts)} prompts and {len(texts)} texts; give one of each.")
    how = self.record["generation"]
    prompt, length = tokens.encode_prompts(prompts, self.vocab, how["max_length"])
    typed = [self.vocab.encode(text) for text in texts]
    size = length + np.array([len(text) for text in typed])
    if size.max() > how["max_length"]:
      worst = int(size.argmax())
      raise UserError(
        f"{tokens.short(texts[worst])} and its prompt take {size[worst]} tokens, and the model's "
        f"context holds {how['max_length']}; shorten one of them."
      )
    actions = tokens.padded([[*text, EOS] for text in typed])
    rows, found = tree(prompt, length, actions, int(size.max())), []
    rows["weight"] *= finished | (rows["action"] != EOS)
    for start in range(0, len(texts), batch):
      index = np.arange(start, start + min(batch, len(texts))) % len(texts)  # one shape
      part = {name: x[index] for name, x in rows.items()}
      found.append(self._score(self.params, part, how["backspace"] and backspace))
    return np.concatenate(found)[: len(texts)]

  @cached_property
  def _score(self) -> Callable:
    """(params, rows of a tree, backspace) -> each row's log-likelihood, float32 [b]."""

    def score(params, rows, backspace: bool):
      logits = self.network.apply(params, rows["token"], rows["position"], rows["end"])
      return loss.log_likelihood(logits, rows, backspace)

    return jax.jit(score, static_argnums=2)


def _listed(texts: str | Sequence[str]) -> list[str]:
  return [texts] if isinstance(texts, str) else list(texts)


def load_pretrained(directory: str | Path) -> Loaded:
  """The model that `--mode=export` wrote, on one device.

  Raises:
    UserError: no such model.
  """
  folder = Path(directory).expanduser()
  try:
    record = read_json(folder / exported.CONFIG).get(METHOD)
  except (OSError, ValueError):
    record = None  # exported.load says what is wrong
  if record is None:
    record, vocab, network, params = _read_exported(folder)
  else:
    vocab, network, params = _read_hugging_face(folder, record)
  limits = {name: record["generation"][name] for name in rollout.RolloutConfig.__dataclass_fields__}
  generate = rollout.make_rollout(network, rollout.RolloutConfig(**limits))
  return Loaded(vocab, record, params, network, generate)


def _read_exported(folder: Path) -> tuple:
  """(record, vocabulary, network, parameters) of a run from nothing."""
  record, stored = exported.load(folder, METHOD)
  facts, sizes = record["run"]["facts"], dict(record["network"])
  if "tokenizer" in facts:
    facts = {"tokenizer": {**facts["tokenizer"], "path": str(folder / TOKENIZER)}}
  if sizes["lora"]:
    sizes["lora"] = lora.LoraConfig(**sizes["lora"])
  network = transformer.make_network(TransformerConfig(**sizes))

  def whole(key):
    return lora.join(network.init(key), network.frozen(key))

  params = exported.fill(stored, jax.eval_shape(whole, jax.random.key(0)))
  return record, tokens.from_facts(facts), network, params


def _read_hugging_face(folder: Path, record: dict) -> tuple:
  """(vocabulary, network, parameters) of a run from pretrained weights, its adapters merged."""
  sizes = TransformerConfig(**{**record["network"], "lora": None})
  vocab = TextVocab.from_file(folder)
  network = transformer.make_network(sizes)
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  device = SingleDeviceSharding(jax.local_devices()[0])
  shardings = jax.tree.map(lambda _: device, shapes)
  # The bias of <backspace> is there: an export has the tensor.
  params = pretrained.place(pretrained.read(folder, sizes, vocab, 0.0), shapes, shardings)
  return vocab, network, params
