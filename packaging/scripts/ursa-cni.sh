# Takes the plugin out of the network's list: a list that names a program which is gone lets no pod start. While pods
# run that started with it, a stub stays in the runtime's directory, so that they can end.
before_removal() {
    if grep -qs ursa-cni /etc/cni/net.d/* || [ -e /opt/cni/bin/ursa-cni ]; then
        ursa-cni uninstall --drain-timeout 0 || exit 1
    fi
}
