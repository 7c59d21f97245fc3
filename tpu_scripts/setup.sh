#!/usr/bin/env bash
# setup.sh NAME [--dry-run]: puts one commit and one set of package versions on all workers, and mounts a bucket.
#
# The versions that the first setup of NAME resolved are used by every later one, so that a slice which was replaced
# after a preemption trains with what the first one trained with; UPGRADE=yes forgets them. Safe to repeat.
#
# Settings: ZONE, PROJECT, SLICES, REVISION (HEAD), EXTRAS (train,tpu), BUCKET (gs://bucket[/folder], mounted by
# gcsfuse), MOUNT (/mnt/bucket), UPGRADE (yes, no), SSH_FLAGS (such as --internal-ip).

# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
start "$@"
: "${BUCKET:=}" "${MOUNT:=/mnt/bucket}" "${UPGRADE:=no}"
[[ -z $BUCKET || $BUCKET == gs://* ]] || die "BUCKET is '$BUCKET' and must begin with gs://" 2
versions=$FOLDER/unclip-versions.txt

revision=$(commit)
if [[ $(git -C "$ROOT" status --porcelain --untracked-files=no) ]]; then
  say "changes that are not committed stay here; the workers get commit $revision"
fi

run mkdir -p "$FOLDER"
[[ $UPGRADE == no ]] || run rm -f "$versions"
run touch "$versions"
run cp "$HERE/worker.sh" "$FOLDER/unclip-worker.sh"
run git -C "$ROOT" archive --format=tar.gz "--output=$FOLDER/unclip-code.tar.gz" "$revision"
for slice in $(slices); do
  retry gcloud compute tpus tpu-vm scp "$FOLDER/unclip-code.tar.gz" "$FOLDER/unclip-worker.sh" "$versions" "$slice:." \
    "${PLACE[@]}" "${SSH[@]}" --worker=all
done
on_workers setup "$revision" "$EXTRAS" "$BUCKET" "$MOUNT"
[[ -z $DRY_RUN ]] || exit 0

versions_of() { sed -n 's/^unclip: version //p' "$1"; }

mapfile -t logs < <(logs_of_workers)
differing=''
for log in "${logs[@]}"; do
  difference=$(diff <(versions_of "${logs[0]}") <(versions_of "$log")) && continue
  difference=$(grep '^[<>]' <<<"$difference" | paste -sd' ' -)
  say "$(worker_of "$log") (>) differs from $(worker_of "${logs[0]}") (<): $difference"
  differing=yes
done
[[ ! $differing ]] || die "workers with different versions hang when they start: repeat setup.sh $NAME"
versions_of "${logs[0]}" | grep '==' >"$versions"
say "$NAME holds commit $revision on ${#logs[@]} workers"
