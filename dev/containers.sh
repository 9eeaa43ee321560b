#!/usr/bin/env bash
# Checks Dockerfile and docker-compose.yml as far as it goes without an engine: nothing is built or started.
set -euo pipefail
cd "$(dirname "$0")/.."

die() { echo "containers.sh: $*" >&2; exit 1; }

docker-compose --file docker-compose.yml --profile ceph config --quiet

# Each file that the compose file mounts from here is there.
while read -r mounted; do
  [[ -f $mounted ]] || die "docker-compose.yml mounts $mounted, which is no file"
done < <(sed -nE 's/^ +- (\.\/[^:]+):.*/\1/p' docker-compose.yml)

# Each package that the image installs exists in Debian 12; libraries alone at run time, headers to build.
mapfile -t packages < <(sed -nE 's/.*apt-get install .*--no-install-recommends ([^\\]+).*/\1/p' Dockerfile | xargs -n 1)
[[ ${#packages[@]} -ge 5 ]] || die "the packages in the Dockerfile were not found: ${packages[*]}"
for package in "${packages[@]}"; do
  apt-cache show "$package" >/dev/null 2>&1 || die "the Dockerfile installs $package, which Debian has not"
done

# The Rust of the image is not older than the one that Cargo.toml asks for.
needed=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
image=$(sed -nE 's/^FROM rust:([0-9.]+)-bookworm AS build$/\1/p' Dockerfile)
printf '%s\n' "$needed" "$image" | sort --version-sort --check=silent ||
  die "Cargo.toml needs Rust $needed, the Dockerfile builds with '$image'"

# Everything that the sources take in while they are compiled is in the build's context.
while read -r folder; do
  grep -qxF "!$folder" .dockerignore || die "the sources include files of $folder/, which .dockerignore keeps out"
done < <(grep -rhoE 'include_(str|bytes|dir)!\([^)]*"[./]*\.\./[a-z]+/' src | sed -E 's/.*\.\.\/([a-z]+)\/$/\1/' | sort -u)
