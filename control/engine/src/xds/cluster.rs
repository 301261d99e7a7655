//! Clusters.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ursa_model::{GoDuration, Protocol};

use super::{endpoint, part};
use crate::envoy::{
    encode::any,
    types::{
        cluster::{
            CircuitBreakers, Cluster,
            circuit_breakers::Thresholds,
            cluster::{ClusterDiscoveryType, DiscoveryType, EdsClusterConfig, LbPolicy},
        },
        core::{BindConfig, Http1ProtocolOptions, Http2ProtocolOptions, TransportSocket},
        upstream_http::{
            HttpProtocolOptions,
            http_protocol_options::{
                ExplicitHttpConfig, UpstreamProtocolOptions, explicit_http_config::ProtocolConfig,
            },
        },
    },
};

/// How long a connection may take to come about when no policy says so.
pub(crate) const CONNECT_TIMEOUT: GoDuration = GoDuration::from_secs(5);
/// The source address of connections that the proxy makes to its own workload: the redirect exempts it.
const LOCAL_SOURCE_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 6));
const LOCAL_SOURCE_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0, 0, 0, 0, 0, 0, 0, 6));

const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

fn base(name: &str, kind: DiscoveryType) -> Cluster {
    Cluster {
        name: name.to_owned(),
        connect_timeout: part::duration(CONNECT_TIMEOUT),
        circuit_breakers: Some(CircuitBreakers {
            thresholds: vec![Thresholds { track_remaining: true, ..Thresholds::default() }],
            ..CircuitBreakers::default()
        }),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(kind as i32)),
        ..Cluster::default()
    }
}

/// Endpoints come from discovery.
pub(crate) fn discovered(name: &str, tls: Option<TransportSocket>) -> Cluster {
    Cluster {
        eds_cluster_config: Some(EdsClusterConfig { eds_config: part::ads(), service_name: String::new() }),
        transport_socket: tls,
        ..base(name, DiscoveryType::Eds)
    }
}

/// Nobody: whatever is sent here is refused.
pub(crate) fn closed(name: &str) -> Cluster {
    base(name, DiscoveryType::Static)
}

/// The workload itself.
pub(crate) fn local(name: &str, ip: IpAddr, port: u16) -> Cluster {
    let source = if ip.is_loopback() {
        None
    } else {
        let source = if ip.is_ipv4() { LOCAL_SOURCE_V4 } else { LOCAL_SOURCE_V6 };
        Some(BindConfig { source_address: Some(part::socket_address(source, 0)), ..BindConfig::default() })
    };
    Cluster {
        load_assignment: Some(endpoint::fixed(name, ip, port)),
        upstream_bind_config: source,
        ..base(name, DiscoveryType::Static)
    }
}

/// Wherever the connection was going.
pub(crate) fn original_destination(name: &str) -> Cluster {
    Cluster { lb_policy: LbPolicy::ClusterProvided as i32, ..base(name, DiscoveryType::OriginalDst) }
}

/// What the upstream speaks; none for bytes.
pub(crate) fn http_options(protocol: &Protocol) -> Option<HttpProtocolOptions> {
    let config = match protocol {
        Protocol::Http => ProtocolConfig::HttpProtocolOptions(Http1ProtocolOptions::default()),
        Protocol::Http2 | Protocol::Grpc => {
            ProtocolConfig::Http2ProtocolOptions(Http2ProtocolOptions::default())
        }
        _ => return None,
    };
    Some(HttpProtocolOptions {
        upstream_protocol_options: Some(UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
            protocol_config: Some(config),
        })),
        ..HttpProtocolOptions::default()
    })
}

/// Puts the protocol's options into the cluster, when policies are done with them.
pub(crate) fn finish(mut cluster: Cluster, options: Option<&HttpProtocolOptions>) -> Cluster {
    if let Some(options) = options {
        cluster.typed_extension_protocol_options.insert(HTTP_OPTIONS.to_owned(), any(options));
    }
    cluster
}
