#!/usr/bin/env bash
# Runs every test, with and without the feature `ceph`, against a RabbitMQ of its own that it stops at the end.
# Arguments go to `cargo nextest run`, such as: -E 'test(restore)'
set -euo pipefail
cd "$(dirname "$0")/.."

dev/install.sh test

work=$(mktemp -d)
finish() {
  dev/rabbit.sh down "$work/rabbit" || true
  rm -rf "$work"
}
trap finish EXIT

dev/rabbit.sh up "$work/rabbit" >&2
BACKHAUL_TEST_AMQP_URL=$(<"$work/rabbit/url")
export BACKHAUL_TEST_AMQP_URL

echo "test.sh: without the feature ceph" >&2
cargo nextest run --locked --no-default-features "$@"
echo "test.sh: with all features" >&2
cargo nextest run --locked "$@"
