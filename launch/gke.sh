#!/usr/bin/env bash
# Trains on Google Kubernetes Engine, as a JobSet or through xpk.
#
# launch/gke.sh COMMAND [FLAGS] -- ARGUMENTS OF TRAIN, or sweep run and those of a worker
#   manifest   print the JobSet
#   create     create it with kubectl; the cluster needs the JobSet controller
#   babysit    create it where there is none, tell what becomes of it, and end with the exit code of
#              training: 0 done, 1 error, 43 diverged; 3: given up. It may be stopped at any time
#   logs       follow what the first process prints
#   status     the JobSet and its pods
#   delete     delete the JobSet
#   xpk        submit with xpk instead, to a cluster that xpk has made (TPU)
# Flags, or variables in their place:
#   --name=NAME          GKE_NAME       name of the JobSet
#   --image=IMAGE        GKE_IMAGE      container image, see launch/Dockerfile
#   --claim=CLAIM        GKE_CLAIM      PersistentVolumeClaim, mounted at /runs in every pod: the place
#                                       for --workdir, which must outlive the pods; not needed where
#                                       --workdir is an address, gs://... or s3://...
#   --gcsfuse                           the claim is a bucket of the Cloud Storage FUSE driver
#   --service-account=NAME  GKE_SERVICE_ACCOUNT  Kubernetes' service account of the pods, which may
#                                       use the bucket
#   --tpu=ACCELERATOR    GKE_TPU        gke-tpu-accelerator such as tpu-v5-lite-podslice, with
#   --topology=TOPOLOGY  GKE_TOPOLOGY   such as 4x4
#   --gpu=ACCELERATOR    GKE_GPU        or gke-accelerator such as nvidia-h100-80gb
#   --chips=N                           TPU chips or GPUs of a host, 4
#   --hosts=N                           hosts of a slice, 1
#   --slices=N                          TPU slices, 1
#   --spot                              on Spot nodes
#   --env=NAME=VALUE                    variable of training, one flag for each; the value is seen in
#                                       the manifest, and by xpk on its command line
#   --restarts=N                        how often all is started again, 50
#   --grace=SECONDS                     from SIGTERM to SIGKILL, 300: a save has to fit in
#   --poll=SECONDS                      between two looks of babysit, 60; after failures longer, up to
#                                       15 minutes
#   --namespace=NAMESPACE               of kubectl
# xpk alone (it reads --name, --image, --slices, --env, --restarts and --grace of the above):
#   --project=PROJECT    GKE_PROJECT    project of the cluster
#   --zone=ZONE          GKE_ZONE       zone of the cluster
#   --cluster=CLUSTER    GKE_CLUSTER    name of the cluster
#   --type=TYPE          GKE_TYPE       device type such as v5litepod-16
#   --storage=NAME       GKE_STORAGE    storage attached with `xpk storage attach`; not needed where
#                                       --workdir is an address
#   --dry-run            print the commands, run none

set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=commands.sh
. "$(dirname "$0")/commands.sh"

PORT=12321 # of the first pod; 8476 and 8482 are the TPU library's and JAX's own

main() {
  case ${1-} in
    -h | --help) print_help; exit 0 ;;
    manifest | create | babysit | logs | status | delete | xpk) command=$1; shift ;;
    *) bad_usage "a command is needed: manifest, create, babysit, logs, status, delete or xpk" ;;
  esac
  name=${GKE_NAME-} image=${GKE_IMAGE-} claim=${GKE_CLAIM-} tpu=${GKE_TPU-} gpu=${GKE_GPU-}
  topology=${GKE_TOPOLOGY-} project=${GKE_PROJECT-} zone=${GKE_ZONE-} cluster=${GKE_CLUSTER-}
  type=${GKE_TYPE-} storage=${GKE_STORAGE-} service_account=${GKE_SERVICE_ACCOUNT-}
  chips=4 hosts=1 slices=1 spot=0 gcsfuse=0 restarts=50 grace=300 namespace=
  variables=()
  while [ $# -gt 0 ]; do
    case $1 in
      --name=*) name=${1#*=} ;;
      --image=*) image=${1#*=} ;;
      --claim=*) claim=${1#*=} ;;
      --gcsfuse) gcsfuse=1 ;;
      --service-account=*) service_account=${1#*=} ;;
      --tpu=*) tpu=${1#*=} ;;
      --topology=*) topology=${1#*=} ;;
      --gpu=*) gpu=${1#*=} ;;
      --chips=*) chips=${1#*=} ;;
      --hosts=*) hosts=${1#*=} ;;
      --slices=*) slices=${1#*=} ;;
      --spot) spot=1 ;;
      --env=*) check_variable "${1#*=}"; variables+=("${1#*=}") ;;
      --restarts=*) restarts=${1#*=} ;;
      --grace=*) grace=${1#*=} ;;
      --poll=*) poll=${1#*=} ;;
      --namespace=*) namespace=${1#*=} ;;
      --project=*) project=${1#*=} ;;
      --zone=*) zone=${1#*=} ;;
      --cluster=*) cluster=${1#*=} ;;
      --type=*) type=${1#*=} ;;
      --storage=*) storage=${1#*=} ;;
      --dry-run) DRY_RUN=1 ;;
      -h | --help) print_help; exit 0 ;;
      --) shift; break ;;
      *) bad_usage "unknown argument $1; arguments of train stand behind --" ;;
    esac
    shift
  done
  whole --chips "$chips" 1
  whole --hosts "$hosts" 1
  whole --slices "$slices" 1
  whole --restarts "$restarts" 0
  whole --grace "$grace" 0
  whole --poll "$poll" 0
  needed "$name" --name GKE_NAME
  case $name in
    *[!a-z0-9-]* | [!a-z]* | *-) bad_usage "--name=$name is no name of Kubernetes: a-z, 0-9 and -" ;;
  esac
  check_length
  case $command in manifest | create | babysit | xpk)
    needed "$image" --image GKE_IMAGE
    [ $# -gt 0 ] || bad_usage "arguments of train are needed behind --, such as -- --config=..."
    [ "$1" != sweep ] || [ "$hosts:$slices" = 1:1 ] ||
      bad_usage "a worker of a sweep is one process: --hosts=1 --slices=1" ;;
  esac
  case $command in manifest | create | babysit) check_manifest "$@" ;; esac
  "do_$command" "$@"
}

# Names of pods are part of addresses, where 63 characters are the most; five are drawn at random.
check_length() {
  local pod="$name-train-$((slices - 1))-$((hosts - 1))-xxxxx" most=63
  [ "$command" != xpk ] || pod=$name most=40 # what xpk takes
  [ ${#pod} -le "$most" ] ||
    bad_usage "--name=$name is $((${#pod} - most)) characters too long: $pod may have $most"
}

check_manifest() {
  if [ "$gcsfuse" = 1 ] || ! kept_at_address "$@"; then
    needed "$claim" --claim GKE_CLAIM
  fi
  [ -n "$tpu$gpu" ] || bad_usage "--tpu=... or --gpu=... is needed, which machines to run on"
  [ -z "$tpu" ] || [ -z "$gpu" ] || bad_usage "--tpu and --gpu are two ways: give one"
  [ -z "$tpu" ] || needed "$topology" --topology GKE_TOPOLOGY
  [ -z "$gpu" ] || [ "$slices" = 1 ] || bad_usage "--slices are for TPUs: give more --hosts"
  local variable
  for variable in ${variables[@]+"${variables[@]}"}; do
    case $gpu:$variable in
      ?*:PROCESS=*) bad_usage "--env=PROCESS=...: on GPUs it is the number of a pod" ;;
    esac
  done
}

kubernetes() {
  run kubectl ${namespace:+--namespace="$namespace"} "$@"
}

do_create() {
  local text
  text=$(do_manifest "$@")
  [ "$DRY_RUN" = 0 ] || printf '%s\n' "$text"
  kubernetes create -f - <<<"$text"
}

do_logs() {
  kubernetes logs --follow "--selector=jobset.sigs.k8s.io/jobset-name=$name,\
jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
}

do_status() {
  kubernetes get jobset "$name"
  kubernetes get pods "--selector=jobset.sigs.k8s.io/jobset-name=$name" --output=wide
}

do_delete() {
  kubernetes delete jobset "$name"
}

# ---------------------------------------------------------------- babysit

# The JobSet's controller starts all again by itself; this looks on.
do_babysit() {
  [ "$DRY_RUN" = 0 ] || { plan "$@"; return; }
  local failures=0 told before='' again="\`delete\` it, and the same command goes on"
  while :; do
    told=$(tell_state) || { fail_once "kubectl does not tell the state of $name"; continue; }
    if [ -n "$told" ]; then
      [ "$told" = "$before" ] || say "JobSet: $told"
    elif [ -n "$before" ]; then
      give_up "somebody has deleted $name"
    else
      do_create "$@" || { fail_once "$name cannot be created"; continue; }
    fi
    case $told in
      state=Completed*) say "done"; exit 0 ;;
      *reason=ReachedMaxRestarts) give_up "started again as often as its JobSet may be" "$again" ;;
      state=Failed*)
        end_as_pods_did || fail_once "kubectl does not tell how the pods of $name ended"
        continue ;;
    esac
    before=${told:-created} failures=0
    sleep "$poll"
  done
}

# One line, or nothing where there is no such JobSet.
tell_state() {
  kubernetes get jobset "$name" --ignore-not-found --output="jsonpath=state={.status.terminalState} \
restarts={.status.restarts} ready={.status.replicatedJobsStatus[*].ready} \
reason={.status.conditions[?(@.type==\"Failed\")].reason}"
}

# Where one process diverges the others may end with 134, or be stopped. Fails where nobody tells.
end_as_pods_did() {
  local told code=1
  told=$(tell_codes) || return 1
  case " $told " in *" 43 "*) code=43 ;; esac
  say "training ended with exit code $code, which no restart mends: see logs"
  exit "$code"
}

tell_codes() {
  kubernetes get pods "--selector=jobset.sigs.k8s.io/jobset-name=$name" --output="jsonpath=\
{.items[*].status.containerStatuses[?(@.name==\"train\")].state.terminated.exitCode}"
}

# A dry run cannot look, so it shows what each case would run.
plan() {
  echo "# look, and again every $poll s"; tell_state
  echo "# where there is none"; do_create "$@"
  echo "# Completed: this ends with 0. Failed: with what the pods ended with"; tell_codes
}

# xpk restarts on 42 and on what signals leave, and on nothing else.
do_xpk() {
  needed "$project" --project GKE_PROJECT
  needed "$zone" --zone GKE_ZONE
  needed "$cluster" --cluster GKE_CLUSTER
  needed "$type" --type GKE_TYPE
  kept_at_address "$@" || needed "$storage" --storage GKE_STORAGE
  [ -z "$service_account" ] ||
    bad_usage "xpk has no --service-account: its pods have default, or xpk-sa where storage is attached"
  local given=() variable
  for variable in ${variables[@]+"${variables[@]}"}; do
    case $variable in
      *[\"\\]* | *\$\(*) bad_usage "--env=${variable%%=*}=...: xpk spoils \", \\ and \$( in values" ;;
    esac
    given+=(--env="$variable")
  done
  python_words "$@"
  run xpk workload create --workload="$name" --project="$project" --zone="$zone" \
    --cluster="$cluster" --device-type="$type" --num-slices="$slices" --docker-image="$image" \
    ${storage:+--storage="$storage"} --max-restarts="$restarts" --restart-on-exit-codes=42 \
    --termination-grace-period-seconds="$grace" ${given[@]+"${given[@]}"} \
    --command="$(quoted python "${program[@]}")"
}

# A word as a string of JSON, which YAML reads.
json() {
  local word=${1//\\/\\\\}
  printf '"%s"' "${word//\"/\\\"}"
}

# Words as items of the list of arguments. Kubernetes expands $(NAME) in them, $$ stands for $.
items() {
  local word
  for word in "$@"; do
    printf '              - %s\n' "$(json "${word//\$/\$\$}")"
  done
}

# Variables, NAME=VALUE, as items of the list of them; Kubernetes expands as above.
values() {
  local variable value
  for variable in "$@"; do
    value=${variable#*=}
    printf '\n              - name: %s\n                value: %s' \
      "$(json "${variable%%=*}")" "$(json "${value//\$/\$\$}")"
  done
}

# How Kubernetes and JobSet see the exit codes: a pod that ends with 1 or 43 fails its Job for the
# reason PodFailurePolicy, and with it the JobSet. Any other end (42: preempted and saved; a signal;
# 134: another pod is gone; a pod that was evicted, whatever it ended with) fails the Job, and the
# JobSet starts all again.
do_manifest() {
  local annotations='' selector resource start environment='' tolerations=''
  local fuse='' mount='' volume='' module=blindvalm_jax.train
  if [ -n "$tpu" ]; then
    annotations="
  annotations:
    # all pods of a slice on the nodes of one pool
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool"
    selector="cloud.google.com/gke-tpu-accelerator: $(json "$tpu")
              cloud.google.com/gke-tpu-topology: $(json "$topology")"
    resource=google.com/tpu
    start="
$(items --distributed=auto)" # GKE tells each pod its slice and its place
  else
    selector="cloud.google.com/gke-accelerator: $(json "$gpu")"
    resource=nvidia.com/gpu
    start="
              - \"--distributed=$name-train-0-0.$name:$PORT\"
              - \"--processes=$hosts\"
              - \"--process=\$(PROCESS)\""
    environment="
              - name: PROCESS
                valueFrom:
                  fieldRef:
                    fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']"
    tolerations="
            - {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}"
  fi
  if [ "${1-}" = sweep ]; then
    module=blindvalm_jax.sweep start=''
    shift
  fi
  environment="$(values ${variables[@]+"${variables[@]}"})$environment"
  if [ "$spot" = 1 ]; then
    selector="$selector
              cloud.google.com/gke-spot: \"true\""
    tolerations="$tolerations
            - {key: cloud.google.com/gke-spot, operator: Exists, effect: NoSchedule}"
  fi
  [ "$gcsfuse" = 0 ] || fuse='
          metadata:
            annotations:
              gke-gcsfuse/volumes: "true" # brings the container that mounts the bucket'
  if [ -n "$claim" ]; then
    mount='
              volumeMounts:
              - {name: runs, mountPath: /runs}'
    volume="
            securityContext:
              # of the image's user, who may write then
              fsGroup: 1000
              fsGroupChangePolicy: OnRootMismatch
            volumes:
            - name: runs
              persistentVolumeClaim:
                claimName: $(json "$claim")"
  fi
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: "$name"$annotations
spec:
  network:
    # a headless service: pods find each other as $name-train-SLICE-HOST.$name
    enableDNSHostnames: true
    subdomain: "$name"
  failurePolicy:
    maxRestarts: $restarts
    rules:
    - name: training_failed
      action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: train
    replicas: $slices
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        completionMode: Indexed
        # one process cannot come back alone: the JobSet starts all of them again
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: Count
            onPodConditions:
            - type: DisruptionTarget
          - action: FailJob
            onExitCodes:
              containerName: train
              operator: In
              values: [1, 43]
        template:$fuse
          spec:${service_account:+
            serviceAccountName: $(json "$service_account")}
            restartPolicy: Never
            terminationGracePeriodSeconds: $grace
            nodeSelector:
              $selector
            tolerations:${tolerations:- []}
            containers:
            - name: train
              image: $(json "$image")
              command: ["python", "-m", "$module"]
              args:$start
$(items "$@")${environment:+
              env:$environment}
              resources:
                limits:
                  $resource: $chips$mount$volume
END
}

main "$@"
