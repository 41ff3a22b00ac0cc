"""The benchmarks run, at a small size, and the tables of docs/PERFORMANCE.md are made of theirs."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]


def run(top: Path, *command: str) -> str:
  """What `python benchmarks/...` prints; its numbers go to `top`."""
  environment = {**os.environ, "BENCHMARKS": str(top)}
  command = [sys.executable, f"benchmarks/{command[0]}.py", *command[1:]]
  done = subprocess.run(
    command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=900
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture
def report(monkeypatch, tmp_path):
  """benchmarks/report.py, with one number kept."""
  monkeypatch.syspath_prepend(ROOT / "benchmarks")
  module = importlib.import_module("report")
  monkeypatch.setattr(module, "KEPT", tmp_path)
  record = {"command": "python it --now", "tables": {"4 x 4": {"ratio/Haar": 1.236, "ms/MSE": 2}}}
  (tmp_path / "wavelet.json").write_text(json.dumps(record))
  return module


def test_report_has_what_was_measured_and_says_what_was_not(report):
  lines = report.summary().splitlines()
  assert "| wavelet loss and gradient, of the MSE's | 1.24 | 1.3 | `python it --now` |" in lines
  assert sum("not measured" in line for line in lines) == len(lines) - 3


def test_report_writes_between_its_markers_only(report):
  text = "a\n<!-- wavelet -->\nold\n<!-- end -->\nb\n<!-- decode -->\nkept\n<!-- end -->\n"
  rows = "      ratio     ms\nHaar  1.236       \nMSE          2.000"
  wanted = text.replace("old", f"```\n$ python it --now\n\n4 x 4\n{rows}\n```")
  assert report.rewritten(text) == wanted == report.rewritten(wanted)


def test_every_table_of_the_performance_page_is_a_benchmark():
  text = (ROOT / "docs" / "PERFORMANCE.md").read_text()
  names = [line[5:-4] for line in text.splitlines() if line.startswith("<!-- ")]
  assert "report" in names and names[1::2] == ["end"] * (len(names) // 2)
  assert all((ROOT / "benchmarks" / f"{name}.py").exists() for name in names[::2])


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/*.py")), ids=lambda path: path.stem)
def test_a_benchmark_is_imported(path, monkeypatch):
  monkeypatch.syspath_prepend(path.parent)
  spec = importlib.util.spec_from_file_location(f"imported_{path.stem}", path)
  module = importlib.util.module_from_spec(spec)
  monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
  spec.loader.exec_module(module)


def test_rows_of_a_sweep_and_rungs_of_the_ladder_are_configs(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "benchmarks")
  rates, ladder = map(importlib.import_module, ("rates", "ism_ablation"))
  for make, columns in rates.TASKS.values():
    configs = [make("", "x.npz") for _ in rates.GRID]
    for config, row in zip(configs, rates.GRID, strict=True):
      rates.timing.change(config, row)
    assert columns and len(set(map(str, configs))) == len(rates.GRID)
  seen = {str(ladder.rung_config(rung, 0, 0)) for rung in ladder.RUNGS}
  assert len(seen) == len(ladder.RUNGS)
  config = ladder.rung_config("whole method", 0, 0)
  row = "loss.split.velocity=5 eval.nfe=(1,) optim.lr=1e-2 data.path=a=b optim.name=adamw"
  rates.timing.change(config, row)
  assert config.loss.split.velocity == 5 and config.eval.nfe == (1,) and config.optim.lr == 0.01
  assert (config.data.path, config.optim.name) == ("a=b", "adamw")


def test_an_ablation_goes_on_with_no_shorter_run(monkeypatch, tmp_path):
  monkeypatch.syspath_prepend(ROOT / "benchmarks")
  ablation = importlib.import_module("ablation")
  saved = SimpleNamespace(newest_meta=lambda: {"config": {"steps": 3}})
  monkeypatch.setattr(ablation, "Checkpoints", lambda workdir: saved)
  with pytest.raises(SystemExit, match=f"{tmp_path}/a_seed0 holds a run of 3 steps; give another"):
    ablation.run(tmp_path, ["a"], [0], lambda *_: SimpleNamespace(steps=6))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("config", "rows"),
  [
    ("ism_imagenet256:debug", ("flow 16 xla scanned block", "ism 16 xla unrolled products")),
    ("seqmatch_gpt2:gpu,debug", ("mle 8 cudnn unrolled none", "seqmatch 8 xla scanned block")),
  ],
)
def test_accelerator_benchmark_measures_a_small_step(config, rows, tmp_path):
  small = f"--rows={';'.join(rows)}", "--steps=1", "--pool=2"
  run(tmp_path, "gpu", f"--config={config}", *small)
  tables = json.loads((tmp_path / "gpu.json").read_text())["tables"]
  for column in ("ms", "rows a second", "TFLOP a second", "MFU", "GiB"):
    assert all(tables[config][f"{column}/{row}"] > 0 for row in rows)
  assert tables["checkpoint"]["until on disk/another"] > 0
  assert 0 < tables["attention"]["of the gradient/cudnn"] < 0.01
  pairing = {"of its steps/class", "of its steps/none"} <= set(tables.get("sOT", ()))
  assert pairing == config.startswith("ism")
  assert tables["loop"]["of the step alone/loop"] > 0


@pytest.mark.slow
def test_steps_are_measured_alone_and_in_the_loop(tmp_path):
  configs = "ism_digits:debug", "seqmatch_arithmetic:debug"
  run(tmp_path, "train_step", f"--configs={';'.join(configs)}", "--rounds=1", "--steps=2")
  (numbers,) = json.loads((tmp_path / "train_step.json").read_text())["tables"].values()
  for column in ("loop", "engine", "GFLOP"):
    assert all(numbers[f"{column}/{name}"] > 0 for name in configs)


@pytest.mark.slow
def test_growth_is_fitted_to_times_and_flops(tmp_path):
  only = "--only=iSM, batch;SequenceMatch, batch;pairing, pool;generation"
  run(tmp_path, "growth", only, "--points=2", "--rounds=1")
  exponents = json.loads((tmp_path / "growth.json").read_text())["tables"]["exponents"]
  assert len([key for key in exponents if key.startswith("exponent/")]) == 4
  for name in ("iSM", "SequenceMatch"):
    assert exponents[f"counted/{name}, batch"] == pytest.approx(1, abs=0.01)
  assert (tmp_path / "growth.png").stat().st_size > 10_000


@pytest.mark.slow
def test_pairing_is_compared_with_the_optimum(tmp_path):
  run(tmp_path, "sinkhorn", "--pools=256x64,300x8", "--exact=256", "--overlap=0")
  first, second = json.loads((tmp_path / "sinkhorn.json").read_text())["tables"].values()
  assert 1 <= first["cost/sOT, blind"] < 1.1 and first["distinct/sOT, blind"] == 1
  assert "cost/sOT, blind" not in second and "SciPy, blind" not in str(second)


@pytest.mark.slow
def test_pipelines_are_measured(tmp_path):
  configs = "--configs=ism_digits:debug;seqmatch_arithmetic:debug"
  small = "--records=512", "--seconds=0.1", "--rounds=1", "--steps=2"
  run(tmp_path, "data", configs, *small)
  tables = json.loads((tmp_path / "data.json").read_text())["tables"]
  assert tables["questions and texts"]["tokens a second/seqmatch_arithmetic:debug"] > 0
  assert tables["training"]["ratio/ism_digits:debug, data"] > 0
