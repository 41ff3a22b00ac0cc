"""Schedule and optimiser. Clipping lives in the step, which needs the gradient's norm anyway."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from train_jax import lora
from train_jax.errors import UserError


def schedule(lr: float, warmup: int, steps: int, final: float) -> optax.Schedule:
  """Linear warm-up over `warmup` steps, then a cosine from `lr` to `final * lr` at `steps`.

  `final = 1` is a constant rate after the warm-up.

  Raises:
    UserError: `lr` is not above 0, or another is below it.
  """
  if not lr > 0:
    raise UserError(f"optim.lr={lr} must be above 0.")
  for name, value in (("warmup", warmup), ("final", final)):
    if not value >= 0:
      raise UserError(f"optim.{name}={value} must be at least 0.")
  return optax.warmup_cosine_decay_schedule(
    init_value=lr / max(warmup, 1),
    peak_value=lr,
    warmup_steps=warmup,
    decay_steps=max(steps, warmup + 1),
    end_value=final * lr,
  )


def _is_matrix(path, _) -> bool:
  name = jax.tree_util.keystr(path[-1:], simple=True)
  return name == "kernel" or lora.is_adapter(name)


def adamw(
  rate: optax.Schedule, b1: float, b2: float, weight_decay: float, mu_dtype: str = "float32"
):
  """AdamW (Loshchilov & Hutter, arXiv 1711.05101); only matrices decay: kernels and adapters.

  By name, because stacked layers give biases a second axis.

  Args:
    mu_dtype: what the first moments are kept in, float32 or bfloat16. The second stay in float32:
      with b2 near 1 a step changes them by less than bfloat16 resolves.

  Raises:
    UserError: `mu_dtype` is neither, or a decay is not in [0, 1).
  """
  for name, decay in (("b1", b1), ("b2", b2)):
    if not 0 <= decay < 1:
      raise UserError(f"optim.{name}={decay} must be at least 0 and below 1.")
  if mu_dtype not in ("float32", "bfloat16"):
    raise UserError(f"optim.mu_dtype={mu_dtype!r} is unknown; choose 'float32' or 'bfloat16'.")

  def mask(params):
    return jax.tree_util.tree_map_with_path(_is_matrix, params)

  return optax.adamw(
    rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=mask, mu_dtype=jnp.dtype(mu_dtype)
  )
