//! The types of resources that pass the relay.

use std::fmt;

use ursa_wire::type_url;

/// A type of resource, in the order in which additions are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Envoy clusters.
    Cluster,
    /// Endpoints of a cluster.
    Endpoint,
    /// TLS secrets: bundles from control, the workload's own leaf from the agent.
    Secret,
    /// Route configurations.
    Route,
    /// Configurations of HTTP filters, by the names under which listeners ask for them.
    Extension,
    /// Envoy listeners.
    Listener,
    /// A DNS name of the mesh; for the shim, never for Envoy.
    Name,
    /// Which identity the workload is to hold; for the agent, never for Envoy.
    Identity,
}

impl Kind {
    /// Every type, additions first to last.
    pub const ALL: [Self; 8] = [
        Self::Cluster,
        Self::Endpoint,
        Self::Secret,
        Self::Route,
        Self::Extension,
        Self::Listener,
        Self::Name,
        Self::Identity,
    ];

    /// The types that Envoy asks for.
    pub const ENVOY: [Self; 6] =
        [Self::Cluster, Self::Endpoint, Self::Secret, Self::Route, Self::Extension, Self::Listener];

    /// The type URL on the wire.
    pub const fn type_url(self) -> &'static str {
        match self {
            Self::Cluster => type_url::CLUSTER,
            Self::Endpoint => type_url::ENDPOINT,
            Self::Secret => type_url::SECRET,
            Self::Route => type_url::ROUTE,
            Self::Extension => type_url::EXTENSION,
            Self::Listener => type_url::LISTENER,
            Self::Name => type_url::NAME,
            Self::Identity => type_url::WORKLOAD_IDENTITY,
        }
    }

    /// The type of a type URL, if the relay carries it.
    pub fn from_type_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_url() == url)
    }

    /// A short name: directory on disk, word in a status line.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cluster => "clusters",
            Self::Endpoint => "endpoints",
            Self::Secret => "secrets",
            Self::Route => "routes",
            Self::Extension => "extensions",
            Self::Listener => "listeners",
            Self::Name => "names",
            Self::Identity => "identities",
        }
    }

    /// Whether Envoy consumes this type, so that "good" means "Envoy acknowledged it".
    pub const fn is_for_envoy(self) -> bool {
        !matches!(self, Self::Name | Self::Identity)
    }

    pub(crate) const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
