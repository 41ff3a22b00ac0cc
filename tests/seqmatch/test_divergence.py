"""phi of each divergence: its shape, the divergence it stands for, and the penalty's limits."""

from math import log

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from seqmatch_jax import divergence
from seqmatch_jax.divergence import DIVERGENCES, STEEPEST

# phi as METHODS has it, in float64, and where its domain begins.
FORMULAS = {
  "kl": (lambda x: np.log(1 + x), -1.0),
  "reverse_kl": (lambda x: 1 - np.exp(-x), -np.inf),
  "js": (lambda x: np.log(2 - np.exp(-x)), -log(2)),
  "chi2": (lambda x: x - x**2 / 4, -np.inf),
  "chi2_mixture": (lambda x: x - x**2 / 4, -np.inf),
}
# Where phi' = STEEPEST, solved by hand; chi2 has no edge.
EDGES = {"kl": 0.01 - 1, "reverse_kl": -log(100), "js": log(1.01 / 2)}


def draw(name, count=201):
  """Points of the domain, all above the edge."""
  low = EDGES.get(name, -5.0)
  return np.linspace(low + 1e-6, 5.0, count)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_phi_is_the_formula_concave_with_value_zero_and_slope_one(name, float64):
  formula, _ = FORMULAS[name]
  x = draw(name)
  np.testing.assert_allclose(divergence.phi(name, x), formula(x), rtol=1e-12, atol=1e-12)
  assert divergence.phi(name, jnp.zeros(())) == 0
  h = 1e-4
  assert (formula(h) - formula(-h)) / (2 * h) == pytest.approx(1, abs=1e-6)
  wide = np.linspace(-50, 50, 4001)  # the tangents below the edges too
  slopes = np.diff(divergence.phi(name, wide)) / np.diff(wide)
  assert np.all(np.diff(slopes) <= 1e-9)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradient_is_the_numeric_derivative(name, float64):
  x, h = np.concatenate([draw(name), [-8.0, -30.0]]), 1e-6
  grads = jax.vmap(jax.grad(lambda x: divergence.phi(name, x)))(x)
  numeric = (divergence.phi(name, x + h) - divergence.phi(name, x - h)) / (2 * h)
  np.testing.assert_allclose(grads, numeric, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", sorted(EDGES))
def test_the_tangent_begins_where_the_slope_is_steepest(name, float64):
  edge, slope = EDGES[name], jax.grad(lambda x: divergence.phi(name, x))
  formula, _ = FORMULAS[name]
  assert slope(edge + 1e-9) == pytest.approx(STEEPEST, rel=1e-4)
  assert slope(edge - 1e-9) == slope(-1e6) == STEEPEST
  below = formula(edge) + STEEPEST * (-7.0 - edge)
  assert divergence.phi(name, -7.0) == pytest.approx(below, rel=1e-12)


def divergences(data, model):
  """Each divergence from its textbook definition, as phi normalises it."""
  mean = (data + model) / 2
  kl = lambda p, q: np.sum(p * np.log(p / q))  # noqa: E731
  return {
    "kl": kl(data, model),
    "reverse_kl": kl(model, data),
    "js": kl(data, mean) + kl(model, mean),
    "chi2": np.sum((model - data) ** 2 / data),
    "chi2_mixture": 2 * np.sum((data - mean) ** 2 / mean),
  }


@pytest.mark.parametrize("name", DIVERGENCES)
def test_maximum_over_rewards_is_the_divergence(name, float64):
  data, model = np.random.default_rng(0).dirichlet(np.full(6, 4.0), 2)
  extra = -0.25 if name == "chi2_mixture" else 0.0  # the penalty on the model's own side

  def conjugate(p, q):
    low = max(FORMULAS[name][1] + 1e-9, -60.0)
    low = EDGES.get(name, low)
    own = lambda x: x - extra * x**2  # noqa: E731
    found = minimize_scalar(
      lambda x: float(q * own(x) - p * divergence.phi(name, np.float64(x))),
      bounds=(low, 60.0),
      method="bounded",
      options={"xatol": 1e-9},
    )
    return -found.fun, found.x

  values, points = zip(*(conjugate(p, q) for p, q in zip(data, model, strict=True)), strict=True)
  assert sum(values) == pytest.approx(divergences(data, model)[name], rel=1e-6)
  if name != "chi2_mixture":  # phi' at the maximum is the density ratio
    slopes = jax.vmap(jax.grad(lambda x: divergence.phi(name, x)))(np.array(points))
    np.testing.assert_allclose(slopes, model / data, rtol=1e-4)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("alpha", [0.003, 0.05, 0.4])
def test_penalty_is_phi_less_the_reward(name, alpha, float64):
  r = np.append(draw(name), [-0.0499, 0.0499]) / alpha  # and where the series is at its worst
  formula, _ = FORMULAS[name]
  penalty = divergence.penalty(name, r, alpha)
  np.testing.assert_allclose(penalty, formula(alpha * r) / alpha - r, rtol=1e-6, atol=1e-9)
  assert np.all(penalty <= 0)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_float32_is_exact_to_rounding_at_every_size_of_alpha(name):
  """Against float64 in which phi(x) - x is summed as a series in ever smaller terms, or plainly."""
  alpha = np.float32(10.0) ** np.arange(-12, 1)[:, None].astype(np.float32)
  r = np.array([-0.6, -1e-3, 1e-3, 0.3, 2.0, 40.0], np.float32)
  got = divergence.penalty(name, r, alpha)
  x = np.float64(alpha) * np.float64(r)
  first, second = {"kl": (1, 2), "reverse_kl": (1, 1), "js": (2, 6)}.get(name, (0.5, 0))
  third = {"kl": 6, "reverse_kl": 1, "js": 26}.get(name, 0)
  series = -first * x / 2 + second * x**2 / 6 - third * x**3 / 24
  plain = FORMULAS[name][0](np.where(np.abs(x) < 1e-4, 1, x)) / np.where(x == 0, 1, x) - 1
  want = r * np.where(np.abs(x) < 1e-4, series, plain)
  np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("alpha", [0.0, 1e-30, 1e-3, 0.1, 1.0, 10.0])
def test_finite_everywhere_and_exactly_0_without_alpha(name, alpha):
  """Values, and gradients in r and alpha; outside the domain they lead back."""
  r = np.float32([-1e9, -1e4, -88, -1.0, -0.7, -1e-3, 0, 1e-30, 0.1, 90, 1e4, 1e9])
  both = jax.vmap(
    jax.value_and_grad(lambda r, a: divergence.penalty(name, r, a), (0, 1)), (0, None)
  )
  value, (by_r, by_alpha) = both(r, alpha)
  assert np.isfinite(value).all() and np.isfinite(by_r).all() and np.isfinite(by_alpha).all()
  if alpha == 0:
    assert np.all(value == 0) and np.all(by_r == 0)
  if name in EDGES:
    assert np.all(np.abs(by_r) <= STEEPEST)
  assert np.all(np.diff(by_r) <= 1e-5 * np.abs(by_r[:-1]) + 1e-6)  # concave


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_two_branches_meet(name):
  """The series and the difference agree where one takes over, in value and in gradient."""
  x = np.float32([-0.05, 0.05])
  inside, outside = np.nextafter(x, 0), np.nextafter(x, 2 * x)
  both = jax.vmap(jax.value_and_grad(lambda r: divergence.penalty(name, r, 1.0)))
  for a, b in zip(both(inside), both(outside), strict=True):
    np.testing.assert_allclose(a, b, rtol=3e-5)
