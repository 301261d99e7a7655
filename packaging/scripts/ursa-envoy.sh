after_removal() {
    if systemctl --quiet is-active 'ursa-sidecar@*.service'; then
        echo "sidecars of this machine go on with the Envoy they have, and can't start another one: install ursa-envoy," >&2
        echo "or set envoy in /etc/ursa/agent.yaml" >&2
    fi
}
