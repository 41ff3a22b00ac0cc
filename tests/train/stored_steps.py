"""States to be stored, and ways in which a stored step is damaged."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from train_jax.state import TrainState

DECAYS = {"target": 0.5, "sample": 0.99}


def make_state(step: int) -> TrainState:
  """Every dtype that a state may hold, in containers of every kind, different at each step."""
  keys = iter(jax.random.split(jax.random.key(step), 8))
  params = {
    "layer": {"kernel": jax.random.normal(next(keys), (64, 32)), "bias": jnp.zeros(32)},
    "half": jax.random.normal(next(keys), (16, 3)).astype(jnp.bfloat16),
  }
  tx = optax.adamw(lambda count: 0.1 * count, mu_dtype=jnp.float32)
  _, opt_state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
  return TrainState(
    step=jnp.int32(step),
    skipped=jnp.int32(1),
    params=params,
    opt_state=opt_state,
    ema={name: jax.tree.map(lambda p: p.astype(jnp.float32) / 2, params) for name in DECAYS},
    aux_state={
      "full": jax.random.bernoulli(next(keys), 0.5, (37,)),
      "tokens": jax.random.randint(next(keys), (5, 7), -(2**31), 2**31 - 1),
      "bytes": jnp.arange(9, dtype=jnp.uint8),
      "pair": (jnp.float16(1.5), jnp.float32(jnp.nan)),
      "nothing": (),
      # Restored by name: "10" would sort before "2".
      "many": [jnp.int32(i) for i in range(12)],
    },
    rng=jax.random.key_data(next(keys)),
  )


make_state = jax.jit(make_state, static_argnums=0)


def meta_of(step: int) -> dict:
  return {
    "step": step,
    "position": 10 * step,
    "config": {"nfe": (1, 2), "lr": 0.1},
    "metadata": {},
  }


def flip_bit(path: Path, bit: int) -> None:
  data = bytearray(path.read_bytes())
  data[bit // 8] ^= 1 << (bit % 8)
  path.write_bytes(data)


def truncate(step: Path) -> None:
  path = max((step / "state" / "ocdbt.process_0" / "d").iterdir(), key=lambda p: p.stat().st_size)
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty_file(step: Path) -> None:
  (step / "ema_sample" / "manifest.ocdbt").write_bytes(b"")


def remove_item(step: Path) -> None:
  shutil.rmtree(step / "ema_target")


def remove_meta(step: Path) -> None:
  shutil.rmtree(step / "meta")


def gut(step: Path) -> None:
  shutil.rmtree(step)
  step.mkdir()


def change_position(step: Path) -> None:
  path = step / "meta" / "metadata"
  assert '"position": 20' in path.read_text()
  path.write_text(path.read_text().replace('"position": 20', '"position": 21'))
