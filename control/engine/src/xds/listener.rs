//! Listeners and filter chains.

use std::{collections::BTreeMap, net::IpAddr, num::NonZeroU32};

use prost::{Message, Name};

use super::part;
use crate::envoy::{
    encode::any,
    types::{
        core::TrafficDirection,
        listener::{AdditionalAddress, Filter, FilterChain, Listener, ListenerFilter, listener_filter},
        original_src::OriginalSrc,
        tls_inspector::TlsInspector,
    },
};

/// Metadata key under which tools of Kuma look for labels.
const TAGS: &str = "io.kuma.tags";
/// Metadata that names what the listener stands for.
const UNIFIED_NAME: &str = "kuma.io/unified-name";

/// A port of a service on its virtual addresses. Connections reach it from the catch-all listener by their
/// original destination, so nothing is bound.
pub(crate) fn outbound(
    name: &str,
    addresses: &[IpAddr],
    port: u16,
    chains: Vec<FilterChain>,
) -> Option<Listener> {
    let (first, rest) = addresses.split_first()?;
    Some(Listener {
        additional_addresses: rest
            .iter()
            .map(|ip| AdditionalAddress {
                address: Some(part::address(*ip, port)),
                ..AdditionalAddress::default()
            })
            .collect(),
        bind_to_port: part::no(),
        metadata: part::metadata(TAGS, &BTreeMap::from([(UNIFIED_NAME.to_owned(), name.to_owned())])),
        ..base(name, *first, port, TrafficDirection::Outbound, chains)
    })
}

/// A port of the workload. Connections reach it from the catch-all listener.
pub(crate) fn inbound(
    name: &str,
    ip: IpAddr,
    port: u16,
    labels: &BTreeMap<String, String>,
    chains: Vec<FilterChain>,
) -> Listener {
    Listener {
        bind_to_port: part::no(),
        enable_reuse_port: part::yes(),
        metadata: part::metadata(TAGS, labels),
        ..base(name, ip, port, TrafficDirection::Inbound, chains)
    }
}

/// What the redirect sends traffic to: hands each connection to the listener of its original destination, and
/// keeps those that have none.
pub(crate) fn catch_all(
    name: &str,
    any_address: IpAddr,
    port: u16,
    direction: TrafficDirection,
    chains: Vec<FilterChain>,
    default_chain: FilterChain,
) -> Listener {
    Listener {
        use_original_dst: part::yes(),
        enable_reuse_port: part::yes(),
        default_filter_chain: Some(default_chain),
        ..base(name, any_address, port, direction, chains)
    }
}

fn base(
    name: &str,
    ip: IpAddr,
    port: u16,
    direction: TrafficDirection,
    chains: Vec<FilterChain>,
) -> Listener {
    Listener {
        name: name.to_owned(),
        stat_prefix: name.to_owned(),
        address: Some(part::address(ip, port)),
        traffic_direction: direction as i32,
        filter_chains: chains,
        ..Listener::default()
    }
}

/// A chain that takes every connection.
pub(crate) fn chain(filters: Vec<Filter>) -> FilterChain {
    FilterChain { filters, ..FilterChain::default() }
}

/// Tells TLS from plaintext before a filter chain is chosen.
pub(crate) fn tls_inspector() -> ListenerFilter {
    filter("envoy.filters.listener.tls_inspector", &TlsInspector::default())
}

/// Lets the workload see the client's address, which wins over the one that the cluster says. What is sent with it has
/// this mark.
pub(crate) fn original_source(mark: NonZeroU32) -> ListenerFilter {
    let config = OriginalSrc { mark: mark.get(), ..OriginalSrc::default() };
    filter("envoy.filters.listener.original_src", &config)
}

fn filter<M: Message + Name>(name: &str, config: &M) -> ListenerFilter {
    ListenerFilter {
        name: name.to_owned(),
        config_type: Some(listener_filter::ConfigType::TypedConfig(any(config))),
        ..ListenerFilter::default()
    }
}
