//! The types of resources, one file each. A new type is a file and its line in [`ALL`].

use crate::registry::Descriptor;

pub mod dataplane;
pub mod dataplane_insight;
pub mod global_secret;
pub mod hostname_generator;
pub mod mesh;
pub mod mesh_access_log;
pub mod mesh_circuit_breaker;
pub mod mesh_external_service;
pub mod mesh_fault_injection;
pub mod mesh_health_check;
pub mod mesh_http_route;
pub mod mesh_identity;
pub mod mesh_insight;
pub mod mesh_load_balancing_strategy;
pub mod mesh_metric;
pub mod mesh_multi_zone_service;
pub mod mesh_open_telemetry_backend;
pub mod mesh_passthrough;
pub mod mesh_proxy_patch;
pub mod mesh_rate_limit;
pub mod mesh_retry;
pub mod mesh_service;
pub mod mesh_tcp_route;
pub mod mesh_timeout;
pub mod mesh_tls;
pub mod mesh_trace;
pub mod mesh_traffic_permission;
pub mod mesh_trust;
pub mod mesh_zone_address;
pub mod secret;
pub mod service_insight;
pub mod workload;
pub mod zone;
pub mod zone_insight;

/// Every type, by name.
pub(crate) static ALL: &[&Descriptor] = &[
    &dataplane::DESCRIPTOR,
    &dataplane_insight::DESCRIPTOR,
    &global_secret::DESCRIPTOR,
    &hostname_generator::DESCRIPTOR,
    &mesh::DESCRIPTOR,
    &mesh_access_log::DESCRIPTOR,
    &mesh_circuit_breaker::DESCRIPTOR,
    &mesh_external_service::DESCRIPTOR,
    &mesh_fault_injection::DESCRIPTOR,
    &mesh_http_route::DESCRIPTOR,
    &mesh_health_check::DESCRIPTOR,
    &mesh_identity::DESCRIPTOR,
    &mesh_insight::DESCRIPTOR,
    &mesh_load_balancing_strategy::DESCRIPTOR,
    &mesh_metric::DESCRIPTOR,
    &mesh_multi_zone_service::DESCRIPTOR,
    &mesh_open_telemetry_backend::DESCRIPTOR,
    &mesh_passthrough::DESCRIPTOR,
    &mesh_proxy_patch::DESCRIPTOR,
    &mesh_rate_limit::DESCRIPTOR,
    &mesh_retry::DESCRIPTOR,
    &mesh_service::DESCRIPTOR,
    &mesh_tcp_route::DESCRIPTOR,
    &mesh_tls::DESCRIPTOR,
    &mesh_timeout::DESCRIPTOR,
    &mesh_trace::DESCRIPTOR,
    &mesh_traffic_permission::DESCRIPTOR,
    &mesh_trust::DESCRIPTOR,
    &mesh_zone_address::DESCRIPTOR,
    &secret::DESCRIPTOR,
    &service_insight::DESCRIPTOR,
    &workload::DESCRIPTOR,
    &zone::DESCRIPTOR,
    &zone_insight::DESCRIPTOR,
];
