//! MeshPassthrough: what may leave the mesh by address or name.

use std::collections::BTreeSet;

use crate::{
    Path,
    meta::Meta,
    names, open_enum,
    policy::TargetRef,
    registry::{Descriptor, PolicyTraits},
    resource::{NoStatus, ResourceSpec},
    spec_struct,
    validate::{self, must_be_one_of},
    violation::Violations,
};

/// All that is known of the type.
pub static DESCRIPTOR: Descriptor = Descriptor {
    acted_on: false,
    ..Descriptor::policy::<MeshPassthrough>(
        PolicyTraits::PROXY,
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

/// What a match needs of Envoy: matches of one chain must agree.
#[derive(Debug, PartialEq, Eq)]
struct Chain<'a> {
    class: &'static str,
    /// Canonical, empty for domains.
    address: String,
    /// Of a TLS server.
    server: &'a str,
}

impl Match {
    /// What is spoken, `tcp` when nothing is said.
    pub fn protocol(&self) -> &str {
        self.protocol.as_ref().map_or("tcp", |protocol| protocol.as_str().unwrap_or_default())
    }

    fn chain(&self) -> Chain<'_> {
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
        let server = if self.match_type == "Domain" && class == "tls" { self.value.as_str() } else { "" };
        Chain { class, address, server }
    }

    /// Whether two matches would need the same filter chain and can't share it. One without a port is for all.
    fn conflicts_with(&self, other: &Self) -> bool {
        let chain = self.chain();
        let same_ports = other.port == self.port || other.port.is_none() || self.port.is_none();
        let same_protocol = other.protocol() == self.protocol();
        if !same_ports || other.chain() != chain {
            return false;
        }
        if chain.address.is_empty() {
            // All domains of HTTP on a port are in one chain.
            chain.server.is_empty() && chain.class == "http" && !same_protocol
        } else {
            !same_protocol || other.value != self.value
        }
    }

    /// Which field to change, and why.
    fn conflict(&self, other: &Self) -> (&'static str, String) {
        let (was, now) = (other.protocol(), self.protocol());
        let port = self.port.or(other.port);
        let ports = port.map_or("all ports".to_owned(), |port| format!("port {port}"));
        if was == now {
            let (other, this) = (&other.value, &self.value);
            let message = format!(
                "match {this:?} resolves to the same address as match {other:?} on {ports}, both would produce the same filter chain"
            );
            return ("value", message);
        }
        if !self.chain().address.is_empty() {
            let message = format!(
                "protocols {was} and {now} for the same address on {ports} would produce the same filter chain, use a single protocol for {:?}",
                self.value
            );
            return ("protocol", message);
        }
        let same = "using the same port in multiple matches requires the same protocol for the following protocols: [grpc http http2]";
        if self.port == other.port {
            return ("port", same.to_owned());
        }
        let message = format!(
            "a match without a port applies to all ports, so protocols {was} and {now} are both configured on {ports}, {same}"
        );
        ("port", message)
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
        // What conflicts with an earlier match isn't held against later ones.
        let mut accepted: Vec<&Match> = Vec::new();
        let mut seen = BTreeSet::new();
        for (i, entry) in self.default.append_match.iter().enumerate() {
            let path = path.field("appendMatch").index(i);
            if entry.protocol() == "mysql" && entry.port.is_none() {
                out.add(path.field("port"), "port must be defined for Mysql protocol");
            }
            if let Some(port) = entry.port {
                validate::valid_port(&path.field("port"), port, out);
            }
            match accepted.iter().find(|other| entry.conflicts_with(other)) {
                Some(other) => {
                    let (field, message) = entry.conflict(other);
                    out.add(path.field(field), message);
                }
                None => accepted.push(entry),
            }
            if let Some(port) = entry.port
                && !seen.insert((port, entry.protocol(), &entry.value))
            {
                out.add(
                    path.field("value"),
                    format!("value {} is already defiend for this port and protocol", entry.value),
                );
            }
            if !PROTOCOLS.contains(&entry.protocol()) {
                out.add(path.field("protocol"), must_be_one_of("protocol", &PROTOCOLS));
            }
            entry.validate_value(&path, out);
        }
    }
}

impl Match {
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
                if !domain.starts_with('*') && !names::is_dns_name(domain) {
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

#[cfg(test)]
mod tests {
    use crate::table::faults;

    #[rstest::rstest]
    #[case::same_address(
        "{type: IP, value: '::1', port: 80, protocol: tcp}, {type: CIDR, value: '::1/128', port: 80, protocol: tcp}",
        &["[1].value: match \"::1/128\" resolves to the same address as match \"::1\" on port 80, both would produce the same filter chain"]
    )]
    #[case::two_protocols(
        "{type: IP, value: 10.0.0.1, protocol: http}, {type: IP, value: 10.0.0.1, protocol: grpc}",
        &["[1].protocol: protocols http and grpc for the same address on all ports would produce the same filter chain, use a single protocol for \"10.0.0.1\""]
    )]
    #[case::all_ports(
        "{type: Domain, value: a.example, protocol: http}, {type: Domain, value: b.example, port: 80, protocol: grpc}",
        &["[1].port: a match without a port applies to all ports, so protocols http and grpc are both configured on port 80, using the same port in multiple matches requires the same protocol for the following protocols: [grpc http http2]"]
    )]
    #[case::refused_ones_do_not_count(
        "{type: Domain, value: a.example, port: 80, protocol: http}, {type: Domain, value: b.example, port: 80, protocol: grpc}, {type: Domain, value: c.example, port: 80, protocol: http}",
        &["[1].port: using the same port in multiple matches requires the same protocol for the following protocols: [grpc http http2]"]
    )]
    #[case::twice(
        "{type: Domain, value: a.example, port: 443, protocol: tls}, {type: Domain, value: a.example, port: 443, protocol: tls}",
        &["[1].value: value a.example is already defiend for this port and protocol"]
    )]
    #[case::different(
        "{type: Domain, value: a.example, port: 443, protocol: tls}, {type: IP, value: 10.0.0.1, port: 443, protocol: tcp}, {type: CIDR, value: 10.0.0.0/8, port: 443, protocol: tcp}",
        &[]
    )]
    fn matches_that_share_a_chain_agree(#[case] matches: &str, #[case] expected: &[&str]) {
        let spec = format!("default: {{passthroughMode: Matched, appendMatch: [{matches}]}}");
        let expected: Vec<String> =
            expected.iter().map(|fault| format!("spec.default.appendMatch{fault}")).collect();
        assert_eq!(faults("MeshPassthrough", &spec), expected);
    }
}
