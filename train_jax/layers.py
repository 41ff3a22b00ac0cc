"""Layers that networks share, in Flax NNX.

Dimensions: b batch, l length, k features, n heads, f head features.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from train_jax.errors import UserError
from train_jax.mesh import by_heads, shard_batch

# What the backward pass of a block takes from the forward pass, and does not compute again.
REMAT = {
  "none": None,  # computes nothing again
  "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # of the linear layers
  "block": jax.checkpoint_policies.nothing_saveable,  # its input only
}


DTYPES = ("float32", "bfloat16")  # of a network's computation
ATTENTION = ("xla", "cudnn")  # what computes it


def check_network(config, names: tuple[str, ...], share: int) -> None:
  """Raises UserError unless a network can be made of the settings that all networks have.

  Args:
    config: has the fields `names`, `width` and `heads` among them, `dtype`, `remat` and
      `attention`, as the config's section `model`.
    names: of those that must be at least 1.
    share: what the features of a head must be a multiple of.
  """
  if config.dtype not in DTYPES:
    raise UserError(
      f"model.dtype={config.dtype!r} is none of {', '.join(DTYPES)}; choose one of them (in "
      "float16 small gradients would be 0, as no loss is scaled here)."
    )
  if config.remat not in REMAT:
    raise UserError(f"model.remat={config.remat!r} is unknown; choose one of {', '.join(REMAT)}.")
  if config.attention not in ATTENTION:
    known = " or ".join(map(repr, ATTENTION))
    raise UserError(f"model.attention={config.attention!r} is unknown; choose {known}.")
  if config.attention == "cudnn" and config.dtype != "bfloat16":
    raise UserError(
      f"model.attention='cudnn' needs model.dtype='bfloat16', and it is {config.dtype!r}; choose "
      "that, or model.attention='xla'."
    )
  for name in names:
    if (value := getattr(config, name)) < 1:
      raise UserError(f"model.{name}={value} must be at least 1.")
  unit = share * config.heads
  if config.width % unit:
    raise UserError(
      f"model.width={config.width} must be a multiple of {share} x model.heads={config.heads}; "
      f"the nearest is {max(1, round(config.width / unit)) * unit}."
    )


def attend(
  q: jax.Array, key: jax.Array, value: jax.Array, kind: str, mask: jax.Array | None = None
) -> jax.Array:
  """softmax(q key^T / sqrt(f)) value, of q [b, l, n, f] -> [b, l, n, f].

  Args:
    key, value: of as many heads as q, or of fewer that groups of its heads share. For XLA's they
      may have another length than q, l'.
    kind: one of ATTENTION. cuDNN's never writes the scores [l, l] to memory; where there is no
      GPU it is XLA's, which computes the same.
    mask: bool [b, 1, l, l'], what is seen; None: everything.
  """
  if kind == "xla" or jax.default_backend() != "gpu":
    return jax.nn.dot_product_attention(q, key, value, mask=mask, implementation="xla")
  length, features = q.shape[1], q.shape[-1]
  if features % 8 or features > 256:
    raise UserError(
      "model.attention='cudnn' takes heads of 8, 16, ... 256 features, and model.width / "
      f"model.heads is {features}; choose other sizes, or model.attention='xla'."
    )
  if mask is not None:
    odd = length % 2  # the backward pass takes even lengths
    q, key, value = (jnp.pad(a, ((0, 0), (0, odd), (0, 0), (0, 0))) for a in (q, key, value))
    mask = shard_batch(jnp.pad(mask, ((0, 0), (0, 0), (0, odd), (0, odd))))
  q, key, value = by_heads(q, key, value)
  attended = jax.nn.dot_product_attention(q, key, value, mask=mask, implementation="cudnn")
  attended, *_ = by_heads(attended, key, value)  # and with it its gradient
  return attended[:, :length]


def recipe(make: Callable) -> tuple[Callable, Callable]:
  """A module as functions: `init(key) -> params`, nested dicts of arrays, and back: `merge`.

  Args:
    make: nnx.Rngs -> the module.
  """
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

  def init(key: jax.Array) -> dict:
    return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key))))

  return init, lambda params: nnx.merge(graphdef, nnx.State(params))


def stack_blocks(make: Callable, depth: int, rngs: nnx.Rngs) -> nnx.Module:
  """`depth` of `make(rngs)` as one module, its parameters stacked along a leading axis."""
  return nnx.split_rngs(splits=depth)(nnx.vmap(make))(rngs)


def scan_blocks(body: Callable, x, blocks, *, remat: str, unroll: bool):
  """x after `body(x, block) -> (x, kept)` of each of `blocks`, stacked along a leading axis.

  Returns x and what was kept of each, stacked alike, as `jax.lax.scan` does. `remat` is one of
  REMAT. `unroll` writes all blocks out: faster when shallow, slower to compile when deep.
  """
  if policy := REMAT[remat]:
    # Written out, both computations need barriers, or XLA merges them; across a loop it can't.
    body = jax.checkpoint(body, policy=policy, prevent_cse=unroll)
  return jax.lax.scan(body, x, blocks, unroll=unroll)


class Dense(nnx.Linear):
  """A linear layer that flattens all leading dimensions into one.

  [b, l, k] @ [k, m] as a plain matrix product: on CPU its backward pass is twice as fast as that of
  the batched one, elsewhere it is the same.
  """

  def __call__(self, x: jax.Array) -> jax.Array:
    flat = super().__call__(x.reshape(-1, x.shape[-1]))
    return flat.reshape(*x.shape[:-1], flat.shape[-1])


@jax.custom_vjp
def output(x: jax.Array, matrix: jax.Array) -> jax.Array:
  """x [..., k] @ matrix [k, v] -> [..., v] float32, whatever the dtype of the two: a last layer.

  The products are summed in float32 and stay so: rounded to bfloat16, the two best of some ten
  thousand tokens are often equal, and rewards and guidance are differences of outputs. The
  gradients are products in the dtype of the two, as every other layer's: of float32 with bfloat16
  they would be computed in float32.
  """
  rows = x.reshape(-1, x.shape[-1])
  found = jnp.matmul(rows, matrix, preferred_element_type=jnp.float32)
  return found.reshape(*x.shape[:-1], -1)


def _output_backward(kept, gradient):
  x, matrix = kept
  rows, gradient = (a.reshape(-1, a.shape[-1]).astype(x.dtype) for a in (x, gradient))
  return (gradient @ matrix.T).reshape(x.shape), rows.T @ gradient


output.defvjp(lambda x, matrix: (output(x, matrix), (x, matrix)), _output_backward)


class Embed(nnx.Embed):
  """Rows of a table, looked up in its own type and then cast.

  Flax casts the table first: the whole of it at each call, and a row's gradient, a sum over all
  places where it was looked up, would be added in bfloat16.
  """

  def __call__(self, index: jax.Array) -> jax.Array:
    return self.embedding[...][index].astype(self.dtype)


class Mlp(nnx.Module):
  """Two dense layers with an activation between them."""

  def __init__(self, width: int, hidden: int, out: int, activation, **kwargs):
    self.inner = Dense(width, hidden, **kwargs)
    self.outer = Dense(hidden, out, **kwargs)
    self.activation = activation

  def __call__(self, x: jax.Array) -> jax.Array:
    return self.outer(self.activation(self.inner(x)))


def sinusoidal(x: jax.Array, features: int, longest: float = 10_000.0) -> jax.Array:
  """cos and sin of x [b] at `features / 2` frequencies from 1 down to 1 / longest -> [b, features].

  (Vaswani et al., arXiv 1706.03762, section 3.5.)
  """
  half = features // 2
  frequency = jnp.exp(-jnp.log(longest) * jnp.arange(half) / half)
  angle = x[:, None] * frequency
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def sinusoidal_grid(height: int, width: int, features: int) -> jax.Array:
  """Fixed position embedding of a 2-d grid, rows then columns -> [height * width, features].

  (MAE, arXiv 2111.06377, and DiT.)
  """
  rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
  halves = [sinusoidal(axis.reshape(-1), features // 2) for axis in (columns, rows)]
  return jnp.concatenate(halves, axis=-1)
