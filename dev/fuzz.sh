#!/usr/bin/env bash
# Gives the parsers bytes by chance, with libFuzzer, as many parsers at once as there are processors.
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

# The sanitizers need a nightly Rust; of them, code without `unsafe` would have little. By itself cargo-fuzz builds each crate
# in one piece, on one processor.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-$PWD/target}
cargo fuzz build --sanitizer none --codegen-units 16
parsers=$CARGO_TARGET_DIR/$(rustc --print host-tuple)/release/parsers
found=$CARGO_TARGET_DIR/fuzz

fuzz() {
  mkdir -p "$found/$1" "fuzz/artifacts/$1"
  if ! BACKHAUL_FUZZ_TARGET=$1 "$parsers" "$found/$1" "fuzz/corpus/$1" -artifact_prefix="fuzz/artifacts/$1/" \
    -max_total_time="$seconds" -timeout=5 -rss_limit_mb=1024 -max_len=65536 -print_final_stats=1 >"$found/$1.log" 2>&1; then
    tail -n 60 "$found/$1.log" >&2
    echo "fuzz.sh: $1 failed; what it failed with is in fuzz/artifacts/$1" >&2
    return 1
  fi
  echo "fuzz.sh: $1: $(sed -n 's/^stat::number_of_executed_units: *//p' "$found/$1.log") runs in $seconds seconds" >&2
}
export -f fuzz
export found parsers seconds

printf '%s\n' "${targets[@]}" | xargs -P "$(nproc)" -I{} bash -euo pipefail -c 'fuzz {}'
