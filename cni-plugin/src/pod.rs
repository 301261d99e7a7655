//! A pod's network namespace: the right one, and what can be seen inside it.

use std::collections::BTreeSet;
use std::fs;
use std::net::IpAddr;
use std::path::Path;

use ursa_init::RedirectIntent;
use ursa_init::netns::Netns;

use crate::spec::{Code, Environment, Failure};

/// The pod's namespace, never the machine's own, nor one whose user ids are others.
pub(crate) fn namespace(environment: &Environment) -> Result<Netns, Failure> {
    namespace_at(environment.netns.as_deref().unwrap_or(Path::new("")))
}

/// The same by its path.
pub(crate) fn namespace_at(path: &Path) -> Result<Netns, Failure> {
    let fits = |netns: &Netns| {
        netns.refuse_own_or_host()?;
        netns.refuse_other_users()
    };
    let netns = Netns::open(path).and_then(|netns| fits(&netns).map(|()| netns));
    netns.map_err(|e| {
        Failure::new(Code::InvalidNamespace, "the pod's network namespace can't be used", e.with_causes())
    })
}

/// Checks that the namespace has an address of the previous result: rules in another pod's, or the machine's, would
/// be worse than none.
pub(crate) fn refuse_strangers(netns: &Netns, expected: &[String]) -> Result<(), Failure> {
    if expected.is_empty() {
        let hint = "ursa-cni must come after the plugin that gives the pod its addresses";
        return Err(Failure::new(Code::InvalidConfig, "prevResult lists no `ips`", hint));
    }
    let expected: Vec<IpAddr> = expected.iter().filter_map(|text| text.parse().ok()).collect();
    netns.refuse_strangers(&expected).map_err(|e| {
        let message = "CNI_NETNS is not this pod's network namespace";
        Failure::new(Code::InvalidNamespace, message, e.with_causes())
    })
}

/// The ports among those that the rules send traffic to on which nobody listens.
pub(crate) fn silent_ports(netns: &Netns, intent: &RedirectIntent) -> Result<Vec<u16>, ursa_init::Error> {
    let listening = netns.run(|| {
        ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"]
            .into_iter()
            .filter_map(|table| fs::read_to_string(table).ok())
            .flat_map(|table| listeners(&table))
            .collect::<BTreeSet<u16>>()
    })?;
    let wanted =
        [(intent.inbound.enabled, intent.inbound.port), (intent.outbound.enabled, intent.outbound.port)];
    Ok(wanted
        .into_iter()
        .filter(|(on, port)| *on && !listening.contains(port))
        .map(|(_, port)| port)
        .collect())
}

/// The listening ports in the kernel's table: `sl local_address rem_address st …`, in hexadecimal.
fn listeners(table: &str) -> Vec<u16> {
    const LISTEN: &str = "0A";
    let port = |line: &str| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let local = fields.next()?;
        let state = fields.nth(1)?;
        (state == LISTEN).then(|| u16::from_str_radix(local.rsplit(':').next()?, 16).ok())?
    };
    table.lines().skip(1).filter_map(port).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_table() {
        let table = "  sl  local_address rem_address   st tx_queue\n\
                     0: 00000000:3A99 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1\n\
                     1: 0100007F:1F90 0100007F:C350 01 00000000:00000000 00:00000000 00000000     0        0 2\n\
                     cut off";
        assert_eq!(listeners(table), [15001]);
    }
}
