#!/bin/sh
# What the lab calls besides our own binaries: always its network's tools; for `tests` also what the tests compare with,
# kill with and run pods by; for `packages` what builds packages and looks at them.
cd "$(dirname "$0")/.."
. scripts/common.sh
PATH=$PATH:/usr/sbin:/sbin:/usr/lib/cni
case "${1:-}" in
packages | tests)
    need python3 python3
    need dpkg-shlibdeps dpkg-dev
    need strip binutils
    need rpmbuild rpm
    ;;
esac
[ "${1:-}" != packages ] || exit 0
need ip iproute2
need nft nftables
[ "${1:-}" = tests ] || exit 0
# What looks at packages.
need lintian lintian
# Container runtimes, and what stands in a pod's network before our plugin.
need containerd containerd
need podman podman
need runc runc
need portmap containernetworking-plugins
need /bin/busybox busybox-static
# The redirect's other backend, and the peers' rules.
need iptables iptables
# What fault tests kill programs with.
need strace strace
# Virtual machines with a systemd of their own.
need systemd-nspawn systemd-container
need mmdebstrap mmdebstrap
