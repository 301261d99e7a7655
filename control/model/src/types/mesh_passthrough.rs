//! MeshPassthrough: what may leave the mesh by address or name.

use crate::{
    Path,
    meta::Meta,
    names, open_enum,
    policy::TargetRef,
    registry::{Descriptor, PolicyTraits, Sync},
    resource::{NoStatus, ResourceSpec},
    spec_struct,
    validate::{self, must_be_one_of},
    violation::Violations,
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    sync: Sync { global_to_zone: true, zone_to_global: true, zone_to_zones: true },
    acted_on: false,
    policy: Some(PolicyTraits { has_to: false, has_rules: false, is_inbound: false, is_outbound: false }),
    ..Descriptor::of::<MeshPassthrough>(
        "MeshPassthrough",
        "meshpassthroughs",
        "mp",
        "Mesh Passthrough",
        "Mesh Passthroughs",
    )
};

open_enum! {
    /// How much may leave.
    pub enum PassthroughMode { All = "All", Matched = "Matched", None = "None" }
}

spec_struct! {
    /// What may leave the selected proxies.
    pub struct MeshPassthrough {
        pub target_ref: Option<TargetRef>,
        pub default: Conf,
    }
    /// How much, and what.
    pub struct Conf {
        pub passthrough_mode: Option<PassthroughMode>,
        pub append_match: Vec<Match>,
    }
    /// One address or name.
    pub struct Match {
        #[serde(rename = "type")]
        pub match_type: String,
        pub value: String,
        pub port: Option<u32>,
        /// A text; anything else is refused by validation.
        pub protocol: Option<serde_json::Value>,
    }
}

const PROTOCOLS: [&str; 6] = ["tcp", "tls", "grpc", "http", "http2", "mysql"];
const HTTP_PROTOCOLS: [&str; 3] = ["grpc", "http", "http2"];

impl Match {
    /// What is spoken, `tcp` when nothing is said.
    pub fn protocol(&self) -> &str {
        self.protocol.as_ref().map_or("tcp", |protocol| protocol.as_str().unwrap_or_default())
    }

    /// The filter chain it needs: kind of protocol, canonical address, name of a TLS server.
    fn chain(&self) -> (&'static str, String, &str) {
        let class = match self.protocol() {
            "tls" => "tls",
            protocol if HTTP_PROTOCOLS.contains(&protocol) => "http",
            _ => "tcp",
        };
        let address = match self.match_type.as_str() {
            "IP" => self
                .value
                .parse::<std::net::IpAddr>()
                .map_or(self.value.clone(), |ip| format!("{ip}/{}", if ip.is_ipv6() { 128 } else { 32 })),
            "CIDR" => {
                self.value.parse::<ipnet::IpNet>().map_or(self.value.clone(), |net| net.trunc().to_string())
            }
            _ => String::new(),
        };
        let name = if self.match_type == "Domain" && class == "tls" { self.value.as_str() } else { "" };
        (class, address, name)
    }
}

impl ResourceSpec for MeshPassthrough {
    const DESCRIPTOR: &'static Descriptor = &DESCRIPTOR;
    type Status = NoStatus;

    fn validate(&self, _meta: &Meta, out: &mut Violations) {
        validate::top_level(self.target_ref.as_ref(), false, out);
        let path = Path::spec().field("default");
        if self.default.passthrough_mode.as_ref().is_some_and(|mode| !mode.is_known()) {
            out.add(path.field("passthroughMode"), must_be_one_of("passthroughMode", PassthroughMode::KNOWN));
        }
        let all = &self.default.append_match;
        for (i, entry) in all.iter().enumerate() {
            let path = path.field("appendMatch").index(i);
            if entry.protocol() == "mysql" && entry.port.is_none() {
                out.add(path.field("port"), "port must be defined for Mysql protocol");
            }
            if entry.port.is_some_and(|port| !(1..=65535).contains(&port)) {
                out.add(path.field("port"), "port must be a valid (1-65535)");
            }
            entry.validate_conflicts(&path, &all[..i], out);
            if !PROTOCOLS.contains(&entry.protocol()) {
                out.add(path.field("protocol"), must_be_one_of("protocol", &PROTOCOLS));
            }
            entry.validate_value(&path, out);
        }
    }
}

impl Match {
    /// Two matches that would need the same filter chain can't both be there.
    fn validate_conflicts(&self, path: &Path, before: &[Match], out: &mut Violations) {
        let chain = self.chain();
        let conflict = before.iter().find(|other| {
            let same_ports = other.port == self.port || other.port.is_none() || self.port.is_none();
            let same_protocol = other.protocol() == self.protocol();
            same_ports
                && other.chain() == chain
                && if chain.1.is_empty() {
                    chain.2.is_empty() && chain.0 == "http" && !same_protocol
                } else {
                    !same_protocol || other.value != self.value
                }
        });
        if let Some(other) = conflict {
            if other.protocol() == self.protocol() {
                let message = format!(
                    "match {:?} resolves to the same address as match {:?}, both would produce the same filter chain",
                    self.value, other.value
                );
                out.add(path.field("value"), message);
            } else if chain.1.is_empty() {
                out.add(
                    path.field("port"),
                    "using the same port in multiple matches requires the same protocol for the following protocols: [grpc http http2]",
                );
            } else {
                let message = format!(
                    "protocols {} and {} for the same address would produce the same filter chain, use a single protocol for {:?}",
                    other.protocol(),
                    self.protocol(),
                    self.value
                );
                out.add(path.field("protocol"), message);
            }
        }
        let repeated = |other: &&Match| {
            other.port == self.port && other.protocol() == self.protocol() && other.value == self.value
        };
        if self.port.is_some() && before.iter().any(|other| repeated(&other)) {
            out.add(
                path.field("value"),
                format!("value {} is already defiend for this port and protocol", self.value),
            );
        }
    }

    fn validate_value(&self, path: &Path, out: &mut Violations) {
        match self.match_type.as_str() {
            "CIDR" if self.value.parse::<ipnet::IpNet>().is_err() => {
                out.add(path.field("value"), "provided CIDR has incorrect value");
            }
            "IP" if !names::is_ip(&self.value) => {
                out.add(path.field("value"), "provided IP has incorrect value");
            }
            "CIDR" | "IP" => {}
            "Domain" => {
                let protocol = self.protocol();
                if matches!(protocol, "tcp" | "mysql") {
                    out.add(
                        path.field("protocol"),
                        format!("protocol {protocol} is not supported for a domain"),
                    );
                }
                let wildcard = self.value.strip_prefix('*');
                if wildcard.is_some_and(|rest| !rest.is_empty() && !rest.starts_with('.')) {
                    out.add(
                        path.field("value"),
                        "provided DNS has incorrect value, partial wildcard is currently not supported",
                    );
                }
                if wildcard.is_some() && self.port.is_none() && HTTP_PROTOCOLS.contains(&protocol) {
                    out.add(
                        path.field("port"),
                        "wildcard domains doesn't work for all ports and layer 7 protocol",
                    );
                }
                let domain = self.value.strip_prefix("*.").unwrap_or(&self.value);
                let is_address = names::is_ip(domain);
                if !domain.starts_with('*') && (is_address || !names::is_dns_name(domain)) {
                    out.add(path.field("value"), "provided DNS has incorrect value");
                }
            }
            other => out.add(
                path.field("type"),
                format!("provided type {other} is not supported, one of Domain, IP, or CIDR is supported"),
            ),
        }
    }
}
