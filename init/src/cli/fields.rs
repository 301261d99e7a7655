//! Every field of the redirect's document as a flag and a variable: one table, from which the arguments are made.

use std::fmt::Display;
use std::str::FromStr;

use serde::Serialize;
use serde_json::{Value, json};

use crate::intent::{Ids, Interface, Ports, Workload, kuma};
use crate::yaml;

/// One field of the document.
pub(super) struct Field {
    /// Its path in the document.
    pub(super) path: &'static str,
    /// The flag, without `--`; also the argument's id.
    pub(super) flag: &'static str,
    /// The variable.
    pub(super) variable: &'static str,
    /// What the help calls the value.
    pub(super) value: &'static str,
    pub(super) help: &'static str,
    /// The heading under which the help shows it.
    pub(super) heading: &'static str,
    pub(super) kind: Kind,
}

/// How a text becomes a value of the document.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    One(fn(&str) -> Result<Value, String>),
    /// May be repeated; each text holds any number of items.
    Many(fn(&str) -> Result<Vec<Value>, String>),
}

impl Kind {
    /// Reads one occurrence.
    pub(super) fn parse(self, text: &str) -> Result<Vec<Value>, String> {
        match self {
            Self::One(parse) => parse(text.trim()).map(|value| vec![value]),
            Self::Many(parse) => parse(text),
        }
    }
}

impl Field {
    /// The field's value from everything that was given.
    pub(super) fn value(&self, given: Vec<Value>) -> Value {
        match self.kind {
            Kind::One(_) => given.into_iter().next_back().unwrap_or(Value::Null),
            Kind::Many(_) => Value::Array(given),
        }
    }
}

const PROXY: &str = "The proxy";
const IN: &str = "Arriving connections";
const OUT: &str = "Opened connections";
const DNS: &str = "Name lookups";
const NET: &str = "Network";
const MORE: &str = "More";

macro_rules! field {
    ($heading:ident $path:literal $flag:literal $variable:literal $value:literal $kind:expr, $help:literal) => {
        Field {
            path: $path,
            flag: $flag,
            variable: $variable,
            value: $value,
            help: $help,
            heading: $heading,
            kind: $kind,
        }
    };
}

use Kind::{Many, One};

#[rustfmt::skip]
pub(super) const FIELDS: &[Field] = &[
    field!(PROXY "proxyUids" "proxy-uid" "URSA_PROXY_UIDS" "UID" Many(numbers), "User ids of the proxy"),
    field!(PROXY "proxyGids" "proxy-gid" "URSA_PROXY_GIDS" "GID" Many(numbers), "Group ids of the proxy"),
    field!(PROXY "proxyMark" "proxy-mark" "URSA_PROXY_MARK" "MARK" One(number), "Socket mark of the proxy, decimal or 0x… (complements the ids)"),
    field!(IN "inbound.enabled" "inbound" "URSA_INBOUND" "BOOL" One(boolean), "Redirect arriving connections"),
    field!(IN "inbound.port" "inbound-port" "URSA_INBOUND_PORT" "PORT" One(port), "The proxy's inbound port"),
    field!(IN "inbound.mode" "inbound-mode" "URSA_INBOUND_MODE" "MODE" One(mode), "redirect, or tproxy to keep the client's address"),
    field!(IN "inbound.includePorts" "include-inbound-ports" "URSA_INCLUDE_INBOUND_PORTS" "PORTS" Many(items::<Ports>), "Redirect only these arriving ports"),
    field!(IN "inbound.excludePorts" "exclude-inbound-ports" "URSA_EXCLUDE_INBOUND_PORTS" "PORTS" Many(items::<Ports>), "Leave these arriving ports alone"),
    field!(IN "inbound.includeCidrs" "include-inbound-cidrs" "URSA_INCLUDE_INBOUND_CIDRS" "CIDR" Many(cidrs), "Redirect only connections from these sources"),
    field!(IN "inbound.excludeCidrs" "exclude-inbound-cidrs" "URSA_EXCLUDE_INBOUND_CIDRS" "CIDR" Many(cidrs), "Leave connections from these sources alone"),
    field!(IN "inbound.probes.sources" "probe-sources" "URSA_PROBE_SOURCES" "IP" Many(items::<std::net::IpAddr>), "The node's addresses, whose kubelet's probes go past the proxy"),
    field!(IN "inbound.probes.ports" "probe-ports" "URSA_PROBE_PORTS" "PORTS" Many(items::<Ports>), "The ports that it probes [default: all]"),
    field!(OUT "outbound.enabled" "outbound" "URSA_OUTBOUND" "BOOL" One(boolean), "Redirect opened connections"),
    field!(OUT "outbound.port" "outbound-port" "URSA_OUTBOUND_PORT" "PORT" One(port), "The proxy's outbound port"),
    field!(OUT "outbound.includePorts" "include-outbound-ports" "URSA_INCLUDE_OUTBOUND_PORTS" "PORTS" Many(items::<Ports>), "Redirect only these destination ports"),
    field!(OUT "outbound.excludePorts" "exclude-outbound-ports" "URSA_EXCLUDE_OUTBOUND_PORTS" "PORTS" Many(items::<Ports>), "Leave these destination ports alone"),
    field!(OUT "outbound.includeCidrs" "include-outbound-cidrs" "URSA_INCLUDE_OUTBOUND_CIDRS" "CIDR" Many(cidrs), "Redirect only these destinations"),
    field!(OUT "outbound.excludeCidrs" "exclude-outbound-cidrs" "URSA_EXCLUDE_OUTBOUND_CIDRS" "CIDR" Many(cidrs), "Leave these destinations alone"),
    field!(OUT "outbound.excludeUids" "exclude-outbound-uids" "URSA_EXCLUDE_OUTBOUND_UIDS" "UID" Many(items::<Ids>), "Leave these users alone"),
    field!(OUT "outbound.excludeOwners" "exclude-outbound-owners" "URSA_EXCLUDE_OUTBOUND_OWNERS" "[[PROTOCOL:]PORTS:]UIDS" Many(owners), "Leave a part of a user's traffic alone, such as tcp:22,80-88:1000-1002; more after `;`"),
    field!(OUT "outbound.includeGids" "include-outbound-gids" "URSA_INCLUDE_OUTBOUND_GIDS" "GID" Many(items::<Ids>), "Redirect only traffic of these groups"),
    field!(OUT "outbound.excludeGids" "exclude-outbound-gids" "URSA_EXCLUDE_OUTBOUND_GIDS" "GID" Many(items::<Ids>), "Leave traffic of these groups alone"),
    field!(DNS "dns" "dns" "URSA_DNS" "WHICH" One(dns), "Which lookups to redirect: all, resolvers (those of the resolv.conf), off"),
    field!(DNS "dns.port" "dns-port" "URSA_DNS_PORT" "PORT" One(port), "The shim's DNS port"),
    field!(DNS "dns.resolvers" "dns-resolvers" "URSA_DNS_RESOLVERS" "IP" Many(items::<std::net::IpAddr>), "The resolvers [default: those in the resolv.conf]"),
    field!(DNS "dns.conntrackZones" "dns-conntrack-zones" "URSA_DNS_CONNTRACK_ZONES" "BOOL" One(boolean), "Track redirected lookups in a conntrack zone of their own"),
    field!(DNS "dns.honourExcludeCidrs" "dns-honour-exclude-cidrs" "URSA_DNS_HONOUR_EXCLUDE_CIDRS" "BOOL" One(boolean), "Leave lookups to excluded destinations alone too"),
    field!(NET "ipv4" "ipv4" "URSA_IPV4" "BOOL" One(boolean), "Redirect IPv4"),
    field!(NET "ipv6" "ipv6" "URSA_IPV6" "BOOL" One(boolean), "Redirect IPv6"),
    field!(NET "vipRanges" "vip-ranges" "URSA_VIP_RANGES" "CIDR" Many(cidrs), "Addresses of the mesh: routed to lo, always redirected, never let out"),
    field!(NET "interfaces.include" "include-interfaces" "URSA_INCLUDE_INTERFACES" "NAME" Many(items::<Interface>), "Only traffic by these interfaces; br+ means all that begin so"),
    field!(NET "interfaces.exclude" "exclude-interfaces" "URSA_EXCLUDE_INTERFACES" "NAME" Many(items::<Interface>), "Leave traffic by these interfaces alone"),
    field!(NET "bridges" "bridges" "URSA_BRIDGES" "NAME[:CIDR]" Many(bridges), "Interfaces of guests, such as docker0:172.17.0.0/16"),
    field!(MORE "workloads" "workload" "URSA_WORKLOADS" "YAML" Many(workloads), "One of several workloads, such as '{name: web, uids: [1000], …}'; repeat it"),
    field!(MORE "tproxy.mark" "tproxy-mark" "URSA_TPROXY_MARK" "MARK" One(number), "The mark of a transparent proxy's connections to the application"),
    field!(MORE "tproxy.routeTable" "tproxy-route-table" "URSA_TPROXY_ROUTE_TABLE" "TABLE" One(number), "The routing table that brings its answers back"),
    field!(MORE "dropInvalid" "drop-invalid" "URSA_DROP_INVALID" "BOOL" One(boolean), "Discard packets that belong to no connection"),
    field!(MORE "trace" "trace" "URSA_TRACE" "BOOL" One(boolean), "Trace packets through all rules (nft monitor trace)"),
    field!(MORE "position" "position" "URSA_POSITION" "WHERE" One(position), "first or last among programs that translate addresses"),
];

fn boolean(text: &str) -> Result<Value, String> {
    match text {
        "true" => Ok(true.into()),
        "false" => Ok(false.into()),
        _ => Err("must be true or false".to_owned()),
    }
}

fn port(text: &str) -> Result<Value, String> {
    let number = text.parse::<u16>().ok().filter(|port| *port > 0);
    number.map(Value::from).ok_or_else(|| "must be a port (1 to 65535)".to_owned())
}

/// Marks are usually written in hexadecimal.
fn number(text: &str) -> Result<Value, String> {
    let number = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    };
    number.map(Value::from).ok_or_else(|| "must be a number below 2^32, decimal or 0x…".to_owned())
}

fn numbers(text: &str) -> Result<Vec<Value>, String> {
    let number = |item: &str| {
        item.parse::<u32>().map(Value::from).map_err(|_| {
            format!("`{item}` is no numeric id; names aren't looked up, because a lookup can hang (try `id -u {item}`)")
        })
    };
    split(text).map(number).collect()
}

fn items<T: FromStr<Err: Display> + Serialize>(text: &str) -> Result<Vec<Value>, String> {
    let item = |item: &str| {
        let item = item.parse::<T>().map_err(|why| format!("`{item}`: {why}"))?;
        serde_json::to_value(item).map_err(|why| why.to_string())
    };
    split(text).map(item).collect()
}

fn split(text: &str) -> impl Iterator<Item = &str> {
    text.split(',').map(str::trim).filter(|item| !item.is_empty())
}

fn all<T: Serialize>(parsed: Result<Vec<T>, impl Display>) -> Result<Vec<Value>, String> {
    let values = parsed.map_err(|why| why.to_string())?;
    values.into_iter().map(|value| serde_json::to_value(value).map_err(|why| why.to_string())).collect()
}

fn cidrs(text: &str) -> Result<Vec<Value>, String> {
    all(kuma::cidrs(&[text.to_owned()]))
}

fn owners(text: &str) -> Result<Vec<Value>, String> {
    all(kuma::owner_exclusions(&[text.to_owned()]))
}

fn bridges(text: &str) -> Result<Vec<Value>, String> {
    all(kuma::bridges(&[text.to_owned()]))
}

/// One workload or a list of them.
fn workloads(text: &str) -> Result<Vec<Value>, String> {
    if text.trim_start().starts_with('[') {
        return all(yaml::from_str::<Vec<Workload>>(text));
    }
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    all(yaml::from_str::<Workload>(text).map(|workload| vec![workload]))
}

fn mode(text: &str) -> Result<Value, String> {
    one_of(text, &["redirect", "tproxy"])
}

fn position(text: &str) -> Result<Value, String> {
    one_of(text, &["first", "last"])
}

fn one_of(text: &str, words: &[&str]) -> Result<Value, String> {
    if words.contains(&text) { Ok(text.into()) } else { Err(format!("must be one of {}", words.join(", "))) }
}

fn dns(text: &str) -> Result<Value, String> {
    match one_of(text, &["all", "resolvers", "off"])?.as_str() {
        Some("off") => Ok(json!({"enabled": false})),
        _ => Ok(json!({"enabled": true, "capture": text})),
    }
}
