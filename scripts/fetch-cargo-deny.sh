#!/bin/sh
# Puts cargo-deny at target/tools/bin/cargo-deny (a debug build: quicker to build than it saves in running).
cd "$(dirname "$0")/.."
. scripts/common.sh

version=0.20.2
dir=${CARGO_TARGET_DIR:-target}/tools
if [ -x "$dir/bin/cargo-deny" ] && "$dir/bin/cargo-deny" --version | grep -q " $version\$"; then
    exit 0
fi
mkdir -p "$dir"
CARGO_PROFILE_DEV_DEBUG=0 CARGO_TARGET_DIR="$dir/build" \
    cargo install --quiet --locked --debug --root "$dir" cargo-deny --version "$version"
rm -rf "$dir/build"
