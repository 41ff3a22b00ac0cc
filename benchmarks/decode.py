"""Generation with a cache that rewinds, and the parallel pass over trees, against their baselines.

    python benchmarks/decode.py [--batch=16] [--length=256] [--width=128] [--depth=2]

Generation plays the same number of actions in every row: tokens only; tokens and <backspace>s; the
same, in chunks of 8 as --stream makes them; and tokens with the whole prefix computed again at each
step (no cache). The parallel pass takes a gradient of the SequenceMatch loss on trees of
trajectories with <backspace>s, and of the likelihood of plain texts with as many tokens.
"""

import argparse
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from timing import in_turn, show

from seqmatch_jax.actions import tree
from seqmatch_jax.display.sample import make_stream
from seqmatch_jax.loss import LossConfig, loss, normalized
from seqmatch_jax.rollout import RolloutConfig, make_rollout
from seqmatch_jax.tokens import BACKSPACE, EOS, SPECIAL
from seqmatch_jax.transformer import TransformerConfig, make_network

VOCAB, PROMPT = 40, 8


def random_actions(rng, batch: int, count: int, backspaces: float) -> np.ndarray:
  """Tokens and legal <backspace>s, int32 [batch, count]."""
  actions = rng.integers(SPECIAL, VOCAB, (batch, count)).astype(np.int32)
  depth = np.zeros(batch, int)
  for i in range(count):
    erase = (rng.random(batch) < backspaces) & (depth > 0)
    actions[erase, i] = BACKSPACE
    depth += np.where(erase, -1, 1)
  return actions


def without_cache(network, length: int, count: int):
  """Generation that computes the whole prefix again at each step."""
  end = jnp.full((1, length), length)

  @jax.jit
  def run(params, prompt, actions):
    b, p = prompt.shape
    position = jnp.broadcast_to(jnp.arange(length), (b, length))

    def body(carry):
      i, text, seen = carry
      logits = network.apply(params, text, position, jnp.broadcast_to(end, (b, length)))
      last = logits[:, p + i - 1]  # looked at, so that it is computed
      text = jax.lax.dynamic_update_slice(text, actions[:, i][:, None], (0, p + i))
      return i + 1, text, seen + jnp.argmax(last, axis=1)

    text = jnp.pad(prompt, ((0, 0), (0, length - p)))
    start = 0, text, jnp.zeros(b, jnp.int32)
    return jax.lax.while_loop(lambda c: c[0] < count, body, start)

  return run


def gradient(network, config: LossConfig):
  def value(params, rows):
    logits = network.apply(params, rows["token"], rows["position"], rows["end"])
    return loss(config, logits, rows)[0]

  return jax.jit(jax.grad(value))


def main(args) -> None:
  rng = np.random.default_rng(0)
  sizes = {name: getattr(args, name) for name in ("width", "depth", "heads", "dtype")}
  network = make_network(TransformerConfig(VOCAB, **sizes, hidden=3 * args.width, unroll=True))
  params = network.init(jax.random.key(0))
  b, count = args.batch, args.length - PROMPT
  prompt = rng.integers(SPECIAL, VOCAB, (b, PROMPT)).astype(np.int32)
  prompt_length, row = np.full(b, PROMPT, np.int32), np.arange(b)
  limits = RolloutConfig(args.length, count, count)
  rollout, stream = make_rollout(network, limits), make_stream(network, limits, every=8)
  asked = params, prompt, prompt_length, jax.random.key(0), row

  def generate(actions):
    return lambda: rollout(*asked, forced=actions)

  tokens, erasing = (random_actions(rng, b, count, rate) for rate in (0.0, 0.3))
  slow = without_cache(network, args.length, count)
  times = in_turn(
    {
      "tokens only": generate(tokens),
      "with <backspace>s": generate(erasing),
      "in chunks": lambda: list(stream(*asked, forced=erasing)),
      "no cache": lambda: slow(params, prompt, tokens),
    },
    args.rounds,
  )
  rows = {}
  for name, seconds in times.items():
    rows[f"seconds/{name}"] = seconds
    rows[f"actions a second/{name}"] = b * count / seconds
    rows[f"ratio/{name}"] = seconds / times["tokens only"]
  tables = {f"{b} rows, {args.length} tokens": rows}

  # As many nodes in both: what is typed and erased on one side is more text on the other.
  actions = random_actions(rng, b, count, 0.3)
  actions[:, -1] = EOS
  nodes = PROMPT + int(np.max(np.sum(actions > BACKSPACE, axis=1)))
  plain = np.where(np.arange(nodes - PROMPT + 1) == nodes - PROMPT, EOS, tokens[:, :1])
  plain = plain.astype(np.int32)
  plain[:, :-1] = tokens[:, : nodes - PROMPT]
  steps = {
    "maximum likelihood": (LossConfig("chi2", 0.0, 1.0, False), plain),
    "SequenceMatch on trees": (LossConfig("chi2_mixture", 0.02, 0.998, True), actions),
  }
  jobs = {}
  for name, (config, acts) in steps.items():
    made, _ = normalized(jax.tree.map(jnp.asarray, tree(prompt, prompt_length, acts, nodes)))
    jobs[name] = partial(gradient(network, config), params, made)
  times = in_turn(jobs, args.rounds)
  rows = {f"ms/{name}": seconds * 1e3 for name, seconds in times.items()}
  rows |= {f"ratio/{name}": s / times["maximum likelihood"] for name, s in times.items()}
  tables[f"parallel pass and gradient, {b} rows of {nodes} nodes"] = rows
  show("decode", tables)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--batch", type=int, default=16)
  parser.add_argument("--length", type=int, default=256)
  parser.add_argument("--width", type=int, default=128)
  parser.add_argument("--depth", type=int, default=2)
  parser.add_argument("--heads", type=int, default=4)
  parser.add_argument("--dtype", default="float32")
  parser.add_argument("--rounds", type=int, default=3)
  main(parser.parse_args())
