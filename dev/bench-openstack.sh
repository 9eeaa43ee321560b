#!/usr/bin/env bash
# Measures `backhaul cinder` beside Cinder's own backup service, each in the same place of the same control plane: how long a
# full backup of a volume of 1 GiB that holds 64 MiB takes from the request to `available`, and an incremental one in which nothing
# has changed from the cast to the service to `available`. Prints the table that stands in docs/openstack.md. Needs root, as dev/cinder-stack.sh does.
#   bench-openstack.sh [RUNS]   medians of so many runs (5)
set -euo pipefail
cd "$(dirname "$0")/.."
repository=$PWD
export LC_ALL=C PYTHONWARNINGS=ignore
unset "${!BACKHAUL_@}" CEPH_ARGS CEPH_CONF
die() { echo "bench-openstack.sh: $*" >&2; exit 1; }

runs=${1:-5}
((runs > 0)) || die "usage: bench-openstack.sh [RUNS]"

dev/install.sh test
python=$(dev/cinder.sh)
cargo build --locked --release
target=$(cargo metadata --locked --no-deps --format-version 1 | sed 's/.*"target_directory":"\([^"]*\)".*/\1/')
work=$(mktemp -d) # sockets have short paths
service_pid=''
finish() {
  stop_service
  if [[ ${API_PID-} ]]; then kill "$API_PID" 2>/dev/null || true; fi
  dev/cinder-stack.sh down "$work/stack" || true
  dev/ceph.sh down "$work/ceph" || true
  rm -rf "$work"
}
trap finish EXIT

stop_service() {
  if [[ $service_pid ]]; then
    kill -TERM -- "-$service_pid" 2>/dev/null || true
    wait "$service_pid" 2>/dev/null || true
    service_pid=''
  fi
}

# Asks the control plane for something; what it says is in `answer` then.
ask() {
  echo "$*" >&"${API[1]}"
  read -r answer <&"${API[0]}" || die "the control plane has ended: $*"
  [[ $answer == '{"ok"'* ]] || die "$*: $answer"
}

field() { jq --raw-output ".ok.$1" <<<"$answer"; }

reports() { grep "Received backup service update from $name" "$work/stack/log/scheduler.log" | grep -c "'backend_state': True" || true; }

# Starts a backup service on a host of its own, and waits until the scheduler gives it backups.
start_service() {
  local driver=$1 class=$2
  shift 2
  mkdir -p "$work/$name"
  cat >"$work/$name.conf" <<END
[DEFAULT]
host = $name
storage_availability_zone = $name
backup_driver = cinder.backup.drivers.$driver.$class
backup_posix_path = $work/$name
backup_ceph_conf = $work/ceph/ceph.conf
END
  setsid "$@" --config-file="$work/stack/cinder.conf" --config-file="$work/$name.conf" >"$work/$name.log" 2>&1 &
  service_pid=$!
  for _ in {1..600}; do
    if (($(reports) > 0)); then return; fi
    kill -0 "$service_pid" 2>/dev/null || break
    sleep 0.2
  done
  die "the service has not begun: $(tail -5 "$work/$name.log")"
}

# Makes a full backup, and prints the seconds that it took.
backup() {
  local began=$EPOCHREALTIME
  ask backup "$volume" --zone "$name"
  field id >>"$work/backups"
  ask settled "$(field id)"
  [[ $(field status) == available ]] || die "$(field fail_reason)"
  awk -v began="$began" -v ended="$EPOCHREALTIME" 'BEGIN { printf "%.2f\n", ended - began }'
}

# Makes an incremental backup, and prints the seconds from the cast to the service to its end.
timed() {
  ask time-backup "$volume" "$name" --zone "$name" --incremental
  field id >>"$work/backups"
  [[ $(field status) == available ]] || die "$answer"
  printf '%.3f\n' "$(field seconds)"
}

median() { sort -n | awk '{ a[NR] = $1 } END { print a[int((NR + 1) / 2)] }'; }

# Prints the seconds of a full backup, and the median of incremental ones.
measure() {
  local driver=$1 class=$2 full id
  shift 2
  start_service "$driver" "$class" "$@"
  ask create-volume 1
  volume=$(field id)
  rbd --conf "$work/ceph/ceph.conf" bench --io-type write --io-size 4M --io-total 64M --io-pattern seq \
    "volumes/volume-$volume" >/dev/null
  backup >"$work/full"
  full=$(<"$work/full")
  for ((run = 0; run < runs; run++)); do timed; done >"$work/incrementals"
  # A project may have ten backups.
  while read -r id; do
    ask delete "$id"
    ask settled "$id"
  done < <(tac "$work/backups")
  rm "$work/backups"
  stop_service
  echo "$full $(median <"$work/incrementals")"
}

dev/ceph.sh up "$work/ceph" >/dev/null
dev/cinder-stack.sh up "$work/stack" "$work/ceph/ceph.conf" >/dev/null
coproc API { "$repository/dev/cinder-stack.sh" api "$work/stack"; }

row() { printf '| %-34s | %8s | %8s | %8s |\n' "$@"; }
ratio() { awk -v us="$1" -v them="$2" 'BEGIN { printf "%.1f", them / us }'; }
row work Backhaul Cinder 'x Cinder'
echo '|---|---:|---:|---:|'
for driver in ceph:CephBackupDriver posix:PosixBackupDriver; do
  name=bench-ours-${driver%%:*}
  measure "${driver%%:*}" "${driver#*:}" "$target/release/backhaul" cinder >"$work/ours"
  name=bench-cinders-${driver%%:*}
  measure "${driver%%:*}" "${driver#*:}" "$python" "${python%/*}/cinder-backup" >"$work/cinders"
  read -r our_full our_incremental <"$work/ours"
  read -r cinders_full cinders_incremental <"$work/cinders"
  row "full, ${driver%%:*}" "$our_full" "$cinders_full" "$(ratio "$our_full" "$cinders_full")"
  row "nothing changed, ${driver%%:*}" "$our_incremental" "$cinders_incremental" \
    "$(ratio "$our_incremental" "$cinders_incremental")"
done
printf '\nSeconds: of a full backup from the request to "available", looked at every 0.1 s; of "nothing changed" from the cast to the
service to "available", looked at every 5 ms, the median of %s.\n' "$runs"
