"""What a <backspace> does: actions in time -> a tree of tokens that one masked pass can read.

The state is the text so far; a token appends, <backspace> removes the last token
(arXiv 2306.05426). A token that was erased stays in the row as a node, for its logits are those of
a state that was visited; a <backspace> takes no place. Which nodes a node sees is an interval, so
that the logits of every state of the trajectory come out of one pass.

Dimensions: b batch, p prompt, n data actions, v vocabulary, g trajectories of one prompt,
a actions of one, s nodes. A trajectory is its actions, <eos> last, then PAD.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from seqmatch_jax.tokens import BACKSPACE, EOS, PAD
from train_jax.errors import UserError


@dataclass(frozen=True)
class Noise:
  """Wrong tokens that are typed and erased again before a data action.

  Attributes:
    rate: eta, the probability of an error before each data action; 0 for data as they are.
    max_errors: wrong tokens in one answer at most; where more are drawn, a random part is kept.
    source: wrong tokens are drawn from all characters of the answers ("uniform"), or from the
      candidates in the prompt ("prompt").
    run: the probability that a wrong token is followed by another before the erasing begins.
  """

  rate: float = 0.0
  max_errors: int = 0
  source: str = "uniform"
  run: float = 0.0

  def __post_init__(self):
    if not 0 <= self.rate <= 1:
      raise UserError(f"noise.rate={self.rate} must lie in [0, 1].")
    if not 0 <= self.run < 1:
      raise UserError(f"noise.run={self.run} must lie in [0, 1).")
    if self.max_errors < (self.rate > 0):
      raise UserError(
        f"noise.max_errors={self.max_errors} leaves no room for errors; with noise.rate="
        f"{self.rate} it must be at least {int(self.rate > 0)}."
      )
    if self.source not in ("uniform", "prompt"):
      raise UserError(f"noise.source={self.source!r} is unknown; choose 'uniform' or 'prompt'.")


def corrupt(
  rng: np.random.Generator, answer: np.ndarray, wrong: np.ndarray, noise: Noise
) -> tuple[np.ndarray, np.ndarray]:
  """Inserts wrong tokens and the <backspace>s that erase them.

  Args:
    answer: int32 [b, n], data actions: characters, <eos>, then PAD.
    wrong: bool [b, v], the tokens that an error may be; the right one is never drawn.

  Returns:
    actions int32 [b, n + 2 max_errors], and weight float32 of that shape: 1 at data actions and
    <backspace>s, 0 at wrong tokens and PAD.
  """
  n, most = answer.shape[1], noise.max_errors
  right = np.take_along_axis(wrong, answer, 1)  # is the right token among those to draw from?
  choices = wrong.sum(1, keepdims=True) - right  # [b, n]
  draw = np.where((answer != PAD) & (choices > 0), rng.random(answer.shape), 1.0)
  hit = (draw < noise.rate) & (draw.argsort(1).argsort(1) < most)
  more = hit * (rng.geometric(1 - noise.run, answer.shape) - 1)
  room = most - hit.sum(1, keepdims=True) - (more.cumsum(1) - more)
  errors = hit + np.clip(room, 0, more)  # [b, n] wrong tokens before each data action

  # Each time belongs to the data action that it leads up to: `errors` wrong tokens, as many
  # <backspace>s, and the action itself at `left` = 0.
  when = np.arange(n) + 2 * errors.cumsum(1)
  time = np.arange(n + 2 * most)
  done = np.zeros((len(answer), len(time)), int)
  np.put_along_axis(done, when, 1, 1)
  action = np.minimum(done.cumsum(1) - done, n - 1)  # [b, a]

  def at(x):
    return np.take_along_axis(x, action, 1)

  left = at(when) - time
  # The candidates in order, but for the right one, which is stepped over.
  pick = (rng.random(left.shape) * at(choices)).astype(int)
  place = np.take_along_axis(wrong.cumsum(1) - 1, answer, 1)
  pick += at(right) & (pick >= at(place))
  mistake = np.take_along_axis(np.argsort(~wrong, 1, kind="stable"), pick, 1)

  erase = (left > 0) & (left <= at(errors))
  actions = np.select([left < 0, left == 0, erase], [PAD, at(answer), BACKSPACE], mistake)
  weight = (actions != PAD) & (left <= at(errors))
  return actions.astype(np.int32), weight.astype(np.float32)


def _put(array, index, value):
  """array [m, k] with `value` at `index` [m, l] of each row; a NumPy array is changed in place."""
  if isinstance(array, np.ndarray):
    np.put_along_axis(array, index, value, 1)
    return array
  return jnp.put_along_axis(array, index, value, 1, inplace=False)


def _tops(depth, push, node, root):
  """The last token of the text after each action, as a node.

  At any depth of the stack, the token is the last one that was put there.

  Args:
    depth: [m, a], answer tokens in the text after each action.
    push, node: [m, a], whether the action is a token, and which node that is.
    root: [m], the last node of the prompt.
  """
  xp, actions = depth.__array_namespace__(), depth.shape[1]
  spare = actions + 1  # where writes go that must not be seen
  stack = xp.repeat(root[:, None], spare + 1, 1)

  def step(stack, now):
    depth, slot, node = (x[:, None] for x in now)
    stack = _put(stack, slot, node)
    return stack, xp.take_along_axis(stack, depth, 1)[:, 0]

  times = (depth.T, xp.where(push, depth, spare).T, node.T)
  if xp is np:
    return np.stack([step(stack, now)[1] for now in zip(*times, strict=True)], 1)
  return jax.lax.scan(step, stack, times)[1].T


def tree(prompt, prompt_length, actions, nodes: int) -> dict:
  """Trajectories as a tree of nodes, in one linear scan; NumPy in NumPy out, JAX in JAX out.

  A row holds the prompt, then every token that was typed, in time order. The g trajectories of a
  prompt share its nodes, and do not see each other.

  Args:
    prompt: int32 [b, p], <bos> first.
    prompt_length: int32 [b].
    actions: int32 [b, a], or [b, g, a]. In jit, no <backspace> may meet the prompt.
    nodes: s, at least the prompt and all tokens typed.

  Returns:
    Of each node [b, s]:
      token: int32, PAD where there is none.
      position: int32, its place in the text.
      end: int32, the number of nodes there were when it was erased: see `visible`.
      erasable: bool, False at the prompt, where <backspace> is illegal.
    Of each action [b, g a]:
      action: int32.
      read: int32, the node whose logits are pi(. | s_i).
      next: int32, the node of the state after it; that of <eos> is `read`.
      time: int32, i.
      weight: float32, 1, or 0 at PAD.

  Raises:
    ValueError: <backspace> at the prompt, or too few nodes (NumPy only).
  """
  xp, b, a = actions.__array_namespace__(), len(actions), actions.shape[-1]
  acts = actions.reshape(b, -1, a)  # [b, g, a]
  push, pop, first = acts > BACKSPACE, acts == BACKSPACE, prompt_length[:, None, None]
  depth = xp.cumsum(push.astype(np.int32) - pop, 2, dtype=np.int32)
  count = first + xp.cumsum(push.reshape(b, -1), 1, dtype=np.int32).reshape(acts.shape)
  used = count[:, -1, -1:]  # [b, 1]
  if xp is np and depth.min() < 0:
    raise ValueError(f"a <backspace> meets the prompt in row {int(np.argmin(depth.min((1, 2))))}")
  if xp is np and used.max() > nodes:
    raise ValueError(f"{int(used.max())} nodes do not fit into {nodes}")

  root = xp.broadcast_to(first - 1, count[..., :1].shape)
  flat = [x.reshape(-1, a) for x in (depth, push, count - 1)]
  top = _tops(*flat, root.reshape(-1)).reshape(acts.shape)
  read = xp.concatenate([root, top[..., :-1]], 2)

  # One node more than asked for takes the writes of actions that make none.
  index, length = np.arange(nodes + 1, dtype=np.int32), prompt_length[:, None]
  inside = index < length
  made, gone = (xp.where(m, i, nodes).reshape(b, -1) for m, i in ((push, count - 1), (pop, read)))
  token = xp.pad(prompt, ((0, 0), (0, nodes + 1 - prompt.shape[1])))
  token = _put(xp.where(inside, token, PAD), made, acts.reshape(b, -1))
  position = _put(xp.where(inside, index, 0), made, (first - 1 + depth).reshape(b, -1))
  # What a trajectory leaves alive ends with it; what it erased, at that moment.
  last = xp.broadcast_to(count[..., -1:], acts.shape)
  end = _put(xp.where(inside, used, index + 1), made, last.reshape(b, -1))
  end = _put(end, gone, count.reshape(b, -1))

  real = acts != PAD
  by_node = {
    "token": token,
    "position": position,
    "end": end,
    "erasable": (index >= length) & (index < used),
  }
  by_action = {
    "action": acts,
    "read": xp.where(real, read, 0),
    "next": xp.where(real, top, 0),
    "time": xp.where(real, np.arange(a, dtype=np.int32), 0),
    "weight": real.astype(np.float32),
  }
  return {name: x[:, :nodes] for name, x in by_node.items()} | {
    name: x.reshape(b, -1) for name, x in by_action.items()
  }


def group_into_rows(size: np.ndarray, sequences_per_row: int) -> np.ndarray:
  """Deals trees to rows of about equal size: the largest beside the smallest.

  Args:
    size: [b], nodes of each tree.
    sequences_per_row: g, trees in a row; divides b.

  Returns:
    [b / g, g], the trees of each row.
  """
  if sequences_per_row == 1:
    return np.arange(len(size))[:, None]
  order = np.argsort(-size, kind="stable").reshape(
    sequences_per_row, -1
  )  # one lane after the other,
  order[1::2] = order[1::2, ::-1]  # there and back
  return order.T


def _before(size: np.ndarray, row: np.ndarray) -> np.ndarray:
  """size [b], row [b] ascending -> the sum of the sizes before each in its row, [b, 1]."""
  before = size.cumsum() - size
  return (before - before[np.searchsorted(row, row)])[:, None]


def _put_rows(trees: dict, row: np.ndarray, count: np.ndarray, nodes: int, actions: int) -> dict:
  """Trees in rows, one behind the other; of each tree [b] its nodes and `count` actions."""
  size = trees["end"][:, 0]  # the first node lives to the end of its tree
  before, rows = _before(size, row), row[-1] + 1
  if np.bincount(row, size).max() > nodes:
    raise ValueError(f"{int(np.bincount(row, size).max())} nodes do not fit into {nodes}")

  def put(values, size, before, padding):
    used = np.arange(values.shape[1]) < size[:, None]
    out = np.broadcast_to(np.asarray(padding, values.dtype), (rows, np.shape(padding)[-1])).copy()
    place = (np.arange(values.shape[1]) + before)[used]
    out[np.broadcast_to(row[:, None], used.shape)[used], place] = values[used]
    return out

  empty, index = np.zeros(nodes, np.int32), np.arange(1, nodes + 1)
  by_node = {n: put(trees[n], size, before, empty) for n in ("token", "position", "erasable")}
  by_node["end"] = put(trees["end"] + before.astype(np.int32), size, before, index)
  real, empty = trees["action"] != PAD, np.zeros(actions, np.int32)
  by_action = {name: trees[name] for name in ("action", "time", "weight")}
  for name in ("read", "next"):
    by_action[name] = np.where(real, trees[name] + before, 0).astype(np.int32)
  earlier = _before(count, row)
  return by_node | {name: put(x, count, earlier, empty) for name, x in by_action.items()}


def pack(trees: dict, sequences_per_row: int, nodes: int) -> dict:
  """Packs every `sequences_per_row` neighbours of a batch of trees into one row (NumPy).

  They do not see each other: what the nodes of a tree see ends with the tree.

  Args:
    trees: what `tree` returns, [b, ...].

  Returns:
    The same with [b / sequences_per_row, nodes] and [b / sequences_per_row, sequences_per_row a].

  Raises:
    ValueError: a row's trees have more nodes.
  """
  b, a = trees["action"].shape
  return _put_rows(
    trees, np.arange(b) // sequences_per_row, np.full(b, a), nodes, sequences_per_row * a
  )


def pack_rows(trees: dict, row: np.ndarray, nodes: int, actions: int) -> dict:
  """As `pack`, with any number of trees in a row, and no PAD between their actions.

  Args:
    row: int [b], ascending, the row of each tree.
    actions: of a row of the result; what is left is PAD.
  """
  return _put_rows(trees, row, np.sum(trees["action"] != PAD, axis=1), nodes, actions)


def visible(end):
  """end [..., s] -> bool [..., s, s]: node j (row) sees node k (column) iff k <= j < end[k]."""
  k = np.arange(end.shape[-1])
  j = k[:, None]
  return (k <= j) & (j < end[..., None, :])


def replay(prompt, actions) -> list[int]:
  """The text that is left when the actions are done: the prompt's tokens, then the answer's.

  Stops at <eos> or PAD.

  Raises:
    ValueError: <backspace> at the prompt.
  """
  text = [int(token) for token in prompt]
  start = len(text)
  for action in actions:
    if action in (EOS, PAD):
      break
    if action != BACKSPACE:
      text.append(int(action))
    elif len(text) > start:
      text.pop()
    else:
      raise ValueError("a <backspace> meets the prompt")
  return text
