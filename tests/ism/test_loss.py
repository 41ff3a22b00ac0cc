"""The objective: who gets which examples, one call with a gradient, as a naive loop has it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import pywt

from configs import ism_digits
from ism_jax import loss
from ism_jax.loss import LossConfig
from train_jax.errors import UserError

NULL = 3
ISM = LossConfig(
  split={"velocity": 2, "guidance": 1, "consistency": 1},
  target="two_steps",
  weighting="by_term",
  class_dropout=0.5,
  w_max=2.0,
  w_step=0.5,
  zero_w_prob=0.25,
  interval_start=0.3,
  bootstrap_guidance=0.0,
  wavelet_levels=2,
  level_decay=0.5,
  norm="l2",
)
FLOW = replace(ISM, split={"velocity": 1}, w_max=0.0, wavelet_levels=0)
SHORTCUT = replace(
  FLOW,
  split={"velocity": 7, "consistency": 1},
  weighting="by_example",
  bootstrap_guidance=0.5,
  wavelet_levels=1,
)
B = 32
KEY = jax.random.key(0)


def network(params, x, t, d, label, w):
  """A small network without layers: nonlinear, and every input matters."""
  shift = params["class"][label] * (1 + w) + params["t"] * t + params["d"] * d
  return jnp.tanh(params["a"] * x + shift[:, None, None, None])


def network64(params, x, t, d, label, w):
  """`network` for one example in float64."""
  shift = params["class"][label] * (1 + w) + params["t"] * t + params["d"] * d
  return np.tanh(params["a"] * np.asarray(x, np.float64) + shift)


def make_params(scale):
  values = {"a": 0.7, "t": -0.5, "d": 0.9, "class": np.array([0.5, -1.0, 1.5, 0.2])}
  return jax.tree.map(lambda v: jnp.asarray(scale * v, jnp.float32), values)


PARAMS, TARGET_PARAMS = make_params(1.0), make_params(0.6)


@pytest.fixture(scope="module")
def batch():
  x0, x1 = np.random.default_rng(0).normal(size=(2, B, 4, 4, 1)).astype(np.float32)
  return x0, x1, jnp.arange(B) % NULL


def run(config, batch, params=PARAMS, target_params=TARGET_PARAMS, apply=network):
  compiled = jax.jit(lambda p, q, *batch: loss.loss(config, apply, p, q, *batch, NULL, KEY))
  return compiled(params, target_params, *batch)


def make_examples(config, batch, params=PARAMS, key=KEY):
  def make(params, *batch):
    networks = loss.Networks(network, params, TARGET_PARAMS, NULL)
    return loss.make_examples(config, networks, *batch, key)

  return jax.jit(make)(params, *batch)


def term_of_each(split):
  """The term of each of B examples, counted off one by one."""
  wheel = [term for term, n in split.items() for _ in range(n)]
  return [wheel[i % len(wheel)] for i in range(B)]


@pytest.mark.parametrize("counts", [(1,), (2, 1, 1), (5, 2, 1), (7, 1)], ids=str)
def test_examples_are_dealt_in_turn_and_gathered_again(counts):
  split = dict(zip(loss.TERMS, counts, strict=False))
  x, number = jnp.arange(B * 6).reshape(B, 2, 3), jnp.arange(B)
  dealt = loss.deal(split, x, number)
  for term, (images, numbers) in dealt.items():
    mine = [i for i, name in enumerate(term_of_each(split)) if name == term]
    np.testing.assert_array_equal(numbers, mine)
    np.testing.assert_array_equal(images, x[np.array(mine)])
  for i, whole in enumerate((x, number)):
    parts = {term: arrays[i] for term, arrays in dealt.items()}
    np.testing.assert_array_equal(loss.gather(split, parts), whole)


def test_examples_of_each_term(batch):
  x0, x1, label = batch
  examples = make_examples(ISM, batch)
  assert set(examples) == set(loss.TERMS)
  for term, part in examples.items():
    mine = [i for i, name in enumerate(term_of_each(ISM.split)) if name == term]
    t = np.asarray(part.t)[:, None, None, None]
    np.testing.assert_allclose(part.x, (1 - t) * x0[mine] + t * x1[mine], atol=1e-6)
    kept = np.asarray(part.label) == np.asarray(label)[mine]
    assert np.all(kept | (np.asarray(part.label) == NULL))
    assert (0 < np.mean(~kept) < 1) if term == "velocity" else np.all(kept)
  velocity, guidance, consistency = (examples[term] for term in loss.TERMS)
  assert not np.any(velocity.w) and not np.any(velocity.d) and not np.any(guidance.d)
  assert np.all(guidance.w > 0) and np.all(guidance.w <= 2)
  assert np.all(consistency.d >= 1 / 64) and np.all(consistency.t + consistency.d <= 1)
  assert set(np.asarray(consistency.w).tolist()) <= {0.0, 0.5, 1.0, 1.5, 2.0}
  # Each term draws for itself, and another key draws otherwise.
  assert np.mean(velocity.t[: len(guidance.t)] == guidance.t) < 0.5
  assert np.mean(make_examples(ISM, batch, key=jax.random.key(1))["velocity"].t == velocity.t) < 0.5


def test_dropped_classes_and_zero_w_are_as_frequent_as_configured():
  x = jnp.zeros((8000, 1, 1, 1))
  many = (x, x, jnp.zeros(8000, int))
  examples = make_examples(replace(ISM, class_dropout=0.1), many)
  assert abs(np.mean(examples["velocity"].label == NULL) - 0.1) < 0.02
  assert abs(np.mean(examples["consistency"].w == 0) - 0.25) < 0.04
  assert not np.any(make_examples(SHORTCUT, many)["consistency"].w)  # w_max = 0


def haar_distance(error, levels, decay):
  """Weighted energy of the bands of error [h, w], by PyWavelets."""
  low, *details = pywt.wavedec2(error, "haar", level=levels) if levels else [error]
  energies = [sum(np.sum(band**2) for band in bands) for bands in reversed(details)]
  energies.append(np.sum(low**2))
  raw = [decay**level for level in range(levels + 1)]
  sizes = [3 * error.size / 4**level for level in range(1, levels + 1)] + [low.size]
  scale = error.size / np.dot(raw, sizes)
  return scale * np.dot(raw, energies) / error.size


def naive_loss(config, batch):
  """One example after the other in float64; only t, d, w and labels are taken from the code."""
  params, target_params = (
    jax.tree.map(lambda v: np.asarray(v, np.float64), p) for p in (PARAMS, TARGET_PARAMS)
  )
  x0s, x1s, _ = (np.asarray(a, np.float64) for a in batch)
  examples = make_examples(config, batch)
  costs = {term: [] for term in examples}
  for x0, x1, term in zip(x0s, x1s, term_of_each(config.split), strict=True):
    drawn = examples[term]
    t, d, label, w = (np.asarray(a)[len(costs[term])] for a in (drawn.t, drawn.d, *drawn[3:5]))
    t, d, w = float(t), float(d), float(w)
    x = (1 - t) * x0 + t * x1
    if term == "velocity":
      target = x1 - x0
    elif term == "guidance":
      gap = network64(params, x, t, 0, label, 0) - network64(params, x, t, 0, NULL, 0)
      target = x1 - x0 + (w if t >= config.interval_start else 0) * gap
    else:
      half, steps, at = d / 2, [], x
      for start in (t, t + half):
        told = 0 if half == 1 / 128 else half
        s = network64(target_params, at, start, told, label, w)
        if told == 0:
          inputs = (target_params, at, start, 0)
          gap = network64(*inputs, label, 0) - network64(*inputs, NULL, 0)
          s = s + config.bootstrap_guidance * gap
        steps.append(s)
        at = at + half * s
      target = (steps[0] + steps[1]) / 2
    error = (network64(params, x, t, d, label, w) - target)[:, :, 0]
    costs[term].append(haar_distance(error, config.wavelet_levels, config.level_decay))
  means = {term: np.mean(values) for term, values in costs.items()}
  by_example = np.mean(np.concatenate(list(costs.values())))
  return by_example if config.weighting == "by_example" else sum(means.values()), means


@pytest.mark.parametrize(
  "config",
  [ISM, replace(ISM, weighting="by_example", wavelet_levels=0), SHORTCUT, FLOW],
  ids=["by term", "by example", "shortcut", "flow"],
)
def test_loss_is_that_of_a_naive_loop(config, batch):
  expected, means = naive_loss(config, batch)
  value, metrics = run(config, batch)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  assert metrics.keys() == {*means, "curvature"}
  for term, mean in means.items():
    np.testing.assert_allclose(metrics[term], mean, rtol=1e-5)


def test_a_term_of_one_s_own_takes_its_part(batch, monkeypatch):
  _, x1, label = batch

  def still(config, networks, x0, x1, label, keys):
    """The field at the data is 0."""
    zero = jnp.zeros(len(label))
    return loss.Examples(x1, zero + 1, zero, label, zero, 0 * x1)

  monkeypatch.setitem(loss.TERMS, "still", still)
  config = replace(ISM, split={"still": 3, "velocity": 1}, w_max=0.0, wavelet_levels=0)
  value, metrics = run(config, batch)
  mine = np.arange(B) % 4 > 0  # in the order of TERMS: velocity goes first
  output = network(PARAMS, x1[mine], *np.float32([[1], [0]]).repeat(24, 1), label[mine], 0.0)
  np.testing.assert_allclose(metrics["still"], np.mean(output**2), rtol=1e-5)
  np.testing.assert_allclose(value, metrics["velocity"] + metrics["still"], rtol=1e-6)
  by_example, _ = run(replace(config, weighting="by_example"), batch)
  np.testing.assert_allclose(by_example, (metrics["velocity"] + 3 * metrics["still"]) / 4, 1e-6)


def test_curvature_is_the_share_of_the_velocity_that_is_not_predicted(batch):
  silent = lambda params, x, *rest: 0 * x  # noqa: E731
  knowing = lambda params, x, *rest: jnp.asarray(batch[1] - batch[0])  # noqa: E731
  for apply, expected in ((silent, 1), (knowing, 0)):
    _, metrics = run(replace(FLOW, wavelet_levels=2), batch, apply=apply)
    np.testing.assert_allclose(metrics["curvature"], expected, atol=1e-6)


@pytest.mark.parametrize(
  ("config", "calls"), [(ISM, [B // 2, B // 4, B // 4, B]), (FLOW, [B])], ids=["ism", "flow"]
)
def test_examples_per_network_call(config, calls, batch):
  # With class and without in one call, two half-steps in turn, and all that need a gradient in one.
  sizes = []

  def counted(params, x, *rest):
    sizes.append(len(x))
    return network(params, x, *rest)

  jax.eval_shape(jax.grad(lambda p: run(config, batch, p, apply=counted)[0]), PARAMS)
  assert sizes == calls


def test_gradient_comes_through_the_last_call_only(batch):
  examples = make_examples(ISM, batch)

  def with_constant_targets(params):
    total = 0.0
    for each in examples.values():
      output = network(params, *each[:5])
      total += jnp.mean(loss.distance(ISM, output - each.target))
    return total

  expected = jax.jit(jax.grad(with_constant_targets))(PARAMS)
  both = jax.jit(jax.grad(lambda p, q: run(ISM, batch, p, q)[0], argnums=(0, 1)))
  gradient, of_target = both(PARAMS, TARGET_PARAMS)
  for name in PARAMS:
    np.testing.assert_allclose(gradient[name], expected[name], rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(of_target[name], 0)
  assert all(np.any(g) for g in gradient.values())


def test_only_consistency_reads_the_target_network(batch):
  broken = jax.tree.map(lambda p: p * jnp.nan, TARGET_PARAMS)
  _, metrics = run(ISM, batch, target_params=broken)
  assert np.isfinite(metrics["velocity"]) and np.isfinite(metrics["guidance"])
  assert np.isnan(metrics["consistency"])
  # And its targets do not read the parameters that are trained.
  examples = make_examples(ISM, batch, params=jax.tree.map(lambda p: p * jnp.nan, PARAMS))
  assert np.all(np.isfinite(examples["consistency"].target))


def test_charbonnier_is_another_distance():
  # A flat error is one coefficient of the low band, 4, whose weight is 16/55 at a decay of 1/2.
  flat = jnp.ones((1, 4, 4, 1))
  found = [loss.distance(replace(ISM, norm=norm), flat) for norm in ("l2", "charbonnier")]
  np.testing.assert_allclose(found, [[16 / 55], [(4 - 1e-3) / 55]], rtol=1e-5)


def test_what_a_config_says_is_what_is_learned():
  config = ism_digits.get_config()
  ism = LossConfig(**config.loss)
  assert (ism.group, ism.is_flow_matching) == (8, False)
  assert list(ism.split) == list(loss.TERMS)  # of a checkpoint's JSON too, which sorts them
  assert LossConfig(**{**config.loss, "split": dict(sorted(config.loss.split.items()))}) == ism
  flow, shortcut = (LossConfig(**ism_digits.get_config(o).loss) for o in ("flow", "shortcut"))
  assert (flow.is_flow_matching, shortcut.is_flow_matching) == (True, False)
  assert not replace(flow, class_dropout=0.0).is_flow_matching  # it cannot be guided
  replace(ism, w_max=0.3, w_step=0.1)  # a multiple up to rounding: 3 * 0.1 != 0.3


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"split": {"velocity": 1, "drift": 1}}, r"no term 'drift'; choose from velocity, guidance, c"),
    ({"split": {"guidance": 1, "consistency": 1}}, r"velocity': 0.* that of velocity at least 1"),
    ({"split": {"velocity": 4, "guidance": -1}}, r"loss.split=.* must be whole numbers"),
    ({"split": {"velocity": 2.5, "guidance": 1}}, r"loss.split=.* must be whole numbers"),
    ({"split": {"velocity": 4, "guidance": "x"}}, r"loss.split=.* must be whole numbers"),
    ({"norm": "l1"}, r"loss.norm='l1' is unknown; choose from l2, charbonnier"),
    ({"target": "jump"}, r"loss.target='jump' is unknown; .* two_steps, meanflow, improved_meanf"),
    (
      {"target": "meanflow", "bootstrap_guidance": 0.5},
      r"loss.bootstrap_guidance=0.5 is a part of loss.target=two_steps",
    ),
    ({"weighting": "rows"}, r"loss.weighting='rows' is unknown; .* by_example, by_term"),
    ({"w_max": 0.0}, r"loss.split.guidance=1 but loss.w_max=0"),
    ({"split": {"velocity": 1}}, r"loss.split.guidance=0 but loss.w_max=2"),
    ({"interval_start": 2.0}, r"loss.interval_start=2.0 must be between 0 and 1, below 1"),
    ({"interval_start": float("nan")}, r"loss.interval_start=nan must"),
    ({"bootstrap_guidance": -1.0}, r"loss.bootstrap_guidance=-1.0 must be at least 0"),
    ({"class_dropout": 1.5}, r"loss.class_dropout=1.5 must be between 0 and 1"),
    ({"zero_w_prob": -0.1}, r"loss.zero_w_prob=-0.1 must be between 0 and 1"),
    ({"class_dropout": 0.0}, r"loss.class_dropout=0 with guidance: .* choose .*=0.1"),
    ({"w_max": float("inf")}, r"loss.w_max=inf must be a multiple"),
    ({"w_max": float("nan")}, r"loss.w_max=nan must be a multiple"),
    ({"w_step": 0.3}, r"loss.w_max=2 must be a multiple of loss.w_step=0.3"),
    ({"w_step": 0.0}, r"loss.w_step=0, which must be above 0"),
  ],
)
def test_bad_settings_are_refused_in_a_sentence(changes, message):
  with pytest.raises(UserError, match=message):
    LossConfig(**{**ism_digits.get_config().loss, **changes})
