"""Eight fake CPU devices, and a small method that every part of the engine can be tried on."""

import os
from importlib.metadata import version
from pathlib import Path

# Before JAX starts. Many threads: eight fake devices on two cores wait for each other for ever
# otherwise.
os.environ.setdefault("NPROC", "32")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The tests wait for the compiler more than for results: it need not optimise, and is not run twice.
# The emitters of fusions take two thirds of its time; a later jaxlib may not know the flag, and XLA
# ends at one that it does not know.
os.environ["XLA_FLAGS"] = " ".join(
  (
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "",
  )
)
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train_jax import mesh as mesh_lib
from train_jax import state as state_lib
from train_jax.loop import LoopConfig
from train_jax.step import Method

ROWS, INPUTS, OUTPUTS = 8, 4, 3


def predict(params, x):
  """A linear model: x [b, INPUTS] -> [b, OUTPUTS]."""
  return x @ params["layer"]["kernel"] + params["layer"]["bias"]


def linear_batch(seed: int, position: int) -> dict[str, np.ndarray]:
  """Batch number `position`, a function of its arguments only."""
  draw = np.random.default_rng((seed, position))
  x = draw.normal(size=(ROWS, INPUTS)).astype(np.float32)
  y = x @ np.arange(INPUTS * OUTPUTS, dtype=np.float32).reshape(INPUTS, OUTPUTS) / 10
  return {"x": x, "y": y, "poison": np.zeros(ROWS, np.float32)}


def linear_stream(seed: int, position: int):
  while True:
    yield linear_batch(seed, position)
    position += 1


def linear_loss(params, ema, batch, key):
  """Least squares, with a little noise and a little of the target average's own prediction."""
  noise = 0.1 * jax.random.normal(key, batch["y"].shape)
  goal = batch["y"] + noise + 0.1 * predict(ema["target"], batch["x"])
  loss = jnp.mean((predict(params, batch["x"]) - goal) ** 2)
  # Adds 0 with gradient 0; where a row is poisoned, 0 with gradient NaN.
  healthy = 1 - batch["poison"].max()
  trap = 0 * jnp.sqrt(healthy * (1 + params["layer"]["bias"][0] ** 2))
  return loss + trap, {"noise": noise[0, 0]}


def linear_augment(state, batch, key):
  """An auxiliary state that counts batches, and has the last draw and parameters that it saw."""
  seen = {
    "count": state.aux_state["count"] + 1,
    "draw": jax.random.normal(key, (2,)),
    "kernel": state.params["layer"]["kernel"],
    "rows": state.aux_state["rows"].at[state.step % 4].set(batch["x"][0]),
  }
  return seen, batch


def linear_init(key):
  kernel = jax.random.normal(key, (INPUTS, OUTPUTS))
  params = {"layer": {"kernel": kernel, "bias": jnp.full(OUTPUTS, 0.1)}}
  aux_state = {
    "count": jnp.zeros((), jnp.int32),
    "draw": jnp.zeros(2),
    "kernel": jnp.zeros_like(kernel),
    "rows": jnp.zeros((4, INPUTS)),
  }
  return params, aux_state


def linear_evaluate(params, step, final):
  yield "norm/kernel", float(jnp.linalg.norm(params["layer"]["kernel"]))
  yield "grid", np.full((4, 6, 3), step, np.uint8)


@pytest.fixture(scope="session")
def method() -> Method:
  """Least squares on a linear model: cheap; with all that a method may have."""
  return Method(linear_init, linear_loss, linear_augment, linear_stream, linear_evaluate)


@pytest.fixture(scope="session")
def batch():
  """position -> a batch of `method`."""
  return lambda position: linear_batch(0, position)


@pytest.fixture(scope="session")
def make_mesh():
  """(data, fsdp, tensor=1) -> a mesh of the first of the eight devices."""

  def make(data: int, fsdp: int, tensor: int = 1) -> jax.sharding.Mesh:
    return mesh_lib.make_mesh(fsdp, tensor, jax.devices()[: data * fsdp * tensor])

  return make


@pytest.fixture(scope="session")
def one_device(make_mesh):
  """The mesh of one device."""
  return make_mesh(1, 1)


@pytest.fixture(scope="session")
def make_state():
  """(method, tx, mesh, decays, seed) -> the state of step 0 on the mesh."""

  def make(method, tx, mesh, decays, seed=0):
    init = state_lib.create(method, tx, decays, seed)
    shardings = mesh_lib.state_sharding(jax.eval_shape(init), mesh)
    return jax.jit(init, out_shardings=shardings)()

  return make


@pytest.fixture(scope="session")
def perturb():
  """params -> params with every zero filled, and no two rows of a stack alike."""

  def run(params):
    leaves, structure = jax.tree.flatten(params)
    waves = [jnp.sin((i + 1.7) * jnp.arange(a.size)).reshape(a.shape) for i, a in enumerate(leaves)]
    return jax.tree.unflatten(structure, [a + 0.1 * w for a, w in zip(leaves, waves, strict=True)])

  return run


@pytest.fixture(scope="session")
def settings():
  """LoopConfig of a short run; keywords replace its values."""

  def make(**kwargs) -> LoopConfig:
    short = {
      "steps": 4,
      "log_every": 1,
      "eval_every": 0,
      "save_every": 2,
      "keep": 2,
      "keep_every": 0,
      "clip": 1.0,
      "grad_accum_steps": 1,
      "max_skipped": 3,
      "seed": 0,
    }
    return LoopConfig(**{**short, **kwargs})

  return make


@pytest.fixture(scope="session")
def differences():
  """(a, b) -> the paths at which two pytrees differ in any bit, dtype or shape."""

  def compare(a, b) -> list[str]:
    left, right = jax.tree_util.tree_flatten_with_path(a), jax.tree_util.tree_flatten_with_path(b)
    if left[1] != right[1]:
      return [f"{left[1]} != {right[1]}"]
    wrong = []
    for (path, x), (_, y) in zip(left[0], right[0], strict=True):
      x, y = np.asarray(x), np.asarray(y)
      if (x.dtype, x.shape, x.tobytes()) != (y.dtype, y.shape, y.tobytes()):
        wrong.append(jax.tree_util.keystr(path))
    return wrong

  return compare
