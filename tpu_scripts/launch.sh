#!/usr/bin/env bash
# launch.sh NAME [--dry-run] -- COMMAND...: starts a command on all workers, which goes on when this script ends.
#
#   launch.sh pod -- unclip train --config dalle2_decoder --out /mnt/bucket/runs
#
# It runs in the folder of the commit that setup.sh put there, with its packages on PATH. A worker that lacks this
# commit, or whose command ended with an error in its first seconds, is named. Output: logs.sh NAME.
#
# Settings: ZONE, PROJECT, SLICES, REVISION (HEAD), REPLACE (yes stops what runs there before), GRACE (seconds it is
# given to save, 60), SETTLE (seconds until workers are looked at, 5; empty: they are not), SSH_FLAGS.

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"
: "${REPLACE:=no}" "${GRACE:=60}" "${SETTLE=5}"
((${#COMMAND[@]})) || die "which command? It follows --, as in: launch.sh $NAME -- unclip train ..." 2

id=$(run_id)
on_workers launch "$id" "$(commit)" "$REPLACE" "$GRACE" "${COMMAND[@]}"
[[ $SETTLE ]] || exit 0
run sleep "$SETTLE"
report=$(statuses "$id")
[[ -z $DRY_RUN ]] || exit 0
if bad=$(grep -vE ': (running|exit 0)' <<<"$report"); then
  say "not running on all workers:"
  echo "$bad" >&2
  exit 1
fi
say "runs on $(wc -l <<<"$report") workers of $NAME"
