//! Routes of requests.

use super::part;
use crate::envoy::types::route::{
    Route, RouteAction, RouteConfiguration, RouteMatch, VirtualHost, WeightedCluster, route::Action,
    route_action::ClusterSpecifier, route_match::PathSpecifier, weighted_cluster::ClusterWeight,
};

/// The name of the route that takes what no other takes: Kuma's hash of the match `/`, which dashboards know.
const CATCH_ALL: &str = "9Zuf5Tg79OuZcQITwBbQykxAk2u4fRKrwYn3//AL4Yo=";

/// One virtual host for every authority.
pub(crate) fn configuration(name: &str, routes: Vec<Route>) -> RouteConfiguration {
    RouteConfiguration {
        name: name.to_owned(),
        validate_clusters: part::no(),
        virtual_hosts: vec![VirtualHost {
            name: name.to_owned(),
            domains: vec!["*".to_owned()],
            routes,
            ..VirtualHost::default()
        }],
        ..RouteConfiguration::default()
    }
}

/// Every path, to one cluster.
pub(crate) fn catch_all(cluster: &str) -> Route {
    Route {
        name: CATCH_ALL.to_owned(),
        r#match: Some(RouteMatch {
            path_specifier: Some(PathSpecifier::Prefix("/".to_owned())),
            ..RouteMatch::default()
        }),
        action: Some(Action::Route(forward(&[(cluster.to_owned(), 1)]))),
        ..Route::default()
    }
}

/// To clusters by weight. The weights must not all be zero.
pub(crate) fn forward(backends: &[(String, u32)]) -> RouteAction {
    let specifier = match backends {
        [(cluster, _)] => ClusterSpecifier::Cluster(cluster.clone()),
        many => ClusterSpecifier::WeightedClusters(WeightedCluster {
            clusters: many
                .iter()
                .map(|(cluster, weight)| ClusterWeight {
                    name: cluster.clone(),
                    weight: part::number(*weight),
                    ..ClusterWeight::default()
                })
                .collect(),
            ..WeightedCluster::default()
        }),
    };
    RouteAction { cluster_specifier: Some(specifier), ..RouteAction::default() }
}
