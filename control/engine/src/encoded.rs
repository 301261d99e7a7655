//! One resource as it goes over the wire: encoded once, shared by everybody who has it.

use std::sync::Arc;

use bytes::Bytes;

/// The kinds of resources that the engine produces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TypeUrl {
    /// Envoy clusters.
    Cluster,
    /// Envoy cluster load assignments.
    Endpoint,
    /// Configurations of HTTP filters that listeners ask for by name.
    Extension,
    /// Envoy listeners.
    Listener,
    /// Envoy route configurations.
    Route,
    /// Envoy secrets that control generates (trust bundles; certificates come from the agent).
    Secret,
    /// Mesh names for the workload's DNS (`ursa.v1.Name`).
    Name,
    /// Which identity the agent obtains for the workload (`ursa.v1.WorkloadIdentity`).
    Identity,
}

impl TypeUrl {
    /// Every kind, in the order in which additions go out.
    pub const ALL: [Self; 8] = [
        Self::Cluster,
        Self::Endpoint,
        Self::Extension,
        Self::Listener,
        Self::Route,
        Self::Secret,
        Self::Name,
        Self::Identity,
    ];

    /// The type URL as it stands in discovery requests and in `Any`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cluster => "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            Self::Endpoint => "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            Self::Extension => "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig",
            Self::Listener => "type.googleapis.com/envoy.config.listener.v3.Listener",
            Self::Route => "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
            Self::Secret => "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
            Self::Name => "type.googleapis.com/ursa.v1.Name",
            Self::Identity => "type.googleapis.com/ursa.v1.WorkloadIdentity",
        }
    }

    /// The kind with this type URL.
    pub fn parse(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == url)
    }
}

/// A resource with its version and its bytes.
#[derive(Debug, PartialEq, Eq)]
pub struct Encoded {
    /// The resource's name.
    pub name: Arc<str>,
    /// Hash of the resource's canonical form: equal content has an equal version, in every process.
    pub version: Arc<str>,
    /// The encoded `envoy.service.discovery.v3.Resource` (name, version and the resource as `Any`).
    pub bytes: Bytes,
    /// The resource message alone (a slice of `bytes`).
    pub any_value: Bytes,
}
