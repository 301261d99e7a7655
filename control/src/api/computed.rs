//! Insights that nobody stores: what is known of a mesh and of the own zone is counted when it is asked for.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use serde_json::{Value, json};
use time::format_description::well_known::Rfc3339;
use ursa_model::{
    Form, Meta, Resource, ResourceSpec, Scope, registry,
    types::{mesh_insight::MeshInsight, zone_insight::ZoneInsight},
};

use super::{
    Shared,
    system::{Status, is_gateway, now},
};
use crate::{api::overview, store::StoreError};

/// Whether resources of a type are counted when they are asked for, one for each Mesh.
pub(super) fn is_computed(kind: &str) -> bool {
    kind == MeshInsight::DESCRIPTOR.name
}

/// What is known of a mesh.
pub(super) async fn of_mesh(state: &Shared, mesh: &Resource) -> Result<Resource, StoreError> {
    let store = &state.control.store;
    let name = mesh.meta.name.as_str();
    let insights = store.list("DataplaneInsight", Some(name)).await?;
    let insights: HashMap<&str, &Arc<Resource>> =
        insights.iter().map(|insight| (insight.meta.name.as_str(), insight)).collect();
    let (mut all, mut standard, mut gateways) = <(Status, Status, Status)>::default();
    let (mut agents, mut envoys, mut backends) = <(Tally, Tally, Tally)>::default();
    for dataplane in store.list("Dataplane", Some(name)).await? {
        let insight = insights.get(dataplane.meta.name.as_str());
        let up = insight.is_some_and(|insight| overview::is_online(insight));
        all.add(up);
        if is_gateway(&dataplane) { &mut gateways } else { &mut standard }.add(up);
        let Some(insight) = insight else { continue };
        let last = insight.spec.get("subscriptions").and_then(Value::as_array).and_then(|all| all.last());
        let version = |of: &str| last?.pointer(&format!("/version/{of}/version"))?.as_str();
        count(&mut agents, version("kumaDp"), up);
        count(&mut envoys, version("envoy"), up);
        count(&mut backends, insight.spec.pointer("/mTLS/issuedBackend").and_then(Value::as_str), up);
    }
    let (mut resources, mut policies) = <(BTreeMap<&str, Value>, BTreeMap<&str, Value>)>::default();
    let (mut internal, mut external) = (0, 0);
    for kind in registry().iter().filter(|kind| kind.form == Form::Spec && kind.scope == Scope::Mesh) {
        let total = store.count(kind.name, Some(name)).await?;
        match kind.name {
            "MeshService" => internal = total,
            "MeshExternalService" => external = total,
            _ => {}
        }
        if total > 0 {
            resources.insert(kind.name, json!({ "total": total }));
            if kind.is_policy() {
                policies.insert(kind.name, json!({ "total": total }));
            }
        }
    }
    let spec = MeshInsight {
        last_sync: now().as_str().map(str::to_owned),
        dataplanes: Some(all.body()),
        dataplanes_by_type: Some(json!({ "standard": standard.body(), "gatewayDelegated": gateways.body() })),
        policies: Some(json!(policies)),
        services: Some(json!({ "total": internal + external, "internal": internal, "external": external })),
        resources: Some(json!(resources)),
        dp_versions: Some(json!({ "kumaDp": bodies(&agents), "envoy": bodies(&envoys) })),
        mtls: Some(json!({ "issuedBackends": bodies(&backends) })),
    };
    let meta = Meta { labels: BTreeMap::new(), ..mesh.meta.clone() };
    Ok(Resource::new(meta, &spec))
}

/// What is known of this control plane's own zone: it is connected for as long as it answers.
pub(super) fn of_own_zone(state: &Shared, zone: &Resource) -> Option<Resource> {
    let control = &state.control;
    if control.config.zone() != zone.meta.name {
        return None;
    }
    let since = control.started.format(&Rfc3339).ok();
    let config = json!({ "store": { "type": control.config.store.r#type } });
    let connection = json!({
        "id": control.instance_id,
        "zoneInstanceId": control.instance_id,
        "connectTime": since,
        "status": { "lastUpdateTime": since, "total": {} },
        "version": { "kumaCp": { "version": env!("CARGO_PKG_VERSION") } },
        "config": config.to_string(),
    });
    let spec = ZoneInsight { subscriptions: vec![connection], ..ZoneInsight::default() };
    Some(Resource::new(Meta { labels: BTreeMap::new(), ..zone.meta.clone() }, &spec))
}

type Tally = BTreeMap<String, Status>;

fn count(tally: &mut Tally, what: Option<&str>, up: bool) {
    if let Some(what) = what.filter(|what| !what.is_empty()) {
        tally.entry(what.to_owned()).or_default().add(up);
    }
}

fn bodies(tally: &Tally) -> Value {
    tally.iter().map(|(what, status)| (what.clone(), status.body())).collect::<serde_json::Map<_, _>>().into()
}
