"""The sampler, on fields whose Euler steps are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ism_jax import dit, sample
from ism_jax.path import draw_noise, min_step_is_zero, step_start
from train_jax import mesh as mesh_lib

SHAPE = (4, 4, 1)
LABELS = np.array([0, 1, 2, 0, 1])


def linear(params, x, t, d, label, w):
  return params * x


def column(values):
  return values[:, None, None, None]


@pytest.fixture(scope="module")
def start():
  """The noise that images 0 to 4 of seed 7 start from."""
  return np.asarray(draw_noise(jax.random.key(7), jnp.arange(5), SHAPE))


@pytest.fixture(scope="module")
def linear_sampler():
  return sample.make_sampler(linear, SHAPE)


@pytest.mark.parametrize("nfe", [1, 2, 3, 7, 64, 100, 128])
def test_euler_on_a_linear_field(nfe, linear_sampler, start):
  images = linear_sampler(jnp.float32(-1.5), 7, LABELS, 0.0, nfe)
  times = np.array([step_start(i, nfe) for i in range(nfe + 1)], np.float64)
  expected = start * np.prod(1 - 1.5 * np.diff(times))
  np.testing.assert_allclose(images, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("nfe", [1, 2, 3, 64, 128])
def test_each_step_is_told_its_time_and_size(nfe, start):
  told = sample.make_sampler(
    lambda params, x, t, d, label, w: column(jnp.stack([t, d], -1) @ params) + 0 * x, SHAPE
  )
  times = told(jnp.array([1.0, 0.0]), 7, LABELS, 0.0, nfe) - start
  starts = np.array([step_start(i, nfe) for i in range(nfe + 1)])
  d = np.diff(starts)
  np.testing.assert_allclose(times, np.full_like(start, d @ starts[:-1]), atol=1e-5)
  sizes = told(jnp.array([0.0, 1.0]), 7, LABELS, 0.0, nfe) - start
  np.testing.assert_allclose(sizes, np.full_like(start, d @ min_step_is_zero(d)), atol=1e-5)


def test_labels_and_strengths_reach_their_images(start):
  told = sample.make_sampler(
    lambda params, x, t, d, label, w: column(label + 10 * w) + 0 * x, SHAPE
  )
  w = np.array([0.0, 0.5, 1.0, 1.5, 2.0])
  shift = told({}, 7, LABELS, w, 2, batch=2) - start
  np.testing.assert_allclose(shift, column(LABELS + 10 * w) + np.zeros(SHAPE), atol=1e-5)
  same = told({}, 7, LABELS, 0.5, 2) - start
  np.testing.assert_allclose(same, column(LABELS + 5.0) + np.zeros(SHAPE), atol=1e-5)


def test_classifier_free_guidance_is_two_passes_where_there_is_a_strength(start):
  slopes, calls = np.array([0.5, -1.0, 2.0, 0.25]), []  # of three classes and null

  def apply(params, x, t, d, label, w):
    jax.debug.callback(lambda rows: calls.append(len(rows)), label)
    return column(jnp.asarray(slopes)[label] + t + 100 * w) * x  # a strength must not come here

  sampler = sample.make_sampler(sample.classifier_free(apply, null=3), SHAPE)
  w = np.array([0.0, 0.5, 1.0, 1.5, 2.0])
  found, wanted = sampler({}, 7, LABELS, w, 4), start.astype(np.float64)
  for i in range(4):
    of_class, of_null = slopes[LABELS] + i / 4, slopes[3] + i / 4
    wanted = wanted * (1 + column(of_class + w * (of_class - of_null)) / 4)
  np.testing.assert_allclose(found, wanted, rtol=1e-5)
  jax.effects_barrier()
  assert calls == [16] * 4  # five rows are filled up to eight
  calls.clear()
  plain = sampler({}, 7, LABELS, 0.0, 4)
  np.testing.assert_array_equal(plain[0], found[0])
  jax.effects_barrier()
  assert calls == [8] * 4


def test_an_image_does_not_depend_on_batch_or_number():
  config = dit.DiTConfig(image_size=4, channels=1, classes=3, patch=2, width=16, depth=1, heads=2)
  init, apply = dit.make_network(config)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda a: (0.2 * rng.normal(size=a.shape)).astype(np.float32),
    jax.eval_shape(init, jax.random.key(0)),
  )
  network = sample.make_sampler(apply, SHAPE)
  images = network(params, 7, LABELS, 0.5, 4, batch=5)
  assert images.shape == (5, *SHAPE)
  np.testing.assert_allclose(network(params, 7, LABELS, 0.5, 4, batch=2), images, atol=1e-5)
  np.testing.assert_allclose(network(params, 7, LABELS[:3], 0.5, 4, batch=5), images[:3], atol=1e-5)
  assert not np.allclose(network(params, 8, LABELS, 0.5, 4, batch=5), images, atol=0.1)


@pytest.mark.parametrize("shape", [(2, 4), (3, 2)], ids=str)  # and six, which do not divide eight
def test_devices_share_the_images_out(linear_sampler, make_mesh, shape):
  seen = []

  def watched(params, x, *rest):
    jax.debug.inspect_array_sharding(x, callback=lambda s: seen.append(s.shard_shape(x.shape)))
    return linear(params, x, *rest)

  mesh, labels = make_mesh(*shape), np.arange(11) % 3
  shared = sample.make_sampler(watched, SHAPE, mesh)
  images = shared(mesh_lib.replicate(jnp.float32(-1.5), mesh), 7, labels, 0.0, 2, batch=8)
  assert seen[0] == (-(-8 // mesh.size), *SHAPE)
  np.testing.assert_array_equal(images, linear_sampler(jnp.float32(-1.5), 7, labels, 0.0, 2))


def test_one_compilation_serves_every_number_of_steps():
  traces = []

  def counted(params, x, *rest):
    traces.append(len(x))
    return params * x

  sampler = sample.make_sampler(counted, SHAPE)
  sampler(jnp.float32(1), 0, LABELS, 0.0, 1, batch=4)
  first = len(traces)
  for nfe in (1, 2, 3, 16, 128):
    sampler(jnp.float32(1), nfe, LABELS, nfe / 10, nfe, batch=4)
  assert first >= 1 and len(traces) == first


def test_few_images_are_not_filled_up_to_a_batch():
  sizes = []

  def counted(params, x, *rest):
    sizes.append(len(x))
    return params * x

  sampler = sample.make_sampler(counted, SHAPE)
  for n, batch in ((1, 256), (3, 256), (4, 256), (5, 6), (11, 6)):
    assert len(sampler(jnp.float32(1), 0, np.zeros(n, int), 0.0, 1, batch=batch)) == n
  assert list(dict.fromkeys(sizes)) == [1, 4, 6]  # 5 are filled up to 8, were there room


def test_progress_counts_images(linear_sampler):
  seen = []
  linear_sampler(jnp.float32(0), 0, LABELS, 0.0, 1, batch=2, progress=seen.append)
  assert seen == [2, 2, 1]


def test_any_seed_will_do(linear_sampler):
  large = linear_sampler(jnp.float32(0), 3_000_000_000, LABELS, 0.0, 1)
  assert not np.allclose(large, linear_sampler(jnp.float32(0), 0, LABELS, 0.0, 1), atol=0.1)


def test_what_is_not_finite_is_seen_even_if_the_decoder_hides_it(make_mesh):
  large = np.array([0, 1, 0, 0, -1, 0, 0, 0], np.int32)

  def network(params, x, t, d, label, w):
    value = jnp.array([0, jnp.inf, -jnp.inf])[label]  # -1 is the last
    return jnp.where(jnp.eye(4)[..., None] > 0, column(value), 0 * x)

  decoder = jnp.float32(0.5), lambda gain, x: jnp.tanh(gain * x)
  draw = sample.make_image_sampler(network, SHAPE, make_mesh(2, 4), 7, decoder)
  numbers, images, finite = draw({}, large, 0.0, 1, 3)
  np.testing.assert_array_equal(numbers, np.arange(3, 11))
  np.testing.assert_array_equal(finite, large == 0)
  assert np.all(images[1, 0, 0] == 255) and np.all(images[4, 0, 0] == 0)


def test_pixels_are_rounded_to_nearest_and_clipped():
  levels = np.arange(256)
  exact = levels / 127.5 - 1
  np.testing.assert_array_equal(sample.to_uint8(exact), levels)
  for off in (-0.45, 0.45):  # of a level: truncation would lose one of these
    np.testing.assert_array_equal(sample.to_uint8(exact + off / 127.5), levels)
  outside = sample.to_uint8(np.array([-7.0, -1.01, 1.01, 300.0]))
  np.testing.assert_array_equal(outside, [0, 0, 255, 255])
  assert outside.dtype == np.uint8
