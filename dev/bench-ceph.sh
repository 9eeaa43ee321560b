#!/usr/bin/env bash
# Measures Backhaul on private Ceph clusters, beside Cinder's Ceph driver and beside the two commands that this runs to
# move the bytes, `rbd export-diff … - | rbd import-diff … -`, and prints the tables that stand in the documentation.
#   bench-ceph.sh [--gib N] [--runs N]   volumes of N GiB (4), medians of N runs (3)
# Needs about 6 times the size of a volume on disk below the target folder, and removes what it made.
set -euo pipefail
cd "$(dirname "$0")/.."
repository=$PWD
export LC_ALL=C
unset "${!BACKHAUL_@}" CEPH_ARGS CEPH_CONF
volume_id=3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88
volume=volumes/volume-$volume_id
scattered_image=volumes/volume-00000000-0000-4000-8000-000000000002
zeros_image=volumes/volume-00000000-0000-4000-8000-000000000003
large_image=volumes/volume-00000000-0000-4000-8000-000000000004
mib=1048576
die() { echo "bench-ceph.sh: $*" >&2; exit 1; }

gib=4
runs=3
while (($#)); do
  case $1 in
  --gib) gib=${2:?} ;;
  --runs) runs=${2:?} ;;
  *) die "usage: bench-ceph.sh [--gib N] [--runs N]" ;;
  esac
  shift 2
done
bytes=$((gib * 1024 * mib))

dev/install.sh bench
python=$(dev/cinder.sh)
cargo build --locked --release
target=$(cargo metadata --locked --no-deps --format-version 1 | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
PATH=$target/release:$PATH
work=$target/bench-ceph
sockets=$(mktemp --directory) # the path of a socket must be short
finish() {
  stop_cinder
  stop_cluster
  cd /
  rm -rf "$work" "$sockets"
}

# Starts a cluster with these lines in its ceph.conf.
start_cluster() {
  "$repository/dev/ceph.sh" up "$work/ceph" "admin socket = $sockets/\$name" "$@" >ceph.log 2>&1 ||
    { cat ceph.log >&2; die "no Ceph"; }
  conf=$work/ceph/ceph.conf
}

stop_cluster() {
  "$repository/dev/ceph.sh" down "$work/ceph" >/dev/null 2>&1 || true
  rm -rf "$work/ceph" "${sockets:?}"/*
}

cinder_pid=''
# Starts Cinder's driver, as one process for all that it is asked: its start is not measured.
start_cinder() {
  mkdir -p cinder
  mkfifo cinder/in cinder/out
  "$python" "$repository/tests/peers/cinder_driver.py" "$work/cinder" cinder.backup.drivers.ceph.CephBackupDriver \
    backup_ceph_conf="$conf" backup_ceph_user=cinder backup_ceph_pool=backups2 <cinder/in >cinder/out 2>cinder.log &
  cinder_pid=$!
  exec {to_cinder}>cinder/in {from_cinder}<cinder/out
}

stop_cinder() {
  if [[ $cinder_pid ]]; then
    exec {to_cinder}>&- {from_cinder}<&-
    wait "$cinder_pid" || true
    cinder_pid=''
  fi
  rm -rf "$work/cinder"
}

# Has Cinder's driver do something.
cinder() {
  local answer
  printf '%s\n' "$1" >&"$to_cinder"
  read -r answer <&"$from_cinder" || die "Cinder ended: $(tail -5 cinder.log)"
  [[ $answer == '{"ok"'* ]] || die "Cinder: $answer"
}

rbd() { command rbd --conf "$conf" --id cinder "$@" 2>rbd.log || { cat rbd.log >&2; return 1; }; }

# Adds up what clients have written to all OSDs, in bytes.
written() {
  local socket
  for socket in "$sockets"/osd.*; do
    ceph --admin-daemon "$socket" perf dump osd 2>/dev/null
  done | jq --slurp 'map(.osd.op_in_bytes) | add'
}

# Waits until nobody works on what was done before: the OSDs remove what snapshots held in the background.
settle() {
  sync
  while ceph --conf "$conf" pg stat 2>/dev/null | grep -q snaptrim; do sleep 0.2; done
}

# Reads lines of an offset and a length, and writes so many bytes there that are not zeros and that no other place has
# and no other seed: to a file, or as one of rbd's differences to standard output.
write_extents() {
  perl -e '
    my ($seed, $path) = @ARGV;
    srand(1);
    my $noise = join "", map { pack "L", int rand 2 ** 32 } 1 .. 16380;
    if (defined $path) { open(STDOUT, "+<:raw", $path) or die "$path: $!" } else { print "rbd diff v1\n" }
    while (<STDIN>) {
      my ($offset, $length) = split;
      if (defined $path) { seek(STDOUT, $offset, 0) } else { print pack "aQ<Q<", "w", $offset, $length }
      for (my $at = 0; $at < $length; $at += 65536) {
        my $left = $length - $at;
        print substr pack("Q<Q<", $seed, $offset + $at) . $noise, 0, $left < 65536 ? $left : 65536;
      }
    }
    print "e" if !defined $path' "$@"
}

# Writes the extents on standard input to an image.
write_image() { write_extents "$2" | rbd import-diff --no-progress - "$1"; }

# All of a range, in pieces.
all() { seq 0 $((4 * mib)) $(($1 - 1)) | awk "{ print \$1, $((4 * mib)) }"; }

# So many extents of a length, each somewhere in a part of its own of the first $3 bytes, at multiples of its length.
scattered() {
  awk -v count="$1" -v length_="$2" -v bytes="$3" -v seed="$4" 'BEGIN {
    srand(seed)
    part = int(bytes / count)
    for (i = 0; i < count; i++) print int((i * part + rand() * (part - length_)) / length_) * length_, length_
  }'
}

configure() {
  cat >backhaul.toml <<END
[worker]
file_roots = ["$work"]

[ceph.main]
conf = "$conf"
user = "cinder"

[store.ceph]
kind = "rbd"
cluster = "main"
pool = "backups"
default = true

[store.posix]
kind = "posix"
path = "$work/posix"
END
  mkdir -p posix
}

seconds_since() { awk -v began="$1" -v ended="$EPOCHREALTIME" 'BEGIN { printf "%.3f\n", ended - began }'; }
median() { printf '%s\n' "$@" | sort -n | awk '{ a[NR] = $1 } END { print a[int((NR + 1) / 2)] }'; }

# Runs a job of Backhaul in a process of its own.
job() {
  backhaul run "$@" --json >event.json 2>>backhaul.log ||
    die "backhaul run $*: $(jq --compact-output .data.error event.json)"
}

of() { jq --raw-output ".data.$1" event.json; }

# Each of these runs its work once, and keeps how long it took, and how much was written to Ceph.
our_seconds=() their_seconds=() cinder_seconds=() our_kib=0
ours() {
  local before kib
  settle
  before=$(written)
  command time --format %M --output=kib backhaul run "$@" --json >event.json 2>>backhaul.log ||
    die "backhaul run $*: $(jq --compact-output .data.error event.json)"
  # From the job's start to its end, as in a worker: the start of the process is not measured, as Cinder's is not.
  our_seconds+=("$(of 'seconds * 1000 | round / 1000')")
  our_written=$(($(written) - before))
  kib=$(<kib)
  if ((kib > our_kib)); then our_kib=$kib; fi
}

theirs() {
  local began before
  settle
  before=$(written)
  began=$EPOCHREALTIME
  "$@"
  their_seconds+=("$(seconds_since "$began")")
  their_written=$(($(written) - before))
}

line() { printf '| %-52s | %8s | %8s | %8s | %7s | %8s | %8s | %8s | %8s |\n' "$@"; }

header() {
  printf '\n%s\n\n' "$1"
  line work "${2-Backhaul}" "${3-rbd}" "${4-Cinder}" "x ${3-rbd}" 'x Cinder' "${5-MiB}" "${6-rbd MiB}" 'memory'
  line '---' '---:' '---:' '---:' '---:' '---:' '---:' '---:' '---:'
}

times() { awk -v them="$1" -v us="$2" 'BEGIN { printf "%.1f", them / us }'; }

# Prints the medians of what was run since the last row.
row() {
  local us them cinder='' by=''
  us=$(median "${our_seconds[@]}")
  them=$(median "${their_seconds[@]}")
  if ((${#cinder_seconds[@]})); then
    cinder=$(median "${cinder_seconds[@]}")
    by=$(times "$cinder" "$us")
  fi
  line "$1" "$us" "$them" "$cinder" "$(times "$them" "$us")" "$by" "$(in_mib "$our_written")" \
    "$(in_mib "$their_written")" "$((our_kib / 1024)) MiB"
  our_median=$us
  our_seconds=() their_seconds=() cinder_seconds=() our_kib=0
}

in_mib() { awk "BEGIN { printf \"%.1f\", $1 / $mib }"; }

our_backup() {
  ours backup --volume-id $volume_id --source "rbd:main/$1" "${@:2}"
  our_backups+=("$(of backup_id)")
  if [[ " $* " == *" --incremental "* && $(of parent_id) == null ]]; then die "not incremental: $(<event.json)"; fi
}

# What Cinder runs; it makes the image of the backups in its own process, which is not measured.
differential() {
  local image=$1 from=$2 snapshot=$3 to=$4
  command rbd export-diff --id cinder --conf "$conf" --pool "${image%/*}" ${from:+--from-snap "$from"} \
    "$image@$snapshot" - 2>rbd.log |
    command rbd import-diff --id cinder --conf "$conf" --pool "${to%/*}" - "$to" 2>rbd-import.log ||
    { cat rbd.log rbd-import.log >&2; die "rbd failed"; }
}

snapshot_and_differential() {
  rbd snap create --no-progress "$1@$3"
  differential "$@"
}

their_count=0 their_last=''
their_backup() {
  local from=''
  if [[ ${2:-} == --incremental ]]; then from=$their_last; else rbd create --size 1M backups/theirs; fi
  their_count=$((their_count + 1))
  their_last=their-$their_count
  theirs snapshot_and_differential "$1" "$from" "$their_last" backups/theirs
}

# Cinder's own backup of an image, by its driver, which finds the image by the volume's id.
declare -A cinder_knows=() cinder_last=()
cinder_backup() {
  local image=$1 id parent=null began cinder_volume_id=${1#*/volume-}
  id=$(</proc/sys/kernel/random/uuid)
  if [[ ${2:-} == --incremental ]]; then parent=\"${cinder_last[$image]}\"; fi
  if [[ ! ${cinder_knows[$image]:-} ]]; then
    cinder "{\"do\": \"add_volume\", \"volume_id\": \"$cinder_volume_id\", \"gib\": ${cinder_gib-$gib}}"
    cinder_knows[$image]=yes
  fi
  settle
  began=$EPOCHREALTIME
  cinder "{\"do\": \"backup\", \"backup_id\": \"$id\", \"volume_id\": \"$cinder_volume_id\", \
\"source\": {\"image\": \"$image\"}, \"parent_id\": $parent}"
  cinder_seconds+=("$(seconds_since "$began")")
  cinder_last[$image]=$id
}

# Removes all backups of a volume, of all three.
our_backups=()
remove_backups() {
  local index image
  for image in $(rbd ls backups2); do
    rbd snap purge --no-progress "backups2/$image"
    rbd rm --no-progress "backups2/$image"
  done
  for ((index = ${#our_backups[@]} - 1; index >= 0; index--)); do
    job delete --backup-id "${our_backups[index]}"
  done
  our_backups=()
  rbd snap purge --no-progress backups/theirs
  rbd rm --no-progress backups/theirs
  rbd snap purge --no-progress "$1"
}

full_backups() {
  local run
  for ((run = 0; run < runs; run++)); do
    if ((run)); then remove_backups "$1"; fi
    our_backup "$1"
    their_backup "$1"
    if [[ $cinder_pid ]]; then cinder_backup "$1"; fi
  done
}

# Writes a file beside the cluster's, past the page cache, and prints how fast that was.
disk_mib_per_second() {
  local began
  dd if=/dev/urandom of=noise bs=4M count=64 status=none
  began=$EPOCHREALTIME
  for ((part = 0; part < 4; part++)); do
    dd if=noise of=disk bs=4M seek=$((part * 64)) oflag=direct conv=notrunc,fsync status=none
  done
  seconds_since "$began" | awk '{ printf "%.0f\n", 1024 / $1 }'
  rm noise disk
}

share_of_disk() {
  awk "BEGIN { printf \"The full backup read and wrote %.0f MiB/s each; the disk alone writes %.0f MiB/s.\n\",
    $bytes / $mib / $our_median, $1 }"
}

make_volume() {
  rbd create --size "$2B" "$1"
  all "$2" | write_image "$1" 1
}

one_cluster() {
  local run disk stream_bytes
  start_cluster "bluestore block size = $((6 * bytes + 4096 * mib))"
  configure
  start_cinder
  disk=$(disk_mib_per_second)
  make_volume $volume "$bytes"
  header "One OSD on a disk; medians of $runs runs"

  full_backups $volume
  row "full, $gib GiB of data"
  full_median=$our_median

  for ((run = 0; run < runs; run++)); do
    ours restore --backup-id "${our_backups[0]}" --target rbd:main/volumes/restored
    if ((run == 0)); then
      cmp <(rbd export --no-progress $volume -) <(rbd export --no-progress volumes/restored -) || die "it was restored wrongly"
    fi
    rbd rm --no-progress volumes/restored
    rbd create --size 1M volumes/restored
    theirs differential backups/theirs '' "$their_last" volumes/restored
    rbd snap purge --no-progress volumes/restored
    rbd rm --no-progress volumes/restored
  done
  row "restore of $gib GiB to a new volume"

  for ((run = 0; run < runs; run++)); do
    scattered $((bytes / 100 / (4 * mib))) $((4 * mib)) "$bytes" "$run" | write_image $volume $((run + 2))
    our_backup $volume --incremental
    their_backup $volume --incremental
    cinder_backup $volume --incremental
  done
  row "incremental, 1 % of $gib GiB in pieces of 4 MiB"

  for ((run = 0; run < runs; run++)); do
    our_backup $volume --incremental
    their_backup $volume --incremental
    cinder_backup $volume --incremental
  done
  row "incremental, nothing changed"
  remove_backups $volume

  for ((run = 0; run < runs; run++)); do
    rbd create --size "${bytes}B" $scattered_image
    echo "0 $((4 * mib))" | write_image $scattered_image 1
    job backup --volume-id $volume_id --source rbd:main/$scattered_image
    our_backups+=("$(of backup_id)")
    rbd create --size 1M backups/theirs
    their_last=base
    snapshot_and_differential $scattered_image '' base backups/theirs
    cinder_backup $scattered_image
    unset 'cinder_seconds[-1]' # only the incremental ones are counted
    scattered 2000 4096 "$bytes" "$run" | write_image $scattered_image 2
    our_backup $scattered_image --incremental
    their_backup $scattered_image --incremental
    cinder_backup $scattered_image --incremental
    stream_bytes=$(rbd export-diff --no-progress --from-snap base "$scattered_image@$their_last" - | wc -c)
    remove_backups $scattered_image
    rbd rm --no-progress $scattered_image
  done
  row "incremental, 2,000 scattered writes of 4 KiB to holes"

  # Half of each object is zeros, which Ceph keeps as it keeps data.
  perl -e 'my $noise = join "", map { pack "L", int rand 2 ** 32 } 1 .. 16384;
    print $noise, "\0" x 65536 for 1 .. $ARGV[0] / 131072' "$bytes" |
    rbd import --no-progress --sparse-size 4M - $zeros_image
  full_backups $zeros_image
  row "full, $gib GiB, half of it zeros that were written"
  remove_backups $zeros_image
  rbd rm --no-progress $zeros_image

  rbd create --size 100G $large_image
  scattered 16 $((4 * mib)) $((102400 * mib)) 1 | write_image $large_image 1
  cinder_gib=100 full_backups $large_image
  row "full, an image of 100 GiB with 64 MiB in it"
  remove_backups $large_image
  rbd rm --no-progress $large_image

  our_median=$full_median
  printf '\n'
  share_of_disk "$disk"
  echo "For the scattered writes rbd moved $(in_mib "$stream_bytes") MiB from one of its processes to the other."
  to_posix
  stop_cinder
  stop_cluster
}

# A chain of chunks from the image, and one from a file with the same bytes.
to_posix() {
  local run changes file_id=00000000-0000-4000-8000-000000000001 in_place="file:$work/volume.img"
  rbd export --no-progress $volume volume.img
  job backup --store posix --volume-id $volume_id --source rbd:main/$volume
  job backup --store posix --volume-id $file_id --source "$in_place"
  for ((run = 0; run < runs; run++)); do
    changes=$(scattered $((bytes / 100 / (4 * mib))) $((4 * mib)) "$bytes" $((run + 100)))
    write_image $volume $((run + 100)) <<<"$changes"
    write_extents $((run + 100)) volume.img <<<"$changes"
    ours backup --store posix --volume-id $volume_id --source rbd:main/$volume --incremental
    theirs job backup --store posix --volume-id $file_id --source "$in_place" --incremental
  done
  header "From an image into the posix store, beside the same bytes from a file, both with Backhaul" 'image' 'file' '' '' ''
  our_written=0 their_written=0
  row "incremental, 1 % of $gib GiB in pieces of 4 MiB"
  rm -rf volume.img posix
}

# Only the full backup, on another cluster.
full_on() {
  local gib=$2 bytes=$(($2 * 1024 * mib))
  start_cluster "${@:3}"
  configure
  make_volume $volume "$bytes"
  header "$1"
  full_backups $volume
  row "full, $gib GiB of data"
  remove_backups $volume
  stop_cluster
}

rm -rf "$work"
mkdir -p "$work"
cd "$work"
conf=$work/ceph/ceph.conf
trap finish EXIT
one_cluster
CEPH_OSDS=2 full_on "Two OSDs on one disk" "$gib" "bluestore block size = $((3 * bytes + 4096 * mib))"
# Six times the size of the volume: it keeps a copy of its own for each snapshot.
full_on "One OSD in memory" "$((gib < 2 ? gib : 2))" "osd objectstore = memstore" "memstore device bytes = $((8 * 1024 * mib))"
printf '\nOn %s cores, which the cluster shares. "x" is how many times quicker Backhaul is, MiB what clients wrote to Ceph,\n' "$(nproc)"
echo '"memory" the peak of the process of Backhaul. The start of neither Backhaul nor Cinder is measured; Cinder is its driver alone.'
