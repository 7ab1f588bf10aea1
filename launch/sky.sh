#!/usr/bin/env bash
# Trains on machines of any cloud that SkyPilot finds, and goes on after preemptions.
#
# launch/sky.sh COMMAND [FLAGS] [-- ARGUMENTS OF TRAIN, or sweep run and those of a worker]
#   launch   submit launch/sky_tpu.yaml or launch/sky_gpu.yaml as a managed job; it goes on without
#            this terminal
#   logs     follow what it prints
#   status   all jobs
#   delete   cancel it
# Flags, or variables in their place:
#   --name=NAME         SKY_NAME    name of the job
#   --tpu=TYPE          SKY_TPU     such as tpu-v5litepod-16
#   --gpu=TYPE:NUMBER   SKY_GPU     or such as H100:8, of each machine
#   --nodes=N                       machines with GPUs, 1
#   --bucket=BUCKET     SKY_BUCKET  gs://..., s3://..., mounted at /runs; it has to exist. Not needed
#                                   where --workdir is an address, gs://... or s3://...
#   --infra=INFRA       SKY_INFRA   where, such as gcp or aws/us-east-1
#   --extras=EXTRAS     SKY_EXTRAS  of the package, instead of those that the YAML names
#   --env=NAME=VALUE                variable of training, one flag for each; the value is seen in the
#                                   commands that are printed
#   --secret=NAME                   variable of this shell that training gets too, seen nowhere
#   --dry-run                       print the commands, run none

set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=commands.sh
. "$ROOT/launch/commands.sh"

main() {
  case ${1-} in
    -h | --help) print_help; exit 0 ;;
    launch | logs | status | delete) command=$1; shift ;;
    *) bad_usage "a command is needed: launch, logs, status or delete" ;;
  esac
  name=${SKY_NAME-} tpu=${SKY_TPU-} gpu=${SKY_GPU-} bucket=${SKY_BUCKET-} infra=${SKY_INFRA-}
  extras=${SKY_EXTRAS-} nodes=1
  variables=()
  while [ $# -gt 0 ]; do
    case $1 in
      --name=*) name=${1#*=} ;;
      --tpu=*) tpu=${1#*=} ;;
      --gpu=*) gpu=${1#*=} ;;
      --nodes=*) nodes=${1#*=} ;;
      --bucket=*) bucket=${1#*=} ;;
      --infra=*) infra=${1#*=} ;;
      --extras=*) extras=${1#*=} ;;
      --env=*) check_variable "${1#*=}"; variables+=(--env "${1#*=}") ;;
      --secret=*) check_secret "${1#*=}"; variables+=(--secret "${1#*=}") ;;
      --dry-run) DRY_RUN=1 ;;
      -h | --help) print_help; exit 0 ;;
      --) shift; break ;;
      *) bad_usage "unknown argument $1; arguments of train stand behind --" ;;
    esac
    shift
  done
  [ "$command" = status ] || needed "$name" --name SKY_NAME
  [ "$command" != launch ] || check_launch "$@"
  cd "$ROOT" # which SkyPilot copies to the machines
  "do_$command" "$@"
}

check_launch() {
  [ $# -gt 0 ] || bad_usage "arguments of train are needed behind --, such as -- --config=..."
  [ -n "$tpu$gpu" ] || bad_usage "--tpu=... or --gpu=... is needed, which machines to run on"
  [ -z "$tpu" ] || [ -z "$gpu" ] || bad_usage "--tpu and --gpu are two ways: give one"
  whole --nodes "$nodes" 1
  [ -z "$tpu" ] || [ "$nodes" = 1 ] || bad_usage "--nodes are for GPUs: name a larger slice"
  check_extras "$extras"
  [ "${1-}" != sweep ] || [ "$nodes" = 1 ] || bad_usage "a worker of a sweep is one process: --nodes=1"
  kept_at_address "$@" || needed "$bucket" --bucket SKY_BUCKET
  local word
  for word in ${variables[@]+"${variables[@]}"}; do
    case $word in BUCKET | TRAIN | EXTRAS | BUCKET=* | TRAIN=* | EXTRAS=*)
      bad_usage "${word%%=*} is a variable of the task itself: see --help for its flag" ;;
    esac
  done
  case $bucket in
    '' | gs://?* | s3://?*) ;;
    *) bad_usage "--bucket=$bucket must be gs://... or s3://...: SkyPilot would copy a directory" ;;
  esac
}

do_launch() {
  local task=launch/sky_gpu.yaml flags=()
  [ -z "$tpu" ] || task=launch/sky_tpu.yaml
  [ "$nodes" = 1 ] || flags+=(--num-nodes "$nodes")
  [ -z "$infra" ] || flags+=(--infra "$infra")
  [ -z "$extras" ] || flags+=(--env EXTRAS="$extras")
  if [ -z "$bucket" ]; then # the task without its mount, as no flag of SkyPilot's leaves it out
    scratch=DIRECTORY
    if [ "$DRY_RUN" = 0 ]; then
      scratch=$(mktemp -d)
      trap 'rm -r "$scratch"' EXIT
    fi
    run cp "$task" "$scratch/task.yaml"
    task=$scratch/task.yaml
    run sed -i.mounted '/^file_mounts:/,/^$/d' "$task"
  fi
  run sky jobs launch --yes --detach-run --name "$name" --gpus "$tpu$gpu" \
    ${flags[@]+"${flags[@]}"} ${variables[@]+"${variables[@]}"} \
    --env BUCKET="$bucket" --env TRAIN="$(quoted "$@")" "$task"
}

do_logs() {
  run sky jobs logs --name "$name"
}

do_status() {
  run sky jobs queue
}

do_delete() {
  run sky jobs cancel --yes --name "$name"
}

main "$@"
