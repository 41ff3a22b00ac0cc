"""Metrics of a policy on questions: exact match, recovery, erasures, likelihood.

Dimensions: e examples, a actions, n data actions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from seqmatch_jax.actions import Noise, replay, tree
from seqmatch_jax.data.questions import Encoded
from seqmatch_jax.loss import LossConfig, log_likelihood
from seqmatch_jax.tokens import BACKSPACE, EOS, PAD
from train_jax import mesh as mesh_lib

# (temperature, allow_retype) of a generation, see `rollout.Settings`. With a temperature and with
# retyping it is the policy itself. Without retyping it is a search.
GENERATIONS = {
  "greedy": (0.0, False),
  "T=1": (1.0, True),
  "T=1, no retyping": (1.0, False),
  "T=0.5": (0.5, True),
}


class Erasures(NamedTuple):
  """Rates of erased tokens.

  A token is wrong if the text up to it does not begin the right answer. The first wrong token,
  typed after a text that does, is an error.

  Attributes:
    rate: <backspace>s over all actions.
    precision: the share of wrong tokens among the erased ones; NaN without any.
    recall: the share of errors that were erased; NaN without any.
  """

  rate: float
  precision: float
  recall: float


def erasures(actions: np.ndarray, answer: np.ndarray) -> Erasures:
  """Rates over trajectories [e, a] against the right answers [e, n]."""
  total = erased = erased_wrong = errors = errors_erased = 0
  for trajectory, right in zip(actions.tolist(), answer.tolist(), strict=True):
    stack: list[tuple[bool, bool]] = []  # of each token: is it wrong, is it an error
    for action in trajectory:
      if action == PAD:
        break
      total += 1
      if action == BACKSPACE:
        wrong, error = stack.pop()
        erased += 1
        erased_wrong += wrong
        errors_erased += error
      elif action != EOS:
        place, after_wrong = len(stack), bool(stack) and stack[-1][0]
        wrong = after_wrong or place >= len(right) or right[place] != action
        stack.append((wrong, wrong and not after_wrong))
        errors += wrong and not after_wrong
  return Erasures(
    rate=erased / max(total, 1),
    precision=erased_wrong / erased if erased else math.nan,
    recall=errors_erased / errors if errors else math.nan,
  )


def exact_match(actions: np.ndarray, answer: np.ndarray) -> np.ndarray:
  """bool [e]: whether the trajectory [e, a] ends with the right answer [e, n]."""
  return np.array(
    [
      EOS in trajectory and [*replay([], trajectory), EOS] == [x for x in right if x != PAD]
      for trajectory, right in zip(actions.tolist(), answer.tolist(), strict=True)
    ]
  )


def force_error(
  rng: np.random.Generator, answer: np.ndarray, wrong: np.ndarray, max_actions: int
) -> np.ndarray:
  """The right answer up to a random place, and there a wrong token -> int32 [e, max_actions].

  From there on the model is on its own: PAD follows, or replaces the token if none can be wrong.

  Args:
    answer: int32 [e, n], characters, <eos>, PAD.
    wrong: bool [e, v], the candidates for the wrong token.
  """
  letters = np.sum(answer > BACKSPACE, axis=1)
  place = (rng.random(len(answer)) * letters).astype(int)
  candidates, example = wrong.copy(), np.arange(len(answer))
  candidates[example, answer[example, place]] = False
  best = np.argmax(rng.random(candidates.shape) * candidates, 1)
  mistake = np.where(candidates.any(1), best, PAD)
  index = np.arange(answer.shape[1])
  forced = np.where(index < place[:, None], answer, PAD)
  forced = np.where(index == place[:, None], mistake[:, None], forced)
  out = np.zeros((len(answer), max_actions), np.int32)
  width = min(max_actions, forced.shape[1])
  out[:, :width] = forced[:, :width]
  return out


def policies(backspace: bool) -> dict[str, bool]:
  """The policies whose likelihood is measured: end of a metric's name -> whether it may erase.

  They are the policy itself, and if it may erase, the same policy without <backspace>. Right
  answers and real texts have no <backspace>, so the first one loses the probability that it has
  there. Only the second one compares with a model that has no <backspace>.
  """
  return {"": True, ", forbidden": False} if backspace else {"": False}


def make_total(apply: Callable, config: LossConfig, mesh: Mesh | None = None) -> Callable:
  """Returns `total(params, trees)`: summed log-likelihoods in nats, and the number of actions.

  The sums are float32 [policies], one under each of `policies`, over the actions with weight, <eos>
  too. `config` says whether the model may erase. The devices of `mesh` share the rows.
  """
  may_erase = policies(config.backspace).values()

  def total(params, trees):
    logits = apply(params, trees["token"], trees["position"], trees["end"])
    sums = jnp.stack([log_likelihood(logits, trees, may).sum() for may in may_erase])
    return sums, trees["weight"].sum()

  return mesh_lib.jit(total, mesh)


def sum_batches(
  total: Callable, params, select: Callable, rows: int, batch: int
) -> tuple[np.ndarray, float]:
  """(log-likelihoods [policies], number of actions) of `rows` rows, `batch` at a time.

  Args:
    total: see `make_total`.
    select: numbers of rows, int [batch] -> these rows, a batch of `actions.tree`.
  """
  nats, count = 0.0, 0.0
  for start in range(0, rows, batch):
    index = np.arange(start, start + batch)
    trees = select(index % rows)
    # The last batch is filled with rows that carry no loss: one shape, one compilation.
    trees["weight"] = trees["weight"] * (index < rows)[:, None]
    sums = total(params, trees)
    nats, count = nats + np.float64(sums[0]), count + float(sums[1])
  return nats, count


def make_likelihood(
  apply: Callable, config: LossConfig, batch: int, mesh: Mesh | None = None
) -> Callable:
  """Returns `likelihood(params, data) -> [policies]`, which computes `batch` examples at a time.

  It is the mean log-likelihood of an answer's actions under each of `policies`, in nats per action,
  <eos> too.
  """
  total = make_total(apply, config, mesh)

  def likelihood(params, data: Encoded) -> list[float]:
    trees = tree(data.prompt, data.prompt_length, data.answer, data.nodes(Noise()))

    def select(index):
      return {name: x[index] for name, x in trees.items()}

    nats, count = sum_batches(total, params, select, len(data.answer), batch)
    return (nats / count).tolist()

  return likelihood


def make_score(apply: Callable, batch: int, mesh: Mesh | None = None) -> Callable:
  """Returns `score(params, data, actions) -> float32 [e]`, the log-likelihood of each trajectory.

  The trajectories [e, a] and the model have no <backspace>.
  """

  def score_rows(params, trees):
    logits = apply(params, trees["token"], trees["position"], trees["end"])
    return log_likelihood(logits, trees, backspace=False)

  score_rows = mesh_lib.jit(score_rows, mesh)

  def score(params, data: Encoded, actions: np.ndarray) -> np.ndarray:
    nodes = data.prompt.shape[1] + actions.shape[1]
    trees, scores = tree(data.prompt, data.prompt_length, actions, nodes), []
    for start in range(0, len(actions), batch):
      index = np.arange(start, start + batch) % len(actions)  # the last batch is filled
      part = {name: x[index] for name, x in trees.items()}
      scores.append(mesh_lib.to_host(score_rows(params, part)))
    return np.concatenate(scores)[: len(actions)]

  return score


def best_of(
  score: Callable, draws: list[np.ndarray], answer: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """(bool [e], int [e]): whether the likeliest of several trajectories [e, a] matches, all actions.

  It is the control for the cost of erasing: a model draws as many answers as a correction takes
  actions, and keeps the one that it finds likeliest.

  Args:
    score: trajectories -> their log-likelihood [e].
  """
  best = np.argmax([score(actions) for actions in draws], axis=0)  # [e]
  chosen = np.stack(draws)[best, np.arange(len(best))]
  return exact_match(chosen, answer), sum(np.sum(actions != PAD, axis=1) for actions in draws)


def measure(
  generate: Callable, score: Callable, data: Encoded, backspace: bool, seed: int, noise: Noise
) -> Iterator[tuple[str, float]]:
  """Yields ("exact/greedy", value) and so on.

  For each of GENERATIONS: `exact`, exact match with <backspace> allowed; `forbidden`, without it;
  `recovery`, exact match although a wrong token was forced; `actions`, their number in an answer;
  `rate`, `precision`, `recall` of erasures; `finished`, trajectories that came to <eos>. A model
  without <backspace> has only `exact`, `recovery`, `actions` and `finished`, and `best_of` 3 draws
  at T = 1; retyping makes no difference there.

  Args:
    generate: (temperature, allow_retype, backspace, forced or None, seed) -> actions int32 [e, a].
    score: actions -> their log-likelihood [e]; see `make_score`.
    noise: of the training; the forced tokens are of its kind.
  """
  rng = np.random.default_rng(seed)
  wrong = data.wrong(noise)
  for name, settings in GENERATIONS.items():
    temperature, allow_retype = settings
    search = temperature > 0 and not allow_retype  # without <backspace> it is as with retyping
    if search and not backspace:
      continue
    actions = generate(*settings, backspace, None, seed)
    yield f"exact/{name}", float(exact_match(actions, data.answer).mean())
    if backspace and not search:
      plain = generate(*settings, False, None, seed)
      yield f"forbidden/{name}", float(exact_match(plain, data.answer).mean())
    forced = force_error(rng, data.answer, wrong, actions.shape[1])
    recovered = generate(*settings, backspace, forced, seed)
    yield f"recovery/{name}", float(exact_match(recovered, data.answer).mean())
    yield f"actions/{name}", float(np.mean(np.sum(actions != PAD, axis=1)))
    if backspace:
      for metric, value in erasures(actions, data.answer)._asdict().items():
        if not math.isnan(value):
          yield f"{metric}/{name}", value
    yield f"finished/{name}", float(np.mean(np.any(actions == EOS, axis=1)))
    if name == "T=1" and not backspace:
      draws = [actions, *(generate(*settings, False, None, seed + i) for i in (1, 2))]
      match, count = best_of(score, draws, data.answer)
      yield f"exact/{name}, best of 3", float(match.mean())
      yield f"actions/{name}, best of 3", float(count.mean())
