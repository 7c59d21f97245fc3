#!/usr/bin/env bash
# worker.sh ACTION ARGUMENTS...: what happens on each worker; setup.sh copies it there, the other scripts call it.
#
#   setup REVISION EXTRAS BUCKET MOUNT
#   launch ID REVISION REPLACE GRACE COMMAND...
#   status ID                            prints running, exit N, lost, idle, or other where another run is going on
#   logs LINES FOLLOW WORKER

set -euo pipefail
home=$HOME/unclip
run=$home/run # of the last launch: id, boot, pid, log and, when it has ended, exit
export PATH=$HOME/.local/bin:$PATH

fail() {
  echo "$1"
  exit 1
}

setup() { # REVISION EXTRAS BUCKET MOUNT
  local code=$home/$1
  command -v uv >/dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh # the image's Python is too old
  mkdir -p "$code"
  tar -xzf "$HOME/unclip-code.tar.gz" -C "$code"
  uv venv --quiet --allow-existing --python 3.12 "$code/.venv"
  uv pip install --quiet --python "$code/.venv/bin/python" --constraints "$HOME/unclip-versions.txt" \
    --editable "${code}[$2]"
  [[ -z $3 ]] || mountpoint -q "$4" || mount_bucket "${3#gs://}" "$4"
  "$code/.venv/bin/python" --version | sed 's/^/unclip: version /'
  uv pip freeze --python "$code/.venv/bin/python" --exclude-editable | sed 's/^/unclip: version /'
}

mount_bucket() { # BUCKET[/FOLDER] MOUNT
  # A checkpoint is whole once its folder is renamed: at once where a bucket has folders (a hierarchical namespace),
  # object after object where it has none, and not at all without a limit.
  local flags=(--implicit-dirs --rename-dir-limit=200000)
  local site=https://packages.cloud.google.com/apt key=/usr/share/keyrings/gcsfuse.asc
  if ! command -v gcsfuse >/dev/null; then
    curl -fsSL "$site/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] $site gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list
    sudo apt-get update -qq
    sudo apt-get install -qq -y gcsfuse
  fi
  [[ $1 != */* ]] || flags+=(--only-dir "${1#*/}")
  sudo mkdir -p "$2"
  sudo chown "$(id -u)" "$2"
  gcsfuse "${flags[@]}" "${1%%/*}" "$2"
}

# A process of an earlier boot may have had the same number.
alive() {
  [[ -f $run/pid && ! -f $run/exit && $(<"$run/boot") == "$(</proc/sys/kernel/random/boot_id)" ]] &&
    kill -0 -- "-$(<"$run/pid")" 2>/dev/null
}

launch() { # ID REVISION REPLACE GRACE COMMAND...
  local id=$1 code=$home/$2 replace=$3 grace=$4
  shift 4
  [[ -x $code/.venv/bin/python ]] || fail "commit ${code##*/} is not set up here: run setup.sh"
  if alive; then
    [[ $replace == yes ]] || fail "a command runs here already, process $(<"$run/pid"): REPLACE=yes stops it"
    stop "$grace"
  fi
  mkdir -p "$run"
  rm -f "$run/exit"
  echo "$id" >"$run/id"
  cat /proc/sys/kernel/random/boot_id >"$run/boot"
  cd "$code"
  printf '== %s %s: %s\n' "$(date -u +%FT%TZ)" "${code##*/}" "${*@Q}" >>"$run/log"
  # In a session of its own, it outlives the connection; the shell around it outlives a SIGTERM, to note how it ended.
  # shellcheck disable=SC2016
  PATH=$code/.venv/bin:$PATH setsid bash -c '
    code=0
    trap "stopped=143" TERM
    "$@" || code=$?
    if ((code == 0)); then code=${stopped:-0}; fi
    echo "$code" >"$0/exit.part"
    mv "$0/exit.part" "$0/exit"' "$run" "$@" </dev/null >>"$run/log" 2>&1 &
  echo "$!" >"$run/pid"
}

# Asks first, so that a training can save; insists after GRACE seconds.
stop() { # GRACE
  local tenths
  kill -TERM -- "-$(<"$run/pid")" 2>/dev/null || true
  for ((tenths = 0; tenths < $1 * 10; tenths++)); do
    alive || return 0
    sleep 0.1
  done
  kill -KILL -- "-$(<"$run/pid")" 2>/dev/null || true
}

status() { # ID
  local id=none answer=idle
  [[ ! -f $run/id ]] || id=$(<"$run/id")
  if alive; then
    answer=running
    [[ $id == "$1" ]] || answer="other: $(grep '^== ' "$run/log" | tail -n 1)"
  elif [[ $id == "$1" && -f $run/exit ]]; then
    answer="exit $(<"$run/exit")"
    [[ $answer == "exit 0" ]] || answer+=", $(tail -n 1 "$run/log")"
  elif [[ $id == "$1" ]]; then
    answer=lost
  fi
  echo "unclip: status $answer"
}

logs() { # LINES FOLLOW WORKER
  local flags=() prefix=
  [[ $2 != yes ]] || flags=(-F)
  [[ $3 != all ]] || prefix="$(hostname): "
  tail -n "$1" "${flags[@]}" "$run/log" | sed -u "s/^/$prefix/"
}

action=$1
shift
case $action in
  setup | launch | status | logs) "$action" "$@" ;;
  *) fail "unknown action $action" ;;
esac
