#!/usr/bin/env bash
# create.sh NAME [--dry-run]: rents a slice, or several that belong together, and waits until it is ready.
#
#   ZONE=us-east5-a ACCELERATOR=v5p-128 create.sh pod
#   CAPACITY=spot QUEUED=yes ...        waits in the queue for spot capacity
#   SLICES=4 ...                        four slices as one multislice, named NAME-0 to NAME-3
#
# Settings: ZONE, PROJECT, ACCELERATOR, RUNTIME_VERSION (chosen by generation), CAPACITY (on-demand, spot, reserved),
# QUEUED (yes, no), SLICES, CREATE_FLAGS (further flags of gcloud), WAIT_LIMIT (seconds until it stops waiting and
# exits with 3; the request stays in the queue).

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"
choose_accelerator
: "${WAIT_LIMIT:=86400}"

request=(gcloud compute tpus "$KIND" create "$NAME" "${PLACE[@]}" "--accelerator-type=$ACCELERATOR")
if [[ $QUEUED == no ]]; then
  request+=("--version=$RUNTIME_VERSION")
elif ((SLICES == 1)); then
  request+=("--runtime-version=$RUNTIME_VERSION" "--node-id=$NAME")
else
  request+=("--runtime-version=$RUNTIME_VERSION" "--node-count=$SLICES" "--node-prefix=$NAME")
fi
request+=("${CAPACITY_FLAGS[@]}" "${EXTRA[@]}")

requested='' shown=''
deadline=$((SECONDS + WAIT_LIMIT))
while state=$(state_now "${requested:-NOT_FOUND}"); do
  case $(meaning "$state") in
    ready) break ;;
    absent)
      if [[ ! $requested ]]; then
        retry "${request[@]}"
        requested=READY
        continue
      fi
      ;;
    gone)
      [[ ! $requested ]] || die "$NAME became $state before it was ready" 3
      die "$NAME is $state: delete.sh $NAME removes it, watch.sh $NAME replaces it"
      ;;
    unusable | unknown) die "$NAME is $state and will not become ready by itself" ;;
  esac
  [[ $state == "$shown" ]] || say "$NAME is $state, waiting"
  shown=$state
  ((SECONDS < deadline)) || die "$NAME is still $state after $WAIT_LIMIT s and stays; delete.sh $NAME ends it" 3
  sleep "$POLL"
done
[[ $DRY_RUN ]] || say "$NAME is ready"
