#!/usr/bin/env bash
# The way in. Makes .venv, installs for the accelerator that the machine has, and runs.
#
#   ./launch.sh                                  trains configs/ism_digits.py into runs/ism_digits
#   ./launch.sh CONFIG [--config.KEY=VALUE ...]  trains another config; --workdir=DIR to choose where
#   ./launch.sh --mode=sample --workdir=DIR ...  anything else that main.py can do
#   ./launch.sh test [pytest options]            installs what the tests need and runs them
#   ./launch.sh install                          installs and stops
#
# ACCELERATOR=cpu|cuda12|cuda13|tpu overrides what is detected; PYTHON=/path/to/python3.11 and VENV=DIR
# override the interpreter and the environment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

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
  wanted="$* $(cat requirements.txt)"
  [[ -f "$stamp" && "$(cat "$stamp")" == "$wanted" ]] && return
  say "installing into $venv (once)"
  if command -v uv >/dev/null; then
    uv pip install --quiet --python "$venv/bin/python" "$@"
  else
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
  fi
  printf '%s' "$wanted" >"$stamp"
}

case "${1:-}" in
-h | --help)
  sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0"
  exit 0
  ;;
esac

accelerator="${ACCELERATOR:-$(detect)}"
case "$accelerator" in
cpu) jax=jax ;;
cuda12 | cuda13 | tpu) jax="jax[$accelerator]" ;;
*) die "ACCELERATOR=$accelerator is unknown; choose cpu, cuda12, cuda13 or tpu." ;;
esac
say "wheels for $accelerator"

venv="${VENV:-.venv}"
if [[ ! -x "$venv/bin/python" ]]; then
  python=$(find_python)
  say "making $venv with $("$python" --version)"
  "$python" -m venv "$venv"
fi
install run -r requirements.txt "$jax"

case "${1:-}" in
install) exit 0 ;;
test)
  shift
  install test -r requirements-test.txt
  exec "$venv/bin/python" -m pytest "$@"
  ;;
"") set -- configs/ism_digits.py ;;
esac

# CONFIG -> --config=CONFIG, and a working directory of its name unless one is given.
if [[ "$1" != -* ]]; then
  config=$1
  shift
  [[ -f "${config%%:*}" ]] || die "$config is neither a command nor a config file; see ./launch.sh --help."
  name=$(basename "${config%%:*}" .py)
  [[ "$config" == *:* ]] && name+="_${config#*:}"
  case " $*" in
  *" --workdir"*) set -- "--config=$config" "$@" ;;
  *) set -- "--config=$config" "--workdir=runs/${name//[^A-Za-z0-9_.-]/_}" "$@" ;;
  esac
fi
exec "$venv/bin/python" main.py "$@"
