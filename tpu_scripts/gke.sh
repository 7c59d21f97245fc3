#!/usr/bin/env bash
# gke.sh ACTION NAME [--dry-run] [-- COMMAND...]: the same on Google Kubernetes Engine, through xpk.
#
#   gke.sh create-cluster CLUSTER        a cluster with SLICES slices of ACCELERATOR
#   gke.sh launch RUN -- COMMAND...      a run of this command on all of them, restarted up to MAX_RESTARTS times
#   gke.sh status RUN                    how it stands
#   gke.sh wait RUN                      waits until it has ended: 0 well, 1 not, 3 after WAIT_LIMIT seconds
#   gke.sh logs RUN                      its output, as it comes (kubectl must know the cluster)
#   gke.sh delete RUN                    ends a run
#   gke.sh delete-cluster CLUSTER        gives everything back
#
# Settings: ZONE, PROJECT, CLUSTER (for runs), ACCELERATOR, SLICES, CAPACITY (on-demand, spot, reserved), RESERVATION,
# REVISION (HEAD), EXTRAS (train,tpu), BASE_IMAGE (python:3.12, the commit is put into it), IMAGE (one that holds
# everything), MAX_RESTARTS (50), GRACE (seconds to save before a restart, 60), WAIT_LIMIT (a week), CREATE_FLAGS.

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
action=${1:-}
case $action in
  create-cluster | launch | status | wait | logs | delete | delete-cluster) shift ;;
  --help | -h) ;;
  *) die "'$action' is none of create-cluster, launch, status, wait, logs, delete and delete-cluster" 2 ;;
esac
start "$@"
: "${CLUSTER:=}" "${RESERVATION:=}" "${IMAGE:=}" "${BASE_IMAGE:=python:3.12}" "${MAX_RESTARTS:=50}" "${GRACE:=60}"
: "${WAIT_LIMIT:=604800}"
ACCELERATOR=${ACCELERATOR/#v5e-/v5litepod-}

case $action in
  *cluster) CLUSTER=$NAME ;;
  *) [[ $CLUSTER ]] || die "set CLUSTER to the cluster that $NAME runs on" 2 ;;
esac
case $action in
  create-cluster | launch) [[ $ACCELERATOR ]] || die "set ACCELERATOR, such as v5p-128 or tpu7x-8" 2 ;;
esac
cluster=("--cluster=$CLUSTER" "${PLACE[@]}")

launch() {
  local text revision source=()
  ((${#COMMAND[@]})) || die "which command? It follows --, as in: gke.sh launch $NAME -- unclip train ..." 2
  text="exec $(quoted "${COMMAND[@]}")" # exec: the signal that asks it to save must reach it
  if [[ $IMAGE ]]; then
    source=("--docker-image=$IMAGE")
  else
    revision=$(commit)
    run rm -rf "$FOLDER/code"
    run mkdir -p "$FOLDER/code"
    run git -C "$ROOT" archive --format=tar "--output=$FOLDER/code.tar" "$revision"
    run tar -xf "$FOLDER/code.tar" -C "$FOLDER/code"
    source=("--base-docker-image=$BASE_IMAGE" "--script-dir=$FOLDER/code")
    text="pip install --quiet --editable '.[$EXTRAS]' && $text"
  fi
  retry xpk workload create "--workload=$NAME" "${cluster[@]}" "--tpu-type=$ACCELERATOR" "--num-slices=$SLICES" \
    "${source[@]}" "--max-restarts=$MAX_RESTARTS" "--termination-grace-period-seconds=$GRACE" "${EXTRA[@]}" \
    "--command=$text"
}

wait_for_end() {
  local code=0
  run xpk workload list "${cluster[@]}" "--wait-for-job-completion=$NAME" "--timeout=$WAIT_LIMIT" || code=$?
  case $code in
    0) ;;
    124) die "$NAME has not ended after $WAIT_LIMIT s" 3 ;;
    125) die "$NAME has failed; gke.sh logs $NAME shows why" ;;
    *) die "xpk could not tell how $NAME stands" ;;
  esac
}

case $action in
  create-cluster)
    case $CAPACITY in
      on-demand) CAPACITY_FLAGS=(--on-demand) ;;
      reserved) CAPACITY_FLAGS=("--reservation=$RESERVATION") ;;
    esac
    [[ $CAPACITY != reserved || $RESERVATION ]] || die "set RESERVATION to the name of the reservation" 2
    retry xpk cluster create "${cluster[@]}" "--tpu-type=$ACCELERATOR" "--num-slices=$SLICES" \
      "${CAPACITY_FLAGS[@]}" "${EXTRA[@]}"
    ;;
  launch) launch ;;
  status) retry xpk workload list "${cluster[@]}" "--filter-by-job=$NAME" ;;
  wait) wait_for_end ;;
  logs)
    run kubectl logs --follow --prefix --tail=100 --max-log-requests=1000 \
      "--selector=jobset.sigs.k8s.io/jobset-name=$NAME"
    ;;
  delete) retry xpk workload delete "${cluster[@]}" "--workload=$NAME" --force ;;
  delete-cluster) retry xpk cluster delete "${cluster[@]}" --force ;;
esac
