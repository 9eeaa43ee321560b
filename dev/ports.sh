# For the scripts that start private services: ports on loopback. Sourced; whoever does has a `die`.
# shellcheck shell=bash

listens() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

# Prints the first of so many neighbouring ports that are free, below the range that the kernel hands out itself.
free_ports() {
    local port next
    for _ in {1..50}; do
        port=$((20000 + RANDOM % 12000))
        for ((next = port; next < port + $1; next++)); do
            if listens "$next"; then continue 2; fi
        done
        echo "$port"
        return
    done
    die "found no free port"
}
