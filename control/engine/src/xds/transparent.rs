//! The catch-all listeners of the redirect and the clusters behind them.
//!
//! Outbound, what no listener claims goes on to where it was going, except the mesh's own addresses: those are
//! refused, because a mesh address without a listener is late, gone or withheld, and must not leave in
//! plaintext. Inbound, everything that no listener claims is refused: a meshed port whose listener isn't there
//! yet is not open in plaintext, whatever address it was dialled by.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    num::NonZeroU32,
};

use ursa_model::vip::VIP_RANGES;

use super::{cluster, filter, listener, part};
use crate::{
    encoded::TypeUrl,
    envoy::{
        encode,
        types::{
            core::TrafficDirection,
            listener::{FilterChain, FilterChainMatch, Listener},
        },
    },
    input,
    snapshot::Layer,
};

/// The cluster behind refused inbound connections.
pub(crate) const REFUSE_INBOUND: &str = "self_transparentproxy_no_destination_inbound";
/// The cluster behind refused outbound connections.
pub(crate) const REFUSE_OUTBOUND: &str = "self_transparentproxy_no_destination_outbound";

/// Where the redirect sends traffic, and which families there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Redirect {
    pub(crate) inbound: u16,
    pub(crate) outbound: u16,
    pub(crate) ipv4: bool,
    pub(crate) ipv6: bool,
    /// What arrives comes by TPROXY: nothing is rewritten, and what Envoy delivers with the client's address needs this
    /// mark for the answers to find back to it.
    pub(crate) tproxy_mark: Option<NonZeroU32>,
}

impl Redirect {
    /// For what is shared by all that have it.
    pub(crate) fn hash(self) -> u128 {
        input::hash(&(self.inbound, self.outbound, self.ipv4, self.ipv6, self.tproxy_mark))
    }

    fn families(self) -> impl Iterator<Item = (&'static str, IpAddr)> {
        let v4 = self.ipv4.then_some(("ipv4", IpAddr::V4(Ipv4Addr::UNSPECIFIED)));
        let v6 = self.ipv6.then_some(("ipv6", IpAddr::V6(Ipv6Addr::UNSPECIFIED)));
        v4.into_iter().chain(v6)
    }
}

/// Adds the outbound half.
pub(crate) fn outbound(redirect: Redirect, layer: &mut Layer) {
    put_cluster(layer, &cluster::closed(REFUSE_OUTBOUND));
    for (family, any_address) in redirect.families() {
        let name = format!("self_transparentproxy_passthrough_outbound_{family}");
        put_cluster(layer, &cluster::original_destination(&name));
        let mesh = FilterChain {
            filter_chain_match: Some(FilterChainMatch {
                prefix_ranges: VIP_RANGES
                    .iter()
                    .filter(|range| range.base.is_ipv4() == any_address.is_ipv4())
                    .map(|range| part::cidr(range.base, range.prefix))
                    .collect(),
                ..FilterChainMatch::default()
            }),
            ..to(&name, REFUSE_OUTBOUND)
        };
        let listener = listener::catch_all(
            &name,
            any_address,
            redirect.outbound,
            TrafficDirection::Outbound,
            vec![mesh],
            to(&name, &name),
        );
        layer.insert(TypeUrl::Listener, encode::resource(TypeUrl::Listener, &name, &listener));
    }
}

/// Adds the inbound half.
pub(crate) fn inbound(redirect: Redirect, layer: &mut Layer) {
    put_cluster(layer, &cluster::closed(REFUSE_INBOUND));
    for (family, any_address) in redirect.families() {
        let name = format!("self_transparentproxy_passthrough_inbound_{family}");
        let listener = Listener {
            // Accepts connections to whatever address the client meant.
            transparent: redirect.tproxy_mark.and_then(|_| part::yes()),
            ..listener::catch_all(
                &name,
                any_address,
                redirect.inbound,
                TrafficDirection::Inbound,
                Vec::new(),
                to(&name, REFUSE_INBOUND),
            )
        };
        layer.insert(TypeUrl::Listener, encode::resource(TypeUrl::Listener, &name, &listener));
    }
}

fn to(stat_prefix: &str, cluster: &str) -> FilterChain {
    listener::chain(vec![filter::Terminal::Tcp(Box::new(filter::tcp(stat_prefix, cluster))).finish()])
}

fn put_cluster(layer: &mut Layer, cluster: &crate::envoy::types::cluster::Cluster) {
    layer.insert(TypeUrl::Cluster, encode::resource(TypeUrl::Cluster, &cluster.name, cluster));
}
