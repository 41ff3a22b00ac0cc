"""A trained model, opened once and used everywhere: to generate, to evaluate, to hand on.

    import seqmatch_jax
    model = seqmatch_jax.Model.from_run("runs/seqmatch_text")   # a run's newest good checkpoint
    model = seqmatch_jax.Model.from_pretrained("exported")      # what save_pretrained wrote
    texts = model.generate(["a prompt"], temperature=1.0, seed=0)
    numbers = model.evaluate()
    model.save_pretrained("exported")

`from_pretrained` and `generate` need jax, flax, numpy and safetensors, and tokenizers for a model
that has a tokenizer. A run from nothing is saved as train_jax/storage/exported.py says, its
tokenizer.json beside it; one from pretrained weights as a Hugging Face folder
(huggingface/export.py), whose config.json has the same record as an entry.

Dimensions: b prompts.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from seqmatch_jax import loss, rollout, tokens, transformer
from seqmatch_jax.actions import tree
from seqmatch_jax.display import show
from seqmatch_jax.huggingface import pretrained
from seqmatch_jax.loss import LossConfig
from seqmatch_jax.rollout import RolloutConfig
from seqmatch_jax.tokens import EOS, TextVocab, Vocab
from seqmatch_jax.transformer import TransformerConfig
from train_jax import lora
from train_jax import mesh as mesh_lib
from train_jax.errors import UserError
from train_jax.files import read_json
from train_jax.storage import exported

METHOD, TOKENIZER = "seqmatch", "tokenizer.json"


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


def make_record(config, metadata: dict, sizes: TransformerConfig, task, step: int = 0) -> dict:
  """What a `Model` is made of beside its parameters, as JSON: what is saved with an export.

  Args:
    config, metadata: those saved with a checkpoint; `config` a ConfigDict.
    task: the module of what is written, see task.py.
  """
  limits = {name: metadata[name] for name in ("max_length", "max_actions", "max_backspaces")}
  generation = {
    **limits,
    "open_ended": task.OPEN_ENDED,
    "temperature": task.TEMPERATURE,
    "allow_retype": task.RETYPE,
    "backspace": config.loss.backspace,
  }
  run = {"config": config.to_dict(), "metadata": metadata}
  known = {"method": METHOD, "step": step, "network": dataclasses.asdict(sizes)}
  return {**known, "generation": generation, "run": run}


@dataclass(frozen=True)
class Model:
  """A trained model.

  Attributes:
    record: sizes, step, limits of a generation, and config and metadata of the run (see
      `make_record`).
    vocab: its tokens.
    network: functions of its parameters (see transformer.py).
    load: () -> all of the network's parameters, nested dicts of arrays; called when they are first
      needed, so that a wrong request is refused before.
    mesh: of the devices that share the work; None for one.
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
    generate = rollout.make_rollout(network, _limits(record), mesh)
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
      pretrained: where the folder of the run's config.pretrained is now; "" where it was.
      devices: all, by default.

    Raises:
      UserError: no such checkpoint, of another method, or other pretrained weights than the run's.
    """
    from ml_collections import ConfigDict

    from seqmatch_jax.huggingface import decoder
    from seqmatch_jax.tasks.from_config import find_task
    from train_jax.checkpointing.checkpoint import Checkpoints

    checkpoints = Checkpoints(workdir)
    saved, metadata, found = checkpoints.require_run(METHOD, step)
    config = ConfigDict(saved)
    if pretrained:
      config, metadata = decoder.moved(config, metadata, pretrained)
    mesh = decoder.mesh_of(config, devices)
    sizes = decoder.make_sizes(config, metadata)
    network = transformer.make_network(sizes)
    record = make_record(config, metadata, sizes, find_task(config), found)

    def load() -> dict:
      abstract = jax.eval_shape(network.init, jax.random.key(0))
      params, _ = checkpoints.restore_ema("sample", abstract, mesh, found)
      return decoder.with_frozen(config, metadata, params, mesh)

    vocab, source = tokens.from_metadata(metadata), config.get("pretrained", "")
    return cls.make(record, vocab, network, load, mesh, source)

  @classmethod
  def from_pretrained(cls, directory: str | Path) -> Model:
    """The model that `save_pretrained` wrote, on one device.

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
      return cls.make(record, vocab, network, lambda: params)
    vocab, network, params = _read_hugging_face(folder, record)
    return cls.make(record, vocab, network, lambda: params, source=str(folder))

  def with_params(self, params, step: int) -> Model:
    """The same model with other parameters, those of `step`; nothing is compiled again."""
    return dataclasses.replace(self, record={**self.record, "step": step}, load=lambda: params)

  @cached_property
  def params(self) -> dict:
    """All of the network's parameters, read once."""
    return self.load()

  @property
  def step(self) -> int:
    """The training step that the parameters are of."""
    return self.record["step"]

  @property
  def limits(self) -> RolloutConfig:
    """Of a generation."""
    return _limits(self.record)

  @property
  def loss_config(self) -> LossConfig:
    """The objective that it was trained with."""
    return LossConfig(**self.record["run"]["config"]["loss"])

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
    settings = rollout.sampling_options(
      temperature, how["allow_retype"], erases, top_k, top_p, max_actions
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

    def score(backspace: bool, params, rows):
      logits = self.network.apply(params, rows["token"], rows["position"], rows["end"])
      return loss.log_likelihood(logits, rows, backspace)

    jitted = {may: mesh_lib.jit(functools.partial(score, may), self.mesh) for may in (True, False)}
    return lambda params, rows, backspace: mesh_lib.to_host(jitted[backspace](params, rows))

  def evaluate(
    self, out: str | Path | None = None, seed: int = 0, features: str = ""
  ) -> dict[str, float]:
    """Every metric on all test examples, by name; docs/METRICS.md says what is what.

    Args:
      out: also prints the numbers, and writes them into this directory.
      features: the workdir of a text run or a folder of GPT-2's weights, whose features MAUVE
        compares; "" for the run's config.eval.features.

    Raises:
      UserError: the run's data are not there, or are others now.
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
    found = run(self, True)
    if out is None:
      return {name: value for name, value in found if not np.ndim(value)}
    return report({"step": self.step, "seed": seed, "examples": examples}, found, Path(out))

  def save_pretrained(self, directory: str | Path) -> None:
    """Writes files that `from_pretrained` reads; all processes must call it, the first writes.

    A model from pretrained weights becomes a folder as Hugging Face lays it out, adapters merged.

    Raises:
      UserError: the directory is what the model began from, or has its tokenizer.
    """
    out, vocab = Path(directory), self.vocab
    taken = [self.source] if self.source else []
    taken += [Path(vocab.path).parent] if isinstance(vocab, TextVocab) else []
    if out.resolve() in (Path(path).expanduser().resolve() for path in taken):
      raise UserError(
        f"--out={out} is what the run began from or has its tokenizer; choose another directory."
      )
    if self.source:
      from seqmatch_jax.huggingface import export

      sizes = _sizes(self.record)
      return export.write(out, self.params, sizes, vocab, self.source, self.record)
    if isinstance(vocab, TextVocab) and jax.process_index() == 0:
      out.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(vocab.path, out / TOKENIZER)
    return exported.save(out, self.params, self.record)


def load_features(path: str, vocab: Vocab | TextVocab) -> Callable:
  """The network at `path` as texts -> float32 [m, k], see `evaluation.features.Features`.

  Args:
    path: the workdir of a run on text, or a folder of GPT-2's or Llama's weights as Hugging Face
      lays it out.
    vocab: of what texts will be made of.

  Raises:
    UserError: there is none, or it does not know all characters of `vocab`.
  """
  from seqmatch_jax.evaluation import features
  from train_jax.checkpointing.checkpoint import Checkpoints

  if not Checkpoints(Path(path).expanduser()).steps():
    return features.of_folder(path)
  model = Model.from_run(Path(path).expanduser())
  features.check_vocabulary(path, model.vocab, vocab)
  hidden = model.network.features
  return features.make_features(hidden, model.params, model.vocab, last=False, mesh=model.mesh)


def _listed(texts: str | Sequence[str]) -> list[str]:
  return [texts] if isinstance(texts, str) else list(texts)


def _limits(record: dict) -> RolloutConfig:
  names = (field.name for field in dataclasses.fields(RolloutConfig))
  return RolloutConfig(**{name: record["generation"][name] for name in names})


def _sizes(record: dict) -> TransformerConfig:
  sizes = dict(record["network"])
  return TransformerConfig(**{**sizes, "lora": sizes["lora"] and lora.LoraConfig(**sizes["lora"])})


def _read_exported(folder: Path) -> tuple:
  """(record, vocabulary, network, parameters) of a run from nothing."""
  record, stored = exported.load(folder, METHOD)
  metadata = record["run"]["metadata"]
  if "tokenizer" in metadata:
    metadata = {"tokenizer": {**metadata["tokenizer"], "path": str(folder / TOKENIZER)}}
  network = transformer.make_network(_sizes(record))

  def whole(key):
    return lora.join(network.init(key), network.frozen(key))

  params = exported.fill(stored, jax.eval_shape(whole, jax.random.key(0)))
  return record, tokens.from_metadata(metadata), network, params


def _read_hugging_face(folder: Path, record: dict) -> tuple:
  """(vocabulary, network, parameters) of a run from pretrained weights, its adapters merged."""
  sizes = TransformerConfig(**{**record["network"], "lora": None})
  vocab = TextVocab.from_file(folder)
  network = transformer.make_network(sizes)
  shapes = jax.eval_shape(network.init, jax.random.key(0))
  device = SingleDeviceSharding(jax.local_devices()[0])
  shardings = jax.tree.map(lambda _: device, shapes)
  # The bias of <backspace> is there: an export has the tensor.
  params = pretrained.to_device(pretrained.read(folder, sizes, vocab, 0.0), shapes, shardings)
  return vocab, network, params
