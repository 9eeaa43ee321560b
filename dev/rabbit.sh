#!/usr/bin/env bash
# A private RabbitMQ node on loopback, for tests and trials. It needs no root and leaves any other broker alone.
#   dev/rabbit.sh up DIR [CONF_LINE…]   start it on free ports, its files in DIR, the lines added to its rabbitmq.conf;
#                                       prints the AMQP URL, which DIR/url keeps. One that runs already is left as it is
#   dev/rabbit.sh ctl DIR ARG…          rabbitmqctl against it
#   dev/rabbit.sh down DIR              stop it; the files stay until the next `up`
# RABBITMQ_BIN names the folder of RabbitMQ's own scripts, if it is not Debian's /usr/lib/rabbitmq/bin.
set -euo pipefail

# Not the wrappers in PATH, which change the user and read /etc/rabbitmq.
bin=${RABBITMQ_BIN:-/usr/lib/rabbitmq/bin}

# shellcheck source=dev/ports.sh
. "$(dirname "$(realpath "$0")")/ports.sh"

die() {
    echo "rabbit.sh: $*" >&2
    exit 1
}

usage() {
    sed -n '3,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

# Everything that makes the node private. HOME holds its cookie, and its epmd has a port of its own.
set_environment() {
    local port=$1
    export HOME=$dir LC_ALL=C.UTF-8
    export ERL_EPMD_ADDRESS=127.0.0.1 ERL_EPMD_PORT=$((port + 1)) RABBITMQ_DIST_PORT=$((port + 2))
    export RABBITMQ_NODENAME=backhaul-$port@localhost
    export RABBITMQ_PID_FILE=$dir/pid
    export RABBITMQ_MNESIA_BASE=$dir/mnesia RABBITMQ_LOG_BASE=$dir/log
    export RABBITMQ_CONFIG_FILE=$dir/rabbitmq.conf RABBITMQ_CONF_ENV_FILE=$dir/no-environment
    export RABBITMQ_ENABLED_PLUGINS_FILE=$dir/enabled_plugins
    # Few threads that do not spin: tests run several nodes beside their own work.
    export RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS='-kernel inet_dist_use_interface {127,0,0,1} +S 2:2 +A 8 +sbwt none +sbwtdcpu none +sbwtdio none'
}

# An old pid file may name a process that is not ours.
ours() { grep -qzxF "RABBITMQ_PID_FILE=$dir/pid" "/proc/$1/environ" 2>/dev/null; }

# Prints the node's process id if it runs.
running() {
    local pid
    [[ -s $dir/pid ]] || return 1
    pid=$(<"$dir/pid")
    ours "$pid" || return 1
    echo "$pid"
}

down() {
    local pid
    if pid=$(running); then
        kill "$pid" 2>/dev/null || true
        # It removes its pid file long before it ends.
        for _ in {1..200}; do
            ours "$pid" || break
            sleep 0.1
        done
        if ours "$pid"; then kill -9 "$pid" 2>/dev/null || true; fi
    fi
    rm -f "$dir/pid"
    # Only ends an epmd that no node uses.
    epmd -kill >/dev/null 2>&1 || true
}

# Starts the node on `port` and waits until it takes connections; fails if it ends before that.
start() {
    local port=$1
    shift
    rm -rf "$dir"/{mnesia,log,pid,url,port,rabbitmq.conf,.erlang.cookie}
    mkdir -p "$dir/log"
    echo "$port" >"$dir/port"
    echo '[].' >"$dir/enabled_plugins"
    {
        echo "listeners.tcp.1 = 127.0.0.1:$port"
        echo 'log.console = false'
        echo 'disk_free_limit.absolute = 50MB'
        if (($#)); then printf '%s\n' "$@"; fi
    } >"$dir/rabbitmq.conf"
    set_environment "$port"
    setsid "$bin/rabbitmq-server" >"$dir/log/start.log" 2>&1 </dev/null &
    local starter=$!
    # A minute is not enough where others want the processors.
    for _ in {1..3000}; do
        if listens "$port" && running >/dev/null; then return; fi
        if ! kill -0 "$starter" 2>/dev/null && ! running >/dev/null; then return 1; fi
        sleep 0.1
    done
    return 1
}

up() {
    if running >/dev/null; then
        cat "$dir/url"
        return
    fi
    [[ -x $bin/rabbitmq-server ]] || die "no $bin/rabbitmq-server: install rabbitmq-server or set RABBITMQ_BIN"
    if [[ ! -e $dir/.rabbit && -n $(ls -A "$dir" 2>/dev/null) ]]; then
        die "$dir holds something else"
    fi
    mkdir -p "$dir"
    touch "$dir/.rabbit"
    local port
    # Somebody may take a port between our look and the start.
    for _ in 1 2 3; do
        port=$(free_ports 3)
        if start "$port" "$@"; then
            echo "amqp://guest:guest@127.0.0.1:$port/%2f" | tee "$dir/url"
            return
        fi
        down
    done
    tail -n 40 "$dir/log/start.log" >&2
    die "the node did not start, see $dir/log"
}

(($# >= 2)) || usage
command=$1
dir=$(realpath -m "$2")
shift 2
case $command in
up) up "$@" ;;
ctl | down)
    [[ -e $dir/port ]] || die "nothing was started in $dir"
    set_environment "$(<"$dir/port")"
    if [[ $command == ctl ]]; then exec "$bin/rabbitmqctl" -q "$@"; fi
    down
    ;;
*) usage ;;
esac
