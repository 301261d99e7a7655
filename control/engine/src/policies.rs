//! What policies do to Envoy resources: one file per policy.
//!
//! A new policy is a file with an [`Effect`] and its line in [`EFFECTS`]; matching, order, merging, sharing and
//! recomputation come with it.

mod mesh_http_route;
mod mesh_tcp_route;
mod mesh_timeout;
mod mesh_tls;
mod mesh_traffic_permission;

use serde_json::Value;
use ursa_model::{Resource, policy::BackendRef};

use crate::{
    policy::merge::{Item, defaults},
    xds::{inbound::Inbound, outbound::Outbound, permission::Permission},
};

/// Finds the cluster that a reference means.
pub(crate) trait Destinations {
    /// The name of the cluster, or none when there is no such service or port.
    fn cluster(&self, backend: &BackendRef) -> Option<String>;
}

/// Reads who may talk to a port from the rules for it, the weakest first.
pub(crate) type ReadPermission = fn(&[Item<'_>]) -> Result<Permission, String>;

/// A policy's effect. All methods are pure; what they return depends on their arguments only.
pub(crate) trait Effect: Sync {
    /// The resource type.
    fn kind(&self) -> &'static str;

    /// Whether the object can be used at all.
    fn check(&self, resource: &Resource) -> Result<(), String>;

    /// One configuration from the items of `to` that cover a destination, the weakest first. References to other
    /// services are resolved here, so that the result alone says what to generate.
    fn merge(&self, items: &[Item<'_>], destinations: &dyn Destinations) -> Option<Value> {
        let _ = destinations;
        defaults(items)
    }

    /// Configures a port that a proxy calls. Called without a configuration too, so that defaults have a place.
    fn outbound(&self, conf: Option<&Value>, port: &mut Outbound) -> Result<(), String> {
        let _ = (conf, port);
        Ok(())
    }

    /// For the policy that says who may talk to a port that a proxy serves: how it is read. Permissions change more
    /// often than ports, so they are kept apart.
    fn permission(&self) -> Option<ReadPermission> {
        None
    }

    /// Configures a port that a proxy serves, from the rules for it, the weakest first.
    fn inbound(&self, rules: &[Item<'_>], port: &mut Inbound) -> Result<(), String> {
        let _ = (rules, port);
        Ok(())
    }
}

/// Every policy, in the order in which they apply.
pub(crate) static EFFECTS: [&dyn Effect; 5] = [
    &mesh_http_route::MeshHttpRoute,
    &mesh_tcp_route::MeshTcpRoute,
    &mesh_tls::MeshTls,
    &mesh_timeout::MeshTimeout,
    &mesh_traffic_permission::MeshTrafficPermission,
];

/// Reads a merged configuration.
pub(crate) fn parse<T: serde::de::DeserializeOwned>(conf: &Value) -> Result<T, String> {
    T::deserialize(conf).map_err(|e| format!("the merged configuration can't be read: {e}"))
}
