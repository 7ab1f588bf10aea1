#!/usr/bin/env bash
# Trains in a container of this machine, with its GPUs or without.
#
# launch/container.sh COMMAND [FLAGS] [-- ARGUMENTS OF TRAIN]
#   build   build the image from launch/Dockerfile
#   run     build it, which takes a moment where nothing has changed, train in it, and end with
#           training's exit code; SIGTERM and `docker stop` have it save, Ctrl-C ends it unsaved
# Flags, or variables in their place:
#   --image=IMAGE    CONTAINER_IMAGE   name of the image, blindvalm
#   --extras=EXTRAS  CONTAINER_EXTRAS  of the package: cuda, tpu, none for CPU; several with commas
#                                      between them (cuda,s3)
#   --runs=DIR       CONTAINER_RUNS    directory for --workdir, /runs in the container; not needed
#                                      where --workdir is an address, gs://... or s3://...
#   --data=DIR       CONTAINER_DATA    directory of data, /data in the container, which only reads it
#   --user=UID:GID   CONTAINER_USER    who writes to --runs, such as "$(id -u):$(id -g)"; 1000:1000
#   --gpus                             with all GPUs of this machine
#   --env=NAME=VALUE                   variable of training, one flag for each; the value is seen in
#                                      the commands that are printed
#   --secret=NAME                      variable of this shell that training gets too, not shown
#   --grace=SECONDS                    from the SIGTERM of `docker stop` to SIGKILL, 300: a save has
#                                      to fit in
#   --dry-run                          print the commands, run none

set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=commands.sh
. "$ROOT/launch/commands.sh"

main() {
  case ${1-} in
    -h | --help) print_help; exit 0 ;;
    build | run) command=$1; shift ;;
    *) bad_usage "a command is needed: build or run" ;;
  esac
  image=${CONTAINER_IMAGE-blindvalm} extras=${CONTAINER_EXTRAS-} runs=${CONTAINER_RUNS-}
  data=${CONTAINER_DATA-} user=${CONTAINER_USER-} gpus=0 grace=300
  variables=()
  while [ $# -gt 0 ]; do
    case $1 in
      --image=*) image=${1#*=} ;;
      --extras=*) extras=${1#*=} ;;
      --runs=*) runs=${1#*=} ;;
      --data=*) data=${1#*=} ;;
      --user=*) user=${1#*=} ;;
      --gpus) gpus=1 ;;
      --env=*) check_variable "${1#*=}"; variables+=("--env=${1#*=}") ;;
      --secret=*) check_secret "${1#*=}"; variables+=("--env=${1#*=}") ;;
      --grace=*) grace=${1#*=} ;;
      --dry-run) DRY_RUN=1 ;;
      -h | --help) print_help; exit 0 ;;
      --) shift; break ;;
      *) bad_usage "unknown argument $1; arguments of train stand behind --" ;;
    esac
    shift
  done
  needed "$image" --image CONTAINER_IMAGE
  check_extras "$extras"
  whole --grace "$grace" 0
  if [ "$command" = run ]; then
    [ $# -gt 0 ] || bad_usage "arguments of train are needed behind --, such as -- --config=..."
    kept_at_address "$@" || needed "$runs" --runs CONTAINER_RUNS
    case $runs$data in *[,\"]*) bad_usage "docker takes no , and no \" in --runs and --data" ;; esac
  fi
  "do_$command" "$@"
}

do_build() {
  run docker build --file="$ROOT/launch/Dockerfile" --build-arg=EXTRAS="$extras" \
    --tag="$image" "$ROOT"
}

# docker refuses a directory that is not there.
do_run() {
  local flags=()
  if [ "$gpus" = 1 ]; then # GPUs exchange data by shared memory, of which a container has 64 MB
    flags+=(--gpus=all --ipc=host)
  fi
  [ -z "$user" ] || flags+=(--user="$user" --env=HOME=/tmp) # one without a home of its own
  [ -z "$runs" ] || flags+=(--mount="type=bind,src=$(absolute "$runs"),dst=/runs")
  [ -z "$data" ] || flags+=(--mount="type=bind,src=$(absolute "$data"),dst=/data,readonly")
  do_build
  flags+=(${variables[@]+"${variables[@]}"} "$image" "$@")
  show docker run --rm --init --stop-timeout="$grace" "${flags[@]}"
  # in this shell's place, so that signals reach it
  [ "$DRY_RUN" = 1 ] || exec docker run --rm --init --stop-timeout="$grace" "${flags[@]}"
}

absolute() {
  case $1 in /*) printf '%s' "$1" ;; *) printf '%s' "$PWD/$1" ;; esac
}

main "$@"
