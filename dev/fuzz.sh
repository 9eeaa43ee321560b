#!/usr/bin/env bash
# Gives the parsers bytes by chance, with libFuzzer.
#   fuzz.sh SECONDS [TARGET…]   every target, or these, for so long each
# What it finds out on the way is kept in target/fuzz for the next time; fuzz/corpus stays as it is. Bytes with which a target
# fails are in fuzz/artifacts/TARGET: with the fault mended, they go into fuzz/corpus/TARGET, where `make test` reads them again.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${1:?usage: fuzz.sh SECONDS [TARGET…]}
shift

dev/install.sh fuzz

targets=("$@")
if [[ ${#targets[@]} == 0 ]]; then
  mapfile -t targets < <(ls fuzz/corpus)
fi

# The sanitizers need a nightly Rust; of them, code without `unsafe` would have little.
cargo fuzz build --sanitizer none

failed=()
for target in "${targets[@]}"; do
  found=${CARGO_TARGET_DIR:-target}/fuzz/$target
  mkdir -p "$found"
  echo "fuzz.sh: $target for $seconds seconds" >&2
  cargo fuzz run --sanitizer none "$target" "$found" "fuzz/corpus/$target" -- -max_total_time="$seconds" -timeout=5 \
    -rss_limit_mb=1024 -max_len=65536 -print_final_stats=1 -verbosity=0 || failed+=("$target")
done
if [[ ${#failed[@]} != 0 ]]; then
  echo "fuzz.sh: failed: ${failed[*]}; what they failed with is in fuzz/artifacts" >&2
  exit 1
fi
