#!/usr/bin/env bash
# Shows Backhaul at work: a volume of real files goes through the queue into a store and back, and is compared.
#   demo.sh         run it; it leaves its work folder to look at
#   demo.sh clean   remove that folder
set -euo pipefail
cd "$(dirname "$0")/.."
repository=$PWD
export LC_ALL=C
unset "${!BACKHAUL_@}" # only the demo's own configuration counts
volume_id=3f2b9c1e-7a64-4d0b-9c53-0d1f5a2b6e88
job_seconds_max=600
file_count_max=30000

bold='' dim='' plain=''
if [[ -t 1 ]]; then bold=$'\e[1m' dim=$'\e[2m' plain=$'\e[0m'; fi
step_count=0
step() { step_count=$((step_count + 1)); printf '\n%s%s. %s%s\n' "$bold" "$step_count" "$*" "$plain"; }
say() { printf '   %s\n' "$*"; }
show() { printf '   %s$ %s%s\n' "$dim" "$*" "$plain"; }
run() { show "$*"; "$@"; }
die() { printf '\n%sdemo.sh: %s%s\n' "$bold" "$*" "$plain" >&2; exit 1; }

# Chooses files for the volume: always the same ones on the same machine, and no path has to be there.
choose_files() {
  local folder bytes_max
  while read -r bytes_max folder; do
    { find "$folder" -xdev -type f -readable ! -name $'*\n*' -printf '%p\t%s\n' 2>/dev/null || true; } | sort |
      awk -F '\t' -v bytes_max="$bytes_max" -v count_max=$((file_count_max / 4)) '
        { blocks = int(($2 + 4095) / 4096) * 4096 }
        count < count_max && bytes + blocks <= bytes_max { bytes += blocks; count++; print $1 }'
  done <<END
360000000 $(rustc --print sysroot)/lib
240000000 /usr/lib
100000000 /usr/share
80000000 /usr/bin
END
}

make_volume() {
  choose_files >files
  mkdir files.d
  xargs --delimiter='\n' cp --parents --target-directory=files.d <files
  say "$(wc -l <files) files, $(du --summarize --human-readable --apparent-size files.d | cut -f1)," \
    "of the Rust toolchain, /usr/lib, /usr/share and /usr/bin"
  run truncate --size=1G volumes/volume.img
  run mkfs.ext4 -q -d files.d volumes/volume.img
  rm -rf files.d
  check_file_system volumes/volume.img
}

# Changes files in the volume as somebody who had mounted it would: new ones, and old ones gone.
change_volume() {
  {
    echo "mkdir /new"
    echo "write $(command -v backhaul) /new/backhaul"
    echo "write $repository/Cargo.lock /new/Cargo.lock"
    grep -E '^[A-Za-z0-9/._+-]+$' files | awk 'NR % 300 == 0 { print "rm " $0 }'
  } >changes
  show "debugfs -w -f changes volumes/volume.img"
  debugfs -w -f changes volumes/volume.img >debugfs.log 2>&1
  say "$(grep -c ^write changes) files written, $(grep -c ^rm changes) removed"
  check_file_system volumes/volume.img
  new_file_is_in volumes/volume.img || die "debugfs did not change the volume, see $work/debugfs.log"
}

check_file_system() {
  show "e2fsck -f -n $1"
  e2fsck -f -n "$1" >e2fsck.log 2>&1 || { cat e2fsck.log >&2; die "e2fsck finds faults in $1"; }
  say "the file system is whole: $(tail -n 1 e2fsck.log | sed 's/^[^:]*: //')"
}

new_file_is_in() {
  debugfs -R 'cat /new/backhaul' "$1" 2>/dev/null | cmp --silent - "$(command -v backhaul)"
}

# Hands a job to the queue and waits for its end; NAME.json is its completion event.
jobs=()
job() {
  local name=$1
  shift
  show "backhaul submit $* --wait --json > $name.json"
  jobs+=("$name")
  timeout --foreground "$job_seconds_max" backhaul submit "$@" --wait --json >"$name.json"
}

of() { jq --raw-output ".data.$2" "$1.json"; }

compare() {
  local was=$1 restored=$2 is
  show "sha256sum $restored"
  is=$(digest "$restored")
  say "was $was"
  say "is  $is"
  [[ $was == "$is" ]] || die "$restored differs from the volume that was backed up"
}

digest() { sha256sum "$1" | cut -d' ' -f1; }

table() {
  local name
  printf '   %-20s %8s %8s %8s %8s %10s %8s %9s %8s\n' '' volume read zero hole unchanged stored seconds MiB/s
  for name in "${jobs[@]}"; do
    # shellcheck disable=SC2046,SC2183 # each line of jq's is a column
    printf '   %-20s %8s %8s %8s %8s %10s %8s %9s %8s\n' "$name" $(
      jq --raw-output '.data
        | def tenths: . * 10 | round / 10;
          def mib: . / 1048576 | tenths;
          if .volume_bytes == null then "-" else .volume_bytes | mib end,
          (.bytes_read, .bytes_zero, .bytes_hole, .bytes_unchanged, .bytes_stored | mib),
          (.seconds * 1000 | round / 1000),
          if .volume_bytes == null or .operation == "delete" or .seconds == 0 or .error != null then "-"
          else .volume_bytes / 1048576 / .seconds | tenths end' "$name.json"
    )
  done
}

worker=
finish() {
  local status=$? tenth
  trap '' INT TERM
  if [[ -n $worker ]]; then
    kill -TERM "$worker" 2>/dev/null || true
    for ((tenth = 0; tenth < 300; tenth++)); do
      kill -0 "$worker" 2>/dev/null || break
      sleep 0.1
    done
    kill -KILL "$worker" 2>/dev/null || true
  fi
  "$repository/dev/rabbit.sh" down "$work/rabbit" >/dev/null 2>&1 || true
  if [[ $status != 0 ]]; then
    echo "The demo failed; the worker's last words, of $work/worker.log:" >&2
    tail -n 10 "$work/worker.log" >&2 || true
  fi
}

target_folder() {
  cargo metadata --locked --no-deps --format-version 1 | sed 's/.*"target_directory":"\([^"]*\)".*/\1/'
}

if [[ ${1:-} == clean ]]; then
  target=$(target_folder)
  exec rm -rf "$target"/demo{,.lock}
fi

step "Install what is missing, and build"
run dev/install.sh
run cargo build --locked --release
target=$(target_folder)
work=$target/demo
PATH=$target/release:$PATH:/usr/sbin:/sbin # mkfs.ext4 and debugfs are not in everybody's PATH

exec 9>"$work.lock"
flock --nonblock 9 || die "another demo is running"
"$repository/dev/rabbit.sh" down "$work/rabbit" >/dev/null 2>&1 || true # of a demo that was killed
rm -rf "$work"
mkdir -p "$work"/{volumes,backups}
cd "$work"
trap finish EXIT

step "Start a private RabbitMQ and a worker"
say "Work folder, where all commands from here on run: $work"
show "dev/rabbit.sh up rabbit"
"$repository/dev/rabbit.sh" up "$work/rabbit" >rabbit.log 2>&1 9>&- || { cat rabbit.log >&2; die "no broker"; }
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
show "cat backhaul.toml"
sed 's/^/   /' backhaul.toml
run backhaul check
show "backhaul worker 2> worker.log &"
backhaul worker >worker.log 2>&1 9>&- &
worker=$!

step "Make a volume of 1 GiB: ext4, full of real files"
make_volume
first=$(digest volumes/volume.img)

step "Back it up: full"
job backup-full backup --volume-id $volume_id --source "file:$work/volumes/volume.img" --name first
full=$(of backup-full backup_id)

step "Change some files in the volume"
change_volume
second=$(digest volumes/volume.img)
[[ $first != "$second" ]] || die "the volume is as before"

step "Back it up again: incremental, on the full one"
job backup-incremental backup --volume-id $volume_id --source "file:$work/volumes/volume.img" --name second --incremental
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

step "Delete the full backup: must be refused, the incremental one builds on it"
status=0
job delete-refused delete --backup-id "$full" || status=$?
[[ $status == 1 ]] || die "expected a failed job (exit code 1), got exit code $status"
say "refused, as it should be: $(of delete-refused error.message)"

step "Delete the incremental backup, then the full one"
job delete-incremental delete --backup-id "$incremental"
job delete-full delete --backup-id "$full"
run backhaul list
left=$(find backups -name 'volume_*' -print -quit)
[[ -z $left ]] || die "objects are left in the store: $left"

step "Stop the worker"
show "kill $worker"
kill -TERM "$worker"
wait "$worker" || die "the worker ended with exit code $?"
worker=

step "What was moved, in MiB, as the completion events tell it"
table
printf '\n%sBoth restored volumes are identical to the originals.%s\n' "$bold" "$plain"
echo "The work folder stays to be looked at ($(du --summarize --human-readable . | cut -f1)); make clean-demo removes it."
