#!/usr/bin/env bash
# Shows Backhaul at work on a private Ceph: an RBD volume of real files goes through the queue into a pool of backups and
# back, and is compared. It leaves its work folder, without the cluster, to look at; `demo.sh clean` removes it.
set -euo pipefail
cd "$(dirname "$0")/.."
. dev/demo-common.sh

volume=volumes/volume-$volume_id

rbd() { command rbd --conf "$work/ceph/ceph.conf" --id cinder "$@"; }

digest_of_image() { rbd export --no-progress "$1" - | sha256sum | cut -d' ' -f1; }

# Prints, in rbd's format of differences, what a file of the same size has that another has not.
difference() {
  perl -e '
    my ($old, $new) = map { open(my $file, "<:raw", $_) or die "$_: $!"; $file } @ARGV;
    print "rbd diff v1\n";
    for (my $at = 0; my $bytes = read($new, my $block, 65536); $at += $bytes) {
      read($old, my $before, 65536);
      print pack("aQ<Q<", "w", $at, $bytes), $block if $block ne $before;
    }
    print "e"' "$1" "$2"
}

compare() {
  show "rbd export $2 - | sha256sum"
  same "$1" "$(digest_of_image "$2")" "$2"
}

# Compares a restored image with what the volume was, and looks at its file system and for stray snapshots.
check_restored() {
  rm -f restored.img
  compare "$1" "$2"
  show "rbd export $2 restored.img"
  rbd export --no-progress "$2" restored.img
  check_file_system restored.img
  snapshots_of "$2" 0
  run rbd rm --no-progress "$2"
}

# Lists the snapshots of an image, of which there must be so many.
snapshots_of() {
  local image=$1 expected=$2 count
  show "rbd snap ls $image"
  rbd snap ls "$image" | awk 'NR > 1 { print "   " $2 }'
  count=$(rbd snap ls --format json "$image" | jq length)
  say "$count snapshots"
  [[ $count == "$expected" ]] || die "$image has $count snapshots, and not $expected"
}

step "Install what is missing, and build"
run dev/install.sh ceph
begin demo-ceph

step "Start a private RabbitMQ, a private Ceph and a worker"
say "Work folder, where all commands from here on run: $work"
start_broker
show "dev/ceph.sh up ceph"
"$repository/dev/ceph.sh" up "$work/ceph" >ceph.log 2>&1 9>&- || { cat ceph.log >&2; die "no Ceph"; }
cat >backhaul.toml <<END
[broker]
url = "$(<rabbit/url)"

[ceph.main]
conf = "ceph/ceph.conf"
user = "cinder"

[store.ceph]
kind = "rbd"
cluster = "main"
pool = "backups"
END
start_worker

step "Make an RBD volume of 1 GiB: ext4, full of real files"
make_file_system volume.img
run rbd import --no-progress volume.img $volume
first=$(digest_of_image $volume)
[[ $first == "$(digest volume.img)" ]] || die "the image is not what was imported"

step "Back it up: full"
backup backup-full --source rbd:main/$volume --name first
full=$(of backup-full backup_id)

step "Change some files in the volume"
cp --sparse=always volume.img before.img
change_file_system volume.img
show "difference before.img volume.img | rbd import-diff - $volume"
difference before.img volume.img | rbd import-diff --no-progress - $volume
rm before.img
second=$(digest_of_image $volume)
[[ $second == "$(digest volume.img)" && $second != "$first" ]] || die "the volume was not changed as the file was"

step "Back it up again: incremental, on the full one"
backup backup-incremental --source rbd:main/$volume --name second --incremental
incremental=$(of backup-incremental backup_id)
[[ $(of backup-incremental parent_id) == "$full" ]] || die "the second backup does not build on the first"

step "What is in the pools now: a snapshot for each backup on the volume, and one on the image of the chain"
run backhaul list
snapshots_of $volume 2
image=backups/volume-$volume_id.backup.$full
snapshots_of "$image" 2
say "the image takes $(rbd du --format json "$image" | jq '.total_used_size / 1048576 | round') MiB"

step "Restore the first point into a new image, and compare"
job restore-full restore --backup-id "$full" --target rbd:main/volumes/first
check_restored "$first" volumes/first

step "Restore the second point into a new image, and compare"
job restore-incremental restore --backup-id "$incremental" --target rbd:main/volumes/second
check_restored "$second" volumes/second
new_file_is_in restored.img || die "the new file is not in the restored volume"

step "Verify both: every block is read and compared with its digest, nothing is written"
job verify-full verify --backup-id "$full"
job verify-incremental verify --backup-id "$incremental"

delete_both "$full" "$incremental"

step "Nothing of them is left, on neither side"
snapshots_of $volume 0
show "rbd ls backups"
images=$(rbd ls backups)
[[ -z $images ]] || die "images are left: $images"
say "no images"
show "rados --pool backups --all ls"
objects() { rados --conf ceph/ceph.conf --id cinder --pool backups --all ls; }
for ((second = 0; second < 60; second++)); do
  # The OSD removes in the background what snapshots held.
  objects | grep -q rbd_data || break
  sleep 1
done
objects | sort | sed 's/^/   /'
if objects | grep -q -e rbd_data -e 'backup\.'; then die "objects of a backup are left"; fi

step "Stop the worker, and Ceph with its files"
stop_worker
stop_services
rm -rf ceph
bye "Both restored images are"
