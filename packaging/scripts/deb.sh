# What a package's script is written in, for dpkg: as debhelper's fragments (dh_installsystemd --restart-after-upgrade,
# dh_installsysusers, dh_installtmpfiles) do it. packaging/build.py puts this before the package's own script and
# `main "$@"` of the right kind behind it.
set -e

# Whether there is a systemd to talk to; in a chroot or an image that is being built there is none.
systemd_runs() {
    [ -z "${DPKG_ROOT:-}" ] && [ -d /run/systemd/system ]
}

reload_units() {
    systemctl --system daemon-reload >/dev/null || true
}

restart_running() {
    for unit; do
        systemctl --quiet is-active "$unit" || continue
        deb-systemd-invoke restart "$unit" >/dev/null ||
            echo "$unit could not be started again; see: journalctl --unit=$unit" >&2
    done
}

postinst() {
    case "$1" in
    configure | abort-upgrade | abort-deconfigure | abort-remove) ;;
    *) return 0 ;;
    esac
    if [ -n "$SYSUSERS" ]; then
        systemd-sysusers ${DPKG_ROOT:+--root="$DPKG_ROOT"} "$SYSUSERS"
    fi
    if [ -n "$TMPFILES" ] && [ -x "$(command -v systemd-tmpfiles)" ]; then
        systemd-tmpfiles ${DPKG_ROOT:+--root="$DPKG_ROOT"} --create "$TMPFILES" >/dev/null || true
    fi
    for unit in $ENABLED; do
        # True for new installations; what an administrator has disabled stays so.
        if deb-systemd-helper --quiet was-enabled "$unit"; then
            deb-systemd-helper enable "$unit" >/dev/null || true
        else
            deb-systemd-helper update-state "$unit" >/dev/null || true
        fi
    done
    for unit in $NOT_ENABLED; do
        if deb-systemd-helper debian-installed "$unit" && deb-systemd-helper --quiet was-enabled "$unit"; then
            deb-systemd-helper enable "$unit" >/dev/null || true
        fi
        deb-systemd-helper update-state "$unit" >/dev/null || true
    done
    if systemd_runs; then
        reload_units
        if [ -n "$ENABLED" ]; then
            # Does nothing to what runs.
            deb-systemd-invoke start $ENABLED >/dev/null || true
        fi
        if [ -n "$2" ]; then
            upgraded
        fi
    fi
}

prerm() {
    [ "$1" = remove ] || return 0
    before_removal
}

postrm() {
    case "$1" in
    remove)
        if systemd_runs; then
            reload_units
            after_removal
        fi
        ;;
    purge)
        if command -v deb-systemd-helper >/dev/null && [ -n "$ENABLED$NOT_ENABLED" ]; then
            deb-systemd-helper purge $ENABLED $NOT_ENABLED >/dev/null || true
        fi
        purge
        ;;
    esac
}
