"""The SequenceMatch objective: a batch of trajectories -> the loss (arXiv 2306.05426).

The logits l(a|s) are soft Q-values: V(s) = logsumexp_a l(a|s), log pi(a|s) = l(a|s) - V(s), and the
reward of an action that leads from s to s' is r = l(a|s) - gamma V(s'). The paper maximises

    J = E_data[ sum_i gamma^i phi(alpha r_i) / alpha ] - V(s_0)

for the divergence of phi less alpha times the causal entropy. Along every trajectory the difference
r_i - log pi_i = V_i - gamma V_{i+1} telescopes to V(s_0). So J is the discounted log-likelihood
with a penalty on large rewards, in value and in gradient:

    J = E_data[ sum_i gamma^i (log pi_i + penalty(r_i)) ],  penalty(r) = phi(alpha r) / alpha - r.

chi2_mixture adds E_model[ sum_i gamma^i penalty(r_i) ] on trajectories of the model, whose sampling
passes no gradient. Maximum likelihood is alpha = 0, gamma = 1. Behavioural cloning is the same on
noised data. The sum is over the actions of weight 1, while the time i counts all actions: without
the noise actions nothing telescopes, so only the second form of J is right.

After <eos> the absorbing state repeats <eos> for ever. Its value is tied to l(eos|s), which costs
nothing at the optimum. Then all of these actions have the reward (1 - gamma) l(eos|s), and the
weight of their geometric series is 1 / (1 - gamma).

Unlikelihood training (Welleck et al., arXiv 1908.04319) can be added as a baseline. It lowers the
probability of each token that the text before an action holds already, except the action itself.

Dimensions: b batch, s node, a action, v vocabulary. A batch is described in `actions.py`; several
trajectories may share a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqmatch_jax import divergence
from seqmatch_jax.actions import visible
from seqmatch_jax.tokens import BACKSPACE, BOS, EOS, PAD
from train_jax.errors import UserError, check_at_least, check_one_of

ILLEGAL = -1e9  # exp of it is 0 beside any logit, and nothing becomes infinite or NaN


@dataclass(frozen=True)
class LossConfig:
  """The divergence and its weights.

  Attributes:
    divergence: one of `divergence.DIVERGENCES`.
    alpha: weight of the causal entropy, and so of the penalty; 0 is maximum likelihood.
    gamma: discount per action, noise included.
    backspace: whether <backspace> is ever legal.
    unlikelihood: weight of the unlikelihood of repeated tokens; 0 leaves it out, 1 is Welleck's.
    warmup: steps of maximum likelihood without noise that come first.
    anneal: steps after them over which alpha grows from 0.
  """

  divergence: str
  alpha: float
  gamma: float
  backspace: bool
  unlikelihood: float = 0.0
  warmup: int = 0
  anneal: int = 0

  def __post_init__(self):
    check_one_of("loss.divergence", self.divergence, divergence.DIVERGENCES)
    for name in ("warmup", "anneal"):
      check_at_least(f"loss.{name}", getattr(self, name), 0)
    for name in ("alpha", "unlikelihood"):
      if not 0 <= getattr(self, name) < math.inf:
        raise UserError(
          f"loss.{name}={getattr(self, name)} must be finite and at least 0; 0 leaves it out."
        )
    if not 0 < self.gamma <= 1:
      raise UserError(f"loss.gamma={self.gamma} must lie in (0, 1]; 1 does not discount.")

  @property
  def on_policy(self) -> bool:
    """Whether the objective has a term on the model's own trajectories."""
    return self.divergence == "chi2_mixture"


class Terms(NamedTuple):
  """Per action [b, a], undiscounted and unmasked; <eos> stands for the whole absorbing series."""

  log_prob: jax.Array
  penalty: jax.Array
  reward: jax.Array


def legal_logits(logits: jax.Array, erasable: jax.Array, backspace: bool) -> jax.Array:
  """logits [..., v] with illegal actions at `ILLEGAL`, where they pass no gradient.

  <pad> and <bos> are no actions; <backspace> is one where `erasable` [...], if `backspace`.
  """
  token = jnp.arange(logits.shape[-1])
  erasing = (erasable & backspace)[..., None]
  legal = (token != PAD) & (token != BOS) & ((token != BACKSPACE) | erasing)
  return jnp.where(legal, logits, ILLEGAL)


def _soft_q(config: LossConfig, logits: jax.Array, batch: dict) -> tuple[jax.Array, jax.Array]:
  """Legal logits [b, s, v], and their values V [b, s]."""
  # In at least float32: 16-bit logits would leave logsumexp two digits.
  logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
  logits = legal_logits(logits, batch["erasable"], config.backspace)
  return logits, jax.nn.logsumexp(logits, axis=-1)


def terms(config: LossConfig, logits: jax.Array, batch: dict, alpha_scale=1.0) -> Terms:
  """Log-probability, penalty and reward of each action of the batch; logits [b, s, v].

  It reads one value per node and one logit per action. No array has the shape [b, a, v].
  """
  logits, value = _soft_q(config, logits, batch)
  chosen = jax.vmap(lambda l, read, action: l[read, action])(logits, batch["read"], batch["action"])
  log_prob = chosen - jnp.take_along_axis(value, batch["read"], axis=1)  # [b, a]
  after = jnp.take_along_axis(value, batch["next"], axis=1)

  # penalty((1 - gamma) l, alpha) / (1 - gamma) = penalty(l, (1 - gamma) alpha), also as gamma -> 1.
  ends = batch["action"] == EOS
  share = jnp.where(ends, 1 - config.gamma, 1.0)
  reward = jnp.where(ends, chosen, chosen - config.gamma * after)
  alpha = config.alpha * alpha_scale * share
  return Terms(log_prob, divergence.penalty(config.divergence, reward, alpha), share * reward)


def log_likelihood(logits: jax.Array, batch: dict, backspace: bool) -> jax.Array:
  """The log-likelihood [b] of each row's actions with weight, in nats; logits [b, s, v].

  `backspace` is whether the policy may erase.
  """
  policy = LossConfig("chi2", alpha=0.0, gamma=1.0, backspace=backspace)
  return jnp.sum(terms(policy, logits, batch).log_prob * batch["weight"], axis=1)


def unlikelihood(config: LossConfig, logits: jax.Array, batch: dict) -> jax.Array:
  """sum_c -log(1 - pi(c | s_i)) of each action i [b, a], over the tokens c of the text s_i.

  The prompt is a part of the text. Each token counts once, and the action itself does not. No
  array is larger than [b, a, s]. The logits are [b, s, v].
  """

  @jax.vmap
  def row(logits, value, token, end, read, action):
    sees = visible(end)  # [s, s]
    same = (token[:, None] == token) & ~jnp.eye(len(token), dtype=bool)
    # All nodes that see a node see the same text before it. So "new" is a property of the node.
    new = ~(sees & same).any(1)
    candidate = sees[read] & new & (token != action[:, None])  # [a, s]
    log_p = logits[read[:, None], token] - value[read, None]
    # At a p that rounds to 1 the logarithm of 1 - p would have an infinite gradient.
    log_rest = jnp.log(-jnp.expm1(jnp.minimum(log_p, -1e-6)))
    return -jnp.sum(jnp.where(candidate, log_rest, 0.0), axis=1)

  names = ("token", "end", "read", "action")
  return row(*_soft_q(config, logits, batch), *(batch[name] for name in names))


def trajectories(batch: dict) -> jax.Array:
  """The number of trajectories in the batch, at least 1."""
  return jnp.maximum(jnp.sum((batch["time"] == 0) & (batch["action"] != PAD)), 1)


def normalized(batch: dict, model: dict | None = None) -> tuple[dict, dict | None]:
  """Both batches with scaled weights: then `loss` is a mean over rows, or over equal parts of them.

  Each term of the objective is a mean over trajectories, divided by the mean number of data actions
  with weight in one. Together that divides by the number of these actions.

  Args:
    batch: the data, a batch of trees (see `actions.tree`) of any number of rows.
    model: the model's own trajectories, another such batch.
  """

  def scaled(batch: dict, scale) -> dict:
    return {**batch, "weight": batch["weight"] * scale}

  per_action = 1 / jnp.maximum(jnp.sum(batch["weight"]), 1.0)
  data = scaled(batch, len(batch["weight"]) * per_action)
  if model is None:
    return data, None
  share = trajectories(batch) / trajectories(model)
  return data, scaled(model, share * len(model["weight"]) * per_action)


def loss(
  config: LossConfig,
  logits: jax.Array,
  batch: dict,
  model: dict | None = None,
  model_logits: jax.Array | None = None,
  alpha_scale: jax.Array | float = 1.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """-J per data action, so maximum likelihood is the mean negative log-likelihood per token.

  Args:
    logits: [b, s, v] of the data `batch`, any float type.
    batch, model: the outputs of `normalized`, or equal parts of their rows; the mean of the parts'
      losses is then that of the whole. Only chi2_mixture uses `model`.
    model_logits: those of `model`.
    alpha_scale: multiplies alpha, from 0 to 1; may be traced.

  Returns:
    The loss, and metrics over the data actions with weight: `nll`, the mean negative
    log-likelihood; `penalty` and `penalty_model`, as parts of the loss; `reward` and `reward_max`,
    the mean reward and the largest in size; `accuracy` of the likeliest action; `unlikelihood`,
    before its weight. With gamma = 1 and without unlikelihood the loss is
    nll + penalty + penalty_model.
  """

  def mean(weights, x):
    return jnp.sum(weights * x) / len(weights)

  def discounted(batch: dict) -> jax.Array:
    return batch["weight"] * jnp.power(config.gamma, batch["time"])

  weight, discount = batch["weight"], discounted(batch)
  log_prob, penalty, reward = terms(config, logits, batch, alpha_scale)
  guess = jnp.argmax(legal_logits(logits, batch["erasable"], config.backspace), axis=-1)  # [b, s]
  right = jnp.take_along_axis(guess, batch["read"], axis=1) == batch["action"]
  metrics = {
    "nll": -mean(weight, log_prob),
    "penalty": -mean(discount, penalty),
    "reward": mean(weight, reward),
    "reward_max": jnp.max(jnp.where(weight > 0, jnp.abs(reward), 0.0)),
    "accuracy": mean(weight, right),
  }
  total = metrics["penalty"] - mean(discount, log_prob)
  if config.on_policy and model is not None:
    model_penalty = terms(config, model_logits, model, alpha_scale).penalty
    metrics["penalty_model"] = -mean(discounted(model), model_penalty)
    total += metrics["penalty_model"]
  if config.unlikelihood:
    metrics["unlikelihood"] = mean(discount, unlikelihood(config, logits, batch))
    total += config.unlikelihood * metrics["unlikelihood"]
  return total, metrics
