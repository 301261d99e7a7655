//! One port of a service, as those who call it see it.

use std::{net::IpAddr, sync::Arc};

use ursa_model::Protocol;

use super::{cluster, filter, listener, route, tls};
use crate::{
    encoded::{Encoded, TypeUrl},
    envoy::{
        encode,
        types::{cluster::Cluster, upstream_http::HttpProtocolOptions},
    },
};

/// What is known of a port before policies.
#[derive(Debug)]
pub(crate) struct Target<'a> {
    /// The KRI of the port: name of all its resources.
    pub(crate) name: &'a str,
    pub(crate) addresses: &'a [IpAddr],
    pub(crate) port: u16,
    pub(crate) protocol: &'a Protocol,
    pub(crate) sni: &'a str,
    /// SPIFFE ids of its proxies.
    pub(crate) peers: &'a [String],
    /// The SDS name of the caller's own certificate.
    pub(crate) identity: Option<&'a str>,
}

/// Cluster and listener of a port, open for policies.
#[derive(Debug)]
pub(crate) struct Outbound {
    pub(crate) name: String,
    pub(crate) cluster: Cluster,
    pub(crate) upstream: HttpProtocolOptions,
    pub(crate) terminal: filter::Terminal,
}

/// The finished pair.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) cluster: Arc<Encoded>,
    /// None for a port without an address.
    pub(crate) listener: Option<Arc<Encoded>>,
    /// Whether the cluster asks for endpoints.
    pub(crate) has_endpoints: bool,
}

impl Outbound {
    /// Mutual TLS to exactly the service's identities. Whoever has no identity of their own, and a service that has
    /// none, get a cluster that refuses: nothing is ever sent in plaintext or to just anybody.
    pub(crate) fn new(target: &Target<'_>) -> Self {
        let cluster = match target.identity {
            Some(identity) if !target.peers.is_empty() => {
                cluster::discovered(target.name, tls::upstream(identity, target.sni, target.peers))
            }
            _ => cluster::closed(target.name),
        };
        // Proxies speak HTTP/2 to each other, whatever the workloads speak.
        let upstream = cluster::http_options(&Protocol::Http2).unwrap_or_default();
        let terminal = if target.protocol.is_http_based() {
            filter::Terminal::Http(Box::new(filter::http(
                target.name,
                route::configuration(target.name, vec![route::catch_all(target.name)]),
            )))
        } else {
            filter::Terminal::Tcp(Box::new(filter::tcp(target.name, target.name)))
        };
        Self { name: target.name.to_owned(), cluster, upstream, terminal }
    }

    pub(crate) fn finish(self, target: &Target<'_>) -> Finished {
        let has_endpoints = self.cluster.eds_cluster_config.is_some();
        let cluster = cluster::finish(self.cluster, Some(&self.upstream));
        let chain = listener::chain(vec![self.terminal.finish()]);
        Finished {
            cluster: encode::resource(TypeUrl::Cluster, &self.name, &cluster),
            listener: listener::outbound(&self.name, target.addresses, target.port, vec![chain])
                .map(|listener| encode::resource(TypeUrl::Listener, &self.name, &listener)),
            has_endpoints,
        }
    }
}
