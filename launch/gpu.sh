#!/usr/bin/env bash
# Trains on GPU machines, one process a machine: under Slurm, over ssh, or on this machine alone.
#
#   sbatch --nodes=4 --gpus-per-node=8 launch/gpu.sh [flags of launch/train.py]
#   HOSTS="gpu1 gpu2" launch/gpu.sh [flags of launch/train.py]
#   launch/gpu.sh [flags of launch/train.py]
#   ... --dry_run          prints the commands instead
#
# Submit from the root of the checkout. It and --workdir must lie on a file system that all machines share, under one
# path. Two minutes before its time limit, and when it is preempted, a Slurm job gets SIGTERM: the run saves, ends with
# status 75, and the job is put back into the queue, where it goes on. Over ssh, Ctrl-C or SIGTERM here is handed on,
# and where one process fails the others are ended too.
#
# Settings: HOSTS, machines that ssh reaches without a password, the first of which the others must reach at
# PORT (9876); and those of environment.sh.
#
#SBATCH --job-name=treerl
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ ! -e "$root/launch/environment.sh" && -n "${SLURM_SUBMIT_DIR:-}" ]]; then
  root="$SLURM_SUBMIT_DIR" # Slurm runs a copy of this file
fi
if [[ ! -e "$root/launch/environment.sh" ]]; then
  echo "treerl: $root is no checkout: submit from its root." >&2
  exit 1
fi
cd "$root"
source launch/environment.sh

dry=""
flags=()
for argument in "$@"; do
  case "$argument" in
    --dry_run) dry=1 ;;
    *) flags+=("$argument") ;;
  esac
done

on_slurm() {
  command -v srun >/dev/null || fail "this is a Slurm job, but there is no srun: load Slurm's module, or unset SLURM_JOB_ID."
  local command=(
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --kill-on-bad-exit=1
    bash launch/local.sh ${flags[@]+"${flags[@]}"}
  )
  if [[ -n "$dry" ]]; then
    quoted "${command[@]}"
    return
  fi
  # shellcheck disable=SC2119
  TREERL_ACCELERATOR="${TREERL_ACCELERATOR:-cuda}" prepare_environment # once, before all of them want it
  local status=0
  "${command[@]}" || status=$?
  if ((status == 75)); then
    say "the run has saved; job $SLURM_JOB_ID goes back into the queue."
    scontrol requeue "$SLURM_JOB_ID"
  fi
  return "$status"
}

pids=()
hosts=()
stop_all() {
  local host
  for host in "${hosts[@]}"; do
    ssh -o BatchMode=yes "$host" "kill -TERM \$(cat $pidfile)" 2>/dev/null || true
  done
}

over_ssh() {
  read -r -a hosts <<<"$HOSTS"
  pidfile="/tmp/treerl.$$.pid"
  local number=0 host command port="${PORT:-9876}" grace="${GRACE_SECONDS:-60}"
  for host in "${hosts[@]}"; do
    command="cd $(quoted "$root") && echo \$\$ >$pidfile && exec bash launch/local.sh $(
      quoted "--coordinator_address=${hosts[0]}:$port" "--num_processes=${#hosts[@]}" "--process_id=$number" \
        ${flags[@]+"${flags[@]}"}
    )"
    if [[ -n "$dry" ]]; then
      quoted ssh -o BatchMode=yes "$host" "$command"
    else
      ssh -o BatchMode=yes "$host" "$command" </dev/null > >(sed "s/^/[$host] /") 2> >(sed "s/^/[$host] /" >&2) &
      pids+=($!)
    fi
    number=$((number + 1))
  done
  [[ -z "$dry" ]] || return 0
  trap stop_all INT TERM

  local result=0 status i left=${#pids[@]} ended=""
  while ((left)); do
    for i in "${!pids[@]}"; do
      if [[ -n "${pids[i]}" ]] && ! kill -0 "${pids[i]}" 2>/dev/null; then
        status=0
        wait "${pids[i]}" || status=$?
        pids[i]=""
        left=$((left - 1))
        if ((status && !result)); then
          result=$status
          ended=$SECONDS
          if ((status != 75)); then # who saves ends by itself, and so do the others
            say "the process on ${hosts[i]} ended with status $status; the others are ended too."
            stop_all
          fi
        fi
      fi
    done
    if [[ -n "$ended" ]] && ((left && SECONDS - ended > grace)); then
      for i in "${!pids[@]}"; do
        [[ -z "${pids[i]}" ]] || kill "${pids[i]}" 2>/dev/null || true
      done
    fi
    sleep 0.2
  done
  return "$result"
}

if [[ -n "${SLURM_JOB_ID:-}" ]]; then
  on_slurm
elif [[ -n "${HOSTS:-}" ]]; then
  over_ssh
elif [[ -n "$dry" ]]; then
  quoted bash launch/local.sh ${flags[@]+"${flags[@]}"}
else
  exec bash launch/local.sh ${flags[@]+"${flags[@]}"}
fi
