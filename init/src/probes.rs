//! The kubelet's probes: they come from the node, without a certificate.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

use serde::{Deserialize, Serialize};

use crate::intent::{Ports, RedirectIntent};

/// Which of a node's connections to its pods go past their proxies. Whoever may send from the node's address, with
/// what is sent through it under that address (a NodePort, for example), may then speak to those ports without a
/// certificate: so it is off unless it is asked for, and best asked for by port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum KubeletProbes {
    /// None, or those to every port.
    Every(bool),
    /// Those to these ports.
    To(Vec<Ports>),
}

impl Default for KubeletProbes {
    fn default() -> Self {
        Self::Every(false)
    }
}

impl KubeletProbes {
    /// Exempts the probes of a pod with these addresses. To be called in the node's network namespace, where the
    /// kubelet is. Sources that the document names itself are the operator's word, and stay alone.
    pub fn exempt(&self, intent: &mut RedirectIntent, pod: &[IpAddr]) {
        let ports = match self {
            Self::Every(false) => return,
            Self::Every(true) => Vec::new(),
            Self::To(ports) if ports.is_empty() => return,
            Self::To(ports) => ports.clone(),
        };
        let probes = &mut intent.inbound.probes;
        if !probes.sources.is_empty() {
            return;
        }
        let sources =
            pod.iter().filter_map(|pod| source_towards(*pod)).filter(|source| !pod.contains(source));
        probes.sources = sources.collect();
        if !probes.sources.is_empty() {
            probes.ports = ports;
        }
    }
}

/// The address that this namespace would call from. Connecting a datagram socket sends nothing: it asks for the route.
fn source_towards(pod: IpAddr) -> Option<IpAddr> {
    const DISCARD: u16 = 9;
    let any: IpAddr = match pod {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect((pod, DISCARD)).ok()?;
    socket.local_addr().ok().map(|address| address.ip())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_asked_for_and_known_is_exempt() {
        let probes = |asked: &str, intent: &str| {
            let asked: KubeletProbes = serde_json::from_str(asked).unwrap();
            let mut intent: RedirectIntent = serde_json::from_str(intent).unwrap();
            // Another address of loopback: what is called from 127.0.0.1.
            asked.exempt(&mut intent, &["127.0.0.9".parse().unwrap()]);
            (intent.inbound.probes.sources, intent.inbound.probes.ports.len())
        };
        let node: IpAddr = Ipv4Addr::LOCALHOST.into();
        assert_eq!(probes("false", "{}"), (vec![], 0));
        assert_eq!(probes("[]", "{}"), (vec![], 0));
        assert_eq!(probes("true", "{}"), (vec![node], 0));
        assert_eq!(probes(r#"[8080,"9000-9010"]"#, "{}"), (vec![node], 2));
        let named: IpAddr = "192.0.2.1".parse().unwrap();
        let intent = r#"{"inbound":{"probes":{"sources":["192.0.2.1"]}}}"#;
        assert_eq!(probes("true", intent), (vec![named], 0));
        assert!(serde_json::from_str::<KubeletProbes>(r#""yes""#).is_err());
    }
}
