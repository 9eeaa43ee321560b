#!/usr/bin/env bash
# Runs every test, and those once more without the feature `ceph` that it may change, against a RabbitMQ, an OpenStack Swift
# with a Keystone and a Barbican, emulators of Google Cloud Storage, a MariaDB and a PostgreSQL, and two Ceph clusters of its
# own, one of them with a gateway for S3 and Swift, which it stops at the end, and with OpenStack's Cinder. What is of
# OpenStack, and the emulators, dev/cinder.sh installs, but for Barbican.
# Tests that this machine cannot run are left out, and it says so at its end.
# Arguments go to `cargo nextest run`, such as: -E 'test(restore)'
set -euo pipefail
cd "$(dirname "$0")/.."

dev/install.sh test

work=$(mktemp -d)
left_out=()
finish() {
  ((${#left_out[@]} == 0)) || printf 'test.sh: left out: %s\n' "${left_out[@]}" >&2
  wait # what still starts cannot be stopped
  if [[ -e $work/stack ]]; then dev/cinder-stack.sh down "$work/stack" || true; fi
  dev/ceph.sh down "$work/ceph-1" || true
  dev/ceph.sh down "$work/ceph-2" || true
  dev/barbican.sh down "$work/barbican" || true
  dev/swift.sh down "$work/swift" || true
  dev/gcs.sh down "$work/gcs" || true
  dev/rabbit.sh down "$work/rabbit" || true
  dev/mariadb.sh down "$work/mariadb" || true
  dev/postgres.sh down "$work/postgres" || true
  rm -rf "$work"
}
trap finish EXIT

free_gib=$(df --output=avail --block-size=1G "$work" | tail -1)
if ((free_gib < 28)); then
  echo "test.sh: $((free_gib)) GiB are free below $work: the tests take 18 there, and what is built and installed 10 in target" >&2
fi

unfit=() # the filters of those tests
truncate -s 1M "$work/device"
if device=$(PATH=$PATH:/usr/sbin losetup --find --show "$work/device"); then
  PATH=$PATH:/usr/sbin losetup --detach "$device"
else
  unfit+=('test(block_device)' 'test(/^brick::a_volume_on_a_share/)' 'test(/^openstack_shares::/)'
    'test(/goes_on_where_we_stopped.*nfs/)' 'test(/fails_in_the_middle_leaves_nothing_behind.*posix/)')
  left_out+=('block devices and mounts: losetup gives no block devices here, mostly because it wants root')
fi
own_mounts=(unshare --mount)
[[ $(id -u) == 0 ]] || own_mounts=(unshare --user --map-root-user --mount)
if ! "${own_mounts[@]}" mount -t tmpfs none "$work"; then
  unfit+=('test(/^damage::a_full_disk_is_told|^damage::a_restore_into_another_mount|^bad_input::a_backup_that_does_not_fit/)')
  left_out+=('full disks and mounts of a store: who runs this may mount nothing here, as in most containers')
fi
if [[ $(dpkg --print-architecture) != amd64 ]]; then
  unfit+=('test(/^nfs::(a_share|of_two)/)')
  left_out+=('shares of an NFS server: what starts a Linux with NFS is there for amd64 only')
fi
if [[ $(id -u) != 0 ]]; then
  unfit+=('test(/^openstack(_bugs|_http|_shares|_states)?::/)'
    'test(/^encrypted::(each_backup|a_volume|what_cannot_be_done|a_restore_that|a_chain)/)')
  left_out+=("the worker in the place of cinder-backup: Cinder's volume service wants root here")
fi
{
  echo '[profile.here]'
  printf "default-filter = 'not (none()"
  ((${#unfit[@]} == 0)) || printf ' + %s' "${unfit[@]}"
  echo ")'"
} >"$work/nextest.toml"
nextest=(cargo nextest run --locked --tool-config-file "test:$work/nextest.toml" --profile here)

# The clusters start, and what is of OpenStack is installed and started, while the tests are built.
{
  dev/cinder.sh >"$work/cinder" && dev/swift.sh up "$work/swift" >/dev/null && dev/gcs.sh up "$work/gcs" >/dev/null &&
    dev/barbican.sh up "$work/barbican" "$work/swift" >/dev/null
} &
openstack=$!
# What tests leave there is more than the usual 10 GiB.
dev/ceph.sh up "$work/ceph-1" "bluestore block size = $((30 << 30))" >/dev/null &
first_cluster=$!
dev/ceph.sh up "$work/ceph-2" >/dev/null &
second_cluster=$!
dev/rabbit.sh up "$work/rabbit" >&2
BACKHAUL_TEST_MARIADB=$(dev/mariadb.sh up "$work/mariadb")
BACKHAUL_TEST_POSTGRES=$(dev/postgres.sh up "$work/postgres")
export BACKHAUL_TEST_MARIADB BACKHAUL_TEST_POSTGRES
wait "$first_cluster"
dev/ceph.sh gateway "$work/ceph-1" >/dev/null
BACKHAUL_TEST_AMQP_URL=$(<"$work/rabbit/url")
BACKHAUL_TEST_S3=$(<"$work/ceph-1/s3")
BACKHAUL_TEST_S3_TLS=$(<"$work/ceph-1/s3-tls")
export BACKHAUL_TEST_AMQP_URL BACKHAUL_TEST_S3 BACKHAUL_TEST_S3_TLS BACKHAUL_TEST_S3_CA=$work/ceph-1/ca.pem
export BACKHAUL_TEST_GCS=$work/gcs BACKHAUL_TEST_SWIFT=$work/swift BACKHAUL_TEST_SWIFT_GATEWAY=$work/ceph-1/swift
export BACKHAUL_TEST_BARBICAN=$work/barbican

# Most tests wait for a server for longer than they compute; more at once would only wait for each other.
threads=$((2 * $(nproc)))
export NEXTEST_TEST_THREADS=${NEXTEST_TEST_THREADS:-$((threads < 8 ? threads : 8))}

"${nextest[@]}" --no-default-features --no-run
wait "$openstack"
BACKHAUL_TEST_CINDER=$(<"$work/cinder")
export BACKHAUL_TEST_CINDER
echo "test.sh: without the feature ceph" >&2
# What talks to object stores, the broker's details, what others see there and people on a terminal, Cinder's files and database,
# and all that holds the chunked engine against a model or breaks it call by call is the same code with the feature, and is
# tested there.
same='test(/^(stores|s3|swift|gcs|nfs|faults|broker|oslo|cinder_conf|cinder_database|cinder_fixtures|export_record|terminal|wire)::/)'
same+=' or test(/^(model|life_model|damage|resume|interrupted)::/)'
filter=("$@")
if (($# == 0)); then filter=(-E "not ($same)"); fi
"${nextest[@]}" --no-default-features "${filter[@]}"

wait "$second_cluster"
export BACKHAUL_TEST_CEPH_CONF=$work/ceph-1/ceph.conf BACKHAUL_TEST_CEPH_CONF_2=$work/ceph-2/ceph.conf
if [[ $(id -u) == 0 ]]; then
  dev/cinder-stack.sh up "$work/stack" "$work/ceph-1/ceph.conf" >/dev/null
  export BACKHAUL_TEST_CINDER_STACK=$work/stack
fi
echo "test.sh: with all features" >&2
"${nextest[@]}" "$@"
