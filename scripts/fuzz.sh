#!/bin/sh
# Runs every fuzz target of tests/fuzz for SECONDS. What is found stays in target/fuzz/artifacts.
cd "$(dirname "$0")/.."
. scripts/common.sh

seconds=$1
version=0.13.2
tools=$(realpath -m "${CARGO_TARGET_DIR:-target}")/tools
fuzz=$(realpath -m "${CARGO_TARGET_DIR:-target}")/fuzz
need g++ g++
if ! { [ -x "$tools/bin/cargo-fuzz" ] && "$tools/bin/cargo-fuzz" --version | grep -q " $version\$"; }; then
    CARGO_TARGET_DIR="$tools/build" cargo install --quiet --locked --root "$tools" cargo-fuzz --version "$version"
    rm -rf "$tools/build"
fi
# The address sanitizer wants a nightly compiler; there is little `unsafe` for it to find.
export PATH="$tools/bin:$PATH" CARGO_TARGET_DIR="$fuzz/build"
for target in $(cargo fuzz list --fuzz-dir tests/fuzz); do
    echo "fuzz $target for $seconds s"
    mkdir -p "$fuzz/corpus/$target" "$fuzz/artifacts/$target"
    log=$fuzz/$target.log
    cargo fuzz run --fuzz-dir tests/fuzz --sanitizer none "$target" "$fuzz/corpus/$target" -- \
        -max_total_time="$seconds" -max_len=4096 -print_final_stats=1 \
        -artifact_prefix="$fuzz/artifacts/$target/" >"$log" 2>&1 || {
        tail -n 40 "$log" >&2
        echo "fuzz: $target found something; the input is in $fuzz/artifacts/$target" >&2
        exit 1
    }
    grep '^stat::number_of_executed_units' "$log"
done
