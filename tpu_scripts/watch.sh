#!/usr/bin/env bash
# watch.sh NAME [--dry-run] -- COMMAND...: keeps a training running until it ends with 0, whatever happens to its slice.
#
#   CAPACITY=spot QUEUED=yes watch.sh pod -- unclip train --config dalle2_decoder --out /mnt/bucket/runs
#
# Creates NAME where there is none, sets it up, launches; replaces it after a preemption (this deletes it) and launches
# the same command at the same commit, which resumes where it saved. Started again, it takes over what runs. Exits with
# 0 when every worker ended with 0, and with 1 after MAX_RESTARTS failures with less than an hour between them, when
# the workers cannot be reached, or when something else runs there.
#
# Settings: those of create.sh, setup.sh and launch.sh, MAX_RESTARTS (3), POLL (seconds between two looks, 30).

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"
choose_accelerator
: "${MAX_RESTARTS:=3}" "${UNREACHABLE_LIMIT:=10}"
((${#COMMAND[@]})) || die "which command? It follows --, as in: watch.sh $NAME -- unclip train ..." 2
REVISION=$(commit) # what is committed from now on does not reach this run
export REVISION
id=$(run_id)
failures=0 unreachable=0 launched=$SECONDS

begin() {
  launched=$SECONDS
  "$HERE/setup.sh" "$NAME" && REPLACE=yes SETTLE="" "$HERE/launch.sh" "$NAME" -- "${COMMAND[@]}"
}

# A failure that came long after the last one starts a new count.
failed() { # WHAT HAPPENED
  ((SECONDS - launched < 3600)) || failures=0
  failures=$((failures + 1))
  say "failure $failures, at most $MAX_RESTARTS are followed by a restart: $1"
  ((failures <= MAX_RESTARTS)) || exit 1
}

create() {
  local code=0
  "$HERE/create.sh" "$NAME" || code=$?
  case $code in
    0) begin || failed "the training could not be launched" ;;
    3) say "no capacity yet, trying again" ;;
    *) exit "$code" ;;
  esac
}

no_answer() {
  unreachable=$((unreachable + 1))
  ((unreachable < UNREACHABLE_LIMIT)) || die "$NAME did not answer $unreachable times in a row"
}

look_at_workers() {
  local report
  if ! report=$(statuses "$id"); then
    no_answer
    return
  fi
  unreachable=0
  if grep -q ': other' <<<"$report"; then
    die "something else runs on $NAME, launch.sh with REPLACE=yes stops it: $(grep -m 1 ': other' <<<"$report")"
  elif ! grep -qv ': exit 0' <<<"$report"; then
    say "the training on $NAME has ended well"
    exit 0
  elif ! grep -qv ': idle' <<<"$report"; then
    begin || failed "the training could not be launched"
  elif grep -qvE ': (running|exit 0)' <<<"$report"; then
    failed "$(grep -vE ': (running|exit 0)' <<<"$report" | paste -sd';' -)"
    begin || say "the restart did not succeed"
  fi
}

if [[ $DRY_RUN ]]; then
  create
  statuses "$id"
  echo "# after a preemption, then again from the top:"
  "$HERE/delete.sh" "$NAME"
  exit 0
fi

while state=$(state_now READY); do
  case $(meaning "$state") in
    ready) look_at_workers ;;
    absent) create ;;
    gone)
      say "$NAME is $state and is replaced"
      if "$HERE/delete.sh" "$NAME"; then
        failures=0
        create
      else
        failed "$NAME could not be deleted"
      fi
      ;;
    unknown) no_answer ;;
    unusable) die "$NAME is $state, which somebody wanted: start it or delete it" ;;
  esac
  sleep "$POLL"
done
