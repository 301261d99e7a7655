#!/bin/sh
# What the lab calls besides our own binaries.
cd "$(dirname "$0")/.."
. scripts/common.sh
need ip iproute2
