//! Load assignments.

use std::{collections::BTreeMap, net::IpAddr};

use super::part;
use crate::envoy::types::{
    core::Locality,
    endpoint::{
        ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint::HostIdentifier,
    },
};

/// One instance of a service.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Instance {
    pub(crate) address: IpAddr,
    pub(crate) port: u16,
    pub(crate) labels: BTreeMap<String, String>,
}

/// The instances of a service's port, all in one zone. Their order is that of their addresses.
pub(crate) fn discovered(cluster: &str, zone: &str, mut instances: Vec<Instance>) -> ClusterLoadAssignment {
    instances.sort_unstable();
    instances.dedup_by(|a, b| (a.address, a.port) == (b.address, b.port));
    let endpoints: Vec<LbEndpoint> = instances
        .into_iter()
        .map(|instance| LbEndpoint {
            metadata: part::metadata("envoy.lb", &instance.labels),
            load_balancing_weight: part::number(1),
            ..endpoint(instance.address, instance.port)
        })
        .collect();
    let mut assignment =
        ClusterLoadAssignment { cluster_name: cluster.to_owned(), ..ClusterLoadAssignment::default() };
    if !endpoints.is_empty() {
        assignment.endpoints.push(LocalityLbEndpoints {
            locality: Some(Locality { zone: zone.to_owned(), ..Locality::default() }),
            lb_endpoints: endpoints,
            ..LocalityLbEndpoints::default()
        });
    }
    assignment
}

/// One address that doesn't change.
pub(crate) fn fixed(cluster: &str, ip: IpAddr, port: u16) -> ClusterLoadAssignment {
    ClusterLoadAssignment {
        cluster_name: cluster.to_owned(),
        endpoints: vec![LocalityLbEndpoints {
            lb_endpoints: vec![endpoint(ip, port)],
            ..LocalityLbEndpoints::default()
        }],
        ..ClusterLoadAssignment::default()
    }
}

fn endpoint(ip: IpAddr, port: u16) -> LbEndpoint {
    LbEndpoint {
        host_identifier: Some(HostIdentifier::Endpoint(Endpoint {
            address: Some(part::address(ip, port)),
            ..Endpoint::default()
        })),
        ..LbEndpoint::default()
    }
}
