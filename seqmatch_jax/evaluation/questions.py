"""How good is a policy that may take tokens back? Exact match, recovery, erasures, likelihood.

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
from train_jax.multihost.signals import pause

# (temperature, allow_retype) of a generation, see `rollout.make_rollout`. Above 0 the
# policy is the model's as it is; not to type again what was erased is a search of its own.
GENERATIONS = {
  "greedy": (0.0, False),
  "T=1": (1.0, True),
  "T=1, no retyping": (1.0, False),
  "T=0.5": (0.5, True),
}


class Erasures(NamedTuple):
  """What became of wrong tokens.

  A token is wrong where the text up to and with it does not begin the right answer; it is an error
  where it is the first such, that is, where it was typed after a text that did.

  Attributes:
    rate: <backspace>s over all actions.
    precision: erased tokens that were wrong, of all erased tokens; NaN without any.
    recall: errors that were erased, of all errors; NaN without any.
  """

  rate: float
  precision: float
  recall: float


def erasures(actions: np.ndarray, answer: np.ndarray) -> Erasures:
  """Counts over trajectories [e, a] against the right answers [e, n], one stack each."""
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
        before = stack[-1][0] if stack else False
        place = len(stack)
        wrong = before or place >= len(right) or right[place] != action
        stack.append((wrong, wrong and not before))
        errors += wrong and not before
  return Erasures(
    rate=erased / max(total, 1),
    precision=erased_wrong / erased if erased else math.nan,
    recall=errors_erased / errors if errors else math.nan,
  )


def exact_match(actions: np.ndarray, answer: np.ndarray) -> np.ndarray:
  """bool [e]: did the trajectory [e, a] end, and leave the right answer [e, n]?"""
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

  PAD after it, or in its place where no token can be wrong: from there on the model is on its own.

  Args:
    answer: int32 [e, n], characters, <eos>, PAD.
    wrong: bool [e, v], what a wrong token may be.
  """
  letters = np.sum(answer > BACKSPACE, axis=1)
  place = (rng.random(len(answer)) * letters).astype(int)
  may = wrong.copy()
  may[np.arange(len(answer)), answer[np.arange(len(answer)), place]] = False
  mistake = np.where(may.any(1), np.argmax(rng.random(may.shape) * may, 1), PAD)
  index = np.arange(answer.shape[1])
  forced = np.where(index < place[:, None], answer, PAD)
  forced = np.where(index == place[:, None], mistake[:, None], forced)
  out = np.zeros((len(answer), max_actions), np.int32)
  width = min(max_actions, forced.shape[1])
  out[:, :width] = forced[:, :width]
  return out


def policies(backspace: bool) -> dict[str, bool]:
  """The policies whose likelihood is measured: end of a metric's name -> whether it may erase.

  The policy itself, and if that may erase, the same where it may not. Right answers and real texts
  have no <backspace>: the first counts the probability that it has there as an error, so the second
  is the one to compare with a model without it.
  """
  return {"": True, ", forbidden": False} if backspace else {"": False}


def make_total(apply: Callable, config: LossConfig, mesh: Mesh | None = None) -> Callable:
  """Returns `total(params, rows)`: the actions' summed log-likelihood in nats, and their number.

  Under each of `policies`: float32 [policies]; of the actions that carry weight, <eos> too. Of
  `config`, whether it may erase counts. The devices of `mesh` share the rows out.
  """
  may_erase = policies(config.backspace).values()

  def total(params, rows):
    logits = apply(params, rows["token"], rows["position"], rows["end"])
    sums = jnp.stack([log_likelihood(logits, rows, may).sum() for may in may_erase])
    return sums, rows["weight"].sum()

  return mesh_lib.jit(total, mesh)


def make_likelihood(
  apply: Callable, config: LossConfig, batch: int, mesh: Mesh | None = None
) -> Callable:
  """Returns `likelihood(params, data) -> [policies]`, which computes `batch` examples at a time.

  That is the mean log-likelihood of an answer's actions under each of `policies`, in nats an
  action, <eos> too.
  """
  total = make_total(apply, config, mesh)

  def likelihood(params, data: Encoded) -> list[float]:
    made = tree(data.prompt, data.prompt_length, data.answer, data.nodes(Noise()))
    log_likelihood, count = 0.0, 0.0
    for start in range(0, len(data.answer), batch):
      # The last batch is filled with rows that carry no loss: one shape, one compilation.
      index = np.arange(start, start + batch)
      rows = {name: x[index % len(x)] for name, x in made.items()}
      rows["weight"] = rows["weight"] * (index < len(data.answer))[:, None]
      sums = total(params, rows)
      log_likelihood, count = log_likelihood + np.float64(sums[0]), count + float(sums[1])
      pause()
    return (log_likelihood / count).tolist()

  return likelihood


def make_score(apply: Callable, batch: int, mesh: Mesh | None = None) -> Callable:
  """Returns `score(params, data, actions) -> float32 [e]`, the log-likelihood of each trajectory.

  Of trajectories [e, a] without <backspace>, under a model that has none.
  """

  def of_rows(params, rows):
    logits = apply(params, rows["token"], rows["position"], rows["end"])
    return log_likelihood(logits, rows, backspace=False)

  of_rows = mesh_lib.jit(of_rows, mesh)

  def score(params, data: Encoded, actions: np.ndarray) -> np.ndarray:
    nodes = data.prompt.shape[1] + actions.shape[1]
    made, found = tree(data.prompt, data.prompt_length, actions, nodes), []
    for start in range(0, len(actions), batch):
      index = np.arange(start, start + batch) % len(actions)  # the last batch is filled
      found.append(mesh_lib.to_host(of_rows(params, {name: x[index] for name, x in made.items()})))
      pause()
    return np.concatenate(found)[: len(actions)]

  return score


def best_of(
  score: Callable, draws: list[np.ndarray], answer: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """(bool [e], int [e]): does the likeliest of several trajectories [e, a] match, and all actions.

  The control for what erasing costs: a model that draws as many answers as a correction takes
  actions, and keeps the one that it finds likeliest itself.

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
  `recovery`, the final answer is right although a wrong token was forced into it; `actions`, how
  many an answer takes; `rate`, `precision`, `recall` of erasures; `finished`, trajectories that
  came to <eos>. Where the model has no <backspace> there are `exact`, `recovery`, `actions` and
  `finished` only, retyping makes no difference, and there is `best_of` 3 draws at T = 1.

  Args:
    generate: (temperature, allow_retype, backspace, forced or None, seed) -> actions int32 [e, a].
    score: actions -> their log-likelihood [e]; see `make_score`.
    noise: of the training; the tokens that are forced are of its kind.
  """
  rng = np.random.default_rng(seed)
  wrong = data.wrong(noise)
  for name, how in GENERATIONS.items():
    temperature, allow_retype = how
    search = temperature > 0 and not allow_retype  # without <backspace> it is as with retyping
    if search and not backspace:
      continue
    actions = generate(*how, backspace, None, seed)
    yield f"exact/{name}", float(exact_match(actions, data.answer).mean())
    if backspace and not search:
      plain = generate(*how, False, None, seed)
      yield f"forbidden/{name}", float(exact_match(plain, data.answer).mean())
    forced = force_error(rng, data.answer, wrong, actions.shape[1])
    recovered = generate(*how, backspace, forced, seed)
    yield f"recovery/{name}", float(exact_match(recovered, data.answer).mean())
    yield f"actions/{name}", float(np.mean(np.sum(actions != PAD, axis=1)))
    if backspace:
      for metric, value in erasures(actions, data.answer)._asdict().items():
        if not math.isnan(value):
          yield f"{metric}/{name}", value
    yield f"finished/{name}", float(np.mean(np.any(actions == EOS, axis=1)))
    if name == "T=1" and not backspace:
      draws = [actions, *(generate(*how, False, None, seed + i) for i in (1, 2))]
      match, taken = best_of(score, draws, data.answer)
      yield f"exact/{name}, best of 3", float(match.mean())
      yield f"actions/{name}, best of 3", float(taken.mean())
