#!/usr/bin/env bash
# A private MariaDB on loopback with an empty database `cinder`, for tests and trials. It leaves any other server alone.
#   dev/mariadb.sh up DIR        start it on a free port, its files in DIR; prints the URL that cinder.conf's [database]
#                                connection takes, which DIR/url keeps. One that runs already is left as it is
#   dev/mariadb.sh sql DIR ARG…  the client against it, as root, in the database `cinder`
#   dev/mariadb.sh restart DIR   stop it, if it runs, and start it again with what is in it, on the same port
#   dev/mariadb.sh down DIR      stop it; the files stay until the next `up`
set -euo pipefail

# shellcheck source=dev/ports.sh
. "$(dirname "$(realpath "$0")")/ports.sh"

die() {
    echo "mariadb.sh: $*" >&2
    exit 1
}

usage() {
    sed -n '3,7s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

# An old pid file may name a process that is not ours.
ours() { grep -qzxF -- "--datadir=$dir/data" "/proc/$1/cmdline" 2>/dev/null; }

# Prints the server's process id if it runs.
running() {
    local pid
    [[ -s $dir/pid ]] || return 1
    pid=$(<"$dir/pid")
    ours "$pid" || return 1
    echo "$pid"
}

sql() { mariadb --no-defaults --socket="$dir/socket" --user=root "$@"; }

down() {
    local pid
    if pid=$(running); then
        kill "$pid" 2>/dev/null || true
        for _ in {1..200}; do
            ours "$pid" || break
            sleep 0.1
        done
        if ours "$pid"; then kill -9 "$pid" 2>/dev/null || true; fi
    fi
    rm -f "$dir/pid"
}

# Makes the files of an empty server.
install() {
    rm -rf "$dir"/{data,log,pid,socket,url}
    mkdir -p "$dir/log"
    mariadb-install-db --no-defaults --datadir="$dir/data" --user="$(id -un)" \
        --auth-root-authentication-method=normal --skip-test-db >"$dir/log/install.log" 2>&1
}

# Starts the server on `port` and waits until it takes connections; fails if it ends before that.
start() {
    local port=$1 user
    user=$(id -un)
    # What a power cut would take is of no worth here, and writing it out is most of the time.
    PATH=$PATH:/usr/sbin setsid mariadbd --no-defaults --datadir="$dir/data" --user="$user" --socket="$dir/socket" \
        --port="$port" --bind-address=127.0.0.1 --skip-name-resolve --pid-file="$dir/pid" \
        --innodb-flush-log-at-trx-commit=0 --innodb-buffer-pool-size=32M --performance-schema=off \
        >"$dir/log/server.log" 2>&1 </dev/null &
    local starter=$!
    for _ in {1..1200}; do
        if [[ -S $dir/socket ]] && sql -e 'SELECT 1' >/dev/null 2>&1; then return; fi
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
    command -v mariadb-install-db >/dev/null || die "no mariadb-install-db: install mariadb-server-core and mariadb-client-core"
    ((${#dir} <= 90)) || die "DIR is too long for the socket in it: $dir"
    if [[ ! -e $dir/.mariadb && -n $(ls -A "$dir" 2>/dev/null) ]]; then
        die "$dir holds something else"
    fi
    mkdir -p "$dir"
    touch "$dir/.mariadb"
    local port
    # Somebody may take a port between our look and the start.
    for _ in 1 2 3; do
        port=$(free_ports 1)
        install
        if start "$port"; then
            # Any further database too: each test has one of its own.
            sql -e "CREATE DATABASE cinder CHARACTER SET utf8mb3; CREATE USER cinder@'%' IDENTIFIED BY 'cinder';
                GRANT ALL ON *.* TO cinder@'%'"
            echo "mysql+pymysql://cinder:cinder@127.0.0.1:$port/cinder?charset=utf8mb4" | tee "$dir/url"
            return
        fi
        down
    done
    tail -n 40 "$dir"/log/*.log >&2
    die "the server did not start, see $dir/log"
}

restart() {
    local address
    [[ -s $dir/url ]] || die "nothing was started in $dir"
    address=$(<"$dir/url")
    address=${address##*@}
    address=${address%%/*}
    down
    start "${address#*:}" || die "the server did not start, see $dir/log"
}

(($# >= 2)) || usage
command=$1
dir=$(realpath -m "$2")
shift 2
case $command in
up) up ;;
sql) sql --database=cinder "$@" ;;
restart) restart ;;
down) down ;;
*) usage ;;
esac
