#!/usr/bin/env bash
# Installs what is missing on Debian 12, as root or through sudo; does nothing, quickly, when all is there.
#   install.sh          what building, running and the demo need
#   install.sh ceph     and what a private Ceph cluster needs
#   install.sh test     and what the tests need
#   install.sh check    and the linters
#   install.sh bench    and what measuring needs
#   install.sh fuzz     and what fuzzing needs
# Rust itself must be there: https://rustup.rs
set -euo pipefail
cd "$(dirname "$0")/.."

die() { echo "install.sh: $*" >&2; exit 1; }
say() { echo "install.sh: $*" >&2; }

packages=(build-essential e2fsprogs jq librados-dev librbd-dev rabbitmq-server)
cluster_packages=(ceph-common ceph-mgr ceph-mon ceph-osd)
tools=()
components=()
case ${1:-run} in
run) ;;
ceph) packages+=("${cluster_packages[@]}") ;;
test)
  packages+=("${cluster_packages[@]}" mariadb-client-core mariadb-server-core memcached openssl postgresql-15 python3-rados
    python3-rbd python3-venv radosgw tinyproxy-bin)
  tools=(cargo-nextest@0.9.143)
  ;;
check) packages+=(docker-compose shellcheck) tools=(cargo-deny@0.20.2) components=(fmt clippy) ;;
bench) packages+=("${cluster_packages[@]}" borgbackup openssl python3-rados python3-rbd python3-venv radosgw restic time) ;;
fuzz) tools=(cargo-fuzz@0.13.2) ;;
*) die "usage: install.sh [ceph|test|check|bench|fuzz]" ;;
esac

require_rust() {
  local needed found component
  needed=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
  command -v cargo >/dev/null || die "cargo is not in PATH: install Rust $needed or newer, see https://rustup.rs"
  found=$(cargo --version | cut -d' ' -f2)
  printf '%s\n' "$needed" "${found%%-*}" | sort --version-sort --check=silent ||
    die "cargo is $found: Rust $needed or newer is needed, try: rustup update stable"
  for component in "${components[@]}"; do
    cargo "$component" --version >/dev/null 2>&1 ||
      die "cargo $component does not work, try: rustup component add rustfmt clippy"
  done
}

as_root() {
  if [[ $EUID == 0 ]]; then "$@"; else sudo "$@"; fi
}

missing_packages() {
  local package
  for package in "${packages[@]}"; do
    [[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || echo "$package"
  done
}

# While this file says 101, packages start no services: no second broker on the default port, no epmd, no ceph-crash.
policy=/usr/sbin/policy-rc.d
policy_mark='# Written by the install.sh of Backhaul while it runs'

forbid_services() {
  trap allow_services EXIT
  if [[ -e $policy ]] && ! is_our_policy; then
    return # somebody else's, who knows why
  fi
  printf '#!/bin/sh\n%s\nexit 101\n' "$policy_mark" | as_root tee "$policy" >/dev/null
  as_root chmod 755 "$policy"
}

allow_services() {
  if is_our_policy; then as_root rm -f "$policy"; fi
}

is_our_policy() { grep --silent --line-regexp --fixed-strings "$policy_mark" "$policy" 2>/dev/null; }

install_packages() {
  local log apt=(env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=600)
  command -v apt-get >/dev/null || die "this is no Debian; install by hand what gives: $*"
  [[ $EUID == 0 ]] || command -v sudo >/dev/null || die "to install $*: run this as root, or install sudo"
  say "installing $*"
  forbid_services
  log=$(mktemp)
  if ! { as_root "${apt[@]}" update && as_root "${apt[@]}" install --yes --no-install-recommends "$@"; } \
    >"$log" 2>&1 </dev/null; then
    cat "$log" >&2
    rm -f "$log"
    die "apt-get failed; all it said is above"
  fi
  rm -f "$log"
  allow_services
  command -v systemctl >/dev/null || return 0
  if [[ " $* " == *" ceph-mon "* ]]; then
    as_root systemctl --quiet disable ceph-crash.service >&2 || true # looks for crashes of a cluster that is not ours
  fi
  if [[ " $* " == *" memcached "* ]]; then
    as_root systemctl --quiet disable memcached.service >&2 || true # the tests start one of their own
  fi
  if [[ " $* " == *" postgresql-15 "* ]]; then
    as_root systemctl --quiet disable postgresql.service >&2 || true # the tests start one of their own
  fi
  if [[ " $* " == *" rabbitmq-server "* ]]; then
    say "the new rabbitmq-server is not to start at boot; if you want it to: systemctl enable --now rabbitmq-server"
    as_root systemctl --quiet disable rabbitmq-server.service epmd.service epmd.socket >&2 || true
  fi
}

require_rust

mapfile -t missing < <(missing_packages)
if [[ ${#missing[@]} != 0 ]]; then
  install_packages "${missing[@]}"
fi

for tool in "${tools[@]}"; do
  if ! cargo "$(sed 's/^cargo-//; s/@.*//' <<<"$tool")" --version >/dev/null 2>&1; then
    say "building $tool, which takes some minutes"
    cargo install --locked "$tool" >&2
  fi
done
