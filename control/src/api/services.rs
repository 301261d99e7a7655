//! What belongs to a service: its hostnames and its dataplanes.

use std::collections::{BTreeMap, BTreeSet};

use axum::{
    extract::{Path, State},
    response::Response,
};
use http::StatusCode;
use serde_json::{Value, json};
use ursa_model::{Resource, ResourceKey, Violations, by_path, hostname, hostname::HostnameError, labels};

use super::{Shared, error::ApiError, respond, system};
use crate::config::Mode;

const DESTINATIONS: [&str; 3] = ["meshservices", "meshexternalservices", "meshmultizoneservices"];

/// `GET /meshes/{mesh}/{service}/{name}/_hostnames`
pub(super) async fn hostnames(
    State(state): State<Shared>,
    Path((mesh, service, name)): Path<(String, String, String)>,
) -> Result<Response, ApiError> {
    let failed = |error| ApiError::store("could not retrieve service", &error);
    let unavailable = || {
        let title = format!("only {:?} are available for inspection", DESTINATIONS.join(","));
        ApiError::invalid(title, Violations::new())
    };
    if !DESTINATIONS.contains(&service.as_str()) {
        return Err(unavailable());
    }
    let descriptor = by_path(&service).ok_or_else(unavailable)?;
    let key = ResourceKey { kind: descriptor.name, mesh, name };
    let service = state.control.store.get(&key).await.map_err(failed)?;
    let service = service.ok_or_else(|| ApiError::not_found("could not retrieve service", &key))?;
    let generators = state.control.store.list("HostnameGenerator", None).await.map_err(failed)?;
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for generator in &generators {
        for (zone, perspective) in perspectives(&state, &service, generator) {
            if let Some(hostname) = generate(&state, generator, &perspective) {
                found.entry(hostname).or_default().insert(zone);
            }
        }
    }
    let items: Vec<Value> = found
        .iter()
        .map(|(hostname, zones)| {
            let zones: Vec<Value> = zones.iter().map(|zone| json!({ "name": zone })).collect();
            json!({ "hostname": hostname, "zones": zones })
        })
        .collect();
    Ok(respond::ok(&json!({ "total": items.len(), "items": items })))
}

/// In which zones a generator could name a service, and the service as those zones see it.
///
/// A zone sees a service of another zone as one that came from global; the labels decide which
/// generators select it, so each zone's view is judged on its own.
fn perspectives(state: &Shared, service: &Resource, generator: &Resource) -> Vec<(String, Resource)> {
    let zone_of = |resource: &Resource| resource.meta.label(labels::ZONE).unwrap_or_default().to_owned();
    let mut own = zone_of(service);
    if own.is_empty() && state.control.config.mode == Mode::Global {
        // What comes from global belongs to no zone; clients of the peer find its own name there.
        service.meta.display_name().clone_into(&mut own);
    }
    let as_is = |zone: String| (zone, service.clone());
    if state.control.config.mode == Mode::Zone {
        return vec![as_is(if own.is_empty() { state.control.config.zone().to_owned() } else { own })];
    }
    let seen_as = |origin: &str| {
        let mut seen = service.clone();
        seen.meta.labels.insert(labels::ORIGIN.into(), origin.into());
        seen
    };
    match generator.meta.label(labels::ORIGIN) {
        // A generator of a zone works in that zone only, and there its own services are local.
        Some("zone") => {
            let zone = zone_of(generator);
            let origin = if zone == own { "zone" } else { "global" };
            vec![(zone, seen_as(origin))]
        }
        // One from global works everywhere: in the service's own zone and in those that get a copy.
        _ => vec![as_is(own.clone()), (own, seen_as("global"))],
    }
}

fn generate(state: &Shared, generator: &Resource, service: &Resource) -> Option<String> {
    let field = match service.descriptor.name {
        "MeshService" => "meshService",
        "MeshExternalService" => "meshExternalService",
        _ => "meshMultiZoneService",
    };
    let wanted = generator.spec.get("selector")?.get(field)?;
    let selected = match wanted.get("matchLabels").and_then(Value::as_object) {
        None => true,
        Some(labels) => labels.iter().all(|(name, value)| service.meta.label(name) == value.as_str()),
    };
    let template = generator.spec.get("template")?.as_str()?;
    if !selected {
        return None;
    }
    match hostname::evaluate(template, &service.meta, state.control.config.zone()) {
        // One that can't be looked up is shown, too, so that one sees why no name is served.
        Ok(hostname) | Err(HostnameError::Name { hostname, .. }) => Some(hostname),
        // A template that gives no name is reported by the generator.
        Err(_) => None,
    }
}

/// `GET /meshes/{mesh}/meshservices/{name}/_dataplanes`
pub(super) async fn dataplanes(
    State(state): State<Shared>,
    Path((mesh, name)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let failed = |error| ApiError::store("Could not retrieve MeshService", &error);
    let key = ResourceKey { kind: "MeshService", mesh: mesh.clone(), name };
    let service = state.control.store.get(&key).await.map_err(failed)?;
    let service = service.ok_or_else(|| ApiError::not_found("Could not retrieve MeshService", &key))?;
    let selected: Vec<Value> = state
        .control
        .store
        .list("Dataplane", Some(&mesh))
        .await
        .map_err(failed)?
        .iter()
        .filter(|dataplane| selects(&service, dataplane))
        .map(|dataplane| system::meta(dataplane))
        .collect();
    Ok(respond::json(StatusCode::OK, &json!({ "total": selected.len(), "items": selected })))
}

fn selects(service: &Resource, dataplane: &Resource) -> bool {
    let selector = service.spec.get("selector");
    if let Some(name) = selector.and_then(|found| found.pointer("/dataplaneRef/name")).and_then(Value::as_str)
    {
        return dataplane.meta.name == name;
    }
    selector
        .and_then(|found| found.pointer("/dataplaneLabels/matchLabels"))
        .and_then(Value::as_object)
        .is_some_and(|wanted| {
            !wanted.is_empty()
                && wanted.iter().all(|(name, value)| dataplane.meta.label(name) == value.as_str())
        })
}
