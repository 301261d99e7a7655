//! What the operator wants redirected: one typed, validated document, read from YAML, JSON, flags or the agent.

mod cgroup;
mod combine;
mod interface;
pub mod kuma;
mod span;
mod validate;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

pub use cgroup::{Cgroup, ParseCgroupError};
pub use combine::Part;
pub use interface::{Interface, ParseInterfaceError};
pub use span::{Ids, ParseSpanError, Ports, Span};
pub use validate::{InvalidIntent, Violation};

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
    /// Several workloads that share the namespace, each with a proxy of its own. With any, `inbound`, `outbound` and
    /// `dns` are said per workload, and what belongs to no workload is left alone, mesh addresses apart.
    pub workloads: Vec<Workload>,
    /// The interfaces that the redirect concerns.
    pub interfaces: Interfaces,
    /// Interfaces behind which guests live (Docker, `KubeVirt`): what arrives by them is opened by a guest.
    pub bridges: Vec<Bridge>,
    /// Redirect IPv4.
    pub ipv4: bool,
    /// Redirect IPv6.
    pub ipv6: bool,
    /// Addresses that belong to the mesh: routed to `lo`, always redirected, never let out.
    pub vip_ranges: Vec<IpNet>,
    /// The mark and the routing table of workloads with `inbound.mode: tproxy`.
    pub tproxy: Tproxy,
    /// Discard packets that belong to no connection (out of window): not translated, they would reach the
    /// application and make it reset a healthy connection.
    pub drop_invalid: bool,
    /// Trace the way of every TCP and UDP packet through all rules (`nft monitor trace`). Slow; for a diagnosis.
    pub trace: bool,
    /// Whether to translate addresses before or after other programs that do (Docker, kube-proxy).
    pub position: Position,
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
            workloads: Vec::new(),
            interfaces: Interfaces::default(),
            bridges: Vec::new(),
            ipv4: true,
            ipv6: true,
            vip_ranges: default_vip_ranges(),
            tproxy: Tproxy::default(),
            drop_invalid: false,
            trace: false,
            position: Position::First,
        }
    }
}

/// The ranges that Ursa takes addresses for mesh names from.
pub fn default_vip_ranges() -> Vec<IpNet> {
    let v4 = |first| IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(first, 0, 0, 0), 8));
    let v6 = Ipv6Net::new_assert(Ipv6Addr::new(0xfd75, 0x7273, 0x6100, 0, 0, 0, 0, 0), 64);
    vec![v4(241), v4(242), v4(243), IpNet::V6(v6)]
}

/// One of several workloads in a namespace: who it is, and its proxy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Workload {
    /// Its name, unique in the namespace; shown beside its rules.
    pub name: String,
    /// The users that it runs as, and nothing else does.
    pub uids: Vec<Ids>,
    /// The slices that it runs in. One that doesn't exist yet is waited for; see [`Cgroup`].
    pub slices: Vec<Cgroup>,
    /// User ids of its proxy.
    pub proxy_uids: Vec<u32>,
    /// Connections that arrive at it; `includePorts` says which ports are its own.
    pub inbound: Inbound,
    /// Connections that it opens.
    pub outbound: Outbound,
    /// Its name lookups.
    pub dns: Dns,
}

/// Which arriving connections go to the proxy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Inbound {
    /// Redirect arriving connections at all.
    pub enabled: bool,
    /// The proxy's inbound port.
    pub port: u16,
    /// How connections reach the proxy.
    pub mode: InboundMode,
    /// Only these ports; empty means all but the excluded ones.
    pub include_ports: Vec<Ports>,
    /// Ports that are left alone. Ignored for ports that are listed in `includePorts`.
    pub exclude_ports: Vec<Ports>,
    /// Only connections from these sources; empty means all but the excluded ones.
    pub include_cidrs: Vec<IpNet>,
    /// Sources whose connections are left alone.
    pub exclude_cidrs: Vec<IpNet>,
    /// The kubelet's probes, which come without a certificate.
    pub probes: Probes,
}

impl Default for Inbound {
    fn default() -> Self {
        Self {
            enabled: true,
            port: 15006,
            mode: InboundMode::Redirect,
            include_ports: Vec::new(),
            exclude_ports: Vec::new(),
            include_cidrs: Vec::new(),
            exclude_cidrs: Vec::new(),
            probes: Probes::default(),
        }
    }
}

/// How arriving connections reach the proxy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum InboundMode {
    /// The destination is rewritten; the application sees the proxy's address.
    #[default]
    Redirect,
    /// The connection is handed over as it is, and the application may see the client's address. The proxy needs
    /// `NET_ADMIN` and a transparent listener.
    Tproxy,
}

/// Connections of the kubelet that go past the proxy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Probes {
    /// The node's addresses, from which the kubelet probes. None means no exemption.
    pub sources: Vec<IpAddr>,
    /// The ports that it probes; empty means all.
    pub ports: Vec<Ports>,
}

/// What [`InboundMode::Tproxy`] uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Tproxy {
    /// The mark of the proxy's connections to the application; the same as in Envoy's `original_src` filter.
    pub mark: u32,
    /// The routing table that brings the application's answers to the proxy.
    pub route_table: u32,
}

impl Default for Tproxy {
    /// Istio's numbers, so that Envoy configurations can be taken over.
    fn default() -> Self {
        Self { mark: 1337, route_table: 133 }
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
    pub exclude_uids: Vec<Ids>,
    /// Users and groups of whose traffic a part is left alone; mesh addresses are closed to it.
    pub exclude_owners: Vec<OwnerExclusion>,
    /// Only traffic of these groups; empty means all. The rest is left alone, lookups included.
    pub include_gids: Vec<Ids>,
    /// Groups whose traffic is left alone, lookups included.
    pub exclude_gids: Vec<Ids>,
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
            exclude_owners: Vec::new(),
            include_gids: Vec::new(),
            exclude_gids: Vec::new(),
        }
    }
}

/// A part of somebody's traffic: users × protocol × ports (Kuma's `excludePortsForUIDs`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct OwnerExclusion {
    /// The users.
    pub uids: Vec<Ids>,
    /// The protocol; both without it.
    pub protocol: Option<Transport>,
    /// The destination ports; empty means all.
    pub ports: Vec<Ports>,
}

/// A protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
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

/// The interfaces that the redirect concerns. The guards around mesh addresses hold on all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
pub struct Interfaces {
    /// Only traffic by these (and `lo`); empty means all but the excluded ones.
    pub include: Vec<Interface>,
    /// Traffic by these is left alone, lookups included.
    pub exclude: Vec<Interface>,
}

/// An interface behind which guests live. Their lookups and the connections that they open go to the proxy, the
/// latter only to `outbound.includeCidrs` where these are given; exclusions are the workload's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Bridge {
    /// The interface (`docker0`, `br+`).
    pub interface: Interface,
    /// The guests' own networks (Kuma's `vnet`): connections to them count as arriving, and only families that are
    /// listed here are concerned. Empty (`KubeVirt`): every connection counts as opened.
    #[serde(default)]
    pub local_cidrs: Vec<IpNet>,
}

/// Where our translation of addresses stands among that of other programs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Position {
    /// Before them.
    #[default]
    First,
    /// After them.
    Last,
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
                "dns.resolvers",
                "ipv4",
                "vipRanges[0]",
                "vipRanges[0]"
            ]
        );
    }

    #[test]
    fn workloads_must_be_told_apart() {
        let fields = |json: &str| -> Vec<String> {
            let intent: RedirectIntent = serde_json::from_str(json).unwrap();
            let found = intent.validate().err().map(|InvalidIntent(found)| found).unwrap_or_default();
            found.into_iter().map(|v| v.field).collect()
        };
        let web = r#"{"name":"web","uids":["2000-2009"],"proxyUids":[5701],"inbound":{"port":15106,"includePorts":[80]},
            "outbound":{"port":15101},"dns":{"port":15153}}"#;
        let shop = r#"{"name":"shop","slices":["ursa.slice/shop.slice"],"proxyUids":[5702],
            "inbound":{"port":15206,"includePorts":["90-99"]},"outbound":{"port":15201},"dns":{"port":15253}}"#;
        assert!(fields(&format!(r#"{{"workloads":[{web},{shop}]}}"#)).is_empty());
        assert_eq!(
            fields(&format!(r#"{{"workloads":[{web},{web}]}}"#)),
            [
                "workloads[1].name",
                "workloads[1].uids",
                "workloads[1].inbound.includePorts",
                "workloads[1].inbound.port",
                "workloads[1].outbound.port",
                "workloads[1].dns.port"
            ]
        );
        let vague = r#"{"name":"x","proxyUids":[0],"inbound":{"mode":"tproxy"}}"#;
        assert_eq!(
            fields(&format!(
                r#"{{"proxyUids":[2005],"dns":{{"port":1}},"workloads":[{web},{vague}],"tproxy":{{"mark":0,"routeTable":254}},
                "bridges":[{{"interface":"docker0"}}]}}"#
            )),
            [
                "dns",
                "bridges",
                "workloads[0].uids",
                "workloads[1].proxyUids[0]",
                "workloads[1].uids",
                "workloads[1].inbound.includePorts",
                "tproxy.mark",
                "tproxy.routeTable"
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
