//! What the control plane says about itself.

use std::collections::BTreeMap;

use axum::{
    extract::{Extension, State},
    response::Response,
};
use serde_json::{Map, Value, json};
use ursa_model::{Descriptor, Form, Resource, Scope, registry};

use super::{Shared, computed, error::ApiError, overview, respond};
use crate::access::{Right, User};

/// `GET /`
pub(super) async fn index(State(state): State<Shared>) -> Response {
    let config = &state.control.config.api_server;
    let mut body = json!({
        "hostname": state.hostname,
        "product": "Ursa",
        "basedOnKuma": "3.0.0",
        "version": env!("CARGO_PKG_VERSION"),
        "instanceId": state.control.instance_id,
        "clusterId": state.control.store.cluster_id(),
    });
    // What isn't served isn't advertised.
    if config.gui.enabled && !config.gui.root_url.is_empty() {
        body["gui"] = json!(config.gui.root_url);
    }
    respond::ok(&body)
}

/// `GET /who-am-i`
pub(super) async fn who_am_i(Extension(user): Extension<User>) -> Response {
    respond::ok(&json!({ "name": user.name, "groups": user.groups }))
}

/// `GET /config`
pub(super) async fn config(
    State(state): State<Shared>,
    Extension(user): Extension<User>,
) -> Result<Response, ApiError> {
    state.access.check(&user, Right::ControlPlaneMetadata, "")?;
    Ok(respond::ok(&state.control.config.redacted()))
}

/// `GET /policies`
pub(super) async fn policies() -> Response {
    let policies: Vec<Value> = registry()
        .iter()
        .filter_map(|descriptor| descriptor.policy.map(|policy| (descriptor, policy)))
        .map(|(descriptor, policy)| {
            json!({
                "name": descriptor.name,
                "readOnly": descriptor.read_only,
                "path": descriptor.path,
                "singularDisplayName": descriptor.singular,
                "pluralDisplayName": descriptor.plural,
                "isExperimental": false,
                "isTargetRefBased": true,
                "isInbound": policy.is_inbound,
                "isOutbound": policy.is_outbound,
            })
        })
        .collect();
    respond::ok(&json!({ "policies": policies }))
}

/// `GET /_resources`
pub(super) async fn resources(State(state): State<Shared>) -> Response {
    let resources: Vec<Value> = registry()
        .iter()
        .map(|descriptor| {
            let mut entry = json!({
                "name": descriptor.name,
                "path": descriptor.path,
                "readOnly": state.read_only(descriptor).is_some(),
                "scope": if descriptor.scope == Scope::Mesh { "Mesh" } else { "Global" },
                "shortName": descriptor.short_name,
                "singularDisplayName": descriptor.singular,
                "pluralDisplayName": descriptor.plural,
                "includeInFederation": descriptor.include_in_federation,
            });
            if let Some(policy) = descriptor.policy {
                entry["policy"] = json!({
                    "hasToTargetRef": policy.has_to,
                    "hasFromTargetRef": false,
                    "hasRulesTargetRef": policy.has_rules,
                    "isTargetRef": true,
                    "isFromAsRules": false,
                });
            }
            entry
        })
        .collect();
    respond::ok(&json!({ "resources": resources }))
}

/// `GET /global-insights`: how many resources there are of each type in global scope.
pub(super) async fn global_insights(State(state): State<Shared>) -> Result<Response, ApiError> {
    let mut totals = Map::new();
    for descriptor in registry().iter().filter(|found| found.scope == Scope::Global && !found.read_only) {
        totals.insert(descriptor.name.into(), json!({ "total": count(&state, descriptor).await? }));
    }
    Ok(respond::ok(&json!({ "type": "GlobalInsights", "creationTime": now(), "resources": totals })))
}

/// `GET /global-insight`: the state of everything in numbers.
pub(super) async fn global_insight(State(state): State<Shared>) -> Result<Response, ApiError> {
    let failed = |error| ApiError::store("Could not retrieve global insight", &error);
    let store = &state.control.store;
    let mut resources = BTreeMap::new();
    let mut policies = 0;
    for descriptor in registry().iter().filter(|found| found.form == Form::Spec) {
        let total = count(&state, descriptor).await?;
        policies += if descriptor.is_policy() { total } else { 0 };
        if total > 0 {
            resources.insert(descriptor.name, json!({ "total": total }));
        }
    }
    let insights = store.list("DataplaneInsight", None).await.map_err(failed)?;
    let online: std::collections::HashSet<(&str, &str)> = insights
        .iter()
        .filter(|insight| overview::is_online(insight))
        .map(|insight| (insight.meta.mesh.as_str(), insight.meta.name.as_str()))
        .collect();
    let (mut standard, mut gateways) = (Status::default(), Status::default());
    for dataplane in store.list("Dataplane", None).await.map_err(failed)? {
        let up = online.contains(&(dataplane.meta.mesh.as_str(), dataplane.meta.name.as_str()));
        if is_gateway(&dataplane) { &mut gateways } else { &mut standard }.add(up);
    }
    let mut services = Status::default();
    for service in store.list("MeshService", None).await.map_err(failed)? {
        services.add(service.spec.get("state").and_then(Value::as_str) == Some("Available"));
    }
    let external = match ursa_model::by_name("MeshExternalService") {
        Some(descriptor) => count(&state, descriptor).await?,
        None => 0,
    };
    let mut zones = Status::default();
    let zone_insights = store.list("ZoneInsight", None).await.map_err(failed)?;
    for zone in store.list("Zone", None).await.map_err(failed)? {
        let connected = zone_insights
            .iter()
            .any(|insight| insight.meta.name == zone.meta.name && overview::is_online(insight));
        zones.add(connected || computed::of_own_zone(&state, &zone).is_some());
    }
    Ok(respond::ok(&json!({
        "createdAt": now(),
        "services": {
            "internal": services.body(),
            "external": { "total": external },
            "gatewayDelegated": Status::default().body(),
        },
        "zones": {
            "controlPlanes": { "total": zones.total, "online": zones.online },
            "zoneEgresses": { "total": 0, "online": 0 },
            "zoneIngresses": { "total": 0, "online": 0 },
        },
        "dataplanes": { "standard": standard.body(), "gatewayDelegated": gateways.body() },
        "policies": { "total": policies },
        "meshes": { "total": store.count("Mesh", None).await.map_err(failed)? },
        "resources": resources,
    })))
}

/// Whether a Dataplane is a gateway's.
pub(super) fn is_gateway(dataplane: &Resource) -> bool {
    dataplane.spec.pointer("/networking/gateway").is_some_and(|found| !found.is_null())
}

/// How many there are, and how many of them are up.
#[derive(Default)]
pub(super) struct Status {
    total: u64,
    online: u64,
}

impl Status {
    pub(super) fn add(&mut self, up: bool) {
        self.total += 1;
        self.online += u64::from(up);
    }

    pub(super) fn body(&self) -> Value {
        json!({
            "total": self.total,
            "online": self.online,
            "offline": self.total - self.online,
            "partiallyDegraded": 0,
        })
    }
}

async fn count(state: &Shared, descriptor: &Descriptor) -> Result<u64, ApiError> {
    let counted = state.control.store.count(descriptor.name, None).await;
    counted.map_err(|error| ApiError::store("Could not count resources", &error))
}

pub(super) fn now() -> Value {
    let format = &time::format_description::well_known::Rfc3339;
    json!(time::OffsetDateTime::now_utc().format(format).unwrap_or_default())
}

/// The short form of a resource in lists of what belongs to another one.
pub(super) fn meta(resource: &Resource) -> Value {
    json!({
        "type": resource.descriptor.name,
        "mesh": resource.meta.mesh,
        "name": resource.meta.name,
        "labels": resource.meta.labels,
    })
}
