#!/usr/bin/env bash
# Measures Backhaul beside OpenStack Cinder's drivers, restic and borg, on the same data in one run, and beside what the
# machine can do at most; prints the tables that stand in the documentation, and draws the picture.
#   bench-peers.sh [--gib N] [--runs N]   a volume of N GiB of real files (2), medians of N runs (3)
# Needs about 8 times the size of the volume on disk below the target folder, and removes what it made.
set -euo pipefail
cd "$(dirname "$0")/.."
repository=$PWD
export LC_ALL=C
unset "${!BACKHAUL_@}" "${!RESTIC_@}" "${!BORG_@}" CEPH_ARGS CEPH_CONF
mib=1048576
cinders_object_bytes=52428800 # the default of its drivers for S3 and Swift
die() { echo "bench-peers.sh: $*" >&2; exit 1; }

gib=2
runs=3
while (($#)); do
  case $1 in
  --gib) gib=${2:?} ;;
  --runs) runs=${2:?} ;;
  *) die "usage: bench-peers.sh [--gib N] [--runs N]" ;;
  esac
  shift 2
done

dev/install.sh bench
python=$(dev/cinder.sh)
cargo build --locked --release
limit=$(cargo build --locked --release --bench limit --message-format json 2>/dev/null |
  jq --raw-output 'select(.reason == "compiler-artifact" and .target.name == "limit") | .executable')
target=$(cargo metadata --locked --no-deps --format-version 1 | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
PATH=$target/release:$PATH:/usr/sbin:/sbin
work=$target/bench-peers
rm -rf "$work"
mkdir -p "$work"
cd "$work"
finish() {
  stop_cinder
  "$repository/dev/ceph.sh" down "$work/ceph" >/dev/null 2>&1 || true
  cd /
  rm -rf "$work"
}
trap finish EXIT

export RESTIC_PASSWORD=secret RESTIC_CACHE_DIR=$work/restic-cache BORG_BASE_DIR=$work/borg-home
export BORG_RELOCATED_REPO_ACCESS_IS_OK=yes BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK=yes

seconds_since() { awk -v began="$1" -v ended="$EPOCHREALTIME" 'BEGIN { printf "%.3f\n", ended - began }'; }
median() { printf '%s\n' "$@" | sort -n | awk '{ a[NR] = $1 } END { if (NR) print a[int((NR + 1) / 2)] }'; }

# What each has measured since the last row: seconds, and the peak of its process's memory in KiB.
declare -A seconds=() memory=()
took() {
  seconds[$1]+=" $2"
  if (($3 > ${memory[$1]:-0})); then memory[$1]=$3; fi
}

# Runs a command in a process of its own, for one of the peers.
timed() {
  local who=$1 began
  shift
  sync
  began=$EPOCHREALTIME
  command time --quiet --format %M --output=kib "$@" >out.log 2>&1 || { tail -20 out.log >&2; die "$who failed: $*"; }
  took "$who" "$(seconds_since "$began")" "$(tail -1 kib)"
}

ours() {
  timed backhaul backhaul run "$@" --json
  tail -1 out.log >event.json
  [[ $(jq --raw-output .type event.json) == *.succeeded.* ]] || die "backhaul run $*: $(<event.json)"
}

configure() {
  cat >backhaul.toml <<END
[worker]
file_roots = ["$work"]
memory_bytes_max = 268435456
[store.local]
kind = "posix"
path = "$work/backups"
compression = "$1"
default = true
${2:-}
END
  mkdir -p backups
}

cinder_pid=''
# Starts one of Cinder's drivers, as one process for all that it is asked: its start is not measured.
start_cinder() {
  stop_cinder
  mkdir -p cinder
  mkfifo cinder/in cinder/out
  "$python" "$repository/tests/peers/cinder_driver.py" "$work/cinder" "$@" <cinder/in >cinder/out 2>cinder.log &
  cinder_pid=$!
  exec {to_cinder}>cinder/in {from_cinder}<cinder/out
  volume_id=$(</proc/sys/kernel/random/uuid)
  cinder "{\"do\": \"add_volume\", \"volume_id\": \"$volume_id\", \"gib\": $gib}"
}

stop_cinder() {
  if [[ $cinder_pid ]]; then
    exec {to_cinder}>&- {from_cinder}<&-
    wait "$cinder_pid" || true
    cinder_pid=''
  fi
  rm -rf "$work/cinder"
}

cinder() {
  local answer
  printf '%s\n' "$1" >&"$to_cinder"
  read -r answer <&"$from_cinder" || die "Cinder ended: $(tail -5 cinder.log)"
  [[ $answer == '{"ok"'* ]] || die "Cinder: $answer"
}

# Has Cinder's driver do something that counts. Its process has a new peak from here on.
cinder_timed() {
  local began
  sync
  echo 5 >"/proc/$cinder_pid/clear_refs"
  began=$EPOCHREALTIME
  cinder "$1"
  took cinder "$(seconds_since "$began")" "$(awk '/VmHWM/ { print $2 }' "/proc/$cinder_pid/status")"
}

cinder_backup() {
  local parent=null
  if [[ ${2:-} ]]; then parent="\"$2\""; fi
  cinder_id=$(</proc/sys/kernel/random/uuid)
  cinder_timed "{\"do\": \"backup\", \"backup_id\": \"$cinder_id\", \"volume_id\": \"$volume_id\", \
\"source\": {\"file\": \"$1\"}, \"parent_id\": $parent}"
}

cinder_restore() {
  cinder_timed "{\"do\": \"restore\", \"backup_id\": \"$1\", \"volume_id\": \"$volume_id\", \
\"target\": {\"file\": \"$2\"}, \"new\": true}"
}

forget_cinder() { rm -rf cinder-store/*; }

limited() { seconds[limit]+=" $("$limit" volume.img "$1")"; }

header() {
  printf '\n%s\n\n' "$1"
  printf '| %-44s | %8s | %8s | %8s | %8s | %8s | %8s | %8s | %8s | %10s | %10s |\n' \
    work Backhaul Cinder restic borg 'x Cinder' 'x restic' 'x borg' 'of limit' 'memory' "Cinder's"
  echo '|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|'
}

# Prints the medians of what was measured since the last row.
row() {
  local us who value ratios=() medians=() of_limit=''
  # shellcheck disable=SC2086 # a list of numbers
  us=$(median ${seconds[backhaul]})
  for who in cinder restic borg; do
    # shellcheck disable=SC2086
    value=$(median ${seconds[$who]:-})
    medians+=("${value:--}")
    ratios+=("$(awk -v us="$us" -v them="${value:-0}" 'BEGIN { if (them) printf "%.1f", them / us; else print "-" }')")
  done
  if [[ ${seconds[limit]:-} ]]; then
    # shellcheck disable=SC2086
    of_limit=$(awk -v us="$us" -v best="$(median ${seconds[limit]})" 'BEGIN { printf "%.0f %%", best / us * 100 }')
  fi
  printf '| %-44s | %8s | %8s | %8s | %8s | %8s | %8s | %8s | %8s | %10s | %10s |\n' "$1" "$us" "${medians[@]}" "${ratios[@]}" \
    "${of_limit:--}" "$((memory[backhaul] / 1024)) MiB" "${memory[cinder]:+$((memory[cinder] / 1024)) MiB}"
  printf '%s\t%s\t%s\t%s\t%s\n' "$1" "$us" "${medians[@]}" >>figures.tsv
  seconds=() memory=()
}

same() { cmp volume.img "$1" || die "$1 was restored wrongly"; }

# Fills an ext4 of the size with real files.
make_volume() {
  local copy sysroot mib_wanted=$((gib * 1024 * 88 / 100))
  sysroot=$(rustc --print sysroot)
  mkdir files
  for ((copy = 0; $(du --summarize --block-size=1M files | cut -f1) < mib_wanted - 100; copy++)); do
    mkdir files/$copy
    { find "$sysroot" /usr -xdev -type f -readable -size -200M -printf '%s %p\n' 2>/dev/null || true; } | sort -k2 |
      awk -v left=$((mib_wanted - $(du --summarize --block-size=1M files | cut -f1))) \
        '{ bytes += $1 + 4096 } bytes < left * 1048576 { print substr($0, index($0, " ") + 1) }' |
      xargs --delimiter='\n' cp --parents --target-directory=files/$copy
  done
  truncate --size="${gib}G" volume.img
  mkfs.ext4 -q -N $((gib * 120000)) -d files volume.img
  rm -rf files
}

# Writes new data to one percent of the volume, in pieces of 1 MiB.
change() {
  local piece
  for ((piece = 0; piece < gib * 1024 / 100; piece++)); do
    dd if=/dev/urandom of=volume.img bs=1M count=1 seek=$((piece * 97 + $1 * 7)) conv=notrunc status=none
  done
}

new_restic() { rm -rf restic "$RESTIC_CACHE_DIR"; restic init --quiet --repo restic --repository-version 2; }
new_borg() { rm -rf borg "$BORG_BASE_DIR"; borg init --encryption none borg 2>/dev/null; }

our_backup() {
  ours backup --volume-id "$volume_id" --source "file:$work/volume.img" "$@"
  our_id=$(jq --raw-output .data.backup_id event.json)
}

# Full backups of the volume and restores of each into a new file, with one compression.
full_and_restore() {
  local run compression=$1
  configure "$compression"
  cinder "{\"do\": \"set\", \"backup_compression_algorithm\": \"$compression\"}"
  for ((run = 0; run < runs; run++)); do
    rm -rf backups cinder-store/* restic borg
    mkdir backups
    our_backup
    cinder_backup "$work/volume.img"
    if [[ $compression == zstd ]]; then
      new_restic
      timed restic restic --quiet --repo restic backup volume.img
      new_borg
      timed borg borg create --compression zstd,3 borg::full volume.img
    fi
    limited "$compression"
  done
  row "full backup, $compression"
  for ((run = 0; run < runs; run++)); do
    both_restore
    if [[ $compression == zstd ]]; then
      mkdir restored
      timed restic restic --quiet --repo restic restore latest --target restored
      rm -rf restored
      mkdir restored
      timed borg env --chdir=restored borg extract --sparse "$work/borg::full"
      rm -rf restored
    fi
  done
  row "restore of a full, $compression"
}

# Cinder has no choice of the level.
full_at_level_1() {
  local run
  configure zstd 'compression_level = 1'
  for ((run = 0; run < runs; run++)); do
    rm -rf backups
    mkdir backups
    our_backup
  done
  row 'full backup, zstd at level 1'
}

both_restore() {
  ours restore --backup-id "$our_id" --target "file:$work/restored.img" "$@"
  same restored.img
  rm restored.img
  truncate --size="$(stat --format %s volume.img)" restored.img
  cinder_restore "$cinder_id" "$work/restored.img"
  same restored.img
  rm restored.img
}

# Ten incremental backups on the full ones that are there; the first ones are measured.
incrementals() {
  local run
  for ((run = 0; run < 10; run++)); do
    change "$run"
    our_backup --incremental
    cinder_backup "$work/volume.img" "$cinder_id"
    if ((run < runs)); then
      timed restic restic --quiet --repo restic backup volume.img
      timed borg borg create --compression zstd,3 "borg::$run" volume.img
      limited hash
    fi
    if ((run == runs - 1)); then row 'incremental backup, 1 % changed, zstd'; fi
  done
  seconds=() memory=()
  rm -rf restic borg
  for ((run = 0; run < runs; run++)); do both_restore; done
  row 'restore of a full and ten incrementals, zstd'
}

# A volume with data in 2 % of it.
empty() {
  local run piece size
  size=$(stat --format %s volume.img)
  rm -rf volume.img backups/* cinder-store/*
  truncate --size="$size" volume.img
  for ((piece = 0; piece < gib * 1024 / 50; piece++)); do
    dd if=/dev/urandom of=volume.img bs=1M count=1 seek=$((piece * 50)) conv=notrunc status=none
  done
  for ((run = 0; run < runs; run++)); do
    rm -rf backups cinder-store/* restic borg
    mkdir backups
    our_backup
    cinder_backup "$work/volume.img"
    new_restic
    timed restic restic --quiet --repo restic backup volume.img
    new_borg
    timed borg borg create --compression zstd,3 borg::full volume.img
  done
  row 'full backup, 98 % of it holes, zstd'
  rm -rf backups cinder-store/* restic borg
}

# What writes to the store's disk at most.
disk() {
  local began bytes
  bytes=$(stat --format %s volume.img)
  sync
  began=$EPOCHREALTIME
  dd if=volume.img of=disk bs=4M conv=fsync status=none
  printf 'A copy of the volume to the same disk, with all of it safe at the end, goes at %s MiB/s.\n' \
    "$(seconds_since "$began" | awk -v bytes="$bytes" '{ printf "%.0f", bytes / 1048576 / $1 }')"
  rm disk
}

# Opens the bucket with objects of a size, for both.
s3_stores() {
  configure zstd "[store.s3]
kind = \"s3\"
endpoint = \"$endpoint\"
access_key = \"$access\"
secret_key = \"$secret\"
bucket = \"ours-$1\"
compression = \"zstd\"
object_bytes = $1"
  start_cinder cinder.backup.drivers.s3.S3BackupDriver backup_s3_endpoint_url="$endpoint" \
    backup_s3_store_access_key="$access" backup_s3_store_secret_key="$secret" backup_s3_object_size="$1" \
    backup_s3_store_bucket="cinders-$1" backup_compression_algorithm=zstd
}

# The same of a container behind the gateway's Swift, with small objects.
swift_stores() {
  local url user key
  url=$(<"$work/ceph/swift")
  user=${url#http://} user=${user%%:*} user=${user//%3A/:}
  key=${url#http://*:} key=${key%%@*}
  url=http://${url##*@}
  configure zstd "[store.swift]
kind = \"swift\"
auth_version = 1
auth_url = \"$url\"
user = \"$user\"
password = \"$key\"
container = \"ours\"
compression = \"zstd\"
object_bytes = $1"
  start_cinder cinder.backup.drivers.swift.SwiftBackupDriver backup_swift_auth=single_user backup_swift_auth_version=1 \
    backup_swift_auth_url="$url" backup_swift_user="$user" backup_swift_key="$key" backup_swift_object_size="$1" \
    backup_swift_container=cinders backup_compression_algorithm=zstd
}

# Backs the volume up to a store that was opened for both, and deletes that.
delete_many() {
  our_backup --store "$1"
  cinder_backup "$work/volume.img"
  seconds=() memory=()
  ours delete --backup-id "$our_id" --store "$1"
  cinder_timed "{\"do\": \"delete\", \"backup_id\": \"$cinder_id\"}"
  row "$2"
}

# The same over S3, to a gateway on a private cluster, and the deletion of many objects.
over_s3() {
  local url run access secret
  # Else the cluster has the other end of its pipe, too, and it never ends.
  stop_cinder
  "$repository/dev/ceph.sh" up "$work/ceph" "bluestore block size = $((8 * gib * 1024 * mib + 8192 * mib))" >ceph.log 2>&1 ||
    die "no Ceph: $(<ceph.log)"
  url=$("$repository/dev/ceph.sh" gateway "$work/ceph")
  access=${url#http://} access=${access%%:*}
  secret=${url#http://*:} secret=${secret%%@*}
  endpoint=http://${url##*@}
  header "Over S3, to Ceph's gateway on the same machine; medians of $runs runs"
  s3_stores $cinders_object_bytes
  for ((run = 0; run < runs; run++)); do
    our_backup --store s3
    cinder_backup "$work/volume.img"
  done
  row 'full backup over S3, zstd'
  for ((run = 0; run < runs; run++)); do both_restore --store s3; done
  row 'restore of a full over S3, zstd'

  dd if=/dev/urandom of=volume.img bs=1M count=625 status=none
  s3_stores 65536
  delete_many s3 'delete of 10,000 objects on S3 (one run)'
  swift_stores 65536
  delete_many swift 'delete of 10,000 objects on Swift (one run)'
}

make_volume
mkdir cinder-store
start_cinder cinder.backup.drivers.posix.PosixBackupDriver backup_posix_path="$work/cinder-store" \
  backup_file_size=$cinders_object_bytes
header "A volume of $gib GiB, full of real files, on the posix store; medians of $runs runs"
for algorithm in zlib none; do full_and_restore $algorithm; done
full_at_level_1
full_and_restore zstd
disk_line=$(disk)
cp volume.img kept.img
incrementals
empty
printf '\n%s\n' "$disk_line"
mv kept.img volume.img
over_s3
printf '\nOn %s cores. "x" is how many times quicker Backhaul is, "of limit" its share of what all cores can do with the same\n' \
  "$(nproc)"
echo 'digests and compression on data in memory, "memory" the peak of the process. Cinder is its driver alone, in a process'
echo "that runs already. Backhaul's objects are of 16 MiB, its default, and Cinder's of 50 MiB, the default of its drivers for"
echo 'S3 and Swift; over S3 both are of 50 MiB. restic encrypts besides.'
cp figures.tsv "$target/bench-peers.tsv"
"$repository/dev/draw-figures.py" figures.tsv >"$target/bench-peers.svg"
echo "These figures are in $target/bench-peers.tsv, and drawn in $target/bench-peers.svg."
