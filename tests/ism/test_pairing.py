"""Pairings: permutations, near SciPy's optimum, straight, and silent about the class."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from ism_jax import pairing
from ism_jax.pairing import PairingConfig
from ism_jax.path import draw_noise
from train_jax.errors import UserError

N = 1024
RNG = jax.random.key(3)
FIRST = 5000  # noise numbers are names, not positions in the pool
CONFIGS = {
  f"{condition}/{solver}": PairingConfig(pool=1, condition=condition, solver=solver)
  for condition in ("class", "none")
  for solver in ("sinkhorn", "exact")
}


@pytest.fixture(scope="module")
def pool():
  """(pixels, label, noise numbers, cost of every pair) of N digits."""
  digits = load_digits()
  rows = np.random.default_rng(0).permutation(len(digits.target))[:N]
  pixels = (digits.images[rows, :, :, None] / 8 - 1).astype(np.float32)
  noise = np.arange(FIRST, FIRST + N, dtype=np.int32)
  x = pixels.reshape(N, -1).astype(np.float64)
  z = np.asarray(draw_noise(RNG, noise, (8, 8, 1)), np.float64).reshape(N, -1)
  cost = np.sum(x**2, 1)[:, None] + np.sum(z**2, 1) - 2 * x @ z.T
  return pixels, digits.target[rows].astype(np.int32), noise, cost


@pytest.fixture(scope="module")
def paired(pool):
  """config -> the pool's noise numbers, paired; each config is solved once."""
  known = {}

  def get(name):
    if name not in known:
      pixels, label, noise, _ = pool
      known[name] = pairing.pair(CONFIGS[name], RNG, pixels, label, noise, 10)
    return known[name]

  return get


def cost_of(paired, cost):
  return np.mean(cost[np.arange(N), paired - FIRST])


def optimum(cost, groups):
  """Mean cost of SciPy's assignment within each group of rows."""
  total = 0.0
  for rows in groups:
    block = cost[np.ix_(rows, rows)]
    total += block[linear_sum_assignment(block)].sum()
  return total / N


def groups_of(condition, label):
  return [np.flatnonzero(label == c) for c in range(10)] if condition == "class" else [np.arange(N)]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pairing_is_a_permutation(name, pool, paired):
  _, _, noise, _ = pool
  result = paired(name)
  assert result.dtype == np.int32
  np.testing.assert_array_equal(np.sort(result), noise)
  assert np.mean(result == noise) < 0.2  # and not the one it was given


@pytest.mark.parametrize(("solver", "slack"), [("sinkhorn", 0.02), ("exact", 1e-5)])
@pytest.mark.parametrize("condition", ["class", "none"])
def test_a_pairing_costs_hardly_more_than_the_optimum(condition, solver, slack, pool, paired):
  _, label, _, cost = pool
  best = optimum(cost, groups_of(condition, label))
  found = cost_of(paired(f"{condition}/{solver}"), cost)
  assert best * (1 - 1e-5) <= found < (1 + slack) * best and best < 0.9 * cost.mean()


@pytest.mark.parametrize("solver", ["sinkhorn", "exact"])
def test_class_wise_pairs_never_cross_classes(solver, pool, paired):
  _, label, _, _ = pool
  drawn_for = lambda name: label[paired(name) - FIRST]  # noqa: E731
  np.testing.assert_array_equal(drawn_for(f"class/{solver}"), label)
  assert np.mean(drawn_for(f"none/{solver}") == label) < 0.3


def gain_by_swapping(paired, cost):
  """Share of pairs of pairs that would be cheaper with their noise exchanged."""
  mine = cost[:, paired - FIRST]
  now = np.diag(mine)
  return np.mean(mine + mine.T < now[:, None] + now - 1e-3)


def test_paths_are_straighter(pool, paired):
  # Paths that cross are what bends the field: of two random pairs half would gain from a swap, of
  # an optimal plan none would.
  _, _, noise, cost = pool
  assert 0.4 < gain_by_swapping(noise, cost) < 0.6
  assert gain_by_swapping(paired("none/exact"), cost) == 0
  assert gain_by_swapping(paired("none/sinkhorn"), cost) < 0.02
  assert gain_by_swapping(paired("class/sinkhorn"), cost) < 0.3


def readable(noise, label):
  """Accuracy on one half of a logistic regression from noise to class, fitted on the other half."""
  x = np.asarray(draw_noise(RNG, noise, (8, 8, 1))).reshape(N, -1)
  return LogisticRegression(max_iter=300).fit(x[::2], label[::2]).score(x[1::2], label[1::2])


def test_only_a_label_blind_pairing_leaks_the_class(pool, paired):
  _, label, noise, _ = pool
  assert readable(noise, label) < 0.15
  assert readable(paired("class/sinkhorn"), label) < 0.15
  assert readable(paired("none/sinkhorn"), label) > 0.3


def test_class_leak_is_what_a_held_out_half_shows(pool, paired):
  _, label, _, _ = pool
  for name in ("class/sinkhorn", "none/sinkhorn"):
    noise = np.asarray(draw_noise(RNG, paired(name), (8, 8, 1))).reshape(N, -1)
    assert abs(pairing.class_leak(noise, label) - readable(paired(name), label)) < 0.08


def test_class_leak_of_classes_that_are_too_few_is_none():
  noise = np.random.default_rng(0).normal(size=(9, 4))
  assert np.isnan(pairing.class_leak(noise, np.array([0] * 8 + [3])))
  assert np.isfinite(pairing.class_leak(noise, np.array([0] * 4 + [1] * 4 + [3])))


@pytest.mark.parametrize("devices", [2, 8])
def test_groups_shared_out_over_devices_give_the_same_pairs(devices, pool):
  pixels, label, noise, _ = pool
  rows = slice(0, 256)

  def run(devices):
    config = CONFIGS["class/sinkhorn"]
    return pairing.pair(config, RNG, pixels[rows], label[rows], noise[rows], 10, devices)

  assert jax.local_device_count() == 8
  np.testing.assert_array_equal(run(devices), run(1))


def test_groups_solved_together_cost_what_they_do_one_by_one(pool):
  pixels, label, noise, cost = pool
  table = pairing._groups(label, 10)

  def run(together):
    config = CONFIGS["class/sinkhorn"]
    solve = jax.jit(partial(pairing._solve, config, together))
    column, _ = solve(pixels, draw_noise(RNG, noise, (8, 8, 1)), table)
    pairs = np.arange(N)
    for rows, columns in zip(table, np.asarray(column), strict=True):
      rows = rows[rows >= 0]
      assert sorted(columns[: len(rows)]) == list(range(len(rows)))
      pairs[rows] = rows[columns[: len(rows)]]
    return np.mean(cost[np.arange(N), pairs])

  three = 3 * table.shape[1] ** 2  # 10 groups in turns of 3, the last of 1
  one_by_one = run(0)
  for together in (three, 2**25):
    assert run(together) == pytest.approx(one_by_one, rel=2e-3)  # ties fall as sums are rounded


@pytest.mark.parametrize("name", CONFIGS)
def test_images_that_are_noise_are_paired_with_it(name):
  label = np.arange(12, dtype=np.int32) % 3
  noise = np.arange(FIRST, FIRST + 12, dtype=np.int32)
  wanted = np.roll(noise, 3)  # of the same class, and nobody's own
  pixels = np.asarray(draw_noise(RNG, wanted, (4, 4, 1)))
  np.testing.assert_array_equal(pairing.pair(CONFIGS[name], RNG, pixels, label, noise, 3), wanted)


def test_images_and_noise_of_one_s_own_are_paired_alike(pool):
  pixels, label, noise, _ = (a[:128] for a in pool)
  config = CONFIGS["class/sinkhorn"]
  order = pairing.match(config, pixels, draw_noise(RNG, noise, (8, 8, 1)), label, 10)
  numbers = pairing.pair(config, RNG, pixels, label, noise, 10)
  np.testing.assert_array_equal(noise[order], numbers)


def test_without_labels_all_are_of_one_class():
  z = np.random.default_rng(0).normal(size=(12, 6))
  wanted = np.roll(np.arange(12), 5)
  np.testing.assert_array_equal(pairing.match(PairingConfig(pool=1), z[wanted], z), wanted)


@pytest.mark.parametrize("shape, labels", [((5, 3), 4), ((4, 2), 4), ((4, 3), 5)])
def test_what_does_not_go_together_is_refused(shape, labels):
  with pytest.raises(UserError, match=r"images \(4, 3\), noise .* do not go together"):
    x, z, label = np.zeros((4, 3)), np.zeros(shape), np.zeros(labels, np.int32)
    pairing.match(PairingConfig(pool=1), x, z, label)


def test_absent_classes_and_a_class_of_one_row():
  label = np.array([4] * 17 + [1] + [2] * 5, np.int32)  # of 7 classes
  pixels = np.random.default_rng(0).normal(size=(23, 2, 2, 1)).astype(np.float32)
  noise = np.arange(23, dtype=np.int32)[::-1].copy()
  result = pairing.pair(PairingConfig(pool=1), RNG, pixels, label, noise, 7)
  np.testing.assert_array_equal(np.sort(result), np.sort(noise))
  assert result[17] == noise[17]
  for rows in (slice(0, 17), slice(18, 23)):
    np.testing.assert_array_equal(np.sort(result[rows]), np.sort(noise[rows]))


def test_equal_images_and_broken_images_still_give_a_permutation():
  # Costs that all agree, and costs that are not numbers: the pairing must end all the same.
  noise, label = np.arange(8, dtype=np.int32), np.zeros(8, np.int32)
  for value in (0.5, np.nan):
    pixels = np.full((8, 2, 2, 1), value, np.float32)
    result = pairing.pair(PairingConfig(1, condition="none"), RNG, pixels, label, noise, 1)
    np.testing.assert_array_equal(np.sort(result), noise)


def test_the_same_pool_is_paired_the_same(pool, paired):
  pixels, label, noise, _ = pool
  again = pairing.pair(CONFIGS["class/sinkhorn"], RNG, pixels, label, noise, 10)
  np.testing.assert_array_equal(again, paired("class/sinkhorn"))


def test_duals_of_a_group_do_not_see_what_fills_it_up():
  cost = np.full((8, 8), 100, np.float32)
  mine = cost[:5, :5] = np.random.default_rng(0).uniform(1, 3, (5, 5))
  f, g = jax.jit(pairing.duals)(cost, np.arange(8) < 5)
  assert not np.any(f[5:]) and not np.any(g[5:])
  plan = np.exp((f[:5, None] + g[:5] - mine) / (0.05 * mine.std()))
  for axis in (0, 1):
    np.testing.assert_allclose(plan.sum(axis), 1 / 5, atol=2e-3)


def test_duals_of_one_row_are_finite():
  cost = np.full((4, 4), 3, np.float32)
  f, g = jax.jit(pairing.duals)(cost, np.arange(4) == 0)
  np.testing.assert_allclose(f[0] + g[0], 3, rtol=1e-5)  # all of the mass is on the one pair


@pytest.mark.parametrize("largest, width", [(1, 1), (4, 4), (5, 8), (8, 8), (9, 16)])
def test_groups_are_as_wide_as_the_next_power_of_two(largest, width):
  label = np.array([1] * largest + [3], np.int32)[::-1]
  wanted = np.full((4, width), -1)
  wanted[1, :largest], wanted[3, 0] = np.arange(1, largest + 1), 0
  np.testing.assert_array_equal(pairing._groups(label, 4), wanted)


round_to_permutation = jax.jit(pairing.round_to_permutation)
ALL = np.ones(12, bool)


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_rounding_breaks_ties(levels):
  score = np.random.default_rng(levels).integers(0, levels, (12, 12)).astype(np.float32)
  column = round_to_permutation(score, ALL)
  np.testing.assert_array_equal(np.sort(column), np.arange(12))


def test_rounding_keeps_a_permutation():
  column = np.random.default_rng(0).permutation(12)
  score = -1e6 * np.ones((12, 12), np.float32)
  score[np.arange(12), column] = np.linspace(-5, 5, 12)
  np.testing.assert_array_equal(round_to_permutation(score, ALL), column)


def test_rounding_settles_the_best_pair_first():
  score = np.random.default_rng(0).normal(size=(12, 12)).astype(np.float32)
  column = np.asarray(round_to_permutation(score, ALL))
  row, best = np.unravel_index(score.argmax(), score.shape)
  assert column[row] == best


def test_rounding_leaves_invalid_rows_alone():
  valid = ALL.copy()
  valid[[2, 7, 11]] = False
  score = np.random.default_rng(0).normal(size=(12, 12)).astype(np.float32)
  score[:, ~valid] = 100.0
  column = np.asarray(round_to_permutation(score, valid))
  np.testing.assert_array_equal(column[~valid], np.flatnonzero(~valid))
  np.testing.assert_array_equal(np.sort(column[valid]), np.flatnonzero(valid))
  np.testing.assert_array_equal(round_to_permutation(score, ~ALL), np.arange(12))


def test_relative_cost(pool, paired):
  pixels, _, noise, cost = pool
  relative = lambda numbers: float(  # noqa: E731
    pairing.relative_cost(draw_noise(RNG, jnp.asarray(numbers), (8, 8, 1)), pixels)
  )
  assert abs(relative(noise) - 1) < 0.02
  result = paired("none/sinkhorn")
  np.testing.assert_allclose(relative(result), cost_of(result, cost) / cost.mean(), rtol=1e-4)
  assert relative(result) < relative(paired("class/sinkhorn")) < 0.95


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"condition": "label"}, "pairing.condition='label' is unknown; choose from class, none"),
    ({"solver": "greedy"}, "pairing.solver='greedy' is unknown; choose from sinkhorn, exact"),
    ({"pool": -1}, "pairing.pool=-1 must be at least 0"),
  ],
)
def test_bad_settings_are_refused_in_a_sentence(changes, message):
  with pytest.raises(UserError, match=message):
    replace(PairingConfig(pool=1), **changes)


@pytest.mark.parametrize("solver", ["sinkhorn", "exact"])
def test_a_blind_problem_takes_the_memory_that_is_checked(solver):
  n, kinds = 2048, (jnp.float32, jnp.float32, jnp.int32)
  shapes = ((n, 2, 2, 1), (n, 2, 2, 1), (1, n))
  rows = [jax.ShapeDtypeStruct(*each) for each in zip(shapes, kinds, strict=True)]
  solve = pairing._solver(PairingConfig(1, "none", solver=solver), 1)
  found = solve.lower(*rows).compile().memory_analysis()
  pairs = (found.temp_size_in_bytes + found.output_size_in_bytes) / n**2
  assert 0.9 * pairing.PAIR_BYTES < pairs < 1.1 * pairing.PAIR_BYTES


@pytest.mark.parametrize(
  ("stats", "fits", "message"),
  [
    (None, 16, r"pool=17 batches of 2048 .* of 34816 .* takes 9 GiB .* may take 8; .*pool=16 or"),
    ({"bytes_limit": 2**37}, 45, r"pool=46 batches of 2048 .* takes 66 GiB .* may take 64; "),
  ],
)
def test_a_blind_pool_that_does_not_fit_is_refused(stats, fits, message, monkeypatch):
  device = SimpleNamespace(memory_stats=lambda: stats)
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  pairing.check_size(PairingConfig(fits, "none"), 2048, 1.0)
  with pytest.raises(UserError, match=message + ".*or pairing.condition=class"):
    pairing.check_size(PairingConfig(fits + 1, "none"), 2048, 1.0)
  pairing.check_size(PairingConfig(10 * fits), 2048, 0.1)
  with pytest.raises(UserError, match=r"'class', .* choose pairing.pool=\d+ or .*pairing\)\."):
    pairing.check_size(PairingConfig(20 * (fits + 1)), 2048, 0.05)
