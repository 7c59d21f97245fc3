#!/usr/bin/env bash
# delete.sh NAME [--dry-run]: gives a slice, or a queued resource with its slices, back; what its disks hold is lost.
#
# Settings: ZONE, PROJECT, QUEUED and SLICES as they were given to create.sh.

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"

request=(gcloud compute tpus "$KIND" delete "$NAME" "${PLACE[@]}" --quiet)
[[ $QUEUED == no ]] || request+=(--force) # its slices with it

state=$(state_now READY)
[[ $(meaning "$state") != absent ]] ||
  die "nothing was deleted: $ZONE has no $KIND called $NAME (QUEUED=$QUEUED says where to look)"
retry "${request[@]}"
[[ $DRY_RUN ]] || say "$NAME is deleted"
