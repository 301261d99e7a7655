ENABLED="ursa-agent.socket ursa-redirect.service"
NOT_ENABLED="ursa-agent.service"
UNITS=/etc/systemd/system
JOINED=/var/lib/ursa/join

make_users() {
    getent group ursa-proxy >/dev/null || groupadd --system ursa-proxy
    getent group ursa-agent >/dev/null || groupadd --system ursa-agent
    getent passwd ursa-agent >/dev/null ||
        useradd --system --gid ursa-agent --home-dir /var/lib/ursa/agent --no-create-home --shell /usr/sbin/nologin \
            --comment "Ursa node agent" ursa-agent
}

# Only the agent: a sidecar executes itself anew in place, and a redirect goes on as it is.
upgraded() {
    restart_running ursa-agent.service
    # Not waited for: one that still waits for its identity would take as long as that takes.
    systemctl --no-block reload 'ursa-sidecar@*.service' || true
}

# The services whose units want a sidecar, by the drop-ins and by what `ursa join` noted.
joined_services() {
    for dropin in "$UNITS"/*.d/50-ursa.conf; do
        if [ -e "$dropin" ]; then
            unit=${dropin%/*}
            unit=${unit##*/}
            echo "${unit%.service.d}"
        fi
    done
    for record in "$JOINED"/*.json; do
        if [ -e "$record" ]; then
            record=${record##*/}
            echo "${record%.json}"
        fi
    done
}

# Takes what `ursa join` made away, by its notes and by the names that it gives. First the services stop needing their
# sidecars, then their traffic goes past them, then the sidecars stop: nothing of the services is restarted.
forget_services() {
    namespaces=$(sed -n 's/^NetworkNamespacePath=//p' "$UNITS"/ursa-sidecar@*.service.d/*.conf 2>/dev/null || true)
    users=$(awk '$1 == "u" || $1 == "u!" { print $2 }' /etc/sysusers.d/ursa-*.conf 2>/dev/null || true)
    {
        ls "$UNITS"/*.d/50-ursa.conf "$UNITS"/ursa-*.d/10-ursa.conf "$UNITS"/ursa-*.slice /etc/sysusers.d/ursa-*.conf ||
            true # Patterns that match nothing.
        grep -ohE '"(/etc/ursa|/etc/sysusers\.d|/etc/systemd/system)/[^"]*"' "$JOINED"/*.json | tr -d '"'
        joined_services | sed 's|.*|/etc/ursa/workloads.d/&.yaml\n/etc/ursa/redirect.d/&.yaml|'
    } 2>/dev/null | sort -u | while read -r file; do
        case "$file" in
        */..*) continue ;;
        /etc/ursa/*.d/* | */ursa-* | */*-ursa.conf) rm -f "$file" ;;
        *) continue ;;
        esac
        case "$file" in
        "$UNITS"/*.d/*) remove_empty "${file%/*}" ;;
        esac
    done
    if systemd_runs; then
        reload_units
        systemctl stop 'ursa-redirect*.service' || true
        if command -v ursa-init >/dev/null; then
            for namespace in $namespaces; do
                ursa-init remove --netns "$namespace" || true
            done
            ursa-init remove --host >/dev/null || true
        fi
        systemctl stop 'ursa-sidecar@*.service' || true
    fi
    remove_users $users
    rm -f "$JOINED"/*.json
}

# By patterns, as what isn't loaded is no reason to complain.
stop_all() {
    systemd_runs || return 0
    systemctl stop 'ursa-agent.*' 'ursa-sidecar@*.service' 'ursa-redirect*.service' 'ursa-sidecar.slice' || true
    # A service that `ursa join` told apart by a slice is in a slice below this one as long as it runs.
    if [ -z "$(systemctl list-units --plain --no-legend 'ursa-*.slice')" ]; then
        systemctl stop 'ursa.slice' || true
    fi
}

# Without this package these services' traffic would go to a proxy that isn't there, and after a boot, without rules, past
# it: in plaintext, although nobody has said so. So it goes only when they have left, or are told to leave.
before_removal() {
    services=$(joined_services | sort -u | tr '\n' ' ')
    if [ -n "$services" ] && [ "${URSA_LEAVE:-}" != 1 ]; then
        cat >&2 <<MESSAGE
ursa-agent can't be removed: services of this machine are in the mesh: $services
Without it they would be cut off, and open to everybody after a reboot. Take them out of the mesh first:
    ursa leave --all
or remove it with URSA_LEAVE=1 in the environment, which does the same. They go on running, but from then on without
mutual TLS: whoever requires it refuses them, and anybody can call them.
MESSAGE
        exit 1
    fi
    if [ -n "$services" ]; then
        ursa-agent leave --all || forget_services
    fi
    stop_all
    if systemd_runs; then
        # Also what nobody's unit put there. Where nothing is, nothing happens.
        ursa-init remove --host >/dev/null || true
    fi
}

after_removal() {
    systemctl reset-failed 'ursa-agent.*' 'ursa-sidecar@*' 'ursa-redirect*' >/dev/null 2>&1 || true
    rm -rf /run/ursa-sidecar /run/ursa/agent.sock /run/ursa/redirect*.json
    remove_empty /run/ursa
}

purge() {
    # Only after a removal that was forced is there anything left to forget.
    forget_services
    stop_all
    remove_users ursa-agent ursa-proxy
    rm -rf /var/lib/ursa/agent /var/lib/ursa/join /etc/ursa/workloads.d /etc/ursa/redirect.d /run/ursa-sidecar
    rm -f /etc/ursa/redirect.yaml /etc/ursa/agent.yaml.rpmsave /etc/ursa/agent.yaml.rpmnew
    remove_empty /etc/ursa /var/lib/ursa /run/ursa
}
