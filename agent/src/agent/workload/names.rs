//! The table of names for the shim: a name appears only when Envoy has accepted the listener of its address.

use std::collections::BTreeMap;
use std::net::IpAddr;

use prost::Message;
use ursa_wire::resources::Name;

use crate::relay::{Cache, Kind, value};
use crate::shim::protocol::DnsTable;

/// Seconds for which an answer may be kept.
const TTL: u32 = 30;

/// The table as it may be served now.
pub(super) fn table(cache: &Cache, domains: &[String]) -> DnsTable {
    let accepted = cache.accepted(Kind::Listener);
    let mut names: BTreeMap<String, Vec<IpAddr>> = BTreeMap::new();
    for (key, item) in cache.current(Kind::Name) {
        let Ok(Ok(name)) = value(&item).map(Name::decode) else {
            tracing::warn!(name = %key, "a DNS entry from control can't be read and is left out");
            continue;
        };
        if !name.listener.is_empty() && !accepted.contains_key(&name.listener) {
            continue;
        }
        let addresses = name.addresses.iter().filter_map(|address| address.parse().ok()).collect();
        names.insert(name.hostname, addresses);
    }
    DnsTable { names, domains: domains.to_vec(), ttl: TTL }
}
