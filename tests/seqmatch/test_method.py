"""SequenceMatch assembled: phases, rollouts inside the step, resume with the buffer, bad input."""

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import seqmatch_arithmetic
from seqmatch_jax import method as seqmatch
from seqmatch_jax.actions import replay
from seqmatch_jax.tasks import questions
from seqmatch_jax.tokens import BACKSPACE, EOS, PAD
from train_jax import loop
from train_jax import mesh as mesh_lib
from train_jax import state as state_lib
from train_jax.checkpointing.checkpoint import Checkpoints
from train_jax.errors import UserError
from train_jax.step import make_train_step

DECAYS = {"sample": 0.9}
FLAGS = {
  "prompt": None,
  "prompts": None,
  "temperature": None,
  "top_k": None,
  "top_p": None,
  "max_actions": None,
  "backspace": True,
  "stream": False,
  "num": 3,
  "seed": 0,
  "features": None,
}


def get_config(options="two_sum", **changes):
  """The debug config; `section__key=value` changes a value."""
  config = seqmatch_arithmetic.get_config(f"{options},debug")
  for name, value in changes.items():
    section, _, key = name.partition("__")
    if key:
      config[section][key] = value
    else:
      config[section] = value
  return config


def build(config, mesh=None):
  return seqmatch.make_method(config, mesh or mesh_lib.make_mesh())


@pytest.fixture(scope="module")
def default():
  """(method, metadata, parameters) of the debug config."""
  method, metadata = build(get_config())
  return method, metadata, jax.jit(method.init)(jax.random.key(0))[0]


def steps(config, count):
  """The states and metrics of the first steps, the state before them first."""
  method, _ = build(config)
  tx = optax.adam(1e-2)
  state = jax.jit(state_lib.create(method, tx, DECAYS, 0))()
  step = jax.jit(make_train_step(method, tx, DECAYS, clip=1.0))
  yield state, None
  for batch in itertools.islice(method.stream(0, 0), count):
    state, metrics = step(state, batch)
    yield state, metrics


def test_phases():
  """Clean data and alpha = 0 first; then noise, alpha annealed in, rollouts every `refresh`."""
  config = get_config(loss__warmup=3, loss__anneal=4, noise__rate=0.9, buffer__refresh=2)
  filled, penalties = [], []
  for state, metrics in steps(config, 8):
    filled.append(int(state.aux_state["filled"]))
    if metrics:
      penalties.append(float(metrics["penalty"]))
  # Steps 0 to 2 warm up; steps 3, 5 and 7 write 8 rollouts each into 16 rows.
  assert filled == [0, 0, 0, 0, 8, 8, 16, 16, 16]
  assert penalties[:4] == [0] * 4 and min(penalties[4:]) > 0
  erased = [
    bool(np.any(batch["action"] == BACKSPACE))
    for batch in itertools.islice(build(config)[0].stream(0, 0), 8)
  ]
  assert erased == [False] * 3 + [True] * 5


def test_rollouts_are_legal_trajectories_of_the_batch_s_prompts():
  config = get_config(loss__warmup=0)
  method, _ = build(config)
  batch = next(method.stream(0, 0))
  (_, _), (state, _) = steps(config, 1)
  memory = jax.device_get(state.aux_state)
  for row in range(8):
    length = memory["length"][row]
    prompt = memory["prompt"][row][:length]
    np.testing.assert_array_equal(prompt, batch["prompt"][row][:length])
    assert length == batch["prompt_length"][row] and prompt.min() > 0
    actions = memory["actions"][row]
    replay(prompt, actions)  # raises where a <backspace> meets the prompt
    ends = np.flatnonzero(actions == EOS)
    assert len(ends) <= 1 and (len(ends) == 0 or np.all(actions[ends[0] + 1 :] == PAD))


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("divergence", "chi2"),
    ("alpha", 0.5),
    ("gamma", 0.5),
    ("backspace", False),
    ("unlikelihood", 0.25),
  ],
)
def test_every_setting_reaches_the_loss(key, value):
  config = get_config()
  before = seqmatch.make_loss_config(config)
  config.loss[key] = value
  after = seqmatch.make_loss_config(config)
  assert getattr(after, key) == value != getattr(before, key)


def fake_rollouts(monkeypatch):
  """Rollouts of one token and <eos> in place of the policy's; returns what they are asked for."""
  asked = []

  def make_rollout(network, limits, mesh=None):
    def generate(params, prompt, length, key, row, temperature, backspace, allow_retype):
      how = {"temperature": temperature, "backspace": backspace, "allow_retype": allow_retype}
      asked.append({**how, "params": params, "key": jax.random.key_data(key), "row": row})
      actions = np.zeros((len(prompt), limits.max_actions), np.int32)
      actions[:, :2] = 4, EOS
      return SimpleNamespace(actions=jnp.asarray(actions))

    return generate

  monkeypatch.setattr(seqmatch.rollout, "make_rollout", make_rollout)
  return asked


def test_rollouts_are_draws_of_the_policy_itself(monkeypatch):
  """Of the parameters and not of an average, at temperature 1, erasing and retyping, anew."""
  asked = fake_rollouts(monkeypatch)
  method, _ = build(get_config(loss__warmup=0, buffer__refresh=2, buffer__draw=3))
  state = jax.jit(state_lib.create(method, optax.adam(1e-2), DECAYS, 0))()
  state = dataclasses.replace(state, ema=jax.tree.map(jnp.zeros_like, state.ema))
  batch = next(method.stream(0, 0))
  with jax.disable_jit():
    for step in range(4):
      state = dataclasses.replace(state, step=jnp.int32(step))
      aux_state, ready = method.augment(state, batch, jax.random.key(step))
      state = dataclasses.replace(state, aux_state=aux_state)
  assert len(asked) == 2
  for one in asked:
    assert (one["temperature"], one["backspace"], one["allow_retype"]) == (1.0, True, True)
    np.testing.assert_array_equal(one["row"], np.arange(8))
    for mine, wanted in zip(*map(jax.tree.leaves, (one["params"], state.params)), strict=True):
      assert mine is wanted
  assert np.any(asked[0]["key"] != asked[1]["key"])
  # Three rows are drawn; those that fill them up, for eight devices to share, carry nothing.
  weight = np.asarray(ready["model"]["weight"])
  assert len(weight) == 8 and weight.sum(1).tolist() == [2] * 3 + [0] * 5


def test_alpha_begins_after_the_warm_up_and_grows_linearly(monkeypatch):
  fake_rollouts(monkeypatch)
  method, _ = build(get_config(loss__warmup=3, loss__anneal=4))
  state = jax.jit(state_lib.create(method, optax.adam(1e-2), DECAYS, 0))()
  batch, found = next(method.stream(0, 0)), []
  augment = jax.jit(lambda step: method.augment(step, batch, jax.random.key(0))[1]["alpha_scale"])
  for step in range(9):
    found.append(float(augment(dataclasses.replace(state, step=jnp.int32(step)))))
  assert found == [0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1]


def test_noise_begins_after_the_warm_up_where_the_data_are():
  late = build(get_config(loss__warmup=3, noise__rate=0.9))[0].stream(0, 0)
  at_once = build(get_config(loss__warmup=0, noise__rate=0.9))[0].stream(0, 3)
  for batch, wanted in zip(itertools.islice(late, 3, 5), at_once, strict=False):
    for name in wanted:
      np.testing.assert_array_equal(batch[name], wanted[name])


@pytest.mark.parametrize("alpha_scale", [0.0, 0.5])
def test_data_and_own_trajectories_each_have_their_pass(alpha_scale, monkeypatch):
  config = get_config(loss__warmup=0)
  method, metadata = build(config)
  params, _ = jax.jit(method.init)(jax.random.key(0))
  state = jax.jit(state_lib.create(method, optax.adam(1e-2), DECAYS, 0))()
  _, batch = jax.jit(method.augment)(state, next(method.stream(0, 0)), jax.random.key(1))
  batch["alpha_scale"], seen = jnp.float32(alpha_scale), []

  def loss(*args):
    seen.append(args)
    return 0.0, {}

  monkeypatch.setattr(seqmatch.loss, "loss", loss)
  with jax.disable_jit():
    method.loss(params, {}, batch, jax.random.key(0))
  ((loss_config, logits, rows, model, own, alpha, counts),) = seen
  assert loss_config == seqmatch.make_loss_config(config) and float(alpha) == alpha_scale
  assert model is batch["model"] and counts is batch["counts"] and rows is batch
  apply = seqmatch.make_network(config, metadata).apply
  places = lambda tree: (tree["token"], tree["position"], tree["end"])  # noqa: E731
  np.testing.assert_allclose(logits, apply(params, *places(batch)), atol=1e-5)
  wanted = apply(params, *places(model))
  np.testing.assert_allclose(own, wanted if alpha_scale else 0 * wanted, atol=1e-5)
  assert model["token"].shape != batch["token"].shape or np.any(model["token"] != batch["token"])


def test_a_generation_has_room_for_as_many_erasures_as_the_config_says():
  few, more = (build(get_config(eval__erasures=n))[1] for n in (3, 5))
  assert (few["max_backspaces"], more["max_backspaces"]) == (3, 5)
  assert more["max_actions"] - few["max_actions"] == 2 * 2  # each takes its token with it


@pytest.mark.parametrize("final", [False, True])
def test_questions_are_evaluated_as_they_say(final, default, monkeypatch):
  _, metadata, params = default
  asked, measured = [], []
  measure = questions.evaluate.measure

  def in_batches(generate, params, prompt, length, batch, key, **how):
    asked.append((len(prompt), jax.random.key_data(key).tolist(), how))
    return SimpleNamespace(actions=np.full((len(prompt), metadata["max_actions"]), EOS, np.int32))

  def spy(*args):
    measured.append(args)
    return measure(*args)

  monkeypatch.setattr(questions.rollout, "in_batches", in_batches)
  monkeypatch.setattr(questions.evaluate, "measure", spy)
  config = get_config(seed=6)
  results = dict(build(config)[0].evaluate(params, 1, final))
  assert {"log_likelihood/data", "exact/greedy", "recovery/T=1"} <= set(results)
  count = config.data.tests if final else config.data.tests // 4
  assert {(n, tuple(key)) for n, key, _ in asked} == {(count, (0, 6))}
  found = {
    (how["temperature"], how["allow_retype"], how["allow_backspace"], how["forced"] is not None)
    for *_, how in asked
  }
  policies = {(0.0, False), (1.0, True), (0.5, True)}
  wanted = {
    (*how, *rest) for how in policies for rest in ((True, False), (False, False), (True, True))
  }
  assert found == wanted | {(1.0, False, True, False), (1.0, False, True, True)}
  ((_, _, examples, backspace, seed, noise),) = measured
  assert (len(examples.answer), backspace, seed) == (count, True, 6)
  assert noise.source == config.noise.source


@pytest.mark.parametrize("options", ["two_sum,mle", "two_sum,bc"])
def test_baselines_keep_no_buffer(options):
  (state, _), (_, metrics) = steps(get_config(options), 1)
  assert state.aux_state == ()
  assert "penalty_model" not in metrics and float(metrics["penalty"]) == 0
  np.testing.assert_allclose(metrics["loss"], metrics["nll"], rtol=1e-6)


def test_other_questions_have_other_facts(tmp_path, one_device):
  found = []
  for name, content in (
    ("a", "1+2\n3\n2+2\n4\n"),
    ("b", "1+2\n3\n2+2\n4\n"),
    ("c", "1+2\n3\n2+1\n4\n"),
  ):
    (tmp_path / name).write_text(content * 2)
    files = {"data__train": str(tmp_path / name), "data__test": str(tmp_path / "a")}
    config = get_config("", data__source="files", data__lanes=1, **files)
    found.append(questions.make_task(config, one_device).metadata)
  assert found[0] == found[1] and found[0]["examples"] == found[2]["examples"]
  assert found[0].pop("examples_sha256") != found[2].pop("examples_sha256")
  assert found[0] == found[2]


def test_the_loss_does_not_depend_on_the_lanes(one_device):
  batches, losses = [], []
  for sequences_per_row in (1, 2):
    method, _ = build(
      get_config(data__lanes=sequences_per_row, noise__rate=0.5, loss__warmup=0), one_device
    )
    params, _ = jax.jit(method.init)(jax.random.key(0))
    batches.append(next(method.stream(0, 0)) | {"alpha_scale": 1.0})
    losses.append(jax.jit(method.loss)(params, {}, batches[-1], jax.random.key(0))[1])
  assert [len(batch["token"]) for batch in batches] == [16, 8]
  for name, value in losses[0].items():
    np.testing.assert_allclose(losses[1][name], value, rtol=1e-5, err_msg=name)


def test_learns():
  config = get_config(loss__warmup=20, loss__anneal=10, buffer__rows=8)
  losses = [float(metrics["nll"]) for _, metrics in steps(config, 40) if metrics]
  assert np.mean(losses[15:20]) < 0.9 * losses[0]


@pytest.fixture
def train(settings, one_device):
  """(workdir, steps) trains the debug config, or goes on with it; evaluates nothing."""

  def run(workdir, steps):
    method, metadata = build(get_config(), one_device)
    method = method._replace(evaluate=lambda params, step, final: iter(()))
    tx = optax.adam(1e-3)
    record = {"config": {}, "metadata": metadata}
    engine = tx, optax.constant_schedule(1e-3), DECAYS, settings(steps=steps), one_device
    return loop.train(method, *engine, workdir, record)

  return run


def test_resume_is_exact_with_its_buffer(tmp_path, train, one_device, make_state, differences):
  method, _ = build(get_config(), one_device)
  abstract = jax.eval_shape(lambda: make_state(method, optax.adam(1e-3), one_device, DECAYS))
  states = []
  for name, parts in (("whole", (8,)), ("parts", (4, 8))):
    for count in parts:
      assert train(tmp_path / name, count)
    checkpoints = Checkpoints(tmp_path / name)
    states.append(checkpoints.restore(abstract)[0])
    checkpoints.close()
  assert int(states[0].aux_state["filled"]) == 16
  assert differences(*states) == []


def test_evaluation_names_its_numbers(default):
  method, _, params = default
  found = dict(method.evaluate(params, 2, True))
  for name in ("exact", "forbidden", "recovery", "rate", "finished"):
    assert all(0 <= found[f"{name}/{policy}"] <= 1 for policy in ("greedy", "T=1", "T=0.5"))
  assert found["log_likelihood/data"] < 0
  assert all(np.isfinite(value) for value in found.values())
  text = (Path(seqmatch.__file__).parents[1] / "docs" / "METRICS.md").read_text()
  explained = text.partition("\n## Questions")[2].partition("\n## ")[0]
  assert all(f"`{name.partition('/')[0]}`" in explained for name in found)


def test_sample_mode_writes_what_was_asked_for(default, tmp_path, capsys):
  _, metadata, params = default
  (tmp_path / "prompts").write_text("012345=9\n\nfedcba=1\n")
  flags = SimpleNamespace(**{**FLAGS, "prompts": str(tmp_path / "prompts"), "temperature": 1.0})
  seqmatch.sample_mode(get_config(), metadata, lambda mesh: (params, 2), flags, tmp_path)
  rows = json.loads((tmp_path / "generations.json").read_text())
  assert [row["prompt"] for row in rows] == ["012345=9"] * 3 + ["fedcba=1"] * 3
  assert len({row["typed"] for row in rows}) > 2 and "reference" not in rows[0]
  out = capsys.readouterr().out
  assert "012345=9  " in out and "actions/s" in out
  page = (tmp_path / "generations.html").read_text()
  assert "fedcba=1" in page and "step 2, temperature 1.0, seed 0" in page


def test_without_prompts_the_test_questions_are_answered(default, tmp_path):
  _, metadata, params = default
  seqmatch.sample_mode(
    get_config(), metadata, lambda mesh: (params, 2), SimpleNamespace(**FLAGS), tmp_path
  )
  rows = json.loads((tmp_path / "generations.json").read_text())
  asked = questions.make_examples(get_config())[1]
  assert [row["prompt"] for row in rows] == [x.question for x in asked[:3]]
  assert [row["reference"] for row in rows] == [x.answer for x in asked[:3]]


def test_evaluate_mode_writes_its_numbers(default, tmp_path):
  _, metadata, params = default
  seqmatch.evaluate_mode(
    get_config(), metadata, lambda mesh: (params, 2), SimpleNamespace(**FLAGS), tmp_path
  )
  record = json.loads((tmp_path / "evaluation.json").read_text())
  assert record["step"] == 2 and record["examples"] == 40 and "exact/T=1" in record
  flags = SimpleNamespace(**{**FLAGS, "features": "gpt2"})
  with pytest.raises(UserError, match=r"--features=gpt2 is for the MAUVE of texts"):
    seqmatch.evaluate_mode(get_config(), metadata, None, flags, tmp_path)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"prompt": ["12?z"]}, r"'12\?z' has characters that the model does not know \('\?', 'z'\)"),
    ({"prompt": ["12\b"]}, r"holds a backspace, which only the model may type"),
    ({"prompt": ["0" * 99]}, r"has 99 tokens, and the context of 11 tokens"),
    ({"prompts": "nowhere"}, r"--prompts=nowhere cannot be read"),
    ({"prompts": "a", "prompt": ["b"]}, r"--prompt and --prompts are both given"),
    ({"prompt": ["12"]}, r"--num=3 of each prompt would all be the same at temperature 0"),
  ],
)
def test_bad_requests_are_refused_before_anything_is_loaded(changes, message, default, tmp_path):
  _, metadata, _ = default

  def load(mesh):
    raise AssertionError("loaded a checkpoint for a request that cannot be met")

  flags = SimpleNamespace(**{**FLAGS, **changes})
  with pytest.raises(UserError, match=message):
    seqmatch.sample_mode(get_config(), metadata, load, flags, tmp_path)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"loss__gamma": 0.0}, r"loss.gamma=0.0 must lie in \(0, 1\]"),
    ({"loss__gamma": 1.5}, r"loss.gamma=1.5 must lie in \(0, 1\]"),
    ({"loss__alpha": -1.0}, r"loss.alpha=-1.0"),
    ({"loss__divergence": "wasserstein"}, r"loss.divergence='wasserstein' is unknown"),
    ({"loss__backspace": False}, r"types errors that loss.backspace=False cannot erase"),
    ({"loss__warmup": -1}, r"loss.warmup=-1 must be at least 0"),
    ({"noise__rate": 1.5}, r"noise.rate=1.5 must lie in \[0, 1\]"),
    ({"data__source": "poems"}, r"data.source='poems' is unknown; choose from files, add_or"),
    (
      {"data__source": "files", "data__train": "nowhere"},
      r"data.train='nowhere' and data.test='': give both, or neither",
    ),
    (
      {"data__source": "files", "data__train": "nowhere", "data__test": "nowhere"},
      r"the data file 'nowhere' cannot be read",
    ),
    ({"data__examples": 0}, r"data.examples=0 and data.tests=40 must be at least 1"),
    ({"data__context": 5}, r"the context of 5 tokens"),
    ({"buffer__refresh": 0}, r"buffer.refresh=0 must be at least 1"),
    (
      {"data__lanes": 3},
      r"data.sequences_per_row=3: batch=16 does not divide into rows of 3 examples",
    ),
    (
      {"data__lanes": 2, "optim__accumulate": 2},
      r"data.sequences_per_row=2: batch=16 .* 16 parts \(devices times optim.grad_accum_steps\)",
    ),
    ({"data__train": "here"}, r"data.train='here' and data.test='' are not read where data.source"),
    ({"buffer__rows": 7}, r"buffer.size=7 must be at least buffer.rollouts=8"),
    ({"buffer__rollouts": 99}, r"buffer.rollouts=99 must be at least 1 and at most batch=16"),
    ({"model__heads": 3}, r"model.width=16 must be a multiple of 2 x model.heads=3"),
  ],
)
def test_bad_configs_are_refused_in_a_sentence(changes, message):
  with pytest.raises(UserError, match=message):
    build(get_config(**changes))
