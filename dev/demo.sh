#!/usr/bin/env bash
# Shows Backhaul at work: a volume of real files goes through the queue into a store and back, and is compared.
#   demo.sh         run it; it leaves its work folder to look at
#   demo.sh clean   remove that folder, and the one of demo-ceph.sh
set -euo pipefail
cd "$(dirname "$0")/.."
. dev/demo-common.sh

compare() {
  show "sha256sum $2"
  same "$1" "$(digest "$2")" "$2"
}

if [[ ${1:-} == clean ]]; then
  target=$(target_folder)
  exec rm -rf "$target"/demo{,-ceph}{,.lock}
fi

step "Install what is missing, and build"
run dev/install.sh
begin demo
mkdir volumes backups

step "Start a private RabbitMQ and a worker"
say "Work folder, where all commands from here on run: $work"
start_broker
cat >backhaul.toml <<END
[broker]
url = "$(<rabbit/url)"

[worker]
file_roots = ["volumes"]

[store.local]
kind = "posix"
path = "backups"
compression = "zstd"
END
start_worker

step "Make a volume of 1 GiB: ext4, full of real files"
make_file_system volumes/volume.img
first=$(digest volumes/volume.img)

step "Back it up: full"
backup backup-full --source "file:$work/volumes/volume.img" --name first
full=$(of backup-full backup_id)

step "Change some files in the volume"
change_file_system volumes/volume.img
second=$(digest volumes/volume.img)
[[ $first != "$second" ]] || die "the volume is as before"

step "Back it up again: incremental, on the full one"
backup backup-incremental --source "file:$work/volumes/volume.img" --name second --incremental
incremental=$(of backup-incremental backup_id)
[[ $(of backup-incremental parent_id) == "$full" ]] || die "the second backup does not build on the first"

step "What is in the store now"
run backhaul list
run du --summarize --human-readable backups

step "Restore the first point into a new file, and compare"
job restore-full restore --backup-id "$full" --target "file:$work/volumes/first.img"
compare "$first" volumes/first.img
check_file_system volumes/first.img

step "Restore the second point into a new file, and compare"
job restore-incremental restore --backup-id "$incremental" --target "file:$work/volumes/second.img"
compare "$second" volumes/second.img
check_file_system volumes/second.img
new_file_is_in volumes/second.img || die "the new file is not in the restored volume"

step "Verify both: every object is read and compared with its digests, nothing is written"
job verify-full verify --backup-id "$full"
job verify-incremental verify --backup-id "$incremental"

delete_both "$full" "$incremental"
left=$(find backups -name 'volume_*' -print -quit)
[[ -z $left ]] || die "objects are left in the store: $left"

step "Stop the worker"
stop_worker
bye "Both restored volumes are"
