# What a package's script is written in, for rpm: as Fedora's macros (%sysusers_create_compat, %tmpfiles_create_package,
# %systemd_post, %systemd_preun, %systemd_postun_with_restart) do it, in plain shell, because not every system that
# installs rpms has what these expand to. Presets decide what is enabled, and what they enable is started.

# Whether there is a systemd to talk to; in a chroot or an image that is being built there is none.
systemd_runs() {
    [ -d /run/systemd/system ]
}

reload_units() {
    systemctl --system daemon-reload >/dev/null 2>&1 || :
}

restart_running() {
    systemctl try-restart "$@" || echo "$* could not be started again; see: journalctl --unit=$1" >&2
}

# $1 is how many versions of the package there are when this has run.
pre() {
    make_users
}

post() {
    if [ -n "$TMPFILES" ] && command -v systemd-tmpfiles >/dev/null; then
        systemd-tmpfiles --create "$TMPFILES" || :
    fi
    if [ "$1" -eq 1 ] && [ -n "$ENABLED$NOT_ENABLED" ] && command -v systemctl >/dev/null; then
        systemctl --no-reload preset $ENABLED $NOT_ENABLED || :
        if systemd_runs; then
            reload_units
            for unit in $ENABLED; do
                if systemctl --quiet is-enabled "$unit"; then
                    systemctl start "$unit" || :
                fi
            done
        fi
    fi
}

preun() {
    [ "$1" -eq 0 ] || return 0
    before_removal
    if [ -n "$ENABLED$NOT_ENABLED" ] && command -v systemctl >/dev/null; then
        systemctl --no-reload disable $ENABLED $NOT_ENABLED || :
    fi
}

postun() {
    if systemd_runs; then
        reload_units
        if [ "$1" -ge 1 ]; then
            upgraded
        else
            after_removal
        fi
    fi
    # rpm knows no purge.
    if [ "$1" -eq 0 ] && [ "${URSA_PURGE:-}" = 1 ]; then
        purge
    fi
}
