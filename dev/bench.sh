#!/usr/bin/env bash
# Measures the figures that the documentation gives, and prints them as the table that stands there.
#   bench.sh sparse   a volume of 1 TiB that holds 64 MiB
#   bench.sh full     a volume of 8 GiB, full of real files
#   bench.sh jobs [N] many tiny jobs through a broker: N (2000) through one worker, and as many through four
#   bench.sh peers    beside Cinder's drivers, restic and borg, and the machine's limit; bench-peers.sh says what may follow
#   bench.sh ceph     RBD volumes on private Ceph clusters; bench-ceph.sh says what may follow
#   bench.sh openstack [N] a backup in the place of cinder-backup, beside that, from the request to its end: medians of N (5)
# Needs about 25 GB of disk below the target folder, and removes what it made.
set -euo pipefail
cd "$(dirname "$0")/.."
repository=$PWD
export LC_ALL=C
unset "${!BACKHAUL_@}"
volume_id=3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88
die() { echo "bench.sh: $*" >&2; exit 1; }

case ${1:-} in
ceph) exec dev/bench-ceph.sh "${@:2}" ;;
openstack) exec dev/bench-openstack.sh "${@:2}" ;;
peers) exec dev/bench-peers.sh "${@:2}" ;;
esac
dev/install.sh bench
cargo build --locked --release
target=$(cargo metadata --locked --no-deps --format-version 1 | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
PATH=$target/release:$PATH:/usr/sbin:/sbin
sysroot=$(rustc --print sysroot)
work=$target/bench
rm -rf "$work"
mkdir -p "$work"/{volumes,backups}
cd "$work"
finish() {
  "$repository/dev/rabbit.sh" down "$work/rabbit" >/dev/null 2>&1 || true
  cd /
  rm -rf "$work"
}
trap finish EXIT

configure() {
  printf '[worker]\nfile_roots = ["volumes"]\n[store.local]\nkind = "posix"\npath = "backups"\ncompression = "%s"\n' \
    "$1" >backhaul.toml
}

row() { printf '| %-34s | %10s | %9s | %9s | %13s | %11s |\n' "$@"; }
header() {
  printf '\n%s\n\n' "$1"
  row work 'seconds' 'MiB/s' 'cores' 'memory MiB' 'stored MiB'
  row '---' '---:' '---:' '---:' '---:' '---:'
}

# Runs one job in a process of its own, and prints its row.
measure() {
  local name=$1
  shift
  sync
  timed backhaul run "$@" --json >event.json || die "$name failed: $(jq --compact-output .data.error event.json)"
  row "$name" "$wall" "$(jq ".data.volume_bytes / 1048576 / $wall * 10 | round / 10" event.json)" "$cores" "$mib" \
    "$(jq '.data.bytes_stored / 1048576 | round' event.json)"
}

# Runs a command, and leaves its seconds, how many cores it had, and the peak of its memory in MiB.
timed() {
  local user system kib
  command time --format '%e %U %S %M' --output=usage.txt "$@" || return
  read -r wall user system kib <usage.txt
  cores=$(jq --null-input "if $wall > 0 then ($user + $system) / $wall * 100 | round / 100 else 0 end")
  mib=$(jq --null-input "$kib / 1024 | round")
}

backup() {
  measure "$1" backup --volume-id $volume_id --source "file:$work/volumes/volume.img"
  backup_id=$(jq --raw-output .data.backup_id event.json)
}

restore() {
  measure "$1" restore --backup-id "$backup_id" --target "file:$work/volumes/restored.img"
}

sparse() {
  configure zstd
  truncate --size=1T volumes/volume.img
  # 64 pieces of 1 MiB, spread over the whole volume.
  for piece in {0..63}; do
    dd if=/dev/urandom of=volumes/volume.img bs=1M count=1 seek=$((piece * 16384 + piece * 7)) conv=notrunc status=none
  done
  header "A volume of 1 TiB that holds 64 MiB, zstd"
  backup 'full backup'
  timed backhaul list >list.txt || die 'backhaul list failed'
  row 'list' "$wall" '' "$cores" "$mib" ''
  measure 'verify' verify --backup-id "$backup_id"
  restore 'restore into a new file'
  printf '\nThe volume takes %s on disk, the restored one %s, the store %s.\n' \
    "$(du --human-readable volumes/volume.img | cut -f1)" \
    "$(du --human-readable volumes/restored.img | cut -f1)" \
    "$(du --summarize --human-readable backups | cut -f1)"
  cat list.txt
  # Only where there is data can they differ: all else of both is holes, as the sizes on disk show.
  for piece in {0..63}; do
    cmp <(dd if=volumes/volume.img bs=1M count=1 skip=$((piece * 16384 + piece * 7)) status=none) \
      <(dd if=volumes/restored.img bs=1M count=1 skip=$((piece * 16384 + piece * 7)) status=none)
  done
  measure 'delete' delete --backup-id "$backup_id" >/dev/null
  rm -f volumes/*
}

full() {
  local copy algorithm
  mkdir files
  for ((copy = 0; $(du --summarize --block-size=1M files | cut -f1) < 6800; copy++)); do
    mkdir files/$copy
    { find "$sysroot" /usr -xdev -type f -readable -size -200M -printf '%s %p\n' 2>/dev/null || true; } | sort -k2 |
      awk -v left=$((7000 - $(du --summarize --block-size=1M files | cut -f1))) \
        '{ bytes += $1 + 4096 } bytes < left * 1048576 { print substr($0, index($0, " ") + 1) }' |
      xargs --delimiter='\n' cp --parents --target-directory=files/$copy
  done
  truncate --size=8G volumes/volume.img
  mkfs.ext4 -q -N 1000000 -d files volumes/volume.img
  rm -rf files
  header "A volume of 8 GiB, full of real files"
  for algorithm in zstd zlib none; do
    configure $algorithm
    backup "full backup, $algorithm"
    restore "restore into a new file, $algorithm"
    cmp volumes/volume.img volumes/restored.img || die "the restored volume differs"
    rm volumes/restored.img
    measure 'delete' delete --backup-id "$backup_id" >/dev/null
  done
  # A restore can be no faster than the disk takes what it writes.
  sync
  timed dd if=volumes/volume.img of=volumes/copy.img bs=4M conv=fsync status=none
  row 'copy to the same disk, by dd' "$wall" "$(jq --null-input "8192 / $wall * 10 | round / 10")" "$cores" "$mib" ''
  rm -f volumes/*
}

jobs() {
  local soak url
  soak=$(cd "$repository" && cargo build --locked --release --bench soak --message-format json 2>/dev/null |
    jq --raw-output 'select(.reason == "compiler-artifact" and .target.name == "soak") | .executable')
  "$repository/dev/rabbit.sh" up "$work/rabbit" >rabbit.log 2>&1 || die "no broker: $(<rabbit.log)"
  url=$(<rabbit/url)
  printf '\n%s\n\n' "Backups of a volume of 1 MiB into a folder, and their deletes, each sent when an earlier job has ended"
  echo '| workers | jobs | jobs/s | worker ms a job | memory MiB, after a tenth and at the end | open files |'
  echo '|---:|---:|---:|---:|---:|---:|'
  "$soak" "$url" "$1"
  "$repository/dev/rabbit.sh" down "$work/rabbit" >/dev/null
}

case ${1:-} in
sparse) sparse ;;
full) full ;;
jobs) jobs "${2:-2000}" ;;
*)
  sparse
  full
  jobs 2000
  ;;
esac
printf '\nOn %s cores. "cores" is processor time over wall time, "memory" the peak of the process.\n' "$(nproc)"
if (($# == 0)); then
  cd "$repository"
  dev/bench-peers.sh
  dev/bench-ceph.sh
fi
