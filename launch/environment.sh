# shellcheck shell=bash
# Sourced by the launchers: makes or reuses .venv in the repository root, and activates it.
#
#   prepare_environment [EXTRA...]   extras of setup.py wanted beside the accelerator's own
#
# Settings, all optional:
#   PYTHON               interpreter to make .venv with; the default is the first of python3,
#                        python3.13, python3.12, python3.11 that is new enough
#   TREERL_ACCELERATOR   cuda, tpu or none, where the machine is not to be asked
#
# .venv/treerl.stamp says what is installed. It is removed before an installation and written
# after it, so an environment without one is unfinished and is made anew. One with a stamp and
# nothing new to install is used as it is, without network.

oldest_python="3.11"

say() { printf 'treerl: %s\n' "$*" >&2; }
fail() {
  say "$*"
  exit 1
}

# Prints words as a shell reads them, on one line.
quoted() {
  local line
  line="$(printf ' %q' "$@")"
  echo "${line:1}"
}

# Prints the version of interpreter $1, such as 3.12; fails where it is missing or too old.
python_version() {
  "$1" - "$oldest_python" 2>/dev/null <<'PY'
import sys
print("%d.%d" % sys.version_info[:2])
sys.exit(list(sys.version_info[:2]) < [int(x) for x in sys.argv[1].split(".")])
PY
}

# Prints an interpreter to make .venv with.
choose_python() {
  local name
  if [[ -n "${PYTHON:-}" ]]; then
    python_version "$PYTHON" >/dev/null ||
      fail "PYTHON=$PYTHON is no Python of version $oldest_python or newer: set PYTHON to one."
    echo "$PYTHON"
    return
  fi
  for name in python3 python3.13 python3.12 python3.11; do
    if python_version "$name" >/dev/null; then
      echo "$name"
      return
    fi
  done
  fail "found no Python of version $oldest_python or newer: install one, or set PYTHON to it."
}

# Prints the extra of the accelerator at hand: cuda, tpu, or nothing.
accelerator_extra() {
  case "${TREERL_ACCELERATOR:-ask}" in
    cuda | tpu) echo "$TREERL_ACCELERATOR" ;;
    none) ;;
    ask)
      if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
        echo cuda
      elif on_tpu; then
        echo tpu
      fi
      ;;
    *) fail "TREERL_ACCELERATOR=$TREERL_ACCELERATOR is unknown: use cuda, tpu or none." ;;
  esac
}

# Whether this is a TPU VM: a chip's device file, and Google's PCI vendor number or a TPU variable.
on_tpu() {
  [[ -e /dev/accel0 || -e /dev/vfio/0 ]] || return 1
  grep -qs 0x1ae0 /sys/bus/pci/devices/*/vendor || compgen -v TPU_ >/dev/null
}

# Prints the words of line $1 of the stamp.
stamped() { sed -n "s/^$1 //p" .venv/treerl.stamp 2>/dev/null || true; }

# Makes an empty .venv with interpreter $1. One that no launcher made is left alone.
make_venv() {
  if [[ -e .venv || -L .venv ]]; then
    [[ -e .venv/treerl.made || -z "$(ls -A .venv 2>/dev/null)" ]] ||
      fail "$PWD/.venv was not made by launch/: move it away, so that one can be made."
    # Renamed first: a removal that is cut short must not look like somebody else's .venv.
    rm -rf .venv.old
    mv .venv .venv.old
  fi
  rm -rf .venv.old
  mkdir .venv
  touch .venv/treerl.made
  "$1" -m venv .venv || fail "could not make .venv with $1: is its venv module installed?"
}

prepare_environment() {
  local setup accelerator python found installed extras
  setup="$(cksum <setup.py | tr ' ' -)"
  accelerator="$(accelerator_extra)"

  if command -v flock >/dev/null; then
    exec 9>.venv.lock
    flock -n 9 || {
      say "waiting for another launcher to finish with .venv"
      flock 9
    }
  fi

  # The stamp must be of a .venv that still works, lies where it was made, and has the Python
  # that was asked for, if one was.
  found="$(python_version .venv/bin/python)" || found=""
  if [[ -z "$found" || "$(stamped python)" != "$found" || "$(stamped root)" != "$PWD" ]] ||
    [[ -n "${PYTHON:-}" && "$(python_version "$PYTHON" || true)" != "$found" ]]; then
    python="$(choose_python)"
    say "making .venv with $python ($(python_version "$python"))"
    make_venv "$python"
  fi

  # Extras add up, so that launchers which want different ones do not take turns installing.
  installed="$(stamped extras)"
  extras="$(printf '%s\n' "$accelerator" "$@" "${installed//,/$'\n'}" |
    sed '/^$/d' | sort -u | paste -sd, -)"
  if [[ "$(stamped setup)" != "$setup" || "$installed" != "$extras" ]]; then
    say "installing treerl${extras:+ with extras $extras} into .venv (minutes the first time)"
    rm -f .venv/treerl.stamp
    .venv/bin/python -m pip install -q --disable-pip-version-check --use-pep517 \
      -e ".${extras:+[$extras]}" ||
      fail "the installation failed: see the lines above; the next run starts it again."
    printf '%s\n' "python $(python_version .venv/bin/python)" "root $PWD" "setup $setup" \
      "extras $extras" >.venv/treerl.stamp.new
    mv .venv/treerl.stamp.new .venv/treerl.stamp
  fi
  if command -v flock >/dev/null; then
    exec 9>&-
  fi

  # shellcheck disable=SC1091
  source .venv/bin/activate
  export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR-$PWD/.cache/jax}"
  export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS-1}"
}
