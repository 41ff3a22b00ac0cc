"""launch.sh: what it detects, what it calls, where it runs, that a second start installs nothing.

The interpreter of its environment is a script that writes down how it was called.
"""

import os
import shlex
import shutil
import subprocess
import tarfile
import time
import tomllib
from pathlib import Path

import pytest
import yaml

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

  def run(*args, smi: str = "", launcher=ROOT / "launch.sh", **env):
    if smi:
      tool = tools / "nvidia-smi"
      tool.write_text(f"#!/bin/sh\necho '| NVIDIA-SMI 1.2   CUDA Version: {smi}   |'\n")
      tool.chmod(0o755)
    path = f"{tools}:/usr/bin:/bin"
    return subprocess.run(
      [launcher, *args],
      env={"PATH": path, "HOME": str(tmp_path), "VENV": str(venv), **env},
      capture_output=True,
      text=True,
      timeout=60,
      start_new_session=True,  # a group of its own, as in a terminal
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


def test_dry_run_installs_and_starts_nothing(machine):
  done = machine("--dry-run", "configs/ism_digits.py", "--prompt=it's", ACCELERATOR="cpu")
  line = done.stdout.strip()
  assert shlex.split(line)[1:] == [
    "main.py",
    "--config=configs/ism_digits.py",
    "--workdir=runs/ism_digits",
    "--prompt=it's",
  ]
  assert machine("--dry-run", "test", "-q", ACCELERATOR="cpu").stdout.endswith(" -m pytest -q\n")
  assert machine.calls() == []


@pytest.mark.parametrize("accelerator", ["cpu", "cuda12"])
def test_local_processes_differ_in_their_number(machine, accelerator):
  env = {"ACCELERATOR": accelerator, "PORT": "2222"}
  done = machine("--on=local:2", "--dry-run", "configs/ism_digits.py:debug", **env)
  for i, line in enumerate(done.stdout.splitlines()):
    words = shlex.split(line)
    assert {
      "JAX_COORDINATOR_ADDRESS=127.0.0.1:2222",
      "JAX_NUM_PROCESSES=2",
      f"JAX_PROCESS_ID={i}",
    } < set(words)
    assert (f"JAX_LOCAL_DEVICE_IDS={i}" in words) == (accelerator == "cuda12")
    assert words[-2:] == ["--config=configs/ism_digits.py:debug", "--workdir=runs/ism_digits_debug"]
  assert i == 1 and machine.calls() == []


@pytest.fixture
def processes(machine, tmp_path):
  """(shell code, n) -> `--on=local:n` with a main.py that is this code, after its installation."""
  machine("install", ACCELERATOR="cpu")
  python = tmp_path / "venv" / "bin" / "python"

  def run(code: str, n: int):
    python.write_text(f"#!/bin/bash\n{code}\n")
    return machine(f"--on=local:{n}", "configs/ism_digits.py", ACCELERATOR="cpu")

  return run


def test_output_of_local_processes_is_told_apart(processes):
  done = processes('echo "here is $JAX_PROCESS_ID of $JAX_NUM_PROCESSES"', 3)
  assert done.returncode == 0
  assert sorted(done.stdout.splitlines()) == [
    "[1] here is 1 of 3",
    "[2] here is 2 of 3",
    "here is 0 of 3",
  ]


def test_one_that_fails_stops_the_others_and_gives_its_exit_code(processes):
  code = """trap 'echo stopped $JAX_PROCESS_ID; exit 9' TERM
((JAX_PROCESS_ID == 1)) && { sleep 0.5; exit 7; }
for ((i = 0; i < 300; i++)); do sleep 0.1; done"""
  started = time.monotonic()
  done = processes(code, 3)
  assert done.returncode == 7 and time.monotonic() - started < 20
  assert "process 1 ended with exit code 7" in done.stderr
  assert sorted(done.stdout.splitlines()) == ["[2] stopped 2", "stopped 0"]


def test_a_signal_reaches_all_local_processes(machine, processes, tmp_path):
  processes("exit 0", 1)
  python = tmp_path / "venv" / "bin" / "python"
  python.write_text(
    """#!/bin/bash
trap 'echo told $JAX_PROCESS_ID; exit 0' TERM
: >"$0.$JAX_PROCESS_ID"  # ready
if [[ $JAX_PROCESS_ID == 0 ]]; then
  until [[ -e "$0.1" ]]; do sleep 0.05; done
  kill -TERM "$PPID"
fi
for ((i = 0; i < 300; i++)); do sleep 0.1; done
"""
  )
  done = machine("--on=local:2", "configs/ism_digits.py", ACCELERATOR="cpu")
  assert done.returncode == 0, done.stderr
  assert sorted(done.stdout.splitlines()) == ["[1] told 1", "told 0"]


def test_a_signal_to_the_whole_group_is_one_signal_and_all_are_waited_for(processes):
  """As Ctrl-C in a terminal: a second signal would end a run without its save."""
  done = processes(
    """trap 'told=$((told + 1))' INT TERM
[[ $JAX_PROCESS_ID != 0 ]] || { sleep 0.5; kill -TERM -- "-$(ps -o pgid= -p $PPID | tr -d ' ')"; }
for ((i = 0; i < 30; i++)); do sleep 0.1; done
echo told $told times""",
    2,
  )
  assert done.returncode == 0, done.stderr
  assert sorted(done.stdout.splitlines()) == ["[1] told 1 times", "told 1 times"]


def test_slurm_submits_a_process_a_node(machine):
  env = {"PORT": "2222", "START_LIMIT": "90", "SBATCH_OPTIONS": "--gpus-per-node=8 --time=1-0"}
  done = machine("--on=slurm:4", "--dry-run", "configs/ism_digits.py", "--prompt=a b", **env)
  words = shlex.split(done.stdout.splitlines()[-1])
  assert words[:3] == ["sbatch", "--nodes=4", "--ntasks-per-node=1"]
  assert {"--gpus-per-node=8", "--time=1-0", "--job-name=ism_digits"} < set(words)
  install, export, srun = words[words.index("--wrap") + 1].split(" && ")
  assert install == "./launch.sh install"
  assert {"START_LIMIT=90", "JAX_COORDINATOR_PORT=2222"} < set(export.split())
  for given, cores in (({}, "64"), ({"SLURM_CPUS_PER_TASK": "16"}, "16")):
    echo = subprocess.run(
      ["sh", "-c", f"srun() {{ printf '%s\\n' \"$@\"; }}; {srun}"],
      env={"SLURM_CPUS_ON_NODE": "64", **given},
      capture_output=True,
      text=True,
    )
    again = ["./launch.sh", "configs/ism_digits.py", "--prompt=a b"]
    options = ["--kill-on-bad-exit=1", f"--cpus-per-task={cores}"]
    assert echo.stdout.splitlines() == [*options, *again]


def test_tpu_copies_installs_starts_and_shows(machine):
  env = {"PORT": "2222", "TMPDIR": "/tmp"}
  done = machine("--on=tpu:pod:us-east5-a", "--dry-run", "configs/ism_digits.py", "-x=a b", **env)
  pack, copy, install, start, show = map(shlex.split, done.stdout.splitlines())
  assert pack[:3] == ["tar", "-czf", "/tmp/ism-jax.tgz"]
  tpu = ["gcloud", "compute", "tpus", "tpu-vm"]
  everywhere = ["--zone=us-east5-a", "--worker=all"]
  assert copy == [*tpu, "scp", "/tmp/ism-jax.tgz", "pod:ism-jax.tgz", *everywhere]
  assert install[:-1] == [*tpu, "ssh", "pod", *everywhere, "--command"] == start[:-1]
  assert install[-1].endswith("-C ism-jax && cd ism-jax && ./launch.sh install")
  wanted = "env START_LIMIT=50 JAX_COORDINATOR_PORT=2222 ./launch.sh configs/ism_digits.py '-x=a b'"
  assert f"nohup {wanted} >run.log 2>&1" in start[-1]
  assert show[4:-2] == ["ssh", "pod", "--zone=us-east5-a", "--worker=0"] and "tail" in show[-1]


def test_the_program_is_copied_and_what_lies_beside_it_is_not(machine, tmp_path):
  checkout = tmp_path / "checkout"
  checkout.mkdir()
  own = [path.name for path in ROOT.glob("*_jax")]
  own += ["configs", "tools", "benchmarks", "tests", "docs", ".ci"]
  for name in (*own, "imagenet", "latents", "runs", ".git", ".venv"):
    (checkout / name / "__pycache__").mkdir(parents=True)
    for file in ("here.py", "__pycache__/here.pyc"):
      (checkout / name / file).touch()
  files = ["main.py", "pyproject.toml", "README.md", "requirements.txt", "requirements-test.txt"]
  for name in (*files, "mine.py"):
    (checkout / name).touch()
  shutil.copy(ROOT / "launch.sh", checkout)
  gcloud = tmp_path / "tools" / "gcloud"
  gcloud.write_text("#!/bin/sh\n")
  gcloud.chmod(0o755)
  for config, more in (("configs/here.py", []), ("mine.py:debug", ["mine.py"])):
    args = ("--on=tpu:pod:zone", config)
    done = machine(*args, launcher=checkout / "launch.sh", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / "ism-jax.tgz") as tree:
      found = [os.path.normpath(file.name) for file in tree if file.isfile()]
    assert sorted(found) == sorted([*files, *more, "launch.sh", *(f"{top}/here.py" for top in own)])


def test_commands_for_the_workers_are_shell(machine, tmp_path):
  """Run where gcloud is a shell that does what it is told, here."""
  tools = tmp_path / "tools"
  tools.mkdir(exist_ok=True)
  for name, text in (
    ("gcloud", 'case "$5" in -*) ;; esac; [[ "$4" != ssh ]] || bash -c "${@: -1}"'),
    ("tar", "mkdir -p ism-jax; cp -f launcher ism-jax/launch.sh"),
  ):
    (tools / name).write_text(f"#!/bin/bash\ncd {tmp_path}\n{text}\n")
    (tools / name).chmod(0o755)
  (tmp_path / "launcher").write_text('#!/bin/bash\necho "ran $*; $START_LIMIT"\n')
  (tmp_path / "launcher").chmod(0o755)
  done = machine("--on=tpu:pod:zone", "configs/ism_digits.py", "--prompt=a b", START_LIMIT="70")
  assert done.returncode == 0, done.stderr
  assert done.stdout.splitlines()[-1] == "ran configs/ism_digits.py --prompt=a b; 70"


def test_gke_prints_a_jobset(machine):
  args = ("--on=gke:tpu-v5-lite-podslice:8x8", "configs/ism_digits.py", '--prompt="a"')
  done = machine(*args, IMAGE="registry/run", PORT="2222")
  (job,) = yaml.safe_load_all(done.stdout)
  assert (job["kind"], job["metadata"]["name"]) == ("JobSet", "ism-digits")
  work = job["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert work["parallelism"] == work["completions"] == 16
  pod = work["template"]["spec"]
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": "8x8",
  }
  (container,) = pod["containers"]
  assert container["image"] == "registry/run"
  assert container["command"] == ["./launch.sh", *args[1:]]
  assert {"name": "START_LIMIT", "value": "50"} in container["env"]
  # All stop when a host is drained; Kubernetes would take exit code 0 for the end of the run.
  assert {"name": "STOPPED_FAILS", "value": "1"} in container["env"]
  assert container["resources"]["limits"] == {"google.com/tpu": 4}


@pytest.mark.parametrize("place", ["pod", "local:0", "local:x", "tpu:pod", "gke:v5e", "slurm:"])
def test_unknown_places_are_one_sentence(machine, place):
  done = machine(f"--on={place}", "configs/ism_digits.py")
  assert done.returncode == 2 and f"--on={place} is unknown; choose" in done.stderr


def test_all_of_the_packages_is_installed():
  setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
  there = {p for p in ROOT.glob("*_jax/**/*") if p.is_file() and "__pycache__" not in p.parts}
  listed = {name: ["*.py", *setup["package-data"].get(name, ())] for name in setup["packages"]}
  assert there == {
    p
    for name, globs in listed.items()
    for g in globs
    for p in (ROOT / name.replace(".", "/")).glob(g)
  }
