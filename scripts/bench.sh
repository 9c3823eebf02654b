#!/usr/bin/env bash
# Compares Tidegate in front of mosquitto with mosquitto alone, and appends the figures to benches/RESULTS.md.
#
#   scripts/bench.sh                      everything, about half an hour
#   scripts/bench.sh --only pairs         one comparison; see --help for their names
#   scripts/bench.sh --output FILE ...    another file
#
# Needs mosquitto (apt-get install mosquitto) and a quiet machine, because it measures processor time.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -f "${HOME-}/.cargo/env" ] && . "$HOME/.cargo/env"
. scripts/require-rust
require_rust scripts/bench.sh

ulimit -n "$(ulimit -Hn)" || true
cargo build --release --locked -p tidegate -p tidegate-kit --bin tidegate --bin load --bin bench_ratio

output=(--output benches/RESULTS.md)
for arg in "$@"; do
  case "$arg" in --output | --output=* | --help | -h) output=() ;; esac
done
exec target/release/bench_ratio "${output[@]}" "$@"
