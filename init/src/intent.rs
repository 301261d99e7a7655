//! What the operator wants redirected: one typed, validated document, read from YAML, JSON, flags or the agent.

mod ports;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

pub use ports::{ParsePortsError, Ports};

/// The redirect of one network namespace.
///
/// Every field has a default, so `{}` with one proxy uid is a complete document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct RedirectIntent {
    /// User ids of the proxy (Envoy and the shim): their own traffic is never sent back to them.
    pub proxy_uids: Vec<u32>,
    /// Group ids of the proxy; a process with one of them counts as the proxy.
    pub proxy_gids: Vec<u32>,
    /// A socket mark of the proxy. It complements the ids: a pod that holds `NET_RAW` could forge it.
    pub proxy_mark: Option<u32>,
    /// Connections that arrive at the workload.
    pub inbound: Inbound,
    /// Connections that the workload opens.
    pub outbound: Outbound,
    /// Name lookups of the workload.
    pub dns: Dns,
    /// Redirect IPv4.
    pub ipv4: bool,
    /// Redirect IPv6.
    pub ipv6: bool,
    /// Addresses that belong to the mesh: routed to `lo`, always redirected, never let out.
    pub vip_ranges: Vec<IpNet>,
}

impl Default for RedirectIntent {
    fn default() -> Self {
        Self {
            proxy_uids: Vec::new(),
            proxy_gids: Vec::new(),
            proxy_mark: None,
            inbound: Inbound::default(),
            outbound: Outbound::default(),
            dns: Dns::default(),
            ipv4: true,
            ipv6: true,
            vip_ranges: default_vip_ranges(),
        }
    }
}

/// The ranges that Ursa takes addresses for mesh names from.
pub fn default_vip_ranges() -> Vec<IpNet> {
    let v4 = |first| IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(first, 0, 0, 0), 8));
    let v6 = Ipv6Net::new_assert(Ipv6Addr::new(0xfd75, 0x7273, 0x6100, 0, 0, 0, 0, 0), 64);
    vec![v4(241), v4(242), v4(243), IpNet::V6(v6)]
}

/// Which arriving connections go to the proxy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Inbound {
    /// Redirect arriving connections at all.
    pub enabled: bool,
    /// The proxy's inbound port.
    pub port: u16,
    /// Only these ports; empty means all but the excluded ones.
    pub include_ports: Vec<Ports>,
    /// Ports that are left alone. Ignored for ports that are listed in `includePorts`.
    pub exclude_ports: Vec<Ports>,
    /// Sources whose connections are left alone (for example the kubelet's probes).
    pub exclude_cidrs: Vec<IpNet>,
}

impl Default for Inbound {
    fn default() -> Self {
        Self {
            enabled: true,
            port: 15006,
            include_ports: Vec::new(),
            exclude_ports: Vec::new(),
            exclude_cidrs: Vec::new(),
        }
    }
}

/// Which opened connections go to the proxy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Outbound {
    /// Redirect opened connections at all.
    pub enabled: bool,
    /// The proxy's outbound port.
    pub port: u16,
    /// Only these ports; empty means all but the excluded ones.
    pub include_ports: Vec<Ports>,
    /// Ports that are left alone. Mesh addresses are redirected all the same.
    pub exclude_ports: Vec<Ports>,
    /// Only these destinations; empty means all but the excluded ones.
    pub include_cidrs: Vec<IpNet>,
    /// Destinations that are left alone. Mesh addresses are redirected all the same.
    pub exclude_cidrs: Vec<IpNet>,
    /// Users whose traffic is left alone, lookups included; mesh addresses are closed to them.
    pub exclude_uids: Vec<u32>,
}

impl Default for Outbound {
    fn default() -> Self {
        Self {
            enabled: true,
            port: 15001,
            include_ports: Vec::new(),
            exclude_ports: Vec::new(),
            include_cidrs: Vec::new(),
            exclude_cidrs: Vec::new(),
            exclude_uids: Vec::new(),
        }
    }
}

/// Which lookups go to the shim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Dns {
    /// Redirect lookups (UDP and TCP port 53) at all.
    pub enabled: bool,
    /// The shim's DNS port.
    pub port: u16,
    /// All lookups, or only those that go to `resolvers`.
    pub capture: DnsCapture,
    /// The resolvers whose lookups are captured with `capture: resolvers`.
    pub resolvers: Vec<IpAddr>,
    /// Keep the application's lookups in a conntrack zone of their own, so that a port that the shim used before
    /// can't carry a lookup past the redirect.
    pub conntrack_zones: bool,
    /// Whether `outbound.excludeCidrs` exempts lookups too (Kuma does, Istio doesn't).
    pub honour_exclude_cidrs: bool,
}

impl Default for Dns {
    fn default() -> Self {
        Self {
            enabled: true,
            port: 15053,
            capture: DnsCapture::All,
            resolvers: Vec::new(),
            conntrack_zones: true,
            honour_exclude_cidrs: false,
        }
    }
}

/// The scope of DNS capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum DnsCapture {
    /// Every lookup, wherever it is sent.
    All,
    /// Only lookups that are sent to the listed resolvers.
    Resolvers,
}

/// One thing that is wrong with an intent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Violation {
    /// Path of the field, as written in the document.
    pub field: String,
    /// What is wrong and what would be right.
    pub message: String,
}

/// Everything that is wrong with an intent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the redirect's configuration is invalid: {}", list(.0))]
pub struct InvalidIntent(pub Vec<Violation>);

fn list(violations: &[Violation]) -> String {
    violations.iter().map(|v| format!("{}: {}", v.field, v.message)).collect::<Vec<_>>().join("; ")
}

impl RedirectIntent {
    /// Checks the whole document and returns every violation, not only the first.
    pub fn validate(&self) -> Result<(), InvalidIntent> {
        let mut found = Vec::new();
        let mut say =
            |field: &str, message: String| found.push(Violation { field: field.to_owned(), message });

        if self.proxy_uids.is_empty() && self.proxy_gids.is_empty() && self.proxy_mark.is_none() {
            let hint = "name the proxy by at least one of proxyUids, proxyGids, proxyMark: without it the proxy's \
                        own connections would be sent back to it";
            say("proxyUids", hint.to_owned());
        }
        for (i, uid) in self.proxy_uids.iter().enumerate() {
            let field = format!("proxyUids[{i}]");
            match *uid {
                0 => say(
                    &field,
                    "0 (root) can't be the proxy: everything root does would go past the mesh".to_owned(),
                ),
                u32::MAX => say(&field, format!("{uid} is not a user id")),
                _ if self.outbound.exclude_uids.contains(uid) => {
                    say(&field, format!("{uid} is also listed in outbound.excludeUids; list it once"));
                }
                _ => {}
            }
        }
        if self.proxy_mark == Some(0) {
            say("proxyMark", "0 is the mark of every unmarked packet; choose another".to_owned());
        }
        for (field, on, port) in [
            ("inbound.port", self.inbound.enabled, self.inbound.port),
            ("outbound.port", self.outbound.enabled, self.outbound.port),
            ("dns.port", self.dns.enabled, self.dns.port),
        ] {
            if on && port == 0 {
                say(field, "must be between 1 and 65535".to_owned());
            }
        }
        if self.inbound.enabled && self.outbound.enabled && self.inbound.port == self.outbound.port {
            say("outbound.port", format!("{} is already the inbound port", self.outbound.port));
        }
        for (field, on, port) in [
            ("inbound.port", self.inbound.enabled, self.inbound.port),
            ("outbound.port", self.outbound.enabled, self.outbound.port),
        ] {
            if on && self.dns.enabled && port == self.dns.port {
                say("dns.port", format!("{port} is already {field}; the shim serves DNS over TCP too"));
            }
        }
        if !self.ipv4 && !self.ipv6 {
            say("ipv4", "at least one of ipv4 and ipv6 must be true".to_owned());
        }
        if self.dns.enabled && self.dns.capture == DnsCapture::Resolvers && self.dns.resolvers.is_empty() {
            say("dns.resolvers", "must list at least one address with capture: resolvers".to_owned());
        }
        for (i, range) in self.vip_ranges.iter().enumerate() {
            let field = format!("vipRanges[{i}]");
            if range.prefix_len() == 0 {
                say(&field, format!("{range} would close the whole network"));
            }
            if range.trunc().contains(&loopback(range)) {
                say(&field, format!("{range} contains the loopback address"));
            }
        }
        if found.is_empty() { Ok(()) } else { Err(InvalidIntent(found)) }
    }
}

fn loopback(range: &IpNet) -> IpAddr {
    match range {
        IpNet::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpNet::V6(_) => Ipv6Addr::LOCALHOST.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_every_violation() {
        let intent = RedirectIntent {
            proxy_uids: vec![0],
            ipv4: false,
            ipv6: false,
            inbound: Inbound { port: 15001, ..Inbound::default() },
            dns: Dns { port: 15001, capture: DnsCapture::Resolvers, ..Dns::default() },
            vip_ranges: vec!["0.0.0.0/0".parse().unwrap()],
            ..RedirectIntent::default()
        };
        let InvalidIntent(found) = intent.validate().unwrap_err();
        let fields: Vec<_> = found.iter().map(|v| v.field.as_str()).collect();
        assert_eq!(
            fields,
            [
                "proxyUids[0]",
                "outbound.port",
                "dns.port",
                "dns.port",
                "ipv4",
                "dns.resolvers",
                "vipRanges[0]",
                "vipRanges[0]"
            ]
        );
    }

    #[test]
    fn one_proxy_uid_is_a_complete_document() {
        let intent: RedirectIntent = serde_json::from_str(r#"{"proxyUids":[5678]}"#).unwrap();
        intent.validate().unwrap();
        assert_eq!((intent.inbound.port, intent.outbound.port, intent.dns.port), (15006, 15001, 15053));
        assert_eq!(intent.vip_ranges.len(), 4);
    }

    #[test]
    fn ports_are_numbers_or_ranges() {
        let json = r#"{"proxyUids":[1],"outbound":{"excludePorts":[22,"8000-8100","443"]}}"#;
        let intent: RedirectIntent = serde_json::from_str(json).unwrap();
        let text: Vec<_> = intent.outbound.exclude_ports.iter().map(ToString::to_string).collect();
        assert_eq!(text, ["22", "8000-8100", "443"]);
        assert!(serde_json::from_str::<RedirectIntent>(r#"{"outbound":{"excludePorts":["9-3"]}}"#).is_err());
        assert!(serde_json::from_str::<RedirectIntent>(r#"{"outbond":{}}"#).is_err());
    }
}
