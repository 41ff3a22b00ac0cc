"""launch.sh: what it detects, what it calls, and that a second start installs nothing.

The interpreter of its environment is a script that writes down how it was called.
"""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/sh
echo "$*" >> "$(dirname "$0")/../calls"
"""


@pytest.fixture
def machine(tmp_path):
  """A machine with an environment of its own and the system's tools: (args, **env) -> process."""
  venv, tools = tmp_path / "venv", tmp_path / "tools"
  python = venv / "bin" / "python"
  python.parent.mkdir(parents=True)
  tools.mkdir()
  python.write_text(PYTHON)
  python.chmod(0o755)

  def run(*args, smi: str = "", **env):
    if smi:
      tool = tools / "nvidia-smi"
      tool.write_text(f"#!/bin/sh\necho '| NVIDIA-SMI 1.2   CUDA Version: {smi}   |'\n")
      tool.chmod(0o755)
    path = f"{tools}:/usr/bin:/bin"
    return subprocess.run(
      [ROOT / "launch.sh", *args],
      env={"PATH": path, "HOME": str(tmp_path), "VENV": str(venv), **env},
      capture_output=True,
      text=True,
      timeout=60,
    )

  def calls() -> list[str]:
    file = venv / "calls"
    found = file.read_text().splitlines() if file.exists() else []
    file.unlink(missing_ok=True)
    return found

  run.calls = calls
  return run


def test_alone_installs_once_and_trains_the_digits(machine):
  first = machine(ACCELERATOR="cpu")
  assert first.returncode == 0, first.stderr
  install, main = machine.calls()
  assert install.startswith("-m pip install") and install.endswith("-r requirements.txt jax")
  assert main == "main.py --config=configs/ism_digits.py --workdir=runs/ism_digits"
  assert "wheels for cpu" in first.stderr
  machine(ACCELERATOR="cpu")
  assert machine.calls() == [main]  # nothing was installed again


def test_another_accelerator_installs_again(machine):
  machine("install", ACCELERATOR="cpu")
  machine("install", ACCELERATOR="tpu")
  assert [call.split()[-1] for call in machine.calls()] == ["jax", "jax[tpu]"]


@pytest.mark.parametrize(
  "smi, wheels", [("12.4", "cuda12"), ("13.0", "cuda13"), ("14.2", "cuda13")]
)
def test_cuda_wheels_follow_the_driver(machine, smi, wheels):
  if any(Path("/dev").glob("accel*")):
    pytest.skip("this machine has a TPU")
  assert f"wheels for {wheels}" in machine("install", smi=smi).stderr
  assert machine.calls()[0].endswith(f"jax[{wheels}]")


def test_tpu_is_seen(machine):
  assert "wheels for tpu" in machine("install", TPU_NAME="pod").stderr


@pytest.mark.parametrize(
  "args, called",
  [
    (
      ["configs/ism_digits.py:debug", "--config.steps=3"],
      "--config=configs/ism_digits.py:debug --workdir=runs/ism_digits_debug --config.steps=3",
    ),
    (["configs/ism_digits.py", "--workdir=a"], "--config=configs/ism_digits.py --workdir=a"),
    (["--mode=sample", "--workdir=a"], "--mode=sample --workdir=a"),
  ],
)
def test_arguments_reach_main(machine, args, called):
  machine("install", ACCELERATOR="cpu")
  machine.calls()
  machine(*args, ACCELERATOR="cpu")
  assert machine.calls() == [f"main.py {called}"]


def test_test_installs_its_requirements_and_passes_options_on(machine):
  machine("test", "-m", "slow", ACCELERATOR="cpu")
  assert machine.calls()[1:] == [
    "-m pip install --quiet --disable-pip-version-check -r requirements-test.txt",
    "-m pytest -m slow",
  ]


@pytest.mark.parametrize(
  "args, env, message",
  [
    (["configs/none.py"], {"ACCELERATOR": "cpu"}, "configs/none.py is neither a command nor"),
    (["install"], {"ACCELERATOR": "npu"}, "ACCELERATOR=npu is unknown"),
    (["install"], {"ACCELERATOR": "cpu", "VENV": "/no", "PATH": "/none:/bin"}, "no Python 3.11"),
  ],
)
def test_mistakes_are_one_sentence(machine, tmp_path, args, env, message):
  if "PATH" in env:  # a machine with the tools of the shell, and no Python
    tools = tmp_path / "shell"
    tools.mkdir()
    for name in ("bash", "dirname", "sed", "env"):
      (tools / name).symlink_to(f"/usr/bin/{name}")
    env = {**env, "PATH": str(tools), "VENV": str(tmp_path / "none")}
  done = machine(*args, **env)
  assert done.returncode == 2
  assert message in done.stderr.splitlines()[-1]


def test_help_lists_the_commands(machine):
  text = machine("--help").stdout
  assert "./launch.sh test" in text and "ACCELERATOR=" in text and "set -e" not in text


def test_scripts_have_the_run_bit():
  assert os.access(ROOT / "launch.sh", os.X_OK) and os.access(ROOT / ".ci" / "run", os.X_OK)
