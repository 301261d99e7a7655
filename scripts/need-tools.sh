#!/bin/sh
# What the lab calls besides our own binaries.
cd "$(dirname "$0")/.."
. scripts/common.sh
need ip iproute2
need nft nftables
# Container runtimes, and what stands in a pod's network before our plugin.
PATH=$PATH:/usr/sbin:/sbin:/usr/lib/cni
need containerd containerd
need podman podman
need runc runc
need portmap containernetworking-plugins
need iptables iptables
need nft nftables
need /bin/busybox busybox-static
# What the redirect's fault tests kill programs with.
need strace strace
