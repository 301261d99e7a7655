# Sourced by the scripts beside it.
set -eu

# need PROGRAM PACKAGE...: installs Debian packages when the program is missing. Nothing that they bring starts: with
# SYSTEMD_OFFLINE systemctl does nothing but enable.
need() {
    program=$1
    shift
    command -v "$program" >/dev/null 2>&1 && return 0
    if ! command -v apt-get >/dev/null 2>&1; then
        echo "$program is missing: install $* with your package manager" >&2
        return 1
    fi
    log=$(mktemp)
    export DEBIAN_FRONTEND=noninteractive SYSTEMD_OFFLINE=1
    if apt-get -qq install -y --no-install-recommends "$@" >"$log" 2>&1 ||
        { apt-get -qq update >>"$log" 2>&1 &&
            apt-get -qq install -y --no-install-recommends "$@" >>"$log" 2>&1; }; then
        rm -f "$log"
    else
        cat "$log" >&2
        echo "$program is missing and apt-get could not install $*" >&2
        return 1
    fi
}

# wheel REQUIREMENTS DIR: downloads one pinned wheel, refused by pip unless its sha256 is the pinned one.
wheel() {
    need python3 python3
    python3 -m pip --version >/dev/null 2>&1 || need pip3 python3-pip
    python3 -m pip --disable-pip-version-check --no-input download --quiet --no-deps --require-hashes \
        --only-binary :all: --requirement "$1" --dest "$2"
}
