# shellcheck shell=bash
# shellcheck disable=SC2034  # what is set here is used by the scripts that read this file
# What all scripts share: settings, options, printing under --dry-run, retries, states, and all workers at once.
#
# Exit codes of every script: 0 done; 1 failed; 2 wrong usage or settings; 3 no capacity yet, later may work.

set -euo pipefail
exec 3>&1 # a dry run prints here, from inside $(...) too

PROGRAM=$(basename "$0" .sh)
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(dirname "$HERE")

# What a later try may mend, what it will not although it looks alike, and how an earlier try shows that it worked.
TRANSIENT='no more capacity|stockout|RESOURCE_EXHAUSTED|"?code"?: (8|14|429)\b|HTTPError (429|50[0-4])|UNAVAILABLE|'
TRANSIENT+='rateLimitExceeded|try again later|internal error|deadline exceeded|connection (reset|aborted|timed out)'
PERMANENT='Quota limit .* has been exceeded|PERMISSION_DENIED|INVALID_ARGUMENT'
ALREADY='ALREADY_EXISTS|already exists|HTTPError 409'
ABSENT='NOT_FOUND|was not found|HTTPError 404'
DONE='unclip: done'

say() { printf '%s: %s\n' "$PROGRAM" "$1" >&2; }

die() { # SENTENCE [EXIT_CODE]
  say "$1"
  exit "${2:-1}"
}

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)) || die "needs bash 4.4 or newer, this is $BASH_VERSION" 2

# Words as a shell reads them back, quoted where they must be.
quoted() {
  local word words=()
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  printf '%s' "${words[*]}"
}

# Runs a command, or prints it under --dry-run; every command that changes or asks something goes through here.
run() {
  if [[ $DRY_RUN ]]; then
    printf '%s\n' "$(quoted "$@")" >&3
  else
    "$@"
  fi
}

# Runs a command again, after ever longer pauses, while it fails for a reason that passes; 3 where it never passed.
retry() {
  local attempt code pause=$BACKOFF errors
  errors=$(mktemp)
  for ((attempt = 1; ; attempt++)); do
    code=0
    run "$@" 2>"$errors" || code=$?
    ((code)) || break
    if ((attempt > 1)) && grep -qE "$ALREADY" "$errors"; then
      code=0 # the try before took effect although it seemed to fail
      break
    fi
    if grep -qE "$PERMANENT" "$errors" || ! grep -qiE "$TRANSIENT" "$errors"; then
      grep -vE '^(Using ssh batch size|SSH: Attempting)' "$errors" >&2 || true
      break
    fi
    local reason
    reason=$(grep -iE "$TRANSIENT" "$errors" | tail -n 1 | sed 's/^ *//')
    if ((attempt >= ATTEMPTS)); then
      say "gave up after $attempt tries: $reason"
      code=3
      break
    fi
    say "try $attempt of $ATTEMPTS failed, the next one follows in $pause s: $reason"
    sleep "$pause"
    pause=$(awk "BEGIN { pause = 2 * $pause; print (pause > 300 ? 300 : pause) }")
  done
  rm -f "$errors"
  return "$code"
}

# Reads NAME, --dry-run and -- COMMAND..., checks the settings and gives those that are not set their defaults.
start() {
  : "${DRY_RUN:=}" "${ZONE:=}" "${PROJECT:=}" "${ACCELERATOR:=}" "${RUNTIME_VERSION:=}" "${CAPACITY:=on-demand}"
  : "${QUEUED:=no}" "${SLICES:=1}" "${CREATE_FLAGS:=}" "${SSH_FLAGS:=}" "${REVISION:=HEAD}" "${EXTRAS:=train,tpu}"
  : "${POLL:=30}" "${ATTEMPTS:=8}" "${BACKOFF:=10}" "${STATE_DIR:=${XDG_CACHE_HOME:-$HOME/.cache}/unclip_tpu}"
  NAME='' COMMAND=()
  while (($#)); do
    case $1 in
      --help | -h)
        sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
        exit 0
        ;;
      --dry-run) DRY_RUN=yes ;;
      --)
        shift
        COMMAND=("$@")
        break
        ;;
      -*) die "unknown option $1; see $PROGRAM.sh --help" 2 ;;
      *)
        [[ -z $NAME ]] || die "one name is expected, not $NAME and $1; a command follows --" 2
        NAME=$1
        ;;
    esac
    shift
  done
  export DRY_RUN
  [[ $NAME ]] || die "which one? The name is the first argument; see $PROGRAM.sh --help" 2
  [[ $NAME =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    die "the name '$NAME' must be of at most 40 lower-case letters, digits and hyphens, a letter first" 2
  [[ $ZONE ]] || die "set ZONE, such as us-east5-a" 2
  [[ $SLICES =~ ^[1-9][0-9]*$ ]] || die "SLICES is '$SLICES' and must be a whole number from 1" 2
  ((SLICES == 1)) || QUEUED=yes # slices that belong together only come from the queue
  case $CAPACITY in
    on-demand) CAPACITY_FLAGS=() ;;
    spot | reserved) CAPACITY_FLAGS=("--$CAPACITY") ;;
    *) die "CAPACITY is '$CAPACITY' and must be on-demand, spot or reserved" 2 ;;
  esac
  case $QUEUED in
    yes) KIND=queued-resources STATE_FIELD=state.state ;;
    no) KIND=tpu-vm STATE_FIELD=state ;;
    *) die "QUEUED is '$QUEUED' and must be yes or no" 2 ;;
  esac
  PLACE=("--zone=$ZONE")
  [[ -z $PROJECT ]] || PLACE+=("--project=$PROJECT")
  read -ra SSH <<<"$SSH_FLAGS"
  read -ra EXTRA <<<"$CREATE_FLAGS"
  FOLDER=$STATE_DIR/$NAME
}

# Checks ACCELERATOR, in any of its spellings, and chooses the runtime that this generation needs.
choose_accelerator() {
  local runtime
  ACCELERATOR=${ACCELERATOR/#v5e-/v5litepod-}
  case $ACCELERATOR in
    v[234]-[0-9]*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-[0-9]*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-[0-9]*) runtime=v2-alpha-tpuv5 ;;
    v6e-[0-9]*) runtime=v2-alpha-tpuv6e ;;
    tpu7x-*) die "$ACCELERATOR is rented through GKE only: use gke.sh" 2 ;;
    *) die "ACCELERATOR is '$ACCELERATOR' and must be such as v4-8, v5litepod-16, v5p-128 or v6e-8" 2 ;;
  esac
  : "${RUNTIME_VERSION:=$runtime}"
}

# The commit that REVISION names now.
commit() {
  git -C "$ROOT" rev-parse --verify --quiet --short=12 "$REVISION^{commit}" ||
    die "REVISION is '$REVISION', which is no commit of $ROOT" 2
}

# The state that the API reports, or NOT_FOUND; a dry run prints the question and goes on with the state given to it.
state_now() { # ASSUMED
  local state errors
  errors=$(mktemp)
  local request=(gcloud compute tpus "$KIND" describe "$NAME" "${PLACE[@]}" "--format=value($STATE_FIELD)")
  if state=$(retry "${request[@]}" 2>"$errors"); then
    cat "$errors" >&2
    [[ -z $DRY_RUN ]] || state=$1
  elif grep -qE "$ABSENT" "$errors"; then
    state=NOT_FOUND
  else
    cat "$errors" >&2
    state=UNKNOWN
  fi
  rm -f "$errors"
  echo "$state"
}

# What a state means to us: ready, waiting, gone (only a new one helps), absent, unusable, or unknown (no answer).
meaning() {
  case $1 in
    READY | ACTIVE) echo ready ;;
    NOT_FOUND) echo absent ;;
    PREEMPTED | TERMINATED | SUSPENDED | FAILED) echo gone ;;
    STOPPED | STOPPING | HIDING | HIDDEN | UNHIDING) echo unusable ;;
    UNKNOWN) echo unknown ;;
    *) echo waiting ;;
  esac
}

# The names of the slices: NAME, or NAME-0, NAME-1, ... where there are several.
slices() {
  local index
  if ((SLICES == 1)); then
    echo "$NAME"
  else
    for ((index = 0; index < SLICES; index++)); do echo "$NAME-$index"; done
  fi
}

# Runs an action of worker.sh on every worker of every slice; names each that fails, with its last words.
on_workers() { # ACTION ARGUMENTS...
  local slice log logs jobs=() job code=0 text
  text="bash unclip-worker.sh $(quoted "$@") && echo '$DONE'"
  [[ $1 != status ]] || text="[ -e unclip-worker.sh ] || { echo 'unclip: status idle'; echo '$DONE'; exit; }; $text"
  for slice in $(slices); do
    local request=(gcloud compute tpus tpu-vm ssh "$slice" "${PLACE[@]}" "${SSH[@]}" --worker=all)
    request+=("--command=$text" "--output-directory=$FOLDER/output/$slice")
    if [[ $DRY_RUN ]]; then
      run "${request[@]}"
      continue
    fi
    rm -rf "$FOLDER/output/$slice"
    mkdir -p "$FOLDER/output/$slice"
    retry "${request[@]}" &
    jobs+=("$!")
  done
  for job in "${jobs[@]}"; do wait "$job" || code=$?; done
  [[ -z $DRY_RUN ]] || return 0
  ((code == 0 || code == 3)) || code=1
  mapfile -t logs < <(logs_of_workers)
  for log in "${logs[@]}"; do
    grep -qx "$DONE" "$log" && continue
    say "$(worker_of "$log") failed: $(grep -v '^ *$' "$log" | tail -n 1)"
    code=1
  done
  return "$code"
}

# The files with what each worker answered last, in order.
logs_of_workers() {
  local slice
  for slice in $(slices); do
    find "$FOLDER/output/$slice" -name '*.log' 2>/dev/null | sort -V
  done
}

worker_of() { printf 'worker %s of %s' "$(basename "$1" .log)" "$(basename "$(dirname "$1")")"; }

# Asks every worker how the run with this ID stands; one line for each: running, exit N, lost, idle or other.
statuses() { # ID
  local log logs
  on_workers status "$1" >&2 || return 1
  [[ -z $DRY_RUN ]] || return 0
  mapfile -t logs < <(logs_of_workers)
  for log in "${logs[@]}"; do
    printf '%s: %s\n' "$(worker_of "$log")" "$(sed -n 's/^unclip: status //p' "$log")"
  done
}

# What tells a run from any other: its commit and its command.
run_id() { printf '%s\0' "$(commit)" "${COMMAND[@]}" | git hash-object --stdin | cut -c1-12; }
