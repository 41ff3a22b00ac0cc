"""Optima of the objective on an MDP small enough to enumerate.

States of the small MDP are texts of at most three of the tokens 4 and 5. A batch of it need not
hold trajectories: with one node a state, one action a state-action pair at time 0, and discounted
occupancies as weights, the loss is the exact expectation.
"""

from functools import cache
from itertools import product
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from seqmatch_jax import loss as lib
from seqmatch_jax.divergence import DIVERGENCES
from seqmatch_jax.loss import LossConfig
from seqmatch_jax.tokens import BACKSPACE, BOS, EOS

close = np.testing.assert_allclose

GAMMA, LETTERS = 0.9, (4, 5)
STATES = [text for n in range(4) for text in product(LETTERS, repeat=n)]
NUMBER = {text: i for i, text in enumerate(STATES)}
ERASABLE = np.array([bool(text) for text in STATES])[None]


def make_mdp(backspace):
  """Every legal state-action pair: the batch without weights, and who leads where."""
  legal = np.zeros((len(STATES), 6), bool)
  legal[:, EOS], legal[:, BACKSPACE] = True, backspace & ERASABLE[0]
  legal[[len(text) < 3 for text in STATES], 4:] = True
  read, action = np.nonzero(legal)
  after = [
    STATES[i] if a == EOS else STATES[i][:-1] if a == BACKSPACE else (*STATES[i], a)
    for i, a in zip(read, action, strict=True)
  ]
  return SimpleNamespace(
    read=read,
    action=action,
    next=np.array([NUMBER[tuple(int(x) for x in text)] for text in after]),
    goes_on=1.0 * (action != EOS),
    series=np.where(action == EOS, 1 / (1 - GAMMA), 1.0),  # with the absorbing state
  )


MDPS = {backspace: make_mdp(backspace) for backspace in (False, True)}


def table_of_pairs(mdp, theta):
  """theta, a logit of each pair -> logits [states, 6]; texts that are too long are illegal."""
  return jnp.full((len(STATES), 6), lib.ILLEGAL).at[mdp.read, mdp.action].set(theta)


def policy_of(mdp, theta):
  """theta -> log pi of each pair."""
  return jax.nn.log_softmax(table_of_pairs(mdp, theta))[mdp.read, mdp.action]


def occupancy(mdp, prob):
  """Discounted occupancy of each pair, from a linear system: the policy's exact expectation."""
  n = len(STATES)
  step = jnp.zeros((n, n)).at[mdp.next, mdp.read].add(GAMMA * mdp.goes_on * prob)
  visits = jnp.linalg.solve(jnp.eye(n) - step, jnp.eye(n)[0])
  return visits[mdp.read] * prob


def draw_theta(mdp, seed=0):
  """A random policy that takes every legal action."""
  return np.random.default_rng(seed).normal(size=mdp.read.shape)


def data_policy(mdp):
  return np.exp(policy_of(mdp, draw_theta(mdp)))


def pairs_batch(mdp, weight):
  """The batch whose loss is an expectation under the occupancy `weight`."""
  arrays = {"action": mdp.action, "read": mdp.read, "next": mdp.next}
  batch = {name: x[None].astype(np.int32) for name, x in arrays.items()}
  time = np.zeros_like(batch["action"])
  return {**batch, "time": time, "weight": weight[None], "erasable": ERASABLE}


def derivatives(objective):
  """objective(theta, ...) -> its value, gradient and Hessian, compiled."""

  @jax.jit
  def all_three(*args):
    return *jax.value_and_grad(objective)(*args), jax.hessian(objective)(*args)

  return all_three


def minimum(compiled, theta, *args):
  """theta at the minimum of what `derivatives` compiled, by Newton's method in a trust region."""

  def at(x):
    return [np.asarray(part) for part in compiled(x, *args)]

  options = {"gtol": 1e-10, "maxiter": 200}
  hessian = lambda x: at(x)[2]  # noqa: E731
  found = minimize(
    lambda x: at(x)[:2], theta, jac=True, hess=hessian, method="trust-exact", options=options
  )
  assert np.max(np.abs(found.jac)) < 1e-6
  return found.x


@cache
def expected_loss(name, backspace):
  """(theta, alpha, data's and model's occupancies) -> the loss, as `derivatives`."""
  mdp, config = MDPS[backspace], LossConfig(name, 1.0, GAMMA, backspace)

  def objective(theta, alpha, data, model):
    logits = table_of_pairs(mdp, theta)[None]
    data, model = lib.normalized(pairs_batch(mdp, data), pairs_batch(mdp, model))
    return lib.loss(config, logits, data, model, logits, alpha_scale=alpha)[0]

  return derivatives(objective)


@cache
def optimum(name, backspace, alpha):
  """The policy at the loss's minimum; with model trajectories, at their fixed point."""
  mdp = MDPS[backspace]
  data = model = occupancy(mdp, data_policy(mdp))
  theta = np.zeros(mdp.read.shape)
  for _ in range(12 if name == "chi2_mixture" else 1):
    theta = minimum(expected_loss(name, backspace), theta, alpha, data, model)
    model = occupancy(mdp, np.exp(policy_of(mdp, theta)))
  return np.exp(policy_of(mdp, theta))


@pytest.mark.parametrize("backspace", [False, True])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_optimum_tends_to_the_data_with_alpha(name, backspace, float64):
  prob = data_policy(MDPS[backspace])
  coarse, fine = (np.max(np.abs(optimum(name, backspace, a) - prob)) for a in (0.1, 0.01))
  assert fine < 0.02 and 5 < coarse / fine < 15


F_DIVERGENCES = {
  "kl": lambda d, m: d * jnp.log(d / m),
  "reverse_kl": lambda d, m: m * jnp.log(m / d),
  "js": lambda d, m: d * jnp.log(2 * d / (d + m)) + m * jnp.log(2 * m / (d + m)),
  "chi2": lambda d, m: (m - d) ** 2 / d,
  "chi2_mixture": lambda d, m: (m - d) ** 2 / (m + d),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_optimum_is_the_minimum_of_the_divergence_less_the_entropy(name, float64):
  """D / alpha - H minimised over occupancies, without V, r or phi."""
  mdp = MDPS[True]
  data = occupancy(mdp, data_policy(mdp))

  def objective(theta, alpha):
    log_prob = policy_of(mdp, theta)
    model = occupancy(mdp, jnp.exp(log_prob))
    distance = jnp.sum(mdp.series * F_DIVERGENCES[name](data, model))
    return distance / alpha + jnp.sum(model * log_prob)

  direct, off = derivatives(objective), []
  for alpha in (0.1, 0.01):
    exact = np.exp(policy_of(mdp, minimum(direct, np.zeros(mdp.read.shape), alpha)))
    off.append(np.max(np.abs(optimum(name, True, alpha) - exact)))
  if name == "chi2_mixture":  # samples of the model pass no gradient: second order in alpha
    assert off[0] < 1e-2 and off[1] < 1e-4
  else:
    assert max(off) < 1e-6


# ---------------------------------------------------------------------------------- estimation


def enumerate_trajectories(prob, least=1e-10):
  """Every trajectory of a policy {(text, action): prob} that is likelier than `least`."""
  found, open_ = [], [((), [], 1.0)]
  while open_:
    text, actions, p = open_.pop()
    for (state, action), q in prob.items():
      if state == text and p * q > least:
        if action == EOS:
          found.append(([*actions, action], p * q))
        else:
          then = text[:-1] if action == BACKSPACE else (*text, action)
          open_.append((then, [*actions, action], p * q))
  return found


def lookup(mdp, table):
  """{(text, action): x} -> x of each pair, 0 where there is none."""
  pairs = zip(mdp.read, mdp.action, strict=True)
  return np.array([table.get((STATES[i], int(a)), 0.0) for i, a in pairs])


def clean_policy():
  """A random policy without <backspace>, as {(text, action): prob}."""
  mdp = MDPS[False]
  prob = data_policy(mdp)
  pairs = zip(mdp.read, mdp.action, prob, strict=True)
  return {(STATES[i], int(a)): float(p) for i, a, p in pairs}


def test_trajectories_estimate_the_expectation_without_bias(float64, make_batch):
  """Mean over all trajectories, by probability = the exact expectation."""
  mdp, policy, eraser = MDPS[True], clean_policy(), (4, 5)  # erases in one state: few trajectories
  policy = {(t, a): p * (0.9 if t == eraser else 1) for (t, a), p in policy.items()}
  policy[eraser, BACKSPACE] = 0.1
  actions, p = zip(*enumerate_trajectories(policy), strict=True)
  assert len(actions) > 50 and abs(sum(p) - 1) < 1e-8

  batch, texts = make_batch([[t] for t in actions], prompt=(BOS,))
  table = table_of_pairs(mdp, draw_theta(mdp, seed=1))
  nodes = np.array([[NUMBER.get(text, 0) for text in row] for row in texts])
  logits = table[nodes]
  exact = pairs_batch(mdp, occupancy(mdp, lookup(mdp, policy)))
  for name in DIVERGENCES:
    config = LossConfig(name, 0.1, GAMMA, backspace=True)

    def total(logits, batch, c=config):
      data, model = lib.normalized(batch, batch)
      return lib.loss(c, logits, data, model, logits)[0] * jnp.sum(batch["weight"])

    one = jax.vmap(lambda l, row, f=total: f(l[None], jax.tree.map(lambda x: x[None], row)))
    want = jax.jit(total)(table[None], exact)
    close(np.dot(p, jax.jit(one)(logits, batch)), want, rtol=1e-7)


def noised_occupancy(policy, rate):
  """Weights of the actions that carry loss, when errors are typed and erased before a policy's.

  Both the error and its <backspace> take time; the error carries no loss.
  """
  arrive, weight = dict.fromkeys(STATES, 0.0) | {(): 1.0}, {}
  for text in STATES:  # shorter texts first
    noisy = rate * arrive[text] * (len(text) < 3)
    for letter in LETTERS * (noisy > 0):
      weight[(*text, letter), BACKSPACE] = GAMMA * noisy / 2
    arrive[text] += (GAMMA**2 - 1) * noisy
    for action in (EOS, *LETTERS):
      p = arrive[text] * policy.get((text, action), 0.0)
      if p:
        weight[text, action] = p
        if action != EOS:
          arrive[*text, action] += GAMMA * p
  return weight


def test_noise_actions_without_loss_leave_the_clean_policy(float64):
  """The sum over the other actions recovers the data; forms with V(s_0) in them would not."""
  mdp, clean = MDPS[True], clean_policy()
  config = LossConfig("chi2", 0.01, GAMMA, backspace=True)
  weight = lookup(mdp, noised_occupancy(clean, 0.3))
  batch, keep = lib.normalized(pairs_batch(mdp, weight))[0], mdp.action != BACKSPACE

  def objective(theta):
    return lib.loss(config, table_of_pairs(mdp, theta)[None], batch)[0] * jnp.sum(weight)

  policy = np.exp(policy_of(mdp, minimum(derivatives(objective), np.zeros(mdp.read.shape))))
  close(policy, weight / np.bincount(mdp.read, weight)[mdp.read], atol=0.005)
  kept = policy * keep
  kept /= np.bincount(mdp.read, kept)[mdp.read]
  close(kept[keep], lookup(mdp, clean)[keep], atol=0.005)
