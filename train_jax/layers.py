"""Layers that networks share, in Flax NNX.

Dimensions: b batch, l length, k features, n heads, f head features.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from train_jax.errors import UserError, check_at_least, check_one_of
from train_jax.mesh import by_heads, shard_batch

# What a block's forward pass saves for its backward pass; the rest is computed again.
REMAT = {
  "none": None,  # everything is saved
  "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # outputs of linear layers
  "block": jax.checkpoint_policies.nothing_saveable,  # the block's input only
}
DTYPES = ("float32", "bfloat16")  # of a network's computation
ATTENTION = ("xla", "cudnn")  # implementations


def check_network(config, names: tuple[str, ...], multiple: int) -> None:
  """Raises UserError unless the settings that all networks have make a network.

  Args:
    config: the section `model` of a config, with the fields `names`, `width`, `heads`, `dtype`,
      `remat` and `attention`.
    names: fields that must be at least 1.
    multiple: a head's number of features must be divisible by it.
  """
  if config.dtype not in DTYPES:
    raise UserError(
      f"model.dtype={config.dtype!r} is none of {', '.join(DTYPES)}; choose one of them (in "
      "float16 small gradients would be 0, as no loss is scaled here)."
    )
  check_one_of("model.remat", config.remat, REMAT)
  check_one_of("model.attention", config.attention, ATTENTION)
  if config.attention == "cudnn" and config.dtype != "bfloat16":
    raise UserError(
      f"model.attention='cudnn' needs model.dtype='bfloat16', and it is {config.dtype!r}; choose "
      "that, or model.attention='xla'."
    )
  for name in names:
    check_at_least(f"model.{name}", getattr(config, name), 1)
  unit = multiple * config.heads
  if config.width % unit:
    raise UserError(
      f"model.width={config.width} must be a multiple of {multiple} x model.heads={config.heads}; "
      f"the nearest is {max(1, round(config.width / unit)) * unit}."
    )


def attend(
  q: jax.Array, key: jax.Array, value: jax.Array, kind: str, mask: jax.Array | None = None
) -> jax.Array:
  """softmax(q key^T / sqrt(f)) value -> [b, l, n, f].

  Args:
    q: [b, l, n, f].
    key, value: [b, l', n', f]. n' is n, or a divisor if groups of heads share key and value.
      cuDNN needs l' = l.
    kind: one of ATTENTION. cuDNN never writes the scores [l, l] to memory. Without a GPU, XLA
      computes the same.
    mask: bool [b, 1, l, l'], True where q sees the key; None: everywhere.
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
  outputs = jax.nn.dot_product_attention(q, key, value, mask=mask, implementation="cudnn")
  outputs, *_ = by_heads(outputs, key, value)  # this splits the gradient, too
  return outputs[:, :length]


def recipe(make: Callable) -> tuple[Callable, Callable]:
  """A module as two functions: `init(key) -> params` (nested dicts) and `merge(params) -> module`.

  Args:
    make: nnx.Rngs -> the module.
  """
  graphdef = nnx.graphdef(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

  def init(key: jax.Array) -> dict:
    return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key))))

  return init, lambda params: nnx.merge(graphdef, nnx.State(params))


def stack_blocks(make: Callable, depth: int, rngs: nnx.Rngs) -> nnx.Module:
  """`depth` modules `make(rngs)` as one, with parameters stacked along a leading axis."""
  return nnx.split_rngs(splits=depth)(nnx.vmap(make))(rngs)


def scan_blocks(body: Callable, x, blocks, *, remat: str, unroll: bool):
  """`jax.lax.scan` of `body(x, block) -> (x, output)` over stacked blocks -> (x, stacked outputs).

  `remat` is one of REMAT. `unroll` writes all blocks out: faster for shallow networks, slow to
  compile for deep ones.
  """
  if policy := REMAT[remat]:
    # Unrolled, XLA would merge both computations without barriers. Across a loop it cannot.
    body = jax.checkpoint(body, policy=policy, prevent_cse=unroll)
  return jax.lax.scan(body, x, blocks, unroll=unroll)


class Dense(nnx.Linear):
  """A linear layer that flattens all leading dimensions into one.

  So [b, l, k] @ [k, m] is a plain matrix product. On CPU its backward pass is twice as fast as that
  of a batched product, elsewhere it is the same.
  """

  def __call__(self, x: jax.Array) -> jax.Array:
    flat = super().__call__(x.reshape(-1, x.shape[-1]))
    return flat.reshape(*x.shape[:-1], flat.shape[-1])


@jax.custom_jvp
def output(x: jax.Array, matrix: jax.Array) -> jax.Array:
  """A last layer: x [..., k] @ matrix [k, v] -> [..., v] float32, for any dtype of the two.

  Products are summed in float32 and not rounded: in bfloat16 the two best of ten thousand tokens
  are often equal, and rewards and guidance are differences of outputs. Gradients are products in
  the inputs' dtype, as in every other layer. Without this rule they would be float32 products.
  """
  flat = x.reshape(-1, x.shape[-1])
  products = jnp.matmul(flat, matrix, preferred_element_type=jnp.float32)
  return products.reshape(*x.shape[:-1], -1)


@output.defjvp
def _output_rule(inputs, tangents):
  (x, matrix), (x_dot, matrix_dot) = inputs, tangents

  def product(x, matrix):  # its transposes are products in the inputs' dtype
    return jnp.matmul(x.reshape(-1, x.shape[-1]), matrix).astype(jnp.float32)

  y = output(x, matrix)
  return y, (product(x_dot, matrix) + product(x, matrix_dot)).reshape(y.shape)


class Embed(nnx.Embed):
  """An embedding that looks up rows in the table's own dtype and casts them afterwards.

  Flax casts the whole table first, at each call. A row's gradient, a sum over all its uses, would
  then be summed in bfloat16.
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


def sinusoidal(x: jax.Array, features: int) -> jax.Array:
  """cos and sin of x [b] at `features / 2` frequencies from 1 down towards 1e-4 -> [b, features].

  Source: Vaswani et al., arXiv 1706.03762, section 3.5.
  """
  half = features // 2
  frequency = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half) / half)
  angle = x[:, None] * frequency
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def sinusoidal_grid(height: int, width: int, features: int) -> jax.Array:
  """Fixed position embedding of a 2-d grid, row by row -> [height * width, features].

  Source: MAE, arXiv 2111.06377, and DiT.
  """
  rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
  halves = [sinusoidal(axis.reshape(-1), features // 2) for axis in (columns, rows)]
  return jnp.concatenate(halves, axis=-1)
