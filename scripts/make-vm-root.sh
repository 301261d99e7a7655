#!/bin/sh
# Makes the root file system of the tests' virtual machines, some 270 MB at target/vm/root, which every machine has below
# a layer of its own. Does nothing when it is there already. Wants root, and Debian's archive. URSA_VM_DIR puts it elsewhere,
# URSA_VM_SUITE makes it of another release than this machine's own (whose binaries must run in it).
cd "$(dirname "$0")/.."
. scripts/common.sh

dir=${URSA_VM_DIR:-${CARGO_TARGET_DIR:-target}/vm}
suite=${URSA_VM_SUITE:-$(. /etc/os-release && echo "${VERSION_CODENAME:-stable}")}
packages=$(grep -v '^#' scripts/vm-packages.txt | paste -sd,)
key=$(cat scripts/vm-packages.txt scripts/make-vm-root.sh | (echo "$suite"; cat) | sha256sum | cut -c 1-12)
made=$dir/root-$key

mkdir -p "$dir"
# Two at once would make it twice; the second waits and finds it.
exec 9>"$dir/lock"
flock 9
if [ ! -d "$made" ]; then
    [ "$(id -u)" = 0 ] || { echo "making the virtual machines' root wants root: run it with sudo" >&2; exit 1; }
    need mmdebstrap mmdebstrap
    need systemctl systemd
    echo "making $made of Debian $suite: a minute or two"
    work=$dir/making
    rm -rf "$work"
    trap 'rm -rf "$work"' EXIT
    # Units of a desktop's comfort are masked, and firewalld waits until a test starts it. With no machine-id and no
    # resolver of its own each machine gets both from its test.
    mmdebstrap --variant=minbase --mode=root --format=directory --include="$packages" \
        --dpkgopt=force-unsafe-io \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/info/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        --customize-hook='rm -f "$1"/etc/dpkg/dpkg.cfg.d/99mmdebstrap "$1"/etc/resolv.conf "$1"/etc/hostname' \
        --customize-hook='systemctl --root="$1" --quiet enable systemd-networkd.service' \
        --customize-hook='systemctl --root="$1" --quiet disable firewalld.service nftables.service e2scrub_reap.service' \
        --customize-hook='systemctl --root="$1" --quiet mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer getty.target' \
        "$suite" "$work" 9>&- || {
        echo "mmdebstrap could not make a root of Debian $suite; what it said is above" >&2
        exit 1
    }
    mv "$work" "$made"
fi
if [ "$(readlink "$dir/root")" != "root-$key" ]; then
    ln -sfn "root-$key" "$dir/next"
    mv -T "$dir/next" "$dir/root"
    # Those of earlier lists.
    find "$dir" -maxdepth 1 -name 'root-*' ! -name "root-$key" -exec rm -rf --one-file-system {} +
fi
