#!/usr/bin/env bash
# The way in. Makes .venv, installs for the accelerator that the machine has, and runs.
#
#   ./launch.sh                                  trains configs/ism_digits.py into runs/ism_digits
#   ./launch.sh CONFIG [--config.KEY=VALUE ...]  trains another config; --workdir=DIR to choose where
#   ./launch.sh --mode=sample --workdir=DIR ...  anything else that main.py can do
#   ./launch.sh test [pytest options]            installs what the tests need and runs them
#   ./launch.sh install                          installs and stops
#   ./launch.sh CONFIG --help                    lists main.py's options, and the config's keys
#
# --on=PLACE before any of these runs it elsewhere, as many processes; --dry-run prints the commands instead:
#
#   --on=local:N            N processes on this machine, a GPU each if it has GPUs
#   --on=slurm:NODES        submits a job of one process a node; SBATCH_OPTIONS='--exclusive --gpus-per-node=8 --time=1-0'
#                           (--exclusive is all cores of a node, --cpus-per-task=N some; Slurm's default is one)
#   --on=tpu:NAME:ZONE      all workers of a TPU VM: copies the program, installs, starts, shows worker 0's log
#   --on=gke:KIND:TOPOLOGY  prints a JobSet for kubectl, such as gke:tpu-v5-lite-podslice:4x4; IMAGE=registry/name
#                           has the program at /app, the volume claim CLAIM (default runs) is its runs/
#
# Many processes need data and a --workdir that all of them see; neither is copied. START_LIMIT=50 is how many seconds
# they wait for each other, PORT the coordinator's port.
#
# ACCELERATOR=cpu|cuda12|cuda13|tpu overrides what is detected; PYTHON=/path/to/python3.11 and VENV=DIR
# override the interpreter and the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

dry=""
say() { printf 'launch.sh: %s\n' "$*" >&2; }
die() {
  say "$*"
  exit 2
}

# cpu, tpu, or the CUDA major version of the driver.
detect() {
  local version
  if compgen -G '/dev/accel*' >/dev/null || [[ -n "${TPU_NAME:-}${TPU_WORKER_ID:-}" ]] ||
    { compgen -G '/dev/vfio/[0-9]*' >/dev/null && ! command -v nvidia-smi >/dev/null; }; then
    echo tpu
  elif version=$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\)\..*/\1/p') && [[ -n "$version" ]]; then
    ((version >= 13)) && echo cuda13 || echo cuda12
  else
    echo cpu
  fi
}

# The first interpreter that is new enough and can make an environment.
find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3.14 python3 python; do
    if [[ -n "$candidate" ]] &&
      "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  die "no Python 3.11 or newer with venv was found; install one (Debian: python3-venv) or set PYTHON=/path/to/python3."
}

# install STAMP REQUIREMENT...: does nothing when the same was installed before.
install() {
  local stamp="$venv/.installed-$1" wanted
  shift
  wanted="$* $(cat requirements*.txt)"
  [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]] && return
  say "installing into $venv (once), wheels for $accelerator"
  if command -v uv >/dev/null; then
    uv pip install --quiet --python "$venv/bin/python" "$@"
  else
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
  fi
  printf '%s' "$wanted" >"$stamp"
}

# quote WORD...: one line that a shell reads as these words.
quote() {
  local word line=""
  for word in "$@"; do
    [[ "$word" =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

# run COMMAND...: or only print it.
run() {
  if [[ -n "$dry" ]]; then quote "$@"; else "$@"; fi
}

# run_local N COMMAND...: processes 0 to N - 1. When one fails the others are stopped, and its exit code is ours.
run_local() {
  local n=$1 i code first=0 deadline=0 pids=() command
  shift
  set -m
  for ((i = 0; i < n; i++)); do
    command=(env PYTHONUNBUFFERED=1 "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$n" "JAX_PROCESS_ID=$i")
    [[ "$accelerator" != cuda* ]] || command+=("JAX_LOCAL_DEVICE_IDS=$i")
    command+=("$@")
    if [[ -n "$dry" ]]; then
      run "${command[@]}"
      continue
    elif ((i == 0)); then
      "${command[@]}" &
    else
      "${command[@]}" > >(trap '' INT TERM && exec sed -u "s/^/[$i] /") 2>&1 &
    fi
    pids+=($!)
  done
  # They are groups of their own (set -m), or Ctrl-C would be their first signal and this their second.
  trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
  while ((${#pids[@]})); do
    for i in "${!pids[@]}"; do
      kill -0 "${pids[i]}" 2>/dev/null && continue
      wait "${pids[i]}" && code=0 || code=$?
      unset 'pids[i]'
      if ((code && !first)); then
        say "process $i ended with exit code $code; the others are stopped."
        first=$code deadline=$((SECONDS + 15))
        kill -TERM "${pids[@]}" 2>/dev/null || true
      fi
    done
    # One that waits for the dead in a collective hears no signal but this.
    if ((first && SECONDS > deadline)); then kill -KILL "${pids[@]}" 2>/dev/null || true; fi
    sleep 0.2 || true # a signal ends it, too
  done
  return "$first"
}

run_slurm() {
  local nodes=$1 again options=()
  shift
  read -ra options <<<"${SBATCH_OPTIONS:-}"
  again=$(quote ./launch.sh "$@")
  run mkdir -p runs
  # Slurm's TERM comes early enough for a last checkpoint. Since Slurm 22.05 srun inherits no --cpus-per-task; where
  # the job has --cpus-per-gpu, only as an option does it go before that.
  run sbatch "--nodes=$nodes" --ntasks-per-node=1 "--job-name=$name" "--output=runs/%x-%j.log" --signal=TERM@120 \
    "${options[@]}" --wrap "./launch.sh install && export START_LIMIT=$limit JAX_COORDINATOR_PORT=$port \
PROCESS_HOSTS=\$(scontrol show hostnames | paste -sd,) && \
srun --kill-on-bad-exit=1 --cpus-per-task=\${SLURM_CPUS_PER_TASK:-\$SLURM_CPUS_ON_NODE} $again"
}

run_tpu() {
  local vm=$1 zone=$2 tree again ssh program
  shift 2
  tree="${TMPDIR:-/tmp}/ism-jax.tgz"
  again=$(quote env "START_LIMIT=$limit" "JAX_COORDINATOR_PORT=$port" ./launch.sh "$@")
  ssh=(gcloud compute tpus tpu-vm ssh "$vm" "--zone=$zone")
  # By name: a data set may lie beside it.
  program=(launch.sh main.py pyproject.toml requirements*.txt ./*_jax configs tools benchmarks tests docs README.md .ci)
  [[ -z "$config" || "$config" == configs/* || ! -f "${config%%:*}" ]] || program+=("${config%%:*}")
  run tar -czf "$tree" --exclude=__pycache__ "${program[@]}"
  run gcloud compute tpus tpu-vm scp "$tree" "$vm:ism-jax.tgz" "--zone=$zone" --worker=all
  run "${ssh[@]}" --worker=all --command 'mkdir -p ism-jax && tar -xzf ism-jax.tgz -C ism-jax && cd ism-jax && ./launch.sh install'
  # The run outlives this connection.
  run "${ssh[@]}" --worker=all --command "cd ism-jax && { nohup $again >run.log 2>&1 </dev/null & echo \$! >run.pid; }"
  say "stop it with: ${ssh[*]} --worker=all --command 'kill \$(cat ism-jax/run.pid)'"
  # shellcheck disable=SC2016
  run "${ssh[@]}" --worker=0 --command 'tail -n +1 --pid="$(cat ism-jax/run.pid)" -F ism-jax/run.log'
}

print_gke() {
  local kind=$1 topology=$2 hosts command words
  [[ -n "${IMAGE:-}" ]] || say "IMAGE=registry/name is not set; put it in the place of IMAGE before you apply this."
  shift 2
  hosts=$(((${topology//x/*} + 3) / 4)) # four chips a host
  words=("${@//\\/\\\\}")
  command=$(printf '"%s", ' ./launch.sh "${words[@]//\"/\\\"}")
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(tr A-Z_ a-z- <<<"$name")
spec:
  failurePolicy:
    maxRestarts: 10
  replicatedJobs:
    - name: slice
      replicas: 1
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 120
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $kind
                cloud.google.com/gke-tpu-topology: $topology
              containers:
                - name: run
                  image: ${IMAGE:-IMAGE}
                  workingDir: /app
                  command: [${command%, }]
                  env:
                    - {name: START_LIMIT, value: "$limit"}
                    - {name: JAX_COORDINATOR_PORT, value: "$port"}
                    - {name: ACCELERATOR, value: tpu}
                    - {name: STOPPED_FAILS, value: "1"} # a host that is drained stops all: they start again
                  resources:
                    limits: {google.com/tpu: 4}
                  volumeMounts:
                    - {name: runs, mountPath: /app/runs}
              volumes:
                - name: runs
                  persistentVolumeClaim: {claimName: ${CLAIM:-runs}}
YAML
}

place=local
while [[ "${1:-}" == --on=* || "${1:-}" == --dry-run ]]; do
  [[ "$1" == --dry-run ]] && dry=yes || place="${1#--on=}"
  shift
done
case "${1:-}" in
-h | --help)
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0"
  exit 0
  ;;
esac

config=""
[[ "${1:-configs/ism_digits.py}" == -* ]] || config="${1:-configs/ism_digits.py}"
for word in "$@"; do
  case "$word" in --on=* | --dry-run) die "$word comes before all else: ./launch.sh $word ..." ;; esac
done
case "$config" in
"" | test | install) ;;
*) [[ -f "${config%%:*}" ]] || die "$config is neither a command nor a config file; see ./launch.sh --help." ;;
esac
name="${config%%:*}" name="${name##*/}" name="${name%.py}"
[[ "$config" == *:* ]] && name+="_${config#*:}"
name="${name//[^A-Za-z0-9_.-]/_}"
name="${name:-run}"
limit="${START_LIMIT:-50}"
port="${PORT:-$((20000 + RANDOM % 20000))}"
IFS=: read -r where what which <<<"$place"
case "$where/$what/$which" in
local// | local/[1-9]*/) ;;
slurm/[1-9]*/)
  run_slurm "$what" "$@"
  exit
  ;;
tpu/?*/?*)
  run_tpu "$what" "$which" "$@"
  exit
  ;;
gke/?*/[1-9]*x*)
  print_gke "$what" "$which" "$@"
  exit
  ;;
*) die "--on=$place is unknown; choose local, local:N, slurm:NODES, tpu:NAME:ZONE or gke:KIND:TOPOLOGY." ;;
esac

accelerator="${ACCELERATOR:-$(detect)}"
case "$accelerator" in
cpu) jax=jax ;;
cuda12 | cuda13 | tpu) jax="jax[$accelerator]" ;;
*) die "ACCELERATOR=$accelerator is unknown; choose cpu, cuda12, cuda13 or tpu." ;;
esac
venv="${VENV:-.venv}"
if [[ -z "$dry" ]]; then
  if [[ ! -x "$venv/bin/python" ]]; then
    python=$(find_python)
    say "making $venv with $("$python" --version)"
    "$python" -m venv "$venv"
  fi
  install run -r requirements.txt "$jax"
fi

case "${1:-}" in
install) exit 0 ;;
test)
  shift
  if [[ -z "$dry" ]]; then install test -r requirements-test.txt; fi
  run "$venv/bin/python" -m pytest "$@"
  exit
  ;;
"") set -- configs/ism_digits.py ;;
esac

# CONFIG -> --config=CONFIG, and a working directory of its name unless one is given.
if [[ "$1" != -* ]]; then
  shift
  case " $*" in
  *" --workdir"*) set -- "--config=$config" "$@" ;;
  *) set -- "--config=$config" "--workdir=runs/$name" "$@" ;;
  esac
fi
set -- "$venv/bin/python" main.py "$@"
if [[ "$where/$what" == local/?* ]]; then
  [[ "$accelerator" != tpu ]] || die "--on=local:N is for CPUs and GPUs; one process drives all TPU chips of a host."
  run_local "$what" "$@"
else
  [[ -n "$dry" ]] || exec "$@"
  run "$@"
fi
