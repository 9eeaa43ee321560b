#!/usr/bin/env bash
# A private PostgreSQL on loopback with an empty database `cinder`, for tests and trials. It leaves any other server alone.
#   dev/postgres.sh up DIR        start it on a free port; prints the URL that cinder.conf's [database] connection takes,
#                                 which DIR/url keeps. One that runs already is left as it is
#   dev/postgres.sh sql DIR ARG…  psql against it, in the database `cinder`
#   dev/postgres.sh down DIR      stop it and remove its data
# PostgreSQL does not run as root: for root it runs as `nobody`, which is why its data lie in a folder of their own below
# the system's folder for temporary files and not in DIR. POSTGRES_BIN names the folder of its programs, if it is not Debian's.
set -euo pipefail

# shellcheck source=dev/ports.sh
. "$(dirname "$(realpath "$0")")/ports.sh"

die() {
    echo "postgres.sh: $*" >&2
    exit 1
}

usage() {
    sed -n '3,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

# What a command begins with that root would run as somebody else.
privilege=()
if [[ $EUID == 0 ]]; then
    privilege=(setpriv --reuid=nobody --regid=nogroup --clear-groups --)
fi

# An old pid file may name a process that is not ours.
ours() { grep -qzxF -- "$data" "/proc/$1/cmdline" 2>/dev/null; }

# Prints the server's process id if it runs, and knows where its data are.
running() {
    local pid
    [[ -s $dir/data ]] || return 1
    data=$(<"$dir/data")
    [[ -s $data/postmaster.pid ]] || return 1
    pid=$(head -n 1 "$data/postmaster.pid")
    ours "$pid" || return 1
    echo "$pid"
}

down() {
    local pid data
    [[ -s $dir/data ]] || return 0
    data=$(<"$dir/data")
    if pid=$(running); then
        kill -INT "$pid" 2>/dev/null || true # ends the connections there are
        for _ in {1..200}; do
            ours "$pid" || break
            sleep 0.1
        done
        if ours "$pid"; then kill -9 "$pid" 2>/dev/null || true; fi
    fi
    rm -rf "$data" "$dir/data"
}

# Starts the server on `port` and waits until it takes connections; fails if it ends before that.
start() {
    local port=$1 data
    rm -rf "$dir"/{log,url}
    mkdir -p "$dir/log"
    data=$("${privilege[@]}" mktemp -d "${TMPDIR:-/tmp}/backhaul-postgres.XXXXXX")
    echo "$data" >"$dir/data"
    (cd / && "${privilege[@]}" "$bin/initdb" --pgdata="$data" --username=cinder --auth=trust --encoding=UTF8 --locale=C \
        --no-sync --no-instructions) >"$dir/log/install.log" 2>&1
    # What a power cut would take is of no worth here, and writing it out is most of the time.
    (cd / && exec setsid "${privilege[@]}" "$bin/postgres" -D "$data" -p "$port" -k '' -c listen_addresses=127.0.0.1 \
        -c fsync=off -c full_page_writes=off -c shared_buffers=32MB) >"$dir/log/server.log" 2>&1 </dev/null &
    local starter=$!
    for _ in {1..1200}; do
        if psql "postgresql://cinder@127.0.0.1:$port/postgres" -qc 'SELECT 1' >/dev/null 2>&1; then return; fi
        if ! kill -0 "$starter" 2>/dev/null; then return 1; fi
        sleep 0.1
    done
    return 1
}

up() {
    if running >/dev/null; then
        cat "$dir/url"
        return
    fi
    bin=${POSTGRES_BIN:-$(find /usr/lib/postgresql -mindepth 2 -maxdepth 2 -name bin 2>/dev/null | sort -V | tail -n 1)}
    [[ -n $bin && -x $bin/initdb ]] || die "no initdb: install postgresql, or set POSTGRES_BIN"
    if [[ ! -e $dir/.postgres && -n $(ls -A "$dir" 2>/dev/null) ]]; then
        die "$dir holds something else"
    fi
    mkdir -p "$dir"
    touch "$dir/.postgres"
    local port
    # Somebody may take a port between our look and the start.
    for _ in 1 2 3; do
        port=$(free_ports 1)
        if start "$port"; then
            psql "postgresql://cinder@127.0.0.1:$port/postgres" -qc 'CREATE DATABASE cinder'
            echo "postgresql+psycopg2://cinder:cinder@127.0.0.1:$port/cinder" | tee "$dir/url"
            return
        fi
        down
    done
    tail -n 40 "$dir"/log/*.log >&2
    die "the server did not start, see $dir/log"
}

(($# >= 2)) || usage
command=$1
dir=$(realpath -m "$2")
shift 2
case $command in
up) up ;;
sql) psql "$(sed 's/+psycopg2//' "$dir/url")" "$@" ;;
down) down ;;
*) usage ;;
esac
