#!/usr/bin/env bash
# The control plane of OpenStack's Cinder, but for its backup service, on loopback, for tests and trials: cinder-api without
# Keystone, which believes whoever asks, cinder-scheduler, cinder-volume on RBD, and a MariaDB and a RabbitMQ of their own.
# dev/cinder.sh installs Cinder. DIR/url names the API, such as for python-cinderclient. Where file systems can be mounted,
# cinder-volume has a share of an NFS server, too, in the availability zone nfs: one in memory, with a share's name.
#   dev/cinder-stack.sh up DIR CEPH_CONF    start it, its files in DIR, with the volumes in a cluster of dev/ceph.sh;
#                                           prints the path of its cinder.conf. One that runs already is left as it is
#   dev/cinder-stack.sh api DIR             take requests as the HTTP API does, one a line, and more; see dev/cinder-api
#   dev/cinder-stack.sh down DIR            stop all; the files stay until the next `up`
# It needs root: whoever attaches an RBD volume of Cinder takes the key from /etc/ceph, where `up` puts one in a file with a
# name of its own, and `down` removes it.
set -euo pipefail
umask 077

here=$(dirname "$(realpath "$0")")
# shellcheck source=dev/ports.sh
. "$here/ports.sh"

die() {
    echo "cinder-stack.sh: $*" >&2
    exit 1
}

usage() {
    sed -n '5,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

# An old pid file may name a process that is not ours; ours have the path of cinder.conf on their command line.
ours() { grep -qzxF -- "--config-file=$conf" "/proc/$1/cmdline" 2>/dev/null; }

# Prints the process id of a service, such as volume, if it runs.
running() {
    local pid
    [[ -s $dir/run/$1.pid ]] || return 1
    pid=$(<"$dir/run/$1.pid")
    ours "$pid" || return 1
    echo "$pid"
}

# Each in a session of its own, so that its own processes end with it.
start() {
    local program=${2:-${python%/*}/cinder-$1}
    PYTHONWARNINGS=ignore PATH=$PATH:/usr/sbin:/sbin setsid "$python" "$program" --config-file="$conf" >"$dir/log/$1.log" 2>&1 </dev/null &
    echo $! >"$dir/run/$1.pid"
    disown
}

stop() {
    local pid
    if pid=$(running "$1"); then
        kill "$pid" 2>/dev/null || true
        for _ in {1..100}; do
            ours "$pid" || break
            sleep 0.1
        done
        kill -9 -- "-$pid" 2>/dev/null || true
    fi
    rm -f "$dir/run/$1.pid"
}

# Waits until the scheduler has heard of a backend of the volume service, as long as that runs.
await_report() {
    for _ in {1..600}; do
        if grep -q "Received volume service update from .*node1@$1" "$dir/log/scheduler.log"; then return; fi
        running volume >/dev/null || break
        sleep 0.2
    done
    tail -n 20 "$dir/log/volume.log" >&2
    die "cinder-volume did not start, see $dir/log"
}

# Starts the HTTP API and waits until it can be asked.
start_api() {
    local port=$1
    start api
    for _ in {1..600}; do
        if listens "$port"; then
            echo "http://127.0.0.1:$port/v3" >"$dir/url"
            return
        fi
        running api >/dev/null || break
        sleep 0.2
    done
    tail -n 20 "$dir/log/api.log" >&2
    die "cinder-api did not start, see $dir/log"
}

# Starts what takes requests for others, each of which would else be seconds at loading Cinder.
start_requests() {
    start requests "$here/cinder-api"
    for _ in {1..600}; do
        if [[ -S $dir/requests ]]; then return; fi
        running requests >/dev/null || break
        sleep 0.2
    done
    tail -n 20 "$dir/log/requests.log" >&2
    die "dev/cinder-api did not start, see $dir/log"
}

# Mounts something under the name of a share, where cinder-volume would mount the share, and says which; nothing where that cannot be.
mount_share() {
    local share folder
    share=127.0.0.1:/$(<"$dir/cluster")
    folder=$dir/nfs/$(printf %s "$share" | md5sum | cut -d' ' -f1)
    mkdir -p "$folder"
    if mount -t tmpfs -o size=8g "$share" "$folder" 2>/dev/null; then echo "$folder"; fi
}

write_conf() {
    local rabbit=$1 database=$2 ceph_conf=$3 port=$4 backends=rbd1
    if [[ -s $dir/share ]]; then backends=rbd1,nfs1; fi
    cat <<END
[DEFAULT]
host = node1
my_ip = 127.0.0.1
state_path = $dir/state
storage_availability_zone = nova
transport_url = ${rabbit/amqp:/rabbit:}
enabled_backends = $backends
default_volume_type = __DEFAULT__
auth_strategy = noauth
api_paste_config = ${python%/bin/*}/etc/cinder/api-paste.ini
osapi_volume_listen = 127.0.0.1
osapi_volume_listen_port = $port
osapi_volume_workers = 1
# Tests must not wait long for a word of each other.
report_interval = 2
periodic_interval = 5
periodic_fuzzy_delay = 0
backup_driver_stats_polling_interval = 10
graceful_shutdown_timeout = 5
debug = true
[rbd1]
volume_driver = cinder.volume.drivers.rbd.RBDDriver
volume_backend_name = rbd1
rbd_pool = volumes
rbd_ceph_conf = $ceph_conf
rbd_user = cinder
rbd_cluster_name = $(<"$dir/cluster")
# The scheduler would refuse more volumes than this many times what is free.
max_over_subscription_ratio = 1000
[nfs1]
volume_driver = cinder.volume.drivers.nfs.NfsDriver
volume_backend_name = nfs1
backend_availability_zone = nfs
nas_host = 127.0.0.1
nas_share_path = /$(<"$dir/cluster")
nas_secure_file_operations = false
nas_secure_file_permissions = false
nfs_mount_point_base = $dir/nfs
[database]
connection = $database
[oslo_concurrency]
lock_path = $dir/locks
[coordination]
backend_url = file://$dir/coordination
[oslo_messaging_notifications]
driver = messagingv2
[privsep_osbrick]
helper_command = $python ${python%/*}/privsep-helper --config-file=$conf
[cinder_sys_admin]
helper_command = $python ${python%/*}/privsep-helper --config-file=$conf
END
}

up() {
    local ceph_conf rabbit database name port
    ceph_conf=$(realpath "$1")
    if running volume >/dev/null && [[ -e $dir/ready ]]; then
        echo "$conf"
        return
    fi
    [[ $(id -u) == 0 ]] || die "it needs root, for a file in /etc/ceph"
    if [[ ! -e $dir/.cinder && -n $(ls -A "$dir" 2>/dev/null) ]]; then
        die "$dir holds something else"
    fi
    mkdir -p "$dir" /etc/ceph
    touch "$dir/.cinder"
    if [[ -e $dir/cluster ]]; then down; fi
    rm -rf "$dir"/{run,log,state,locks,coordination,ready,url,requests}
    mkdir -p "$dir"/{run,log,state,locks,coordination}
    "$here/cinder.sh" >"$dir/python"
    python=$(<"$dir/python")
    rabbit=$("$here/rabbit.sh" up "$dir/rabbit")
    database=$("$here/mariadb.sh" up "$dir/mariadb")
    # A name that no other cluster has.
    name=${rabbit##*:}
    echo "backhaul-${name%%/*}" >"$dir/cluster"
    port=$(free_ports 1)
    ceph-authtool "${ceph_conf%/*}/keyring" -n client.cinder --print-key |
        sed '1s/^/[client.cinder]\n\tkey = /' >"/etc/ceph/$(<"$dir/cluster").client.cinder.keyring"
    mount_share >"$dir/share"
    write_conf "$rabbit" "$database" "$ceph_conf" "$port" >"$conf"
    PYTHONWARNINGS=ignore "$python" "${python%/*}/cinder-manage" --config-file="$conf" db sync >"$dir/log/sync.log" 2>&1 ||
        die "the tables were not made, see $dir/log/sync.log"
    start scheduler
    start volume
    start_api "$port"
    start_requests
    await_report rbd1
    if [[ -s $dir/share ]]; then await_report nfs1; fi
    touch "$dir/ready"
    echo "$conf"
}

down() {
    stop requests
    stop api
    stop volume
    stop scheduler
    rm -f "/etc/ceph/$(<"$dir/cluster").client.cinder.keyring"
    if [[ -s $dir/share ]] && mountpoint --quiet "$(<"$dir/share")"; then umount --lazy "$(<"$dir/share")"; fi
    "$here/rabbit.sh" down "$dir/rabbit" || true
    "$here/mariadb.sh" down "$dir/mariadb" || true
}

(($# >= 2)) || usage
command=$1
dir=$(realpath -m "$2")
conf=$dir/cinder.conf
shift 2
if [[ $command != up ]]; then
    [[ -e $dir/cluster ]] || die "nothing was started in $dir"
    python=$(<"$dir/python")
fi
case "$command $#" in
"up 1") up "$@" ;;
"api 0") exec "$python" "$here/cinder-api" "$dir/requests" ;;
"down 0") down ;;
*) usage ;;
esac
