//! Envoy's bootstrap: who it is and where its configuration comes from, nothing else.
//!
//! Envoy refuses unknown fields here (and only here), so this stays the same across Envoy's versions.

use std::path::Path;

use serde_json::{Value, json};

use super::WorkloadSpec;
use crate::shim::protocol::{ADMIN_SOCKET, XDS_SOCKET};

/// Statistics that Envoy keeps; every other one costs memory per cluster and listener for nobody.
const STATS: [&str; 9] = [
    "cluster_manager.",
    "overload.",
    "listener_manager.",
    "control_plane.",
    "server.",
    "listener.",
    "http.",
    "tcp.",
    "cluster.",
];

/// The bootstrap of a workload whose shim lives in `dir`.
pub(super) fn bootstrap(spec: &WorkloadSpec, dir: &Path) -> Value {
    let ads = json!({ "ads": {}, "resource_api_version": "V3" });
    json!({
        "node": { "id": spec.node_id(), "cluster": spec.cluster() },
        "admin": { "address": { "pipe": { "path": dir.join(ADMIN_SOCKET), "mode": 0o600 } } },
        "dynamic_resources": {
            "ads_config": {
                "api_type": "DELTA_GRPC",
                "transport_api_version": "V3",
                "set_node_on_first_message_only": true,
                "grpc_services": [{ "envoy_grpc": { "cluster_name": "system_ads" } }]
            },
            "cds_config": ads,
            "lds_config": ads
        },
        "static_resources": {
            "clusters": [{
                "name": "system_ads",
                "type": "STATIC",
                "connect_timeout": "1s",
                "typed_extension_protocol_options": {
                    "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                        "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                        "explicit_http_config": { "http2_protocol_options": {} }
                    }
                },
                "load_assignment": {
                    "cluster_name": "system_ads",
                    "endpoints": [{ "lb_endpoints": [{ "endpoint": { "address": {
                        "pipe": { "path": dir.join(XDS_SOCKET) }
                    } } }] }]
                }
            }]
        },
        "stats_config": { "stats_matcher": { "inclusion_list": {
            "patterns": STATS.map(|prefix| json!({ "prefix": prefix }))
        } } }
    })
}
