#!/usr/bin/env bash
# Trains on a Cloud TPU pod, as a queued resource of gcloud, one process a worker.
#
#   launch/tpu_pod.sh COMMAND --name=N --zone=Z [settings] [-- flags of launch/train.py]
#
#   create   asks for the pod         --type=v5litepod-64 [--version=...] [--spot | --reserved]
#   wait     until it is there
#   setup    copies this checkout to every worker and installs it there
#   run      starts launch/local.sh with the flags on every worker; it goes on without this machine
#   tail     follows worker 0; ends with the run, with its status
#   status   of the pod, and of the run on every worker
#   stop     has the run save and end, with status 75: run again, and it goes on
#   delete   gives the pod back
#   all      create, wait, setup, run, tail; with [--retry=N] a pod that was preempted, or a run that was told to stop,
#            is made or started again up to N times, and goes on from its last checkpoint
#   ... --dry_run   prints the commands instead
#
# --workdir must be a gs:// path that the workers may write. More settings: --project=P, and POLL_SECONDS (30).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

command="${1:-}"
shift || true
name="" zone="" type="" version="" project="" pricing="" retry=0 dry=""
flags=()
while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --version=*) version="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --spot | --reserved) pricing="$1" ;;
    --retry=*) retry="${1#*=}" ;;
    --dry_run) dry=1 ;;
    --)
      shift
      flags=("$@")
      break
      ;;
    *) fail "$1 is no setting: see the head of launch/tpu_pod.sh; flags of launch/train.py come after --." ;;
  esac
  shift
done
case "$command" in
  create | wait | setup | run | tail | status | stop | delete | all) ;;
  *) fail "'$command' is no command: give create, wait, setup, run, tail, status, stop, delete or all." ;;
esac
[[ -n "$name" && -n "$zone" ]] || fail "--name and --zone are missing: give the pod's name and its zone."
if [[ "$command" == create || "$command" == all ]]; then
  [[ -n "$type" ]] || fail "--type is missing: give an accelerator type, such as --type=v5litepod-64."
fi
if [[ -z "$version" ]]; then
  case "$type" in
    v5litepod*) version=v2-alpha-tpuv5-lite ;;
    v5p*) version=v2-alpha-tpuv5 ;;
    v6e*) version=v2-alpha-tpuv6e ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi
workdir=""
for flag in ${flags[@]+"${flags[@]}"}; do
  case "$flag" in --workdir=*) workdir="${flag#*=}" ;; esac
done
if [[ "$command" == run || "$command" == all ]] && [[ "$workdir" != gs://* ]]; then
  fail "--workdir=$workdir is on one worker's disk: give a gs:// path behind --, such as -- --workdir=gs://BUCKET/runs/one."
fi
[[ -n "$dry" ]] || command -v gcloud >/dev/null ||
  fail "gcloud is not installed: see https://cloud.google.com/sdk/docs/install, then gcloud auth login."

# Runs a command, or prints it.
run_or_print() {
  if [[ -n "$dry" ]]; then
    quoted "$@"
  else
    "$@"
  fi
}

where=(--zone="$zone")
[[ -z "$project" ]] || where+=(--project="$project")
resource() {
  local verb="$1"
  shift
  run_or_print gcloud compute tpus queued-resources "$verb" "$name" "${where[@]}" "$@"
}
on_workers() { run_or_print gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"; }
state() { gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format="value(state.state)"; }

do_create() {
  resource create --node-id="$name" --accelerator-type="$type" --runtime-version="$version" ${pricing:+"$pricing"} --quiet
}

do_wait() {
  if [[ -n "$dry" ]]; then
    resource describe --format="value(state.state)"
    return
  fi
  local now before=""
  while true; do
    now="$(state)" || fail "$name cannot be described: see the lines above."
    [[ "$now" == "$before" ]] || say "$name is $now"
    before="$now"
    case "$now" in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED | DELETING)
        say "$name is $now and will not come: look at 'gcloud compute tpus queued-resources describe $name', delete it and create it again."
        return 1
        ;;
    esac
    sleep "${POLL_SECONDS:-30}"
  done
}

do_setup() {
  local archive
  archive="$(mktemp -d)/treerl.tgz"
  [[ -n "$dry" ]] || git ls-files -z | tar --null -T - -czf "$archive"
  [[ -z "$dry" ]] || archive=treerl.tgz
  run_or_print gcloud compute tpus tpu-vm scp "$archive" "$name:treerl.tgz" "${where[@]}" --worker=all || return 1
  on_workers all "mkdir -p treerl && tar xzf treerl.tgz -C treerl && cd treerl && TREERL_ACCELERATOR=tpu bash -c 'source launch/environment.sh && prepare_environment'"
}

do_run() {
  local train
  train="TREERL_ACCELERATOR=tpu JAX_COMPILATION_CACHE_DIR=$(quoted "$workdir/programs") bash launch/local.sh $(quoted ${flags[@]+"${flags[@]}"})"
  on_workers all "cd treerl && rm -f ../treerl.status && (setsid nohup bash -c $(quoted "$train; echo \$? >../treerl.status") >../treerl.log 2>&1 </dev/null &)"
}

# shellcheck disable=SC2016 # the workers expand it
do_tail() {
  on_workers 0 'tail -n +1 -F treerl.log & while [ ! -e treerl.status ]; do sleep 2; done; sleep 1; kill $!; exit $(cat treerl.status)'
}

# shellcheck disable=SC2016
do_status() {
  resource describe --format="value(state.state)"
  on_workers all 'echo "$(hostname): $(cat treerl.status 2>/dev/null || (pgrep -f launch[.]train >/dev/null && echo runs || echo is not running))"'
}

do_stop() { on_workers all "pkill -TERM -f 'launch[.]train' || true"; }
do_delete() { resource delete --force --quiet; }

do_all() {
  local turn=0 status now=""
  [[ -n "$dry" ]] || now="$(state 2>/dev/null)" || true
  while true; do
    status=0
    if [[ -z "$now" ]]; then
      do_create
    fi
    if do_wait && do_setup && do_run; then
      do_tail || status=$?
    else
      status=1
    fi
    [[ -z "$dry" ]] || return 0
    now="$(state 2>/dev/null)" || now=""
    if ((status == 0)) || { [[ "$now" == ACTIVE ]] && ((status != 75)); }; then
      return "$status" # at its end, or the run's own mistake
    fi
    ((turn < retry)) || return "$status"
    turn=$((turn + 1))
    if [[ "$now" == ACTIVE ]]; then
      say "the run was told to stop; it is started again ($turn of $retry)."
    else
      say "$name is ${now:-gone}; it is made again ($turn of $retry)."
      [[ -z "$now" ]] || do_delete
      now=""
    fi
  done
}

"do_$command"
