//! Short paths to the generated messages.

pub(crate) use envoy_types::pb::{
    envoy::{
        config::{
            cluster::v3 as cluster, core::v3 as core, endpoint::v3 as endpoint, listener::v3 as listener,
            rbac::v3 as rbac, route::v3 as route,
        },
        extensions::{
            filters::{
                http::{rbac::v3 as http_rbac, router::v3 as router},
                listener::{original_src::v3 as original_src, tls_inspector::v3 as tls_inspector},
                network::{
                    http_connection_manager::v3 as hcm, rbac::v3 as network_rbac, tcp_proxy::v3 as tcp_proxy,
                },
            },
            matching::common_inputs::{network::v3 as network_inputs, ssl::v3 as ssl_inputs},
            transport_sockets::tls::v3 as tls,
            upstreams::http::v3 as upstream_http,
        },
        r#type::{matcher::v3 as matching, v3 as envoy_type},
    },
    google::protobuf::{Any, BoolValue, Duration, Struct, UInt32Value, Value, value},
    xds::{core::v3 as xds_core, r#type::matcher::v3 as xds_matching},
};
