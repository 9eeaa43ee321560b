#!/usr/bin/env bash
# A private OpenStack Barbican on loopback, for tests and trials, with its keys in SQLite. It needs no root, and leaves any
# other Barbican alone. Who is who the Keystone of dev/swift.sh says, whose catalog gets an entry. It comes from PyPI, and lies
# in Cargo's target folder, so that `cargo clean` removes it. Needs what `dev/install.sh test` installs.
#   dev/barbican.sh up DIR [SWIFT]
#                            start it on a free port, its files in DIR; or, if it does not run, on the port and with the keys
#                            that an earlier `up` has left there. SWIFT is the folder of dev/swift.sh, else the one that is
#                            called swift beside DIR. Prints where it is, http://127.0.0.1:PORT, which DIR/url has as well.
#                            DIR/member has what logs in to Keystone, http://USER:PASSWORD@127.0.0.1:PORT/v3, for the project
#                            `backups` with the role `member`, DIR/stranger the same for the project `strangers`, and
#                            DIR/service for `backups` with the role `service`
#   dev/barbican.sh down DIR stop it; port and files stay
set -euo pipefail
here=$(dirname "$(realpath "$0")")
# Files hold keys.
umask 077

# shellcheck source=dev/ports.sh
. "$here/ports.sh"

constraints=$here/barbican-constraints.txt
venv=$(realpath -m "${CARGO_TARGET_DIR:-$here/../target}")/barbican
python=$venv/bin/python

die() {
    echo "barbican.sh: $*" >&2
    exit 1
}

install() {
    local key
    key=$(sha256sum <"$constraints")
    mkdir -p "$(dirname "$venv")"
    exec 9>"$venv.lock"
    flock 9
    if [[ $(cat "$venv/installed" 2>/dev/null) != "$key" ]]; then
        echo "barbican.sh: installing Barbican into $venv, which takes a minute" >&2
        /usr/bin/python3 -m venv --clear "$venv" >&2
        "$python" -m pip install --quiet --disable-pip-version-check --constraint "$constraints" barbican >&2
        echo "$key" >"$venv/installed"
    fi
    exec 9>&-
}

# An old pid file may name a process that is not ours; ours has the path of its configuration on its command line.
runs() {
    local pid
    pid=$(cat "$dir/pid" 2>/dev/null) || return
    grep -qzxF -- "$dir/paste.ini" "/proc/$pid/cmdline" 2>/dev/null
}

server='
import io, sys, threading
from socketserver import ThreadingMixIn
from wsgiref.simple_server import WSGIServer, make_server
from paste import deploy


class Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


port, paste = sys.argv[1:]
del sys.argv[1:]
barbican = deploy.loadapp("config:" + paste)
turn = threading.Lock()


def one_by_one(environ, start_response):
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    environ["wsgi.input"] = io.BytesIO(body)
    # Of two transactions at once that read and then write, SQLite ends one.
    with turn:
        return [b"".join(barbican(environ, start_response))]


make_server("127.0.0.1", int(port), one_by_one, Server).serve_forever()
'

# Enters Barbican into the catalog, and makes users.
accounts='
import sys
from keystoneauth1 import session
from keystoneauth1.identity import v3
from keystoneclient.v3 import client
auth_url, key, url = sys.argv[1:]
auth = v3.Password(auth_url=auth_url, username="backup", password=key, project_name="backups",
                   user_domain_name="Default", project_domain_name="Default")
keystone = client.Client(session=session.Session(auth=auth), endpoint_override=auth_url)
for old in keystone.services.list(type="key-manager"):
    keystone.services.delete(old)
barbican = keystone.services.create("barbican", "key-manager")
for interface, region, at in (("public", "elsewhere", "http://127.0.0.1:1"), ("internal", "here", "http://127.0.0.1:1"),
                              ("public", "here", url)):
    keystone.endpoints.create(barbican, at, interface, region)
projects = {project.name: project for project in keystone.projects.list()}
users = {user.name: user for user in keystone.users.list()}
roles = {role.name: role for role in keystone.roles.list()}
for name, project, role in (("member", "backups", "member"), ("stranger", "strangers", "member"), ("service", "backups", "service")):
    of = projects.get(project) or keystone.projects.create(project, "default")
    user = users.get(name) or keystone.users.create(name, domain="default", password=key)
    keystone.roles.grant(roles[role], user=user, project=of)
'

write_configuration() {
    cat >"$dir/barbican.conf" <<END
[DEFAULT]
host_href = http://127.0.0.1:$port
db_auto_create = true
# Nothing goes over it.
transport_url = fake://
[database]
connection = sqlite:///$dir/barbican.sqlite
[simple_crypto_plugin]
kek = $(head -c 32 /dev/urandom | base64 | tr +/ -_)
END
    cat >"$dir/paste.ini" <<END
[composite:main]
use = egg:Paste#urlmap
/: versions
/v1: keys
[pipeline:versions]
pipeline = microversion versionapp
[pipeline:keys]
pipeline = authtoken context microversion keyapp
[app:versionapp]
paste.app_factory = barbican.api.app:create_version_app
[app:keyapp]
paste.app_factory = barbican.api.app:create_main_app
[filter:microversion]
paste.filter_factory = barbican.api.middleware.microversion:MicroversionMiddleware.factory
[filter:context]
paste.filter_factory = barbican.api.middleware.context:ContextMiddleware.factory
[filter:authtoken]
paste.filter_factory = keystonemiddleware.auth_token:filter_factory
www_authenticate_uri = $auth_url
auth_url = $auth_url
auth_type = password
username = backup
password = $key
project_name = backups
user_domain_name = Default
project_domain_name = Default
# The catalog has no other endpoint of Keystone.
interface = public
END
}

up() {
    local keystone auth_url key port user
    if runs && [[ -e $dir/url ]]; then
        cat "$dir/url"
        return
    fi
    if [[ ! -e $dir/.barbican && -n $(ls -A "$dir" 2>/dev/null) ]]; then die "$dir holds something else"; fi
    keystone=$(cat "$swift/keystone") || die "start Keystone first: dev/swift.sh up $swift"
    key=${keystone#http://*:} key=${key%%@*} auth_url=http://${keystone#*@}
    install
    mkdir -p "$dir"
    touch "$dir/.barbican"
    if [[ -e $dir/url ]]; then
        port=$(<"$dir/url") port=${port##*:}
    else
        rm -f "$dir/barbican.sqlite"
        port=$(free_ports 1)
        write_configuration
    fi
    # It looks for its configuration at home.
    HOME=$dir setsid "$python" -W ignore -c "$server" "$port" "$dir/paste.ini" >>"$dir/log" 2>&1 </dev/null &
    echo $! >"$dir/pid"
    for _ in {1..600}; do
        if listens "$port" || ! kill -0 "$(<"$dir/pid")" 2>/dev/null; then break; fi
        sleep 0.1
    done
    listens "$port" || die "it did not start, see $dir/log"
    if [[ ! -e $dir/url ]]; then
        "$python" -W ignore -c "$accounts" "$auth_url" "$key" "http://127.0.0.1:$port" >>"$dir/log" 2>&1 ||
            die "Keystone did not take it, see $dir/log"
        for user in member stranger service; do echo "http://$user:$key@${auth_url#http://}" >"$dir/$user"; done
        # Last, as it says that all was made.
        echo "http://127.0.0.1:$port" >"$dir/url"
    fi
    cat "$dir/url"
}

down() {
    if runs; then kill "$(<"$dir/pid")" 2>/dev/null || true; fi
    for _ in {1..50}; do
        runs || break
        sleep 0.1
    done
    if runs; then kill -9 "$(<"$dir/pid")" 2>/dev/null || true; fi
    rm -f "$dir/pid"
}

dir=$(realpath -m "${2-.}")
swift=$(realpath -m "${3-$dir/../swift}")
case "${1-} $#" in
"up 2" | "up 3") up ;;
"down 2") down ;;
*)
    sed -n '5,12s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
