//! What systemd and the kernel say, read from their texts.

use std::collections::{BTreeMap, BTreeSet};

/// What is asked of a service (`systemctl show`).
pub(super) const PROPERTIES: &str = "Id,LoadState,ActiveState,User,DynamicUser,NetworkNamespacePath,PrivateNetwork,Slice,MainPID,ActiveEnterTimestamp";

/// A service as systemd describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Service {
    /// Its real name, behind aliases.
    pub(super) id: String,
    /// `loaded`, `not-found`, `masked`, `bad-setting`, …
    pub(super) load_state: String,
    /// `active`, `inactive`, …
    pub(super) active_state: String,
    /// `User=`; empty for root.
    pub(super) user: String,
    /// `DynamicUser=`.
    pub(super) dynamic_user: bool,
    /// `NetworkNamespacePath=`.
    pub(super) netns: String,
    /// `PrivateNetwork=`.
    pub(super) private_network: bool,
    /// Its slice.
    pub(super) slice: String,
    /// Its main process; 0 for none.
    pub(super) main_pid: u32,
    /// Since when it runs, in systemd's words.
    pub(super) since: String,
}

impl Service {
    /// Whether it runs or is about to.
    pub(super) fn is_up(&self) -> bool {
        matches!(self.active_state.as_str(), "active" | "activating" | "reloading" | "refreshing")
    }
}

/// The services in the output of `systemctl show`, which separates them by empty lines.
pub(super) fn services(text: &str) -> Vec<Service> {
    text.split("\n\n").filter(|part| !part.trim().is_empty()).map(service).collect()
}

fn service(text: &str) -> Service {
    let fields: BTreeMap<&str, &str> = text.lines().filter_map(|line| line.split_once('=')).collect();
    let get = |key: &str| (*fields.get(key).unwrap_or(&"")).to_owned();
    Service {
        id: get("Id"),
        load_state: get("LoadState"),
        active_state: get("ActiveState"),
        user: get("User"),
        dynamic_user: get("DynamicUser") == "yes",
        netns: get("NetworkNamespacePath"),
        private_network: get("PrivateNetwork") == "yes",
        slice: get("Slice"),
        main_pid: get("MainPID").parse().unwrap_or_default(),
        since: get("ActiveEnterTimestamp"),
    }
}

/// The ports that somebody has bound, from `/proc/net/tcp`, `udp` and their like for IPv6. Of TCP only what listens
/// counts: a client's port is free again when a server asks for it.
pub(super) fn bound_ports(text: &str, tcp: bool) -> BTreeSet<u16> {
    const LISTEN: &str = "0A";
    let port = |line: &str| {
        let mut fields = line.split_whitespace().skip(1);
        let local = fields.next()?;
        let state = fields.nth(1)?;
        let (_, port) = local.rsplit_once(':')?;
        (!tcp || state == LISTEN).then(|| u16::from_str_radix(port, 16).ok())?
    };
    text.lines().skip(1).filter_map(port).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn services_are_read_as_systemctl_shows_them() {
        let text = "Id=web.service\nLoadState=loaded\nActiveState=active\nUser=web\nDynamicUser=no\nSlice=system.slice\n\
                    MainPID=7\n\nId=b.service\nUser=\nDynamicUser=yes\nNetworkNamespacePath=/run/netns/b\n";
        let all = services(text);
        assert_eq!(all.len(), 2);
        assert!(all[0].is_up() && all[0].user == "web" && all[0].main_pid == 7 && !all[0].dynamic_user);
        assert!(!all[1].is_up() && all[1].dynamic_user && all[1].netns == "/run/netns/b");
    }

    #[test]
    fn only_what_listens_holds_a_tcp_port() {
        let text = "  sl  local_address rem_address   st tx_queue\n   0: 0100007F:3A99 00000000:0000 0A 0:0\n   \
                    1: 0100007F:3A9E 0100007F:1F90 01 0:0\n";
        assert_eq!(bound_ports(text, true), [15_001].into());
        assert_eq!(bound_ports(text, false), [15_001, 15_006].into());
    }
}
