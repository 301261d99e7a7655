//! Type URLs of the resources that discovery carries.

/// `envoy.config.cluster.v3.Cluster`.
pub const CLUSTER: &str = "type.googleapis.com/envoy.config.cluster.v3.Cluster";
/// `envoy.config.endpoint.v3.ClusterLoadAssignment`.
pub const ENDPOINT: &str = "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment";
/// `envoy.config.core.v3.TypedExtensionConfig`.
pub const EXTENSION: &str = "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig";
/// `envoy.config.listener.v3.Listener`.
pub const LISTENER: &str = "type.googleapis.com/envoy.config.listener.v3.Listener";
/// `envoy.config.route.v3.RouteConfiguration`.
pub const ROUTE: &str = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration";
/// `envoy.extensions.transport_sockets.tls.v3.Secret`.
pub const SECRET: &str = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret";
/// A DNS entry of the workload's view, [`crate::resources::Name`]; ends at the agent.
pub const NAME: &str = "type.googleapis.com/ursa.v1.Name";
/// Which identity the workload is to hold, [`crate::resources::WorkloadIdentity`]; ends at the agent.
pub const WORKLOAD_IDENTITY: &str = "type.googleapis.com/ursa.v1.WorkloadIdentity";

/// The types that the agent subscribes to, in the order in which additions must be applied. Removals go in
/// reverse.
pub const ADD_ORDER: [&str; 8] =
    [WORKLOAD_IDENTITY, SECRET, CLUSTER, ENDPOINT, EXTENSION, LISTENER, ROUTE, NAME];
