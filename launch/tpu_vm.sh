#!/usr/bin/env bash
# Trains on a Cloud TPU VM or on all workers of a pod slice, through preemptions.
#
# launch/tpu_vm.sh COMMAND [FLAGS] [-- ARGUMENTS OF TRAIN, or sweep run and those of a worker]
#   create    make the TPU; with --queued, ask for it
#   install   put the package and configs/ on every worker
#   run       start training on every worker; it goes on without this terminal
#   logs      follow what worker 0 prints
#   babysit   all of the above; make the TPU again when it is preempted, start training again,
#             and end with the exit code of training: 0 done, 1 error, 43 diverged; 3: given up
#   status    state of the TPU and of training on each worker
#   delete    delete the TPU
# Flags, or variables in their place:
#   --name=NAME        TPU_NAME      the TPU's name
#   --project=PROJECT  TPU_PROJECT   project that pays
#   --zone=ZONE        TPU_ZONE      such as us-central1-a
#   --type=TYPE        TPU_TYPE      accelerator type such as v5litepod-16     (create, babysit)
#   --version=VERSION  TPU_VERSION   software version of the VMs               (create, babysit)
#   --source=SOURCE    TPU_SOURCE    wheel, source tar, or git+https://...@TAG (install, babysit)
#   --extras=EXTRAS    TPU_EXTRAS    of the package, tpu,gs; tpu,gs,wandb, say  (install, babysit)
#   --setup=COMMAND    TPU_SETUP     run on each worker after the installation, and by babysit before
#                                    each further start: mounts a bucket that is not mounted, say
#   --spot             TPU_SPOT=1    cheaper, may be taken away
#   --queued           TPU_QUEUED=1  ask through a queued resource of the same name
#   --env=NAME=VALUE   variable of training, one flag for each; the value is seen in the commands
#                      that are printed and on the workers (ps)             (run, babysit)
#   --restarts=N       how often babysit starts training again, 50
#   --poll=SECONDS     between two looks of babysit, 60; after failures longer, up to 15 minutes
#   --configs=DIR      directory of config files to copy, configs/ beside launch/
#   --dry-run          print the commands, run none

set -euo pipefail
ROOT=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=commands.sh
. "$ROOT/launch/commands.sh"

PYTHON_VERSION=3.11 # of constraints.txt; the VMs' own may be older than the package needs

main() {
  case ${1-} in
    -h | --help) print_help; exit 0 ;;
    create | install | run | logs | babysit | status | delete) command=$1; shift ;;
    *) bad_usage "a command is needed: create, install, run, logs, babysit, status or delete" ;;
  esac
  name=${TPU_NAME-} project=${TPU_PROJECT-} zone=${TPU_ZONE-} type=${TPU_TYPE-}
  version=${TPU_VERSION-} source=${TPU_SOURCE-} setup=${TPU_SETUP-} extras=${TPU_EXTRAS-tpu,gs}
  spot=${TPU_SPOT:-0} queued=${TPU_QUEUED:-0} restarts=50 configs=$ROOT/configs
  variables=()
  while [ $# -gt 0 ]; do
    case $1 in
      --name=*) name=${1#*=} ;;
      --project=*) project=${1#*=} ;;
      --zone=*) zone=${1#*=} ;;
      --type=*) type=${1#*=} ;;
      --version=*) version=${1#*=} ;;
      --source=*) source=${1#*=} ;;
      --extras=*) extras=${1#*=} ;;
      --setup=*) setup=${1#*=} ;;
      --spot) spot=1 ;;
      --queued) queued=1 ;;
      --env=*) check_variable "${1#*=}"; variables+=("${1#*=}") ;;
      --restarts=*) restarts=${1#*=} ;;
      --poll=*) poll=${1#*=} ;;
      --configs=*) configs=${1#*=} ;;
      --dry-run) DRY_RUN=1 ;;
      -h | --help) print_help; exit 0 ;;
      --) shift; break ;;
      *) bad_usage "unknown argument $1; arguments of train stand behind --" ;;
    esac
    shift
  done
  whole --restarts "$restarts" 0
  whole --poll "$poll" 0
  needed "$name" --name TPU_NAME
  needed "$project" --project TPU_PROJECT
  needed "$zone" --zone TPU_ZONE
  where=("$name" --project="$project" --zone="$zone")
  case $command in create | babysit)
    needed "$type" --type TPU_TYPE
    needed "$version" --version TPU_VERSION ;;
  esac
  case $command in install | babysit) check_source ;; esac
  case $command in run | babysit)
    [ $# -gt 0 ] || bad_usage "arguments of train are needed behind --, such as -- --config=..." ;;
  esac
  "do_$command" "$@"
}

check_source() {
  needed "$source" --source TPU_SOURCE
  check_extras "$extras"
  case $source in
    git+*) ;;
    *.whl | *.tar.gz) [ -f "$source" ] || bad_usage "--source: there is no file $source" ;;
    *) bad_usage "--source=$source is no .whl, no .tar.gz and no git+https://... address" ;;
  esac
  [ -d "$configs" ] || bad_usage "--configs: there is no directory $configs"
}

tpu() {
  run gcloud compute tpus "$@"
}

# Runs a script on every worker, at the same time.
on_workers() {
  tpu tpu-vm ssh "${where[@]}" --worker=all --command="$1"
}

do_create() {
  local kind=()
  [ "$spot" = 0 ] || kind=(--spot)
  if [ "$queued" = 1 ]; then
    tpu queued-resources create "${where[@]}" --node-id="$name" --accelerator-type="$type" \
      --runtime-version="$version" ${kind[@]+"${kind[@]}"}
  else
    tpu tpu-vm create "${where[@]}" --accelerator-type="$type" --version="$version" \
      ${kind[@]+"${kind[@]}"}
  fi
}

do_delete() {
  if [ "$queued" = 1 ]; then # with its TPU
    tpu queued-resources delete "${where[@]}" --force --quiet
  else
    tpu tpu-vm delete "${where[@]}" --quiet
  fi
}

# The files lie in ~/blindvalm of every worker; uv brings the Python.
do_install() {
  local package=$source files=("$configs" "$ROOT/constraints.txt")
  case $source in
    git+*) ;;
    *)
      package="file://\$HOME/blindvalm/$(basename "$source")"
      files+=("$source") ;;
  esac
  on_workers 'mkdir -p blindvalm' || return 1
  tpu tpu-vm scp --recurse "${files[@]}" "$name:blindvalm/" "${where[@]:1}" --worker=all || return 1
  on_workers "set -e
cd blindvalm
python3 -m pip install --quiet --user uv
PATH=\$HOME/.local/bin:\$PATH
uv venv --quiet --clear --python $PYTHON_VERSION venv
uv pip install --quiet --python venv/bin/python --constraints constraints.txt \"blindvalm_jax${extras:+[$extras]} @ $package\"" || return 1
  [ -z "$setup" ] || on_workers "$setup"
}

# Each worker keeps the process's number, and its exit code once it has ended.
do_run() {
  local train given=()
  [ ${#variables[@]} = 0 ] || given=(env "${variables[@]}")
  python_words "$@"
  train=$(quoted ${given[@]+"${given[@]}"} venv/bin/python "${program[@]}")
  on_workers "set -e
cd blindvalm
rm -f exit_code
nohup sh -c $(quoted "$train; echo \$? > exit_code") >> train.log 2>&1 < /dev/null &
echo \$! > pid"
}

do_logs() {
  tpu tpu-vm ssh "${where[@]}" --worker=0 --command='tail -n 100 -F blindvalm/train.log'
}

do_status() {
  tell_state
  tell_workers || true # there may be no TPU to ask
}

tell_state() {
  if [ "$queued" = 1 ]; then
    tpu queued-resources describe "${where[@]}" --format='value(state.state)'
  else
    tpu tpu-vm describe "${where[@]}" --format='value(state)'
  fi
}

# One line a worker: training=none, running, lost (the machine started anew), or its exit code.
tell_workers() {
  # shellcheck disable=SC2016 # the workers expand it
  on_workers 'cd blindvalm 2> /dev/null && [ -f pid ] || { echo training=none; exit; }
if [ -f exit_code ]; then echo training=$(cat exit_code)
elif kill -0 $(cat pid) 2> /dev/null; then echo training=running
else echo training=lost
fi'
}

# ---------------------------------------------------------------- babysit

do_babysit() {
  [ "$DRY_RUN" = 0 ] || { plan "$@"; return; }
  local starts=0 failures=0 state outcome began=0
  while :; do
    state=$(ask_state) || { fail_once "gcloud does not tell the state of $name"; continue; }
    say "TPU: $state"
    case $state in
      ABSENT)
        do_create || { fail_once "$name cannot be made"; continue; } ;;
      READY | ACTIVE)
        outcome=$(ask_workers) || { fail_once "the workers do not answer"; continue; }
        say "training: $outcome"
        # Before this babysit started it, an ended run is a past one.
        [ "$began" = 1 ] || case $outcome in running | none) ;; *) outcome=lost ;; esac
        case $outcome in
          0) say "done"; exit 0 ;;
          1 | 43) say "training ended with exit code $outcome, which no restart mends: see logs"
                  exit "$outcome" ;;
          running) began=1 failures=0 ;;
          *) # none: a new machine; 42: preempted and saved; others: killed
            [ "$starts" -le "$restarts" ] || give_up "started again $restarts times"
            if [ "$outcome" = none ]; then
              do_install || { fail_once "the installation failed"; continue; }
            elif [ -n "$setup" ]; then # the VMs may have been rebooted, and what it mounted is gone
              on_workers "$setup" || { fail_once "--setup failed"; continue; }
            fi
            do_run "$@" || { fail_once "training could not be started"; continue; }
            starts=$((starts + 1)) began=1 ;;
        esac ;;
      PREEMPTED | TERMINATED | STOPPED | FAILED | SUSPENDED)
        fail_once "$name is $state"
        do_delete || true ;; # the next look shows whether it is gone
      *) ;; # on its way: CREATING, PROVISIONING, WAITING_FOR_RESOURCES, RESTARTING, DELETING...
    esac
    sleep "$poll"
  done
}

# A dry run cannot look, so it shows what each case would run.
plan() {
  echo "# look"; tell_state
  echo "# where there is none"; do_create
  echo "# when it is READY or ACTIVE and new"; do_install; do_run "$@"
  echo "# every $poll s"; tell_state; tell_workers
  echo "# training ended with 42 or was killed: again, at most $restarts times"
  [ -z "$setup" ] || on_workers "$setup"
  do_run "$@"
  echo "# PREEMPTED, TERMINATED, STOPPED, FAILED or SUSPENDED: anew"; do_delete; do_create
  echo "# training ended with 0, 1 or 43: this ends with the same"
}

# The state, or ABSENT; fails where gcloud tells neither.
ask_state() {
  local told errors
  errors=$(mktemp)
  if told=$(tell_state 2>"$errors"); then
    rm -f "$errors"
    echo "${told:-UNKNOWN}"
  elif grep -q NOT_FOUND "$errors"; then
    rm -f "$errors"
    echo ABSENT
  else
    cat "$errors" >&2
    rm -f "$errors"
    return 1
  fi
}

# One word for all workers: what the others ended for. Where a process is gone they end with 134,
# and some may fail with 1; where one fails with 1 alone, the others end with 134.
ask_workers() {
  local told code
  told=$(tell_workers) || return 1
  told=$(sed -n 's/^.*training=\([a-z0-9]*\).*$/\1/p' <<<"$told" | sort -u)
  [ -n "$told" ] || return 1
  for code in running 43 none lost 42; do
    if grep -qx "$code" <<<"$told"; then echo "$code"; return; fi
  done
  grep -vx -e 0 -e 1 -e 134 <<<"$told" | head -n 1 | grep . && return
  grep -x 1 <<<"$told" || tail -n 1 <<<"$told"
}

main "$@"
