"""The objective against the paper's long form; its masks; numerics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmatch_jax import loss as lib
from seqmatch_jax.divergence import DIVERGENCES
from seqmatch_jax.loss import LossConfig
from seqmatch_jax.tokens import BACKSPACE, BOS, EOS, PAD
from tests.seqmatch.trajectories import random_actions, texts_of
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
close = np.testing.assert_allclose


def loss_of(config, logits, batch, model=None, model_logits=None, alpha_scale=1.0):
  """The loss of whole batches, whose weights are as exact as the test."""

  def exact(rows):
    return rows and {**rows, "weight": jnp.asarray(rows["weight"], float)}

  batch, model = lib.normalized(exact(batch), exact(model))
  return lib.loss(config, logits, batch, model, model_logits, alpha_scale)


run = jax.jit(loss_of, static_argnames="config")
run_terms = jax.jit(lib.terms, static_argnames="config")


# ------------------------------------------------------------------------------ trajectories

V = 9


def draw_actions(rng, length):
  """A trajectory of that many actions, a third of them <backspace>, <eos> last."""
  return [*random_actions(rng, length - 1, 1 / 3, V), EOS]


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
def test_equals_the_long_form_in_value_and_gradient(name, float64, make_batch):
  alpha, gamma = 0.03, 0.98
  config = LossConfig(name, alpha, gamma, backspace=True)
  trajectories = [draw_actions(np.random.default_rng(i), n) for i, n in enumerate((11, 1, 6))]
  batch, texts = make_batch([trajectories[:2], trajectories[2:]])
  table, nodes, row = table_of(texts)

  def ours(table):
    return -loss_of(config, table[nodes], batch)[0] * batch["weight"].sum()

  def theirs(table):
    return sum(long_form(name, alpha, gamma, table, row, t) for t in trajectories)

  (got, got_grad), (want, want_grad) = (
    jax.jit(jax.value_and_grad(f))(table) for f in (ours, theirs)
  )
  close(got, want, rtol=1e-9)
  close(got_grad, want_grad, atol=1e-8)


def test_values_telescope_to_the_first(float64, make_batch):
  """sum_i gamma^i (r_i - log pi_i) = V(s_0) with the absorbing state's rewards in its place."""
  config = LossConfig("chi2", 0.1, 0.9, backspace=True)
  actions = draw_actions(np.random.default_rng(3), 20)
  batch, texts = make_batch([[actions]])
  table, nodes, row = table_of(texts)
  log_prob, _, reward = (x[0] for x in run_terms(config, table[nodes], batch))
  series = np.where(np.array(actions) == EOS, 1 / (1 - 0.9), 1.0)
  total = np.sum(0.9 ** np.arange(20) * (reward * series - log_prob))
  close(total, float(value_of(table[row[()]], False)), rtol=1e-12)


def test_maximum_likelihood_is_the_mean_cross_entropy(float64, make_batch):
  batch, texts = make_batch([[draw_actions(np.random.default_rng(i), 5 + i)] for i in range(3)])
  batch["weight"][0, 1] = batch["weight"][2, :3] = 0
  table, nodes, row = table_of(texts)
  table[:, [PAD, BOS]] = 9.0  # the likeliest, if they were actions
  costs, hits = [], []
  for actions, weights in zip(batch["action"], batch["weight"], strict=True):
    for text, action, weight in zip(texts_of(actions), actions, weights, strict=False):
      if weight:
        logits = table[row[text]]
        costs.append(value_of(logits, bool(text)) - logits[action])
        hits.append(action == max([EOS, *range(4, V)] + [BACKSPACE] * bool(text), key=logits.item))
  for config, alpha_scale in ((MLE, 1.0), (LossConfig("js", 0.5, 1.0, True), 0.0)):
    got, metrics = run(config, table[nodes], batch, alpha_scale=alpha_scale)
    close(got, np.mean(costs), rtol=1e-12)
    assert metrics["nll"] == got and metrics["penalty"] == 0
    close(metrics["accuracy"], np.mean(hits))
  assert any(hits)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_metrics_add_up_and_cover_what_carries_loss(gamma, float64, make_batch):
  config = LossConfig("chi2_mixture", 0.2, gamma, backspace=True)
  batch, texts = make_batch([[draw_actions(np.random.default_rng(i), 9)] for i in range(2)])
  batch["weight"][1] = 0
  table, nodes, _ = table_of(texts)
  got, metrics = run(config, table[nodes], batch, batch, table[nodes])
  log_prob, penalty, reward = (x[0] for x in run_terms(config, table[nodes], batch))
  discount = gamma ** np.arange(9)
  close(metrics["penalty"], -np.mean(discount * penalty), rtol=1e-12)
  close(metrics["nll"], -np.mean(log_prob), rtol=1e-12)  # no discount in what is only watched
  parts = metrics["penalty"] + metrics["penalty_model"] - np.mean(discount * log_prob)
  close(got, parts, rtol=1e-12)
  assert metrics["penalty"] > 0
  close(metrics["reward"], np.mean(reward))
  close(metrics["reward_max"], np.max(np.abs(reward)))


def test_alpha_scale_multiplies_alpha(float64, make_batch):
  batch, texts = make_batch([[draw_actions(np.random.default_rng(0), 9)]])
  table, nodes, _ = table_of(texts)
  full, half = (LossConfig("chi2_mixture", alpha, 0.9, True) for alpha in (0.2, 0.1))
  args = (table[nodes], batch, batch, table[nodes])
  got = run(full, *args, alpha_scale=0.5)[0]
  close(got, run(half, *args)[0], rtol=1e-12)


def test_gamma_one_is_the_limit(float64, make_batch):
  """Without discount <eos> has no penalty, and nothing divides by 1 - gamma."""
  batch, texts = make_batch([[draw_actions(np.random.default_rng(1), 8)]])
  table, nodes, _ = table_of(texts)
  for name in ("kl", "chi2"):
    log_prob, penalty, reward = run_terms(LossConfig(name, 0.02, 1.0, True), table[nodes], batch)
    assert penalty[0, -1] == 0 and reward[0, -1] == 0 and np.all(penalty[0, :-1] < 0)
    near = run_terms(LossConfig(name, 0.02, 1 - 1e-9, True), table[nodes], batch)
    close(near.penalty, penalty, atol=1e-7)
    close(near.log_prob, log_prob)


def test_packed_trajectories_are_the_sum_of_separate_ones(float64, make_batch):
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


def test_model_trajectories_count_by_their_own_number(float64, make_batch):
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


# ------------------------------------------------------------------------------- unlikelihood


def repeats(trajectories, weights, prompt, gamma, row):
  """(row of its text, is that erasable, token, weight) of each repetition that counts."""
  for actions, weight in zip(trajectories, weights, strict=True):
    for i, (text, action) in enumerate(zip(texts_of(actions), actions, strict=False)):
      for token in {*prompt, *text} - {action, BOS}:
        yield row[text], bool(text), token, gamma**i * float(weight[i])


def test_unlikelihood_equals_a_loop_in_value_and_gradient(float64, make_batch):
  """With erased tokens, sequences that share a row, noise without weight, and a discount."""
  config = LossConfig("chi2", 0.0, 0.97, backspace=True, unlikelihood=0.7)
  plain = LossConfig("chi2", 0.0, 0.97, backspace=True)
  prompt = (BOS, 6, 8, 6)
  trajectories = [draw_actions(np.random.default_rng(i), n) for i, n in enumerate((14, 1, 9))]
  batch, texts = make_batch([trajectories[:2], trajectories[2:]], prompt)
  batch["weight"] *= np.random.default_rng(0).random(batch["weight"].shape) < 0.7
  weights = batch["weight"].reshape(4, -1)[:3]
  table, nodes, row = table_of(texts)

  def ours(table):
    total, metrics = loss_of(config, table[nodes], batch)
    base = loss_of(plain, table[nodes], batch)[0]
    return (total - base) / 0.7, metrics["unlikelihood"]

  found = list(repeats(trajectories, weights, prompt, 0.97, row))
  text, erasable, token, share = map(np.array, zip(*found, strict=True))

  def theirs(table):
    legal = np.ones((len(found), V), bool)
    legal[:, [PAD, BOS]], legal[:, BACKSPACE] = False, erasable
    odds = jnp.where(legal, jnp.exp(table[text]), 0)
    p = odds[np.arange(len(found)), token] / odds.sum(1)
    return -jnp.sum(share * jnp.log(1 - p)) / batch["weight"].sum()

  (got, metric), got_grad = jax.jit(jax.value_and_grad(ours, has_aux=True))(table)
  want, want_grad = jax.jit(jax.value_and_grad(theirs))(table)
  close((got, metric), want, rtol=1e-9)
  close(got_grad, want_grad, atol=1e-10)
  assert np.any(np.abs(want_grad) > 1e-3)


def test_unlikelihood_is_finite_where_a_repeated_token_is_certain(make_batch):
  batch, texts = make_batch([[[5, 5, 5, 6, 5, EOS]]])
  config = LossConfig("chi2", 0.0, 1.0, backspace=False, unlikelihood=1.0)
  both = jax.jit(jax.value_and_grad(lambda l: loss_of(config, l, batch)[0]))
  plain = jax.jit(lambda l: loss_of(MLE, l, batch)[0])
  for size in (1.0, 30.0, 1e4):
    logits = np.zeros((1, len(texts[0]), V), np.float32)
    logits[..., 5] = size
    value, grads = both(logits)
    assert np.isfinite(value) and np.isfinite(grads).all() and value > plain(logits)


# ----------------------------------------------------------------------------------- numerics


def test_illegal_actions_have_no_probability_and_no_gradient(make_batch):
  batch, texts = make_batch([[draw_actions(np.random.default_rng(i), 9)] for i in range(2)])
  table, nodes, _ = table_of(texts)
  logits = np.float32(table[nodes])
  for backspace in (True, False):
    legal = np.asarray(lib.legal_logits(logits, batch["erasable"], backspace))
    prob = np.exp(legal)
    assert np.all(prob[..., [PAD, BOS]] == 0) and np.all(prob[:, :3, BACKSPACE] == 0)
    erasable = batch["erasable"] & backspace
    assert np.all((prob[..., BACKSPACE] > 0) == erasable)
    legal_elsewhere = np.delete(np.arange(V), [PAD, BOS, BACKSPACE])
    np.testing.assert_array_equal(legal[..., legal_elsewhere], logits[..., legal_elsewhere])

    weight = batch["weight"] * (backspace | (batch["action"] != BACKSPACE))
    data = {**batch, "weight": weight}
    config = LossConfig("chi2", 0.1, 0.9, backspace)
    grads = jax.jit(jax.grad(lambda l, c=config, d=data: loss_of(c, l, d)[0]))(logits)
    assert np.all(grads[..., [PAD, BOS]] == 0)
    assert np.all(grads[..., BACKSPACE][~erasable] == 0)
    assert np.all(grads[:, -1] == 0)  # a padding node
    assert np.any(grads != 0) and np.isfinite(grads).all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_finite_at_any_length_size_and_precision(name, make_batch):
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
    half = jnp.asarray(logits, jnp.bfloat16)
    (value, metrics), grads = both(half)
    assert value.dtype == jnp.float32 and grads.dtype == jnp.bfloat16
    assert value == both(half.astype(jnp.float32))[0][0]  # it is summed in float32
    assert all(np.isfinite(x).all() for x in (value, grads, *metrics.values()))
  assert np.max(np.abs(grads)) > 0


def test_no_array_has_a_logit_for_every_action(make_batch):
  batch, texts = make_batch([[draw_actions(np.random.default_rng(0), 40)]])
  b, s, a = 1, len(texts[0]), 40
  assert s != a
  config = LossConfig("chi2", 0.1, 0.99, backspace=True)
  grad = jax.grad(lambda logits: run(config, logits, batch)[0])
  program = str(jax.make_jaxpr(grad)(np.zeros((b, s, V), np.float32)))
  assert f"[{b},{s},{V}]" in program and f"[{b},{a}]" in program and f"{a},{V}]" not in program


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"divergence": "hellinger"}, r"loss.divergence='hellinger' is unknown; .*chi2_mixture"),
    ({"alpha": -0.1}, r"loss.alpha=-0.1 must be finite and at least 0"),
    ({"alpha": float("nan")}, r"loss.alpha=nan"),
    ({"gamma": 0.0}, r"loss.gamma=0.0 must lie in \(0, 1\]"),
    ({"gamma": 1.01}, r"loss.gamma=1.01 must lie in \(0, 1\]"),
    ({"unlikelihood": -1.0}, r"loss.unlikelihood=-1.0 must be finite and at least 0"),
    ({"warmup": -1}, r"loss.warmup=-1 must be at least 0"),
    ({"anneal": -1}, r"loss.anneal=-1 must be at least 0"),
  ],
)
def test_bad_settings_are_refused_in_a_sentence(change, message):
  good = {"divergence": "chi2", "alpha": 0.1, "gamma": 1.0, "backspace": True}
  with pytest.raises(UserError, match=message):
    LossConfig(**{**good, **change})
