//! MeshTCPRoute: which services connections go to, by weight.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use ursa_model::{
    Resource,
    types::mesh_tcp_route::{MeshTCPRoute, Rule},
};

use super::{Destinations, Effect, mesh_http_route::Backend, parse};
use crate::{
    envoy::types::tcp_proxy::tcp_proxy::{
        ClusterSpecifier, WeightedCluster, weighted_cluster::ClusterWeight,
    },
    policy::merge::Item,
    xds::{filter::Terminal, outbound::Outbound, transparent::REFUSE_OUTBOUND},
};

pub(super) struct MeshTcpRoute;

/// The route with its references resolved.
#[derive(Serialize, Deserialize)]
struct Resolved {
    backends: Vec<Backend>,
}

impl Effect for MeshTcpRoute {
    fn kind(&self) -> &'static str {
        "MeshTCPRoute"
    }

    fn check(&self, resource: &Resource) -> Result<(), String> {
        resource.spec_as::<MeshTCPRoute>().map(drop).map_err(|e| e.to_string())
    }

    /// The strongest route that names backends wins whole; a connection has nothing to tell routes apart by.
    fn merge(&self, items: &[Item<'_>], destinations: &dyn Destinations) -> Option<Value> {
        items.iter().rev().find_map(|item| {
            let rules: Vec<Rule> = parse(item.body.get("rules")?).ok()?;
            let refs = rules.into_iter().next()?.default.backend_refs;
            if refs.is_empty() {
                return None;
            }
            let backends = Backend::resolve(&refs, destinations);
            serde_json::to_value(Resolved { backends }).ok()
        })
    }

    fn outbound(&self, conf: Option<&Value>, port: &mut Outbound) -> Result<(), String> {
        let (Some(conf), Terminal::Tcp(proxy)) = (conf, &mut port.terminal) else { return Ok(()) };
        let Resolved { backends } = parse(conf)?;
        proxy.cluster_specifier = Some(match backends.as_slice() {
            // Nothing is there to take the connection: refuse it rather than send it where nobody asked for.
            [] => ClusterSpecifier::Cluster(REFUSE_OUTBOUND.to_owned()),
            [only] => ClusterSpecifier::Cluster(only.cluster.clone()),
            many => ClusterSpecifier::WeightedClusters(WeightedCluster {
                clusters: many
                    .iter()
                    .map(|backend| ClusterWeight {
                        name: backend.cluster.clone(),
                        weight: backend.weight,
                        ..ClusterWeight::default()
                    })
                    .collect(),
            }),
        });
        Ok(())
    }
}
