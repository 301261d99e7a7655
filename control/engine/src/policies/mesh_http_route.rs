//! MeshHTTPRoute: which requests go where, and what happens to them on the way.

mod matching;
mod rewriting;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use ursa_model::{
    Resource,
    policy::BackendRef,
    types::mesh_http_route::{Filter, MeshHTTPRoute, RouteMatch, Rule},
};

use super::{Destinations, Effect, parse};
use crate::{
    envoy::types::route::{DirectResponseAction, Route, route::Action},
    policy::merge::Item,
    xds::{filter::Terminal, outbound::Outbound, route as routes},
};

pub(super) struct MeshHttpRoute;

/// A cluster and its share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Backend {
    pub(super) cluster: String,
    pub(super) weight: u32,
}

impl Backend {
    /// Those references that lead somewhere and have a share.
    pub(super) fn resolve(refs: &[BackendRef], destinations: &dyn Destinations) -> Vec<Self> {
        refs.iter()
            .filter_map(|backend| {
                let weight = backend.weight.map_or(1, |weight| u32::try_from(weight).unwrap_or(u32::MAX));
                (weight > 0)
                    .then(|| destinations.cluster(backend))
                    .flatten()
                    .map(|cluster| Self { cluster, weight })
            })
            .collect()
    }
}

/// A rule for one match, with its references resolved.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Resolved {
    name: String,
    matches: RouteMatch,
    filters: Vec<Filter>,
    /// Absent: the destination itself.
    backends: Option<Vec<Backend>>,
    /// The cluster of each mirror filter, in their order.
    mirrors: Vec<Option<String>>,
}

impl Effect for MeshHttpRoute {
    fn kind(&self) -> &'static str {
        "MeshHTTPRoute"
    }

    fn check(&self, resource: &Resource) -> Result<(), String> {
        resource.spec_as::<MeshHTTPRoute>().map(drop).map_err(|e| e.to_string())
    }

    /// Rules with equal matches are one rule, whose fields the stronger policy replaces. Envoy takes the first
    /// route that matches, so the narrowest come first.
    fn merge(&self, items: &[Item<'_>], destinations: &dyn Destinations) -> Option<Value> {
        let mut resolved: Vec<Resolved> = Vec::new();
        for item in items {
            let Some(Ok(rules)) = item.body.get("rules").map(parse::<Vec<Rule>>) else { continue };
            for (index, rule) in rules.into_iter().enumerate() {
                let name = item.policy.kri.clone().with_section(format!("rule_{index}")).to_string();
                let matches =
                    if rule.matches.is_empty() { vec![RouteMatch::default()] } else { rule.matches.clone() };
                for matches in matches {
                    let found = resolved.iter().position(|existing| existing.matches == matches);
                    let at = found.unwrap_or_else(|| {
                        resolved.push(Resolved::new(matches));
                        resolved.len() - 1
                    });
                    resolved[at].take(&name, &rule, destinations);
                }
            }
        }
        if resolved.is_empty() {
            return None;
        }
        resolved.sort_by_key(|rule| std::cmp::Reverse(matching::narrowness(&rule.matches)));
        serde_json::to_value(resolved).ok()
    }

    fn outbound(&self, conf: Option<&Value>, port: &mut Outbound) -> Result<(), String> {
        let (Some(conf), Terminal::Http(http)) = (conf, &mut port.terminal) else { return Ok(()) };
        let rules: Vec<Resolved> = parse(conf)?;
        let mut generated: Vec<Route> = rules.iter().flat_map(|rule| rule.routes(&port.name)).collect();
        // Requests that no rule is for go where they would go without rules.
        if !rules.iter().any(|rule| matching::takes_everything(&rule.matches)) {
            generated.push(routes::catch_all(&port.name));
        }
        if let Some(host) = http.routes.virtual_hosts.first_mut() {
            host.routes = generated;
        }
        Ok(())
    }
}

impl Resolved {
    fn new(matches: RouteMatch) -> Self {
        Self { name: String::new(), matches, filters: Vec::new(), backends: None, mirrors: Vec::new() }
    }

    fn take(&mut self, name: &str, rule: &Rule, destinations: &dyn Destinations) {
        name.clone_into(&mut self.name);
        if let Some(filters) = &rule.default.filters {
            self.filters.clone_from(filters);
            self.mirrors = filters
                .iter()
                .filter_map(|filter| filter.request_mirror.as_ref())
                .map(|mirror| destinations.cluster(&mirror.backend_ref))
                .collect();
        }
        if let Some(refs) = &rule.default.backend_refs
            && !refs.is_empty()
        {
            self.backends = Some(Backend::resolve(refs, destinations));
        }
    }

    fn routes(&self, destination: &str) -> Vec<Route> {
        matching::paths(&self.matches)
            .into_iter()
            .map(|path| {
                let mut route = Route {
                    name: self.name.clone(),
                    r#match: Some(matching::route(&self.matches, path.specifier)),
                    action: Some(self.action(destination)),
                    ..Route::default()
                };
                let mut mirrors = self.mirrors.iter();
                for filter in &self.filters {
                    rewriting::apply(filter, path.prefix.as_ref(), &mut mirrors, &mut route);
                }
                route
            })
            .collect()
    }

    fn action(&self, destination: &str) -> Action {
        let backends: Vec<(String, u32)> = match &self.backends {
            None => vec![(destination.to_owned(), 1)],
            Some(backends) => backends.iter().map(|b| (b.cluster.clone(), b.weight)).collect(),
        };
        if backends.is_empty() {
            return Action::DirectResponse(DirectResponseAction {
                status: 500,
                ..DirectResponseAction::default()
            });
        }
        Action::Route(routes::forward(&backends))
    }
}
