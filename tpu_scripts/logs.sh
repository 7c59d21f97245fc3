#!/usr/bin/env bash
# logs.sh NAME [--dry-run]: shows the output of the command that launch.sh started, as it comes.
#
# Settings: ZONE, PROJECT, SLICES, SLICE (0), WORKER (0; all shows every worker of a slice, each line after its host's
# name), LINES_BEFORE (lines that are shown at first, 100), FOLLOW (yes, no), SSH_FLAGS.

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"
: "${SLICE:=0}" "${WORKER:=0}" "${LINES_BEFORE:=100}" "${FOLLOW:=yes}"
slice=$(slices | sed -n "$((SLICE + 1))p")
[[ $slice ]] || die "SLICE is $SLICE and $NAME has $SLICES" 2

run gcloud compute tpus tpu-vm ssh "$slice" "${PLACE[@]}" "${SSH[@]}" "--worker=$WORKER" \
  "--command=bash unclip-worker.sh logs $(quoted "$LINES_BEFORE" "$FOLLOW" "$WORKER")"
