#!/usr/bin/env bash
# A private Ceph cluster of one node on loopback, for tests and trials: a monitor, a manager and an OSD, with cephx. It
# needs no root and leaves any other cluster alone.
#   dev/ceph.sh up DIR [CONF_LINE…]   start it on free ports, its files in DIR, the lines added to its ceph.conf; prints
#                                     the path of its ceph.conf. One that runs already is left as it is
#   dev/ceph.sh ceph DIR ARG…         ceph against it, as client.admin
#   dev/ceph.sh rbd DIR ARG…          rbd against it, as client.admin
#   dev/ceph.sh stop-osd DIR [ID]     stop its OSDs, or one; whoever reads or writes then waits
#   dev/ceph.sh start-osd DIR [ID]    start them again
#   dev/ceph.sh gateway DIR           start a gateway for S3 and Swift beside it; prints where S3 is, as
#                                     http://ACCESS_KEY:SECRET_KEY@127.0.0.1:PORT, which DIR/s3 has as well; DIR/s3-tls
#                                     has the same with TLS, DIR/ca.pem the authority for that, and DIR/swift what Swift's
#                                     own way to log in needs
#   dev/ceph.sh stop-gateway DIR      stop the gateway; `gateway` starts it again, on the same port
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

# shellcheck source=dev/ports.sh
. "$(dirname "$(realpath "$0")")/ports.sh"

die() {
    echo "ceph.sh: $*" >&2
    exit 1
}

usage() {
    sed -n '4,22s/^# \{0,1\}//p' "$0" >&2
    exit 2
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
    stop client.rgw
    for osd in $(osds); do stop "osd.$osd"; done
    stop mgr.x
    stop mon.a
}

# Prints the ids of all OSDs.
osds() { seq 0 $(($(<"$dir/osds") - 1)); }

# Makes an authority and a certificate of it for the gateway.
write_certificate() {
    local key=(-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes)
    openssl req -x509 "${key[@]}" -days 30 -subj /CN=authority -keyout "$dir/rgw/ca.key" -out "$dir/ca.pem" || return
    openssl req "${key[@]}" -subj /CN=gateway -keyout "$dir/rgw/key.pem" -out "$dir/rgw/request.pem" || return
    openssl x509 -req -in "$dir/rgw/request.pem" -days 30 -CA "$dir/ca.pem" -CAkey "$dir/rgw/ca.key" -CAcreateserial \
        -extfile <(echo subjectAltName=IP:127.0.0.1) -out "$dir/rgw/certificate.pem"
}

# The ports of the gateway, without and with TLS, stay the same for as long as the cluster is there, so that it can be
# stopped and started again.
start_gateway() {
    local port=$1 tls=$2 certificate
    certificate="ssl_certificate=$dir/rgw/certificate.pem ssl_private_key=$dir/rgw/key.pem"
    logged radosgw -c "$conf" -n client.rgw --rgw-data="$dir/rgw" \
        --rgw-frontends="beast endpoint=127.0.0.1:$port ssl_endpoint=127.0.0.1:$tls $certificate" \
        --pid-file="$dir/run/client.rgw.pid" --log-file="$dir/log/client.rgw.log" || return
    # It says that it runs before it is so.
    for _ in {1..300}; do
        if running client.rgw >/dev/null && listens "$port" && listens "$tls"; then return; fi
        sleep 0.1
    done
    return 1
}

gateway() {
    local port tls key secret swift
    for program in radosgw openssl; do command -v "$program" >/dev/null || die "no $program: install it"; done
    running mon.a >/dev/null || die "no cluster runs in $dir"
    if running client.rgw >/dev/null; then
        cat "$dir/s3"
        return
    fi
    if [[ -e $dir/s3 ]]; then
        start_gateway "$(sed 's/.*://' "$dir/s3")" "$(sed 's/.*://' "$dir/s3-tls")" || die "the gateway did not start, see $dir/log"
        cat "$dir/s3"
        return
    fi
    mkdir -p "$dir/rgw"
    logged write_certificate || die "no certificate for the gateway was made, see $dir/log/start.log"
    # Somebody may take a port between our look and the start.
    for _ in 1 2 3; do
        port=$(free_ports 1) tls=$(free_ports 1)
        if start_gateway "$port" "$tls"; then break; fi
        stop client.rgw
        port=
    done
    [[ -n $port ]] || die "the gateway did not start, see $dir/log"
    key=$(uuid) secret=$(uuid) swift=$(uuid)
    logged radosgw-admin -c "$conf" user create --uid backup --display-name backup \
        --access-key "$key" --secret-key "$secret" || die "no user of the gateway was made, see $dir/log/start.log"
    logged radosgw-admin -c "$conf" subuser create --uid backup --subuser backup:swift --access full \
        --key-type swift --secret-key "$swift" || die "no user of the gateway was made, see $dir/log/start.log"
    echo "http://backup%3Aswift:$swift@127.0.0.1:$port/auth/v1.0" >"$dir/swift"
    echo "https://$key:$secret@127.0.0.1:$tls" >"$dir/s3-tls"
    echo "http://$key:$secret@127.0.0.1:$port" >"$dir/s3"
    cat "$dir/s3"
}

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
# It keeps little, for an hour: a disk that is rather full is no reason not to start.
mon data avail warn = 0
mon data avail crit = 0
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
[client.rgw]
# So that keys of customers can be tried without TLS.
rgw crypt require ssl = false
rgw thread pool size = 64
# BUCKET.s3.test is a bucket.
rgw dns name = s3.test
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
    key client.rgw --cap mon 'allow rw' --cap mgr 'allow rw' --cap osd 'allow rwx'
    key client.cinder --cap mon 'profile rbd' --cap mgr 'profile rbd' --cap osd "$(IFS=, && echo "${rbd[*]}")"
}

key() { ceph-authtool "$dir/keyring" --gen-key -n "$@"; }


# Starts the cluster with its monitor on `port` and waits until the pools can be written.
start() {
    local port=$1 fsid osd id pool task tasks=()
    shift
    rm -rf "$dir"/{mon,mgr,rgw,run,log,no-modules,commands,keyring,monmap,ceph.conf,ready,s3,s3-tls,ca.pem,swift} "$dir"/osd.*
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
        if start "$(free_ports 1)" "$@"; then
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
gateway) gateway ;;
stop-gateway) stop client.rgw ;;
down) down ;;
*) usage ;;
esac
