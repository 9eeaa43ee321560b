# What the demos have in common: how they talk, the volume of real files, jobs through the queue, and the end of it all.
# shellcheck shell=bash
# Sourced by dev/demo.sh and dev/demo-ceph.sh, from the folder of the repository.

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
die() { printf '\n%s%s: %s%s\n' "$bold" "${0##*/}" "$*" "$plain" >&2; exit 1; }

target_folder() {
  cargo metadata --locked --no-deps --format-version 1 | sed 's/.*"target_directory":"\([^"]*\)".*/\1/'
}

# Builds, and goes to an empty work folder of that name, where no other demo is.
begin() {
  run cargo build --locked --release
  work=$(target_folder)/$1
  PATH=${work%/*}/release:$PATH:/usr/sbin:/sbin # mkfs.ext4 and debugfs are not in everybody's PATH
  exec 9>"$work.lock"
  flock --nonblock 9 || die "another demo is running"
  stop_services # of a demo that was killed
  rm -rf "$work"
  mkdir -p "$work"
  cd "$work" || exit
  trap finish EXIT
}

start_broker() {
  show "dev/rabbit.sh up rabbit"
  "$repository/dev/rabbit.sh" up "$work/rabbit" >rabbit.log 2>&1 9>&- || { cat rabbit.log >&2; die "no broker"; }
}

worker=
start_worker() {
  show "cat backhaul.toml"
  sed 's/^/   /' backhaul.toml
  run backhaul check
  show "backhaul worker 2> worker.log &"
  backhaul worker >worker.log 2>&1 9>&- &
  worker=$!
}

stop_worker() {
  show "kill $worker"
  kill -TERM "$worker"
  wait "$worker" || die "the worker ended with exit code $?"
  worker=
}

stop_services() {
  "$repository/dev/rabbit.sh" down "$work/rabbit" >/dev/null 2>&1 || true
  "$repository/dev/ceph.sh" down "$work/ceph" >/dev/null 2>&1 || true
}

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
  stop_services
  if [[ $status != 0 ]]; then
    echo "The demo failed; the worker's last words, of $work/worker.log:" >&2
    tail -n 10 "$work/worker.log" >&2 || true
  fi
}

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

# Makes an ext4 of 1 GiB in a new file.
make_file_system() {
  choose_files >files
  mkdir files.d
  xargs --delimiter='\n' cp --parents --target-directory=files.d <files
  say "$(wc -l <files) files, $(du --summarize --human-readable --apparent-size files.d | cut -f1)," \
    "of the Rust toolchain, /usr/lib, /usr/share and /usr/bin"
  run truncate --size=1G "$1"
  run mkfs.ext4 -q -d files.d "$1"
  rm -rf files.d
  check_file_system "$1"
}

# Changes files as somebody who had mounted the file system would: new ones, and old ones gone.
change_file_system() {
  {
    echo "mkdir /new"
    echo "write $(command -v backhaul) /new/backhaul"
    echo "write $repository/Cargo.lock /new/Cargo.lock"
    grep -E '^[A-Za-z0-9/._+-]+$' files | awk 'NR % 300 == 0 { print "rm " $0 }'
  } >changes
  show "debugfs -w -f changes $1"
  debugfs -w -f changes "$1" >debugfs.log 2>&1
  say "$(grep -c ^write changes) files written, $(grep -c ^rm changes) removed"
  check_file_system "$1"
  new_file_is_in "$1" || die "debugfs did not change the file system, see $work/debugfs.log"
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

backup() {
  local name=$1
  shift
  job "$name" backup --volume-id $volume_id "$@"
}

of() { jq --raw-output ".data.$2" "$1.json"; }

digest() { sha256sum "$1" | cut -d' ' -f1; }

same() {
  say "was $1"
  say "is  $2"
  [[ $1 == "$2" ]] || die "$3 differs from the volume that was backed up"
}

# Deletes both backups, and tries to do it in the wrong order.
delete_both() {
  local full=$1 incremental=$2 status=0
  step "Delete the full backup: must be refused, the incremental one builds on it"
  job delete-refused delete --backup-id "$full" || status=$?
  [[ $status == 1 ]] || die "expected a failed job (exit code 1), got exit code $status"
  say "refused, as it should be: $(of delete-refused error.message)"

  step "Delete the incremental backup, then the full one"
  job delete-incremental delete --backup-id "$incremental"
  job delete-full delete --backup-id "$full"
  run backhaul list
}

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

# The last words; $1 says what is identical to the originals.
bye() {
  step "What was moved, in MiB, as the completion events tell it"
  table
  printf '\n%s%s identical to the originals.%s\n' "$bold" "$1" "$plain"
  echo "The work folder stays to be looked at ($(du --summarize --human-readable . | cut -f1)); make clean-demo removes it."
}
