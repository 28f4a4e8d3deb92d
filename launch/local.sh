#!/usr/bin/env bash
# Trains on this machine: CPU, GPUs or a TPU VM. Installs into .venv on the first run.
#
#   launch/local.sh [flags of launch/train.py]
#   launch/local.sh --config=experiments/countdown.py --workdir=runs/mine
#
# WORKDIR is the default of --workdir; see environment.sh for PYTHON and TREERL_ACCELERATOR.
# Paths are relative to the repository root, wherever this is called from.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

# shellcheck disable=SC2119
prepare_environment

# A default is given only where the caller gives none: with two --config flags, overrides such as
# --config.seed=1 are an error.
config=(--config=experiments/countdown.py)
workdir=(--workdir="${WORKDIR:-runs/countdown}")
for argument in "$@"; do
  case "$argument" in
    --config | --config=* | -config | -config=*) config=() ;;
    --workdir | --workdir=* | -workdir | -workdir=*) workdir=() ;;
  esac
done
exec python -m launch.train ${config[@]+"${config[@]}"} ${workdir[@]+"${workdir[@]}"} "$@"
