//! What reads the bytes of a connection: an HTTP connection manager or the TCP proxy.

use std::net::{IpAddr, Ipv4Addr};

use ursa_model::GoDuration;

use super::part;
use crate::envoy::{
    encode::any,
    types::{
        Any,
        core::HttpProtocolOptions,
        hcm::{
            HttpConnectionManager, HttpFilter,
            http_connection_manager::{
                ForwardClientCertDetails, InternalAddressConfig, RouteSpecifier, ServerHeaderTransformation,
                SetCurrentClientCertDetails,
            },
            http_filter,
        },
        listener::{Filter, filter},
        route::RouteConfiguration,
        router::Router,
        tcp_proxy::{TcpProxy, tcp_proxy::ClusterSpecifier},
    },
};

/// The last network filter of a port, open for policies.
#[derive(Clone, Debug)]
pub(crate) enum Terminal {
    /// Requests.
    Http(Box<Http>),
    /// Bytes.
    Tcp(Box<TcpProxy>),
}

/// An HTTP connection manager in parts.
#[derive(Clone, Debug)]
pub(crate) struct Http {
    pub(crate) manager: HttpConnectionManager,
    /// Filters before the router.
    pub(crate) filters: Vec<HttpFilter>,
    pub(crate) routes: RouteConfiguration,
}

impl Terminal {
    /// The filter, with the TCP or HTTP filters that policies put before it.
    pub(crate) fn finish(self) -> Filter {
        match self {
            Self::Tcp(proxy) => network("envoy.filters.network.tcp_proxy", any(proxy.as_ref())),
            Self::Http(http) => {
                let Http { mut manager, mut filters, routes } = *http;
                filters.push(http_filter("envoy.filters.http.router", any(&Router::default())));
                manager.http_filters = filters;
                manager.route_specifier = Some(RouteSpecifier::RouteConfig(routes));
                network("envoy.filters.network.http_connection_manager", any(&manager))
            }
        }
    }
}

pub(crate) fn network(name: &str, config: Any) -> Filter {
    Filter { name: name.to_owned(), config_type: Some(filter::ConfigType::TypedConfig(config)) }
}

pub(crate) fn http_filter(name: &str, config: Any) -> HttpFilter {
    HttpFilter {
        name: name.to_owned(),
        config_type: Some(http_filter::ConfigType::TypedConfig(config)),
        ..HttpFilter::default()
    }
}

/// Bytes to one cluster.
pub(crate) fn tcp(stat_prefix: &str, cluster: &str) -> TcpProxy {
    TcpProxy {
        stat_prefix: stat_prefix.to_owned(),
        cluster_specifier: Some(ClusterSpecifier::Cluster(cluster.to_owned())),
        ..TcpProxy::default()
    }
}

/// Requests by routes. Paths are normalised before anything is matched on them, so that no spelling of a path
/// evades a rule, and `server` headers are the application's.
pub(crate) fn http(stat_prefix: &str, routes: RouteConfiguration) -> Http {
    let manager = HttpConnectionManager {
        stat_prefix: stat_prefix.to_owned(),
        common_http_protocol_options: Some(HttpProtocolOptions {
            idle_timeout: part::duration(GoDuration::from_secs(0)),
            ..HttpProtocolOptions::default()
        }),
        request_headers_timeout: part::duration(GoDuration::from_secs(0)),
        internal_address_config: Some(InternalAddressConfig {
            cidr_ranges: private_ranges(),
            ..InternalAddressConfig::default()
        }),
        normalize_path: part::yes(),
        server_header_transformation: ServerHeaderTransformation::PassThrough as i32,
        ..HttpConnectionManager::default()
    };
    Http { manager, filters: Vec::new(), routes }
}

/// Tells the workload who called, and drops what the caller claimed about that.
pub(crate) fn forward_peer(manager: &mut HttpConnectionManager) {
    manager.forward_client_cert_details = ForwardClientCertDetails::SanitizeSet as i32;
    manager.set_current_client_cert_details =
        Some(SetCurrentClientCertDetails { uri: true, ..SetCurrentClientCertDetails::default() });
}

fn private_ranges() -> Vec<crate::envoy::types::core::CidrRange> {
    [([10, 0, 0, 0], 8), ([192, 168, 0, 0], 16), ([172, 16, 0, 0], 12), ([127, 0, 0, 1], 32)]
        .into_iter()
        .map(|(base, prefix)| part::cidr(IpAddr::V4(Ipv4Addr::from(base)), prefix))
        .collect()
}
