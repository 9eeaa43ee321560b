#!/usr/bin/env bash
# A private OpenStack Swift of one node on loopback, and a Keystone, for tests and trials. It needs no root, and leaves any
# other Swift alone. Both are those that dev/cinder.sh installs.
#   dev/swift.sh up DIR      start them on free ports, their files in DIR, which must be on a file system with user extended
#                            attributes; or those that do not run, on the ports and with the files that an earlier `up` has
#                            left there. Prints where to log in, as http://USER:KEY@127.0.0.1:PORT/auth/v1.0, which DIR/url
#                            has as well. DIR/hasty has the same, with tokens that are good for 2 seconds, DIR/keystone what
#                            logs in to Keystone, http://USER:PASSWORD@127.0.0.1:PORT/v3, for the project `backups` in
#                            region `here`, and DIR/application the same with an application credential. New containers have
#                            the storage policy `usual`, or `other` if that is asked for
#   dev/swift.sh down DIR [SERVER…]
#                            stop them, or only these, such as proxy; ports and files stay
set -euo pipefail
here=$(dirname "$(realpath "$0")")

servers=(memcached account container object keystone proxy hasty proxy-keystone)
# Files hold keys.
umask 077

# shellcheck source=dev/ports.sh
. "$(dirname "$(realpath "$0")")/ports.sh"

die() {
    echo "swift.sh: $*" >&2
    exit 1
}

# An old pid file may name a process that is not ours; ours have the path of their configuration on their command line.
ours() { grep -qzxF -- "$dir/$2.conf" "/proc/$1/cmdline" 2>/dev/null; }

stop() {
    local pid
    pid=$(cat "$dir/run/$1.pid" 2>/dev/null) || return 0
    if ours "$pid" "$1"; then kill "$pid" 2>/dev/null || true; fi
    for _ in {1..50}; do
        ours "$pid" "$1" || break
        sleep 0.1
    done
    if ours "$pid" "$1"; then kill -9 "$pid" 2>/dev/null || true; fi
    rm -f "$dir/run/$1.pid"
}

down() {
    local server
    for server in "$@"; do stop "$server" & done
    wait
}

all_run() {
    local server
    for server in "${servers[@]}"; do
        ours "$(cat "$dir/run/$server.pid" 2>/dev/null || echo 0)" "$server" || return
    done
}

uuid() { cat /proc/sys/kernel/random/uuid; }

# start NAME COMMAND…: starts a server, to which the path of NAME.conf is the last argument, unless it runs.
start() {
    local name=$1
    shift
    if ours "$(cat "$dir/run/$name.pid" 2>/dev/null || echo 0)" "$name"; then return; fi
    setsid "$@" "$dir/$name.conf" >>"$dir/log/$name.log" 2>&1 </dev/null &
    echo $! >"$dir/run/$name.pid"
}

# Waits until NAME takes connections on its port.
wait_for() {
    for _ in {1..600}; do
        if listens "${port[$1]}"; then return; fi
        ours "$(<"$dir/run/$1.pid")" "$1" || sleep 0.1
        kill -0 "$(<"$dir/run/$1.pid")" 2>/dev/null || return
        sleep 0.1
    done
    return 1
}

# write_server NAME PIPELINE: what all servers have.
write_server() {
    cat <<END
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = ${port[$1]}
swift_dir = $dir
devices = $dir/devices
mount_check = false
disable_fallocate = true
user = $(id -un)
workers = 0
log_level = WARNING
[pipeline:main]
pipeline = $2
END
}

write_storage() {
    write_server "$1" "$1-server"
    cat <<END
[app:$1-server]
use = egg:swift#$1
# Nobody comes later to bring listings up to date.
container_update_timeout = 60
replication_server = false
END
}

# write_proxy NAME LOGIN…: the filters that know who somebody is come with the standard input.
write_proxy() {
    local name=$1
    shift
    write_server "$name" "catch_errors gatekeeper healthcheck cache bulk $* copy slo dlo proxy-server"
    for filter in catch_errors gatekeeper healthcheck bulk copy slo dlo; do
        printf '[filter:%s]\nuse = egg:swift#%s\n' "$filter" "$filter"
        # A test dates its own writes.
        if [[ $filter == gatekeeper ]]; then echo 'shunt_inbound_x_timestamp = false'; fi
    done
    printf '[filter:cache]\nuse = egg:swift#memcache\nmemcache_servers = 127.0.0.1:%s\n' "${port[memcached]}"
    printf '[app:proxy-server]\nuse = egg:swift#proxy\naccount_autocreate = true\nnode_timeout = 60\nconn_timeout = 10\n'
    cat
}

write_tempauth() {
    cat <<END
[filter:tempauth]
use = egg:swift#tempauth
user_backup_$1 = $2 .admin
token_life = $3
fernet_key_own = $fernet
active_fernet_key_id = own
END
}

write_configuration() {
    local server
    cat >"$dir/swift.conf" <<END
[swift-hash]
swift_hash_path_suffix = $(uuid)
[storage-policy:0]
name = usual
default = yes
[storage-policy:1]
name = other
END
    for server in account container object; do write_storage "$server" >"$dir/$server.conf"; done
    write_tempauth usual "$key" 3600 | write_proxy proxy tempauth >"$dir/proxy.conf"
    write_tempauth hasty "$key" 2 | write_proxy hasty tempauth >"$dir/hasty.conf"
    write_proxy proxy-keystone authtoken keystoneauth >"$dir/proxy-keystone.conf" <<END
[filter:authtoken]
paste.filter_factory = keystonemiddleware.auth_token:filter_factory
www_authenticate_uri = http://127.0.0.1:${port[keystone]}/v3
auth_url = http://127.0.0.1:${port[keystone]}/v3
auth_type = password
username = backup
password = $key
project_name = backups
user_domain_name = Default
project_domain_name = Default
delay_auth_decision = true
# The catalog has no other endpoint of Keystone.
interface = public
[filter:keystoneauth]
use = egg:swift#keystoneauth
reseller_prefix = KEY
operator_roles = admin
END
    cat >"$dir/keystone.conf" <<END
[database]
connection = sqlite:///$dir/keystone.sqlite
[token]
expiration = 3600
[fernet_tokens]
key_repository = $dir/keystone-keys
[fernet_receipts]
key_repository = $dir/keystone-keys
[credential]
key_repository = $dir/keystone-keys
END
}

rings='
import sys
from swift.common.ring import RingBuilder
folder, account, container, storage = sys.argv[1:]
for name, port in ("account", account), ("container", container), ("object", storage), ("object-1", storage):
    builder = RingBuilder(4, 1, 1)
    builder.add_dev({"region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port), "device": "one", "weight": 1})
    builder.rebalance()
    builder.get_ring().save("%s/%s.ring.gz" % (folder, name))
'

# Storage policies are read when they are imported, which is before a server has looked into its configuration.
swift='
import os, runpy, sys
from swift.common import utils
utils.set_swift_dir(os.path.dirname(sys.argv[-1]))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
'

keystone='
import os, sys
os.environ["OS_KEYSTONE_CONFIG_FILES"] = sys.argv[2]
port = int(sys.argv.pop(1))
from keystone.server.wsgi import initialize_public_application
from werkzeug.serving import WSGIRequestHandler, run_simple
WSGIRequestHandler.protocol_version = "HTTP/1.1"
del sys.argv[1:]
run_simple("127.0.0.1", port, initialize_public_application(), threaded=True)
'

# Enters Swift into the catalog, and makes an application credential; prints its id.
catalog='
import sys
from keystoneauth1 import session
from keystoneauth1.identity import v3
from keystoneclient.v3 import client
auth_url, key, proxy = sys.argv[1:]
auth = v3.Password(auth_url=auth_url, username="backup", password=key, project_name="backups",
                   user_domain_name="Default", project_domain_name="Default")
keystone = client.Client(session=session.Session(auth=auth), endpoint_override=auth_url)
swift = keystone.services.create("swift", "object-store")
keystone.regions.create("elsewhere")
for interface, region, host in (("public", "elsewhere", "127.0.0.1:1"), ("internal", "here", "127.0.0.1:1"),
                                ("public", "here", proxy)):
    keystone.endpoints.create(swift, "http://%s/v1/KEY_%%(project_id)s" % host, interface, region)
print(keystone.application_credentials.create("tests", secret=key).id)
'

make_keystone() {
    local manage=("$python" -W ignore "$bin/keystone-manage" --config-file "$dir/keystone.conf")
    mkdir "$dir/keystone-keys"
    "${manage[@]}" db_sync || return
    "${manage[@]}" fernet_setup --keystone-user "$(id -un)" --keystone-group "$(id -gn)" || return
    "${manage[@]}" bootstrap --bootstrap-username backup --bootstrap-project-name backups --bootstrap-password "$key" \
        --bootstrap-region-id here --bootstrap-public-url "http://127.0.0.1:${port[keystone]}/v3"
}

start_keystone() {
    if [[ ! -e $dir/url ]]; then make_keystone || return; fi
    start keystone "$python" -W ignore -c "$keystone" "${port[keystone]}"
    wait_for keystone || return
    if [[ -e $dir/url ]]; then return; fi
    "$python" -W ignore -c "$catalog" "http://127.0.0.1:${port[keystone]}/v3" "$key" \
        "127.0.0.1:${port[proxy-keystone]}" >"$dir/application-id"
}

# Removes what an earlier one began, and writes what the servers need.
make() {
    down "${servers[@]}"
    rm -rf "$dir"/{devices,log,keystone-keys} "$dir"/{*.conf,*.gz,keystone.sqlite,ports,hasty,keystone,application,application-id}
    mkdir -p "$dir/devices/one" "$dir/log"
    for server in "${servers[@]}"; do port[$server]=$(free_ports 1); done
    declare -p port >"$dir/ports"
    key=$(uuid) fernet=$(head -c 32 /dev/urandom | base64 | tr +/ -_)
    write_configuration
    touch "$dir/memcached.conf"
    "$python" -W ignore -c "$rings" "$dir" "${port[account]}" "${port[container]}" "${port[object]}"
}

up() {
    local server key fernet python bin starting
    declare -A port
    if all_run && [[ -e $dir/url ]]; then
        cat "$dir/url"
        return
    fi
    if [[ ! -e $dir/.swift && -n $(ls -A "$dir" 2>/dev/null) ]]; then die "$dir holds something else"; fi
    python=$("$here/cinder.sh")
    bin=$(dirname "$python")
    mkdir -p "$dir/run"
    touch "$dir/.swift"
    if [[ -e $dir/url ]]; then
        # shellcheck source=/dev/null
        . "$dir/ports"
    else
        make
    fi
    # It reads no file: by that path on its command line it is known for ours.
    start memcached memcached --listen=127.0.0.1 --port="${port[memcached]}" --memory-limit=16 --threads=1 \
        --user="$(id -un)" -P
    start_keystone >>"$dir/log/start.log" 2>&1 </dev/null &
    starting=$!
    for server in account container object; do start "$server" "$python" -W ignore -c "$swift" "$bin/swift-$server-server"; done
    for server in proxy hasty proxy-keystone; do start "$server" "$python" -W ignore -c "$swift" "$bin/swift-proxy-server"; done
    for server in account container object proxy hasty proxy-keystone; do
        wait_for "$server" || die "$server did not start, see $dir/log/$server.log"
    done
    wait "$starting" || die "Keystone did not start, see $dir/log/start.log"
    if [[ ! -e $dir/url ]]; then tell; fi
    cat "$dir/url"
}

# Writes where to log in; $dir/url goes last, as it says that all was made.
tell() {
    echo "http://backup%3Ahasty:$key@127.0.0.1:${port[hasty]}/auth/v1.0" >"$dir/hasty"
    echo "http://backup:$key@127.0.0.1:${port[keystone]}/v3" >"$dir/keystone"
    echo "http://$(<"$dir/application-id"):$key@127.0.0.1:${port[keystone]}/v3" >"$dir/application"
    echo "http://backup%3Ausual:$key@127.0.0.1:${port[proxy]}/auth/v1.0" >"$dir/url"
}

if (($# < 2)) || [[ $# -gt 2 && $1 != down ]]; then set -- usage "${2-.}"; fi
dir=$(realpath -m "$2")
case $1 in
up) up ;;
down) if (($# > 2)); then down "${@:3}"; else down "${servers[@]}"; fi ;;
*)
    sed -n '4,12s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
