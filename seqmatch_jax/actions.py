"""What a <backspace> does: actions in time become a tree of tokens, which one masked pass can read.

The state is the text so far. A token appends itself, and <backspace> removes the last token
(arXiv 2306.05426). A token that was erased stays in the row as a node, because its logits are those
of a state that was visited. A <backspace> takes no place. The nodes that see a node are an
interval, so one pass gives the logits of every state of a trajectory.

Dimensions: b batch, p prompt, n data actions, v vocabulary, g trajectories of one prompt,
a actions of one, s nodes. A trajectory is its actions, <eos> last, then PAD.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from seqmatch_jax.tokens import BACKSPACE, EOS, PAD
from train_jax.errors import UserError, check_fraction, check_one_of


@dataclass(frozen=True)
class Noise:
  """Wrong tokens that are typed and erased again before a data action.

  Attributes:
    rate: eta, the probability of an error before each data action; 0 leaves the data as they are.
    max_errors: most wrong tokens in one answer; where more are drawn, a random part is kept.
    source: wrong tokens are drawn from all characters of the answers ("uniform"), or from the
      candidates in the prompt ("prompt").
    run: the probability that a wrong token is followed by another before the erasing begins.
  """

  rate: float = 0.0
  max_errors: int = 0
  source: str = "uniform"
  run: float = 0.0

  def __post_init__(self):
    check_fraction("noise.rate", self.rate)
    check_fraction("noise.run", self.run, inclusive=False)
    check_one_of("noise.source", self.source, ("uniform", "prompt"))
    if self.max_errors < (self.rate > 0):
      raise UserError(
        f"noise.max_errors={self.max_errors} leaves no room for errors; with noise.rate="
        f"{self.rate} it must be at least {int(self.rate > 0)}."
      )


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
  n, limit = answer.shape[1], noise.max_errors
  includes_right = np.take_along_axis(wrong, answer, 1)
  choices = wrong.sum(1, keepdims=True) - includes_right  # [b, n]
  draw = np.where((answer != PAD) & (choices > 0), rng.random(answer.shape), 1.0)
  begins = (draw < noise.rate) & (draw.argsort(1).argsort(1) < limit)
  more = begins * (rng.geometric(1 - noise.run, answer.shape) - 1)
  room = limit - begins.sum(1, keepdims=True) - (more.cumsum(1) - more)
  errors = begins + np.clip(room, 0, more)  # [b, n] wrong tokens before each data action

  # Each time belongs to the data action that it leads up to: `errors` wrong tokens, as many
  # <backspace>s, and the action itself at `left` = 0.
  when = np.arange(n) + 2 * errors.cumsum(1)
  time = np.arange(n + 2 * limit)
  done = np.zeros((len(answer), len(time)), int)
  np.put_along_axis(done, when, 1, 1)
  action = np.minimum(done.cumsum(1) - done, n - 1)  # [b, a]

  def at(x):
    return np.take_along_axis(x, action, 1)

  left = at(when) - time
  # An index into the candidates in order. It steps over the right one.
  pick = (rng.random(left.shape) * at(choices)).astype(int)
  place = np.take_along_axis(wrong.cumsum(1) - 1, answer, 1)
  pick += at(includes_right) & (pick >= at(place))
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


def _last_nodes(depth, push, node, root):
  """The node [m, a] of the last token of the text after each action.

  That token is the one that was last put at this depth of the stack.

  Args:
    depth: [m, a], answer tokens in the text after each action.
    push, node: [m, a], whether the action is a token, and its node.
    root: [m], the last node of the prompt.
  """
  xp, actions = depth.__array_namespace__(), depth.shape[1]
  spare = actions + 1  # a slot that is never read
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
    For each node [b, s]:
      token: int32, PAD where there is none.
      position: int32, its place in the text.
      end: int32, the number of nodes when it was erased: see `visible`.
      erasable: bool, False at the prompt, where <backspace> is illegal.
    For each action [b, g a]:
      action: int32.
      read: int32, the node whose logits are pi(. | s_i).
      next: int32, the node of the state after it; for <eos> it is `read`.
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
  last = _last_nodes(*flat, root.reshape(-1)).reshape(acts.shape)
  read = xp.concatenate([root, last[..., :-1]], 2)

  # One spare node takes the writes of actions that make none.
  index, length = np.arange(nodes + 1, dtype=np.int32), prompt_length[:, None]
  inside = index < length
  new, gone = (xp.where(m, i, nodes).reshape(b, -1) for m, i in ((push, count - 1), (pop, read)))
  token = xp.pad(prompt, ((0, 0), (0, nodes + 1 - prompt.shape[1])))
  token = _put(xp.where(inside, token, PAD), new, acts.reshape(b, -1))
  position = _put(xp.where(inside, index, 0), new, (first - 1 + depth).reshape(b, -1))
  # A node that is never erased ends with its trajectory, the others end when they are erased.
  final = xp.broadcast_to(count[..., -1:], acts.shape)
  end = _put(xp.where(inside, used, index + 1), new, final.reshape(b, -1))
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
    "next": xp.where(real, last, 0),
    "time": xp.where(real, np.arange(a, dtype=np.int32), 0),
    "weight": real.astype(np.float32),
  }
  return {name: x[:, :nodes] for name, x in by_node.items()} | {
    name: x.reshape(b, -1) for name, x in by_action.items()
  }


def visible(end):
  """end [..., s] -> bool [..., s, s]: node j (row) sees node k (column) iff k <= j < end[k]."""
  k = np.arange(end.shape[-1])
  j = k[:, None]
  return (k <= j) & (j < end[..., None, :])


def replay(prompt, actions) -> list[int]:
  """The text after `actions`, up to <eos> or PAD: the prompt's tokens, then the answer's.

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
