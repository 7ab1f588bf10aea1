# shellcheck shell=bash
# Read by the other scripts: commands are shown before they run, or only shown with --dry-run.

DRY_RUN=0
exec 3>&1 # where commands are shown, also where the output of one is captured

# Says what is wrong on one line and ends with 2, the exit code of bad usage.
bad_usage() {
  printf 'error: %s\n' "$1" >&2
  exit 2
}

# The comment at the top of the script is its help.
print_help() {
  sed -n '2,/^$/{/^$/d;s/^# \{0,1\}//;p;}' "$0"
}

# needed VALUE --flag VARIABLE: refuses an empty value.
needed() {
  [ -n "$1" ] || bad_usage "$2=... or the variable $3 is needed; --help says what it is"
}

# whole --flag VALUE LEAST: refuses what is no whole number, or a smaller one, or beyond six digits.
whole() {
  case $2 in '' | *[!0-9]* | 0?* | ???????*) ;; *) [ "$2" -lt "$3" ] || return 0 ;; esac
  bad_usage "$1 must be a whole number from $3 to 999999, got '$2'"
}

# Refuses what is no NAME=VALUE on one line; the value may be a secret, and is not shown.
check_variable() {
  local name=${1%%=*}
  case $1 in *=*) ;; *) bad_usage "--env must be NAME=VALUE, got no = in it" ;; esac
  case $name in
    '' | [0-9]* | *[!A-Za-z0-9_]*)
      bad_usage "--env must be NAME=VALUE, NAME of letters, digits and _, got '$name'" ;;
  esac
  case $1 in *$'\n'*) bad_usage "--env=$name=...: the value must be one line" ;; esac
}

# Refuses what is no name of a variable of this shell. It may be the secret itself, and is not shown.
check_secret() {
  case $1 in '' | [0-9]* | *[!A-Za-z0-9_]*)
    bad_usage "--secret must be the NAME of a variable of this shell, of letters, digits and _" ;;
  esac
  printenv "$1" >/dev/null || bad_usage "--secret=$1: no such variable is exported here"
}

# check_extras EXTRAS: refuses what are no names of extras; they become part of commands.
check_extras() {
  case $1 in
    *[!a-z0-9_,-]*) bad_usage "--extras must be names with commas between them, got '$1'" ;;
  esac
}

# Whether arguments of train keep the run at an address, gs://... or s3://..., which needs no mount.
kept_at_address() {
  local workdir='' before='' word
  for word in "$@"; do # the last one counts
    case $word in -workdir=* | --workdir=*) workdir=${word#*=} ;; esac
    case $before in -workdir | --workdir) workdir=$word ;; esac
    before=$word
  done
  case $workdir in gs://* | s3://*) ;; *) return 1 ;; esac
}

# What is started with the words behind --, as the words of `python`: a training, or with `sweep` in
# front a worker of a sweep, which is one process.
# shellcheck disable=SC2034 # who reads this file reads it
python_words() {
  if [ "${1-}" = sweep ]; then
    program=(-m blindvalm_jax.sweep "${@:2}")
  else
    program=(-m blindvalm_jax.train --distributed=auto "$@")
  fi
}

# Prints words so that any shell reads them back as they are.
quoted() {
  local word space='' escaped="'\\''"
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) printf "%s'%s'" "$space" "${word//\'/$escaped}" ;;
      *) printf '%s%s' "$space" "$word" ;;
    esac
    space=' '
  done
}

show() {
  printf '+ %s\n' "$(quoted "$@")" >&3
}

# Shows a command and runs it, if this is no dry run.
run() {
  show "$@"
  [ "$DRY_RUN" = 1 ] || "$@"
}

# ---------------------------------------------------------------- of the babysitters

GIVEN_UP=3 # no exit code of training: it may go on
poll=60    # seconds between two looks

say() {
  printf '%s %s\n' "$(date -u +%H:%M:%S)" "$1"
}

# Counts failures in a row, and waits twice as long after each.
fail_once() {
  failures=$((failures + 1))
  [ "$failures" -le 10 ] || give_up "$1, 10 times in a row"
  local wait=$poll i
  for ((i = 1; i < failures && wait < 900; i++)); do wait=$((wait * 2)); done
  [ "$wait" -le 900 ] || wait=900
  say "$1; next try in $wait s"
  sleep "$wait"
}

# give_up WHY [WHAT GOES ON]
give_up() {
  printf 'error: %s; given up. %s\n' "$1" "${2-The same command goes on from the last checkpoint}" >&2
  exit "$GIVEN_UP"
}
