# Installed, it starts nothing: `ursa up` does.
ENABLED=""
NOT_ENABLED="ursa-control.service"

make_users() {
    getent group ursa-control >/dev/null || groupadd --system ursa-control
    getent passwd ursa-control >/dev/null ||
        useradd --system --gid ursa-control --home-dir /var/lib/ursa/control --no-create-home \
            --shell /usr/sbin/nologin --comment "Ursa control plane" ursa-control
}

# Agents and sidecars go on without it meanwhile.
upgraded() {
    restart_running ursa-control.service
}

before_removal() {
    if systemd_runs; then
        systemctl stop ursa-control.service ursa-control.socket || true
    fi
}

after_removal() {
    systemctl reset-failed 'ursa-control.*' >/dev/null 2>&1 || true
    rm -f /run/ursa/control.sock
    remove_empty /run/ursa
}

# The store and the keys of every mesh go, too.
purge() {
    remove_users ursa-control
    rm -rf /var/lib/ursa/control
    rm -f /etc/ursa/control.yaml.rpmsave /etc/ursa/control.yaml.rpmnew
    remove_empty /etc/ursa /var/lib/ursa /run/ursa
}
