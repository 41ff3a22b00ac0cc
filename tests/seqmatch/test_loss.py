"""The objective against the paper's long form, and its optima on an MDP small enough to enumerate.

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
from seqmatch_jax.actions import tree
from seqmatch_jax.divergence import DIVERGENCES
from seqmatch_jax.loss import LossConfig
from seqmatch_jax.tokens import BACKSPACE, BOS, EOS, PAD
from train_jax.errors import UserError

MLE = LossConfig("chi2", alpha=0.0, gamma=1.0, backspace=True)
OFF_POLICY = tuple(name for name in DIVERGENCES if name != "chi2_mixture")
PHI = {
  "kl": lambda x: jnp.log(1 + x),
  "reverse_kl": lambda x: 1 - jnp.exp(-x),
  "js": lambda x: jnp.log(2 - jnp.exp(-x)),
  "chi2": lambda x: x - x**2 / 4,
  "chi2_mixture": lambda x: x - x**2 / 4,
}
run = jax.jit(lib.loss, static_argnames="config")
run_terms = jax.jit(lib.terms, static_argnames="config")
close = np.testing.assert_allclose


@pytest.fixture
def float64():
  with jax.enable_x64(True):
    yield


# ------------------------------------------------------------------------------ trajectories

V, PROMPT = 9, (BOS, 6, 8)


def texts_of(actions):
  """The text before each action and after the last one, <eos> appended."""
  texts = [()]
  for action in actions:
    texts.append(texts[-1][:-1] if action == BACKSPACE else (*texts[-1], int(action)))
  return texts


def draw_actions(rng, length):
  """A trajectory of that many actions, a third of them <backspace>, <eos> last."""
  actions, depth = [], 0
  for _ in range(length - 1):
    erase = depth and rng.random() < 1 / 3
    actions.append(BACKSPACE if erase else int(rng.integers(4, V)))
    depth += -1 if erase else 1
  return [*actions, EOS]


def make_batch(rows, prompt=PROMPT):
  """rows of trajectories of actions -> the batch, and the text of each node [b][s]."""
  group, length = max(map(len, rows)), max(len(t) for row in rows for t in row)
  actions = np.full((len(rows), group, length), PAD, np.int32)
  texts = []
  for i, row in enumerate(rows):
    nodes = [None] * (len(prompt) - 1) + [()]
    for j, trajectory in enumerate(row):
      actions[i, j, : len(trajectory)] = trajectory
      after = texts_of(trajectory)[1:]
      nodes += [t for t, a in zip(after, trajectory, strict=True) if a > BACKSPACE]
    texts.append(nodes)
  size = max(map(len, texts)) + 1
  prompts = np.tile(np.int32(prompt), (len(rows), 1))
  batch = tree(prompts, np.full(len(rows), len(prompt), np.int32), actions, size)
  return batch, [nodes + [None] * (size - len(nodes)) for nodes in texts]


def table_of(texts, seed=0):
  """Random logits, one row for each text: (table [texts, v], the row of each node [b, s])."""
  names = sorted({t for row in texts for t in row if t is not None})
  row = {t: i for i, t in enumerate(names)} | {None: 0}
  table = 2 * np.random.default_rng(seed).normal(size=(len(names), V))
  return table, np.array([[row[t] for t in nodes] for nodes in texts]), row


def value_of(logits, erasable):
  """V of one state, the legal logits summed one by one."""
  legal = [EOS, *([BACKSPACE] if erasable else []), *range(4, V)]
  return jnp.log(sum(jnp.exp(logits[a]) for a in legal))


def long_form(name, alpha, gamma, table, row, actions):
  """The paper's objective of one trajectory, the absorbing state as thousands of actions."""
  texts, total = texts_of(actions), 0.0
  value = [value_of(table[row[t]], bool(t)) for t in texts[:-1]]
  value.append(table[row[texts[-2]], EOS])  # the absorbing state's, tied
  phi = lambda r: PHI[name](alpha * r) / alpha  # noqa: E731
  for i, action in enumerate(actions):
    total += gamma**i * phi(table[row[texts[i]], action] - gamma * value[i + 1])
  later = gamma ** np.arange(len(actions), len(actions) + 4000.0)
  return total + jnp.sum(later * phi(value[-1] - gamma * value[-1])) - value[0]


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equals_the_long_form_in_value_and_gradient(name, float64):
  alpha, gamma = 0.03, 0.98
  config = LossConfig(name, alpha, gamma, backspace=True)
  trajectories = [draw_actions(np.random.default_rng(i), n) for i, n in enumerate((11, 1, 6))]
  batch, texts = make_batch([trajectories[:2], trajectories[2:]])
  table, nodes, row = table_of(texts)

  def ours(table):
    return -lib.loss(config, table[nodes], batch)[0] * batch["weight"].sum()

  def theirs(table):
    return sum(long_form(name, alpha, gamma, table, row, t) for t in trajectories)

  (got, got_grad), (want, want_grad) = (
    jax.jit(jax.value_and_grad(f))(table) for f in (ours, theirs)
  )
  close(got, want, rtol=1e-9)
  close(got_grad, want_grad, atol=1e-8)


def test_values_telescope_to_the_first(float64):
  """sum_i gamma^i (r_i - log pi_i) = V(s_0) with the absorbing state's rewards in its place."""
  config = LossConfig("chi2", 0.1, 0.9, backspace=True)
  actions = draw_actions(np.random.default_rng(3), 20)
  batch, texts = make_batch([[actions]])
  table, nodes, row = table_of(texts)
  log_prob, _, reward = (x[0] for x in run_terms(config, table[nodes], batch))
  series = np.where(np.array(actions) == EOS, 1 / (1 - 0.9), 1.0)
  total = np.sum(0.9 ** np.arange(20) * (reward * series - log_prob))
  close(total, float(value_of(table[row[()]], False)), rtol=1e-12)


def test_maximum_likelihood_is_the_mean_cross_entropy(float64):
  batch, texts = make_batch([[draw_actions(np.random.default_rng(i), 5 + i)] for i in range(3)])
  batch["weight"][0, 1] = batch["weight"][2, :3] = 0
  table, nodes, row = table_of(texts)
  costs, hits = [], []
  for actions, weights in zip(batch["action"], batch["weight"], strict=True):
    for text, action, weight in zip(texts_of(actions), actions, weights, strict=False):
      if weight:
        logits = table[row[text]]
        costs.append(value_of(logits, bool(text)) - logits[action])
        hits.append(action == max([EOS, *range(4, V)] + [BACKSPACE] * bool(text), key=logits.item))
  for config, strength in ((MLE, 1.0), (LossConfig("js", 0.5, 1.0, True), 0.0)):
    got, metrics = run(config, table[nodes], batch, strength=strength)
    close(got, np.mean(costs), rtol=1e-12)
    assert metrics["nll"] == got and metrics["penalty"] == 0
    close(metrics["accuracy"], np.mean(hits))


def test_metrics_add_up_and_cover_what_carries_loss(float64):
  config = LossConfig("chi2_mixture", 0.2, 1.0, backspace=True)
  batch, texts = make_batch([[draw_actions(np.random.default_rng(i), 9)] for i in range(2)])
  batch["weight"][1] = 0
  table, nodes, _ = table_of(texts)
  got, metrics = run(config, table[nodes], batch, batch, table[nodes])
  parts = ("nll", "penalty", "penalty_model")
  close(got, sum(metrics[name] for name in parts), rtol=1e-12)
  assert metrics["penalty"] > 0
  reward = run_terms(config, table[nodes], batch).reward[0]
  close(metrics["reward"], np.mean(reward))
  close(metrics["reward_max"], np.max(np.abs(reward)))


def test_strength_scales_alpha(float64):
  batch, texts = make_batch([[draw_actions(np.random.default_rng(0), 9)]])
  table, nodes, _ = table_of(texts)
  full, half = (LossConfig("chi2_mixture", alpha, 0.9, True) for alpha in (0.2, 0.1))
  args = (table[nodes], batch, batch, table[nodes])
  got = run(full, *args, strength=0.5)[0]
  close(got, run(half, *args)[0], rtol=1e-12)


def test_gamma_one_is_the_limit(float64):
  """Without discount <eos> has no penalty, and nothing divides by 1 - gamma."""
  batch, texts = make_batch([[draw_actions(np.random.default_rng(1), 8)]])
  table, nodes, _ = table_of(texts)
  for name in ("kl", "chi2"):
    log_prob, penalty, reward = run_terms(LossConfig(name, 0.02, 1.0, True), table[nodes], batch)
    assert penalty[0, -1] == 0 and reward[0, -1] == 0 and np.all(penalty[0, :-1] < 0)
    near = run_terms(LossConfig(name, 0.02, 1 - 1e-9, True), table[nodes], batch)
    close(near.penalty, penalty, atol=1e-7)
    close(near.log_prob, log_prob)


def test_packed_trajectories_are_the_sum_of_separate_ones(float64):
  config = LossConfig("chi2_mixture", 0.2, 0.95, backspace=True)
  two = [draw_actions(np.random.default_rng(i), n) for i, n in enumerate((12, 7))]
  packed, apart = (make_batch(rows) for rows in ([two], [[t] for t in two]))
  data = []
  for batch, texts in (packed, apart):
    assert lib.trajectories(batch) == 2
    table, nodes, _ = table_of(texts)
    data.append((table[nodes], batch))
  got = [run(config, *x, y[1], y[0]) for x, y in (data, data[::-1])]
  close(got[0][0], got[1][0], rtol=1e-12)
  for name, value in got[0][1].items():
    close(value, got[1][1][name], rtol=1e-12, err_msg=name)


def test_model_trajectories_count_by_their_own_number(float64):
  """Twice the same trajectories say the same about the model; padding rows say nothing."""
  config = LossConfig("chi2_mixture", 0.2, 0.95, backspace=True)
  batch, texts = make_batch([[draw_actions(np.random.default_rng(i), 8)] for i in range(3)])
  table, nodes, _ = table_of(texts)
  logits = table[nodes]
  once = run(config, logits, batch, batch, logits)[1]
  close(once["penalty_model"], once["penalty"], rtol=1e-12)
  twice = jax.tree.map(lambda x: np.concatenate([x, x, 0 * x]), batch)
  double = np.concatenate([logits, logits, logits])
  got = run(config, logits, batch, twice, double)[1]
  close(got["penalty_model"], once["penalty_model"], rtol=1e-12)
  plain = run(LossConfig("chi2", 0.2, 0.95, True), logits, batch, twice, double)[1]
  assert "penalty_model" not in plain


# ----------------------------------------------------------------------------------- numerics


def test_illegal_actions_have_no_probability_and_no_gradient():
  batch, texts = make_batch([[draw_actions(np.random.default_rng(i), 9)] for i in range(2)])
  table, nodes, _ = table_of(texts)
  logits = np.float32(table[nodes])
  for backspace in (True, False):
    legal = np.asarray(lib.legal_logits(logits, batch["erasable"], backspace))
    prob = np.exp(legal)
    assert np.all(prob[..., [PAD, BOS]] == 0) and np.all(prob[:, : len(PROMPT), BACKSPACE] == 0)
    erasable = batch["erasable"] & backspace
    assert np.all((prob[..., BACKSPACE] > 0) == erasable)
    legal_elsewhere = np.delete(np.arange(V), [PAD, BOS, BACKSPACE])
    np.testing.assert_array_equal(legal[..., legal_elsewhere], logits[..., legal_elsewhere])

    weight = batch["weight"] * (backspace | (batch["action"] != BACKSPACE))
    data = {**batch, "weight": weight}
    config = LossConfig("chi2", 0.1, 0.9, backspace)
    grads = jax.jit(jax.grad(lambda l, c=config, d=data: lib.loss(c, l, d)[0]))(logits)
    assert np.all(grads[..., [PAD, BOS]] == 0)
    assert np.all(grads[..., BACKSPACE][~erasable] == 0)
    assert np.all(grads[:, -1] == 0)  # a padding node
    assert np.any(grads != 0) and np.isfinite(grads).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_finite_at_any_length_size_and_precision(name):
  length = 4096
  rng = np.random.default_rng(0)
  batch, texts = make_batch([[draw_actions(rng, length)]])
  config = LossConfig(name, 0.1, 0.998, backspace=True)
  both = jax.jit(jax.value_and_grad(lambda l: run(config, l, batch, batch, l), has_aux=True))
  shape = (1, len(texts[0]), V)
  for logits in (
    rng.normal(size=shape),
    1e4 * rng.choice([-1.0, 1.0], shape),
    np.full(shape, -1e4),
  ):
    (value, metrics), grads = both(jnp.asarray(logits, jnp.bfloat16))
    assert value.dtype == jnp.float32 and grads.dtype == jnp.bfloat16
    assert all(np.isfinite(x).all() for x in (value, grads, *metrics.values()))
  assert np.max(np.abs(grads)) > 0


def test_half_precision_logits_are_summed_in_float32():
  batch, texts = make_batch([[draw_actions(np.random.default_rng(0), 40)]])
  logits = jnp.asarray(table_of(texts)[0][table_of(texts)[1]], jnp.bfloat16)
  config = LossConfig("kl", 0.05, 0.99, backspace=True)
  assert run(config, logits, batch)[0] == run(config, logits.astype(jnp.float32), batch)[0]


def test_no_array_has_a_logit_for_every_action():
  batch, texts = make_batch([[draw_actions(np.random.default_rng(0), 40)]])
  b, s, a = 1, len(texts[0]), 40
  assert s != a
  config = LossConfig("chi2", 0.1, 0.99, backspace=True)
  grad = jax.grad(lambda logits: run(config, logits, batch)[0])
  program = str(jax.make_jaxpr(grad)(np.zeros((b, s, V), np.float32)))
  assert f"[{b},{s},{V}]" in program and f"[{b},{a}]" in program and f"{a},{V}]" not in program


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"divergence": "hellinger"}, ["loss.divergence='hellinger'", "chi2_mixture"]),
    ({"alpha": -0.1}, ["loss.alpha=-0.1", "at least 0"]),
    ({"alpha": float("nan")}, ["loss.alpha=nan"]),
    ({"gamma": 0.0}, ["loss.gamma=0.0", "(0, 1]"]),
    ({"gamma": 1.01}, ["loss.gamma=1.01", "(0, 1]"]),
  ],
)
def test_bad_settings(change, words):
  with pytest.raises(UserError) as error:
    LossConfig(**{"divergence": "chi2", "alpha": 0.1, "gamma": 1.0, "backspace": True, **change})
  assert all(word in str(error.value) for word in words)


# ------------------------------------------------------------------------------- the small MDP

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
    data, model = pairs_batch(mdp, data), pairs_batch(mdp, model)
    return lib.loss(config, logits, data, model, logits, strength=alpha)[0]

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


def test_the_other_reading_of_alpha_forgets_the_data(float64):
  """x - x^2 / (4 alpha), our penalty at 1 / alpha, tends to the most random policy instead."""
  mdp = MDPS[True]
  value = np.zeros(len(STATES))  # soft value iteration with r = 0; after <eos>, 0
  for _ in range(500):
    q = np.full((len(STATES), 6), -np.inf)
    q[mdp.read, mdp.action] = GAMMA * mdp.goes_on * value[mdp.next]
    value = np.log(np.exp(q).sum(1))
  random = np.exp(q - value[:, None])[mdp.read, mdp.action]
  policy = optimum("chi2", True, 1 / 1e-4)
  close(policy, random, atol=0.01)
  assert np.max(np.abs(policy - data_policy(mdp))) > 0.3


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


def test_trajectories_estimate_the_expectation_without_bias(float64):
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
      return lib.loss(c, logits, batch, batch, logits)[0] * jnp.sum(batch["weight"])

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
  """The sum over the other actions recovers the data; forms with V(s_0) in them do not."""
  mdp, clean = MDPS[True], clean_policy()
  config = LossConfig("chi2", 0.01, GAMMA, backspace=True)
  weight = lookup(mdp, noised_occupancy(clean, 0.3))
  batch, keep = pairs_batch(mdp, weight), mdp.action != BACKSPACE

  def form(theta):
    """The right objective, that with V(s_0), and that with half of V(s_0) and half of the drift."""
    logits = table_of_pairs(mdp, theta)[None]
    log_prob, penalty, reward = (x[0] for x in lib.terms(config, logits, batch))
    long = jnp.sum(weight * (mdp.series * reward + penalty))
    drift = jnp.sum(weight * (mdp.series * reward - log_prob))  # telescopes to V(s_0) if unmasked
    first = jax.nn.logsumexp(lib.legal_logits(logits, ERASABLE, True)[0, 0])
    return jnp.stack(
      [
        -lib.loss(config, logits, batch)[0] * jnp.sum(weight),
        long - first,
        long - (drift + first) / 2,
      ]
    )

  off, compiled = [], derivatives(lambda theta, which: -jnp.dot(which, form(theta)))
  for which in range(3):
    theta = minimum(compiled, np.zeros(mdp.read.shape), np.eye(3)[which])
    policy = np.exp(policy_of(mdp, theta))
    wanted = weight / np.bincount(mdp.read, weight)[mdp.read]
    kept = policy * keep
    kept /= np.bincount(mdp.read, kept)[mdp.read]
    errors = np.abs(policy - wanted), np.abs(kept - lookup(mdp, clean))[keep]
    off.append([np.max(x) for x in errors])
  right, masked, halved = off
  assert max(right) < 0.005
  assert masked[0] > 0.2 and masked[1] > 0.05
  assert halved[0] > 0.05 and halved[1] > 0.03
