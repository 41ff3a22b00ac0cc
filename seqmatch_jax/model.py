"""A trained model, opened once and used everywhere: to generate, to evaluate, to export.

    import seqmatch_jax
    model = seqmatch_jax.Model.from_run("runs/seqmatch_text")   # a run's newest good checkpoint
    model = seqmatch_jax.Model.from_pretrained("exported")      # what save_pretrained wrote
    texts = model.generate(["a prompt"], temperature=1.0, seed=0)
    numbers = model.evaluate()
    model.save_pretrained("exported")

`from_pretrained` and `generate` need jax, flax, numpy and safetensors, and tokenizers for a model
that has a tokenizer. A network that was drawn is saved as train_jax/storage/exported.py says, with
its tokenizer.json beside it. A pretrained one is saved as a Hugging Face folder
(huggingface/export.py), whose config.json has the same record as an entry.

Dimensions: b prompts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from seqmatch_jax import loss, rollout, tokens, transformer
from seqmatch_jax.actions import tree
from seqmatch_jax.display import show
from seqmatch_jax.huggingface import saved, tokenizer
from seqmatch_jax.huggingface.tokenizer import TextVocab
from seqmatch_jax.loss import LossConfig
from seqmatch_jax.rollout import Rollout, RolloutConfig
from seqmatch_jax.tokens import EOS, Vocab
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError, check_at_least, check_fraction


class Generation(NamedTuple):
  """A model's continuation of a prompt.

  Attributes:
    text: the text after the prompt, without the erased tokens.
    typed: the keys: text, "\\b" for <backspace>, "\\x04" for <eos>. Characters that would move a
      cursor are shown as pictures, as in the terminal; see `show.line`.
    finished: whether <eos> came before the room was used up.
  """

  text: str
  typed: list[str]
  finished: bool


def sampling_options(
  temperature: float,
  allow_retype: bool,
  backspace: bool,
  top_k: int | None,
  top_p: float | None,
  max_actions: int | None,
) -> dict:
  """The last arguments of `rollout.make_settings` for samples; UserError if one is out of range."""
  if not 0 <= temperature < math.inf:
    raise UserError(f"temperature={temperature} must be finite and at least 0; 0 is greedy.")
  for name, value in (("top_k", top_k), ("max_actions", max_actions)):
    if value is not None:
      check_at_least(name, value, 1)
  if top_p is not None:
    check_fraction("top_p", top_p)
  return {
    "temperature": temperature,
    "allow_retype": allow_retype and temperature > 0,  # a greedy one would repeat itself
    "allow_backspace": backspace,
    "top_k": top_k,
    "top_p": top_p,
    "max_actions": max_actions,
  }


@dataclass(frozen=True)
class Model:
  """A trained model.

  Attributes:
    record: sizes, step, limits of a generation, and config and metadata of the run (see
      `saved.make_record`).
    vocab: its tokens.
    network: functions of its parameters (see transformer.py).
    load: () -> all of the network's parameters, nested dicts of arrays. It is called when they are
      first needed, so a wrong request is refused before.
    mesh: the devices that share the work; None for one device.
    rollout: see `rollout.make_rollout`.
    source: the Hugging Face folder that the network comes from; "" for one that was drawn.
  """

  record: dict = field(repr=False)
  vocab: Vocab | TextVocab = field(repr=False)
  network: transformer.TransformerFunctions = field(repr=False)
  load: Callable[[], dict] = field(repr=False)
  mesh: Mesh | None = field(repr=False)
  rollout: Callable = field(repr=False)
  source: str = ""

  @classmethod
  def make(
    cls,
    record: dict,
    vocab: Vocab | TextVocab,
    network: transformer.TransformerFunctions,
    load: Callable[[], dict],
    mesh: Mesh | None = None,
    source: str = "",
  ) -> Model:
    """The model of a record, a network and the parameters that `load` reads."""
    generate = rollout.make_rollout(network, saved.limits_of(record), mesh)
    return cls(record, vocab, network, load, mesh, generate, source)

  @classmethod
  def from_run(
    cls,
    workdir: str | Path,
    step: int | None = None,
    pretrained: str = "",
    devices: list | None = None,
  ) -> Model:
    """The `sample` average of a run, on a mesh of the devices at hand (see `decoder.mesh_of`).

    Args:
      step: of the checkpoint; None for the newest good one.
      pretrained: the folder of the run's config.pretrained, if it was moved.
      devices: all, by default.
    """
    from ml_collections import ConfigDict

    from seqmatch_jax.huggingface import decoder
    from seqmatch_jax.tasks.from_config import find_task
    from train_jax.checkpointing.checkpoint import Checkpoints

    checkpoints = Checkpoints(workdir)
    config, metadata, step = checkpoints.require_run(saved.METHOD, step)
    config = ConfigDict(config)
    if pretrained:
      config, metadata = decoder.moved(config, metadata, pretrained)
    mesh = decoder.mesh_of(config, devices)
    sizes = decoder.make_sizes(config, metadata)
    network = transformer.make_network(sizes)
    record = saved.make_record(config, metadata, sizes, find_task(config), step)

    def load() -> dict:
      abstract = jax.eval_shape(network.init, jax.random.key(0))
      params, _ = checkpoints.restore_ema("sample", abstract, mesh, step)
      return decoder.with_frozen(config, metadata, params, mesh)

    vocab, source = tokenizer.from_metadata(metadata), config.get("pretrained", "")
    return cls.make(record, vocab, network, load, mesh, source)

  @classmethod
  def from_pretrained(cls, directory: str | Path) -> Model:
    """The model that `save_pretrained` wrote, on one device."""
    record, vocab, network, params, source = saved.read(Path(directory).expanduser())
    return cls.make(record, vocab, network, lambda: params, source=source)

  def with_params(self, params, step: int) -> Model:
    """The same model with other parameters, those of `step`; nothing is compiled again."""
    return dataclasses.replace(self, record={**self.record, "step": step}, load=lambda: params)

  @cached_property
  def params(self) -> dict:
    """All of the network's parameters, read once."""
    return self.load()

  @property
  def step(self) -> int:
    """The training step of the parameters."""
    return self.record["step"]

  @property
  def limits(self) -> RolloutConfig:
    """The limits of a generation."""
    return saved.limits_of(self.record)

  @property
  def loss_config(self) -> LossConfig:
    """The objective of its training."""
    return LossConfig(**self.record["run"]["config"]["loss"])

  def generate(self, prompts: str | Sequence[str], **settings) -> list[str]:
    """The text after each prompt, without the erased tokens; arguments as in `generations`.

    A text breaks off where there is no more room: `Generation.finished` says so.
    """
    return [generation.text for generation in self.generations(prompts, **settings)]

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
    """Continues each prompt, as `--mode=sample` does with the same prompts, settings and seed.

    Several devices or other batch sizes may round otherwise, and then a draw may fall otherwise.

    Args:
      prompts: [b].
      temperature: 0 is greedy; None is 0 for questions and 1 for text.
      seed: of the draws, which depend on a prompt's place among the prompts.
      top_k, top_p: draw from the `top_k` likeliest, and from the likeliest of probability `top_p`.
      max_actions: most tokens typed after a prompt, <backspace>s among them; None: until there is
        no more room, which is also the limit.
      backspace: whether a model that has learned to erase may.
      batch: most prompts at a time.
    """
    prompts, defaults = _listed(prompts), self.record["generation"]
    settings = sampling_options(
      defaults["temperature"] if temperature is None else temperature,
      defaults["allow_retype"],
      defaults["backspace"] and backspace,
      top_k,
      top_p,
      max_actions,
    )
    prompt, length = tokens.encode_prompts(prompts, self.vocab, self.limits.max_length)
    size, key = min(batch, len(prompts)), jax.random.key(seed)
    outputs = self.roll_out(prompt, length, size, key, **settings)

    def generation(start: int, actions, text, end: int, finished) -> Generation:
      text = text[:end].tolist()
      rest = "".join(self.vocab.pieces(text)[start:])
      keys = show.Typist(self.vocab, text[:start]).keys(actions.tolist())
      return Generation(rest, keys, bool(finished))

    return [generation(*row) for row in zip(length, *outputs, strict=True)]

  def roll_out(
    self,
    prompt: np.ndarray,
    length: np.ndarray,
    batch: int,
    key: jax.Array,
    forced: np.ndarray | None = None,
    **settings,
  ) -> Rollout:
    """Continues any number of encoded prompts [m, p], `batch` at a time; NumPy arrays.

    `forced` [m, a] and `settings` are the last arguments of `rollout.make_settings`.
    """
    outputs, m = [], len(prompt)
    for start in range(0, m, batch):
      row = np.arange(start, start + batch)
      index = row % m  # the last batch is filled: one shape, one compilation
      played = None if forced is None else forced[index]
      prompts = prompt[index], length[index], key, row
      output = self.rollout(self.params, *prompts, forced=played, **settings)
      outputs.append([mesh_lib.to_host(x) for x in output])
    return Rollout(*(np.concatenate(parts)[:m] for parts in zip(*outputs, strict=True)))

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
      batch: most pairs at a time.

    Returns:
      float32 [b].
    """
    prompts, texts = _listed(prompts), _listed(texts)
    if len(prompts) != len(texts):
      raise UserError(f"there are {len(prompts)} prompts and {len(texts)} texts; give one of each.")
    limit, n = self.limits.max_length, len(texts)
    prompt, length = tokens.encode_prompts(prompts, self.vocab, limit)
    answers = [self.vocab.encode(text) for text in texts]
    size = length + np.array([len(answer) for answer in answers])
    if size.max() > limit:
      longest = int(size.argmax())
      raise UserError(
        f"{tokens.short(texts[longest])} and its prompt take {size[longest]} tokens, and the "
        f"model's context holds {limit}; shorten one of them."
      )
    actions = tokens.padded([[*answer, EOS] for answer in answers])
    trees = tree(prompt, length, actions, int(size.max()))
    trees["weight"] *= finished | (trees["action"] != EOS)
    erases, scores = self.record["generation"]["backspace"] and backspace, []
    for start in range(0, n, batch):
      index = np.arange(start, start + min(batch, n)) % n  # one shape
      part = {name: x[index] for name, x in trees.items()}
      scores.append(mesh_lib.to_host(self._score[erases](self.params, part)))
    return np.concatenate(scores)[:n]

  @cached_property
  def _score(self) -> dict[bool, Callable]:
    """Whether it may erase -> the function (params, trees) -> log-likelihoods, float32 [b]."""

    def score(backspace: bool, params, trees):
      logits = self.network.apply(params, trees["token"], trees["position"], trees["end"])
      return loss.log_likelihood(logits, trees, backspace)

    return {may: mesh_lib.jit(functools.partial(score, may), self.mesh) for may in (True, False)}

  def evaluate(
    self, out: str | Path | None = None, seed: int = 0, features: str = ""
  ) -> dict[str, float]:
    """Every metric on all test examples, by name; docs/METRICS.md explains them.

    Args:
      out: also prints the numbers, and writes them into this directory.
      features: the workdir of a text run or a folder of GPT-2's weights, whose features MAUVE
        compares; "" for the run's config.eval.features.
    """
    from ml_collections import ConfigDict

    from seqmatch_jax.tasks.from_config import find_task
    from train_jax.metrics import report

    config, metadata = (self.record["run"][name] for name in ("config", "metadata"))
    config = ConfigDict(config)
    task = find_task(config)
    if features and not task.OPEN_ENDED:
      raise UserError(
        f"--features={features} is for the MAUVE of texts, and this run answers questions; leave "
        "it out."
      )
    features = features or config.eval.get("features", "")
    embed = load_features(features, self.vocab) if features else None
    run, examples = task.make_evaluate(config, metadata, self, seed, embed)
    metrics = run(self, True)
    if out is None:
      return {name: value for name, value in metrics if not np.ndim(value)}
    return report({"step": self.step, "seed": seed, "examples": examples}, metrics, Path(out))

  def save_pretrained(self, directory: str | Path) -> None:
    """Writes files that `from_pretrained` reads; all processes must call it, the first writes.

    A pretrained model becomes a folder in Hugging Face's layout, with its adapters merged.
    """
    vocab, source = self.vocab, self.source
    saved.write(Path(directory), self.record, lambda: self.params, vocab, source)


def load_features(path: str, vocab: Vocab | TextVocab) -> Callable:
  """The network at `path` as texts -> float32 [m, k], see `evaluation.features.Features`.

  Args:
    path: the workdir of a run on text, or a folder of GPT-2's or Llama's weights in Hugging Face's
      layout.
    vocab: the tokens of the texts; UserError if the network does not know all their characters.
  """
  from seqmatch_jax.evaluation import features
  from train_jax.checkpointing.checkpoint import Checkpoints

  workdir = Path(path).expanduser()
  if not Checkpoints(workdir).steps():
    return features.of_folder(path)
  model = Model.from_run(workdir)
  features.check_vocabulary(path, model.vocab, vocab)
  hidden = model.network.features
  return features.make_features(hidden, model.params, model.vocab, last=False, mesh=model.mesh)


def _listed(texts: str | Sequence[str]) -> list[str]:
  return [texts] if isinstance(texts, str) else list(texts)
