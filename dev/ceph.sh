#!/usr/bin/env bash
# A private Ceph cluster of one node on loopback, for tests and trials: a monitor, a manager and an OSD, with cephx. It
# needs no root and leaves any other cluster alone.
#   dev/ceph.sh up DIR [CONF_LINE…]   start it on free ports, its files in DIR, the lines added to its ceph.conf; prints
#                                     the path of its ceph.conf. One that runs already is left as it is
#   dev/ceph.sh ceph DIR ARG…         ceph against it, as client.admin
#   dev/ceph.sh rbd DIR ARG…          rbd against it, as client.admin
#   dev/ceph.sh stop-osd DIR [ID]     stop its OSDs, or one; whoever reads or writes then waits
#   dev/ceph.sh start-osd DIR [ID]    start them again
#   dev/ceph.sh down DIR              stop it; the files stay until the next `up`
# It has the pools volumes, backups and backups2, and the users client.admin and client.cinder, which may use RBD in these
# pools; ceph.conf names the keyring of both. Such lines make another cluster of it:
#   "bluestore block size = BYTES"    how much an OSD holds, in a sparse file; 10 GiB if not said
#   "osd objectstore = memstore"      keep it in memory, up to "memstore device bytes = BYTES", 1 GiB if not said; an
#                                     OSD that is stopped has lost it all
# CEPH_OSDS is the number of OSDs, 1 if not set; there is one copy of everything, on any of them.
set -euo pipefail

pools=(volumes backups backups2)
# Files hold keys, and what the environment says may lead elsewhere.
umask 077
unset CEPH_ARGS CEPH_CONF CEPH_KEYRING

die() {
    echo "ceph.sh: $*" >&2
    exit 1
}

usage() {
    sed -n '4,17s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# Prints a port that is free, below the range that the kernel hands out itself.
free_port() {
    local port
    for _ in {1..50}; do
        port=$((20000 + RANDOM % 12000))
        if ! listens "$port"; then
            echo "$port"
            return
        fi
    done
    die "found no free port"
}

# An old pid file may name a process that is not ours; ours have the path of ceph.conf on their command line.
ours() { grep -qzxF -- "$conf" "/proc/$1/cmdline" 2>/dev/null; }

# Prints the process id of a daemon, such as osd.0, if it runs.
running() {
    local pid
    [[ -s $dir/run/$1.pid ]] || return 1
    pid=$(<"$dir/run/$1.pid")
    ours "$pid" || return 1
    echo "$pid"
}

stop() {
    local pid
    if pid=$(running "$1"); then
        kill "$pid" 2>/dev/null || true
        for _ in {1..100}; do
            ours "$pid" || break
            sleep 0.1
        done
        if ours "$pid"; then kill -9 "$pid" 2>/dev/null || true; fi
    fi
    rm -f "$dir/run/$1.pid"
}

down() {
    local osd
    # Each before the one that it talks to.
    for osd in $(osds); do stop "osd.$osd"; done
    stop mgr.x
    stop mon.a
}

# Prints the ids of all OSDs.
osds() { seq 0 $(($(<"$dir/osds") - 1)); }

start_osd() {
    if ! running "osd.$1" >/dev/null; then logged ceph-osd -c "$conf" -i "$1"; fi
}

logged() { "$@" >>"$dir/log/start.log" 2>&1 </dev/null; }

uuid() { cat /proc/sys/kernel/random/uuid; }

write_conf() {
    local fsid=$1 port=$2
    shift 2
    cat <<END
[global]
fsid = $fsid
mon host = v2:127.0.0.1:$port
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind msgr1 = false
auth allow insecure global id reclaim = false
keyring = $dir/keyring
run dir = $dir/run
# The path of a socket must be short, which that of this folder need not be.
admin socket =
mon data = $dir/mon
mgr data = $dir/mgr
osd data = $dir/osd.\$id
# Without modules the manager only counts, which quotas need; it would make a pool of its own and load much Python.
mgr module path = $dir/no-modules
mgr initial modules =
mgr stats period = 1
# One copy, on whatever OSD there is.
mon allow pool size one = true
mon allow pool delete = true
mon warn on pool no redundancy = false
mon data avail warn = 1
mon data avail crit = 1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 8
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0
# Small and quick to start: tests run two clusters beside their own work.
paxos propose interval = 0.05
mon memory autotune = false
rocksdb cache size = 33554432
bluestore block size = 10737418240
bluestore fsck on mkfs = false
bluestore cache autotune = false
bluestore cache size = 134217728
osd op num shards = 2
osd op num threads per shard = 1
osd mclock skip benchmark = true
ms async op threads = 1
debug rocksdb = 1/1
END
    if (($#)); then printf '%s\n' "$@"; fi
    cat <<END
[mon]
pid file = $dir/run/\$name.pid
log file = $dir/log/\$name.log
[mgr]
pid file = $dir/run/\$name.pid
log file = $dir/log/\$name.log
[osd]
pid file = $dir/run/\$name.pid
log file = $dir/log/\$name.log
END
}

# Makes the keys of everybody; the new monitor takes them over with what they allow.
write_keyring() {
    local osd pool rbd=()
    for pool in "${pools[@]}"; do rbd+=("profile rbd pool=$pool"); done
    ceph-authtool -C "$dir/keyring"
    key mon. --cap mon 'allow *'
    key mgr.x --cap mon 'allow profile mgr' --cap osd 'allow *'
    for osd in $(osds); do
        key "osd.$osd" --cap mon 'allow profile osd' --cap mgr 'allow profile osd' --cap osd 'allow *'
    done
    key client.admin --cap mon 'allow *' --cap mgr 'allow *' --cap osd 'allow *'
    key client.cinder --cap mon 'profile rbd' --cap mgr 'profile rbd' --cap osd "$(IFS=, && echo "${rbd[*]}")"
}

key() { ceph-authtool "$dir/keyring" --gen-key -n "$@"; }


# Starts the cluster with its monitor on `port` and waits until the pools can be written.
start() {
    local port=$1 fsid osd id pool task tasks=()
    shift
    rm -rf "$dir"/{mon,mgr,run,log,no-modules,commands,keyring,monmap,ceph.conf,ready} "$dir"/osd.*
    mkdir -p "$dir"/{mon,mgr,run,log,no-modules}
    fsid=$(uuid)
    write_conf "$fsid" "$port" "$@" >"$conf"
    logged write_keyring || return
    logged monmaptool --create --fsid "$fsid" --addv a "[v2:127.0.0.1:$port]" "$dir/monmap" || return
    for osd in $(osds); do
        mkdir "$dir/osd.$osd"
        id=$(uuid)
        echo "osd new $id $osd" >>"$dir/commands"
        logged ceph-osd -c "$conf" -i "$osd" --no-mon-config --mkfs --osd-uuid "$id" &
        tasks+=($!)
    done
    logged ceph-mon -c "$conf" -i a --mkfs --monmap "$dir/monmap" --keyring "$dir/keyring" || return
    logged ceph-mon -c "$conf" -i a || return
    logged ceph-mgr -c "$conf" -i x || return
    printf 'osd pool create %s\n' "${pools[@]}" >>"$dir/commands"
    # Nobody shall look for a reason in that the modules are missing.
    echo 'health mute MGR_MODULE_ERROR --sticky' >>"$dir/commands"
    timeout 60 ceph -c "$conf" <"$dir/commands" >>"$dir/log/start.log" 2>&1 || return
    for task in "${tasks[@]}"; do wait "$task" || return; done
    tasks=()
    for osd in $(osds); do start_osd "$osd" || return; done
    for pool in "${pools[@]}"; do
        # Waits for the OSD.
        logged timeout 120 rbd -c "$conf" pool init "$pool" &
        tasks+=($!)
    done
    for task in "${tasks[@]}"; do wait "$task" || return; done
}

up() {
    if running mon.a >/dev/null && [[ -e $dir/ready ]]; then
        echo "$conf"
        return
    fi
    for program in ceph-mon ceph-mgr ceph-osd ceph rbd; do
        command -v "$program" >/dev/null || die "no $program: install ceph-mon, ceph-mgr, ceph-osd and ceph-common"
    done
    if [[ ! -e $dir/.ceph && -n $(ls -A "$dir" 2>/dev/null) ]]; then
        die "$dir holds something else"
    fi
    mkdir -p "$dir"
    touch "$dir/.ceph"
    if [[ -e $dir/osds ]]; then down; fi
    echo "${CEPH_OSDS:-1}" >"$dir/osds"
    # Somebody may take a port between our look and the start.
    for _ in 1 2 3; do
        if start "$(free_port)" "$@"; then
            touch "$dir/ready"
            echo "$conf"
            return
        fi
        wait
        down
    done
    tail -n 40 "$dir/log/start.log" >&2
    die "the cluster did not start, see $dir/log"
}

(($# >= 2)) || usage
command=$1
dir=$(realpath -m "$2")
conf=$dir/ceph.conf
shift 2
[[ $dir != *[\#\;\$]* ]] || die "a path in ceph.conf must not have any of # ; \$: $dir"
if [[ $command != up && ! -e $dir/osds ]]; then die "nothing was started in $dir"; fi
case $command in
up) up "$@" ;;
ceph) exec ceph -c "$conf" --connect-timeout 30 "$@" ;;
rbd) exec rbd -c "$conf" "$@" ;;
stop-osd) for osd in ${1-$(osds)}; do stop "osd.$osd"; done ;;
start-osd) for osd in ${1-$(osds)}; do start_osd "$osd"; done ;;
down) down ;;
*) usage ;;
esac
