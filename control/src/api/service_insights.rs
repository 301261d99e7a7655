//! Service insights: what is known of each service of a mesh, for clients from before services were
//! resources.
//!
//! One stored ServiceInsight holds all services of a mesh; the API shows each as a resource of its own.

use std::collections::BTreeMap;

use axum::{
    extract::{Path, Request, State},
    response::Response,
};
use serde_json::{Map, Value, json};
use ursa_model::Resource;

use super::{
    OverTls, Shared,
    crud::Parameters,
    error::ApiError,
    query::{PageAsked, Params},
    respond,
};

const RETRIEVE: &str = "Could not retrieve a resource";
const INTERNAL: &str = "internal";
const GATEWAY: &str = "gateway_delegated";
const EXTERNAL: &str = "external";

/// `GET /service-insights` and `GET /meshes/{mesh}/service-insights`
pub(super) async fn list(
    State(state): State<Shared>,
    Path(parameters): Path<Parameters>,
    request: Request,
) -> Result<Response, ApiError> {
    let params = Params::of(request.uri())?;
    let asked = PageAsked::of(&params)?;
    let mesh = parameters.get("mesh").map(String::as_str);
    if let Some(mesh) = mesh {
        state.mesh_exists(mesh).await?;
    }
    let kinds: Vec<&str> =
        params.all("type").flat_map(|value| value.split(',')).filter(|kind| !kind.is_empty()).collect();
    if !kinds.iter().all(|kind| matches!(*kind, INTERNAL | EXTERNAL | GATEWAY)) {
        return Err(ApiError::bad_request("unsupported service type"));
    }
    let stored = state.control.store.list("ServiceInsight", mesh).await;
    let stored = stored.map_err(|error| ApiError::store("Could not retrieve resources", &error))?;
    let services: Vec<Value> = stored
        .iter()
        .flat_map(|insight| {
            services(insight).into_iter().map(move |(name, service)| (insight, name, service))
        })
        .filter(|(_, name, _)| name.contains(params.first("name")))
        .filter(|(.., service)| kinds.is_empty() || kinds.contains(&kind(service)))
        .map(|(insight, name, service)| show(insight, name, service))
        .collect();
    let (items, total) = asked.cut(services);
    let over_tls = request.extensions().get::<OverTls>().is_some();
    let base = state.base_url(request.uri(), request.headers(), over_tls);
    let next = asked.next(&base, request.uri().path(), &params, total);
    Ok(respond::ok(&json!({ "total": total, "items": items, "next": next })))
}

/// `GET /meshes/{mesh}/service-insights/{name}`
pub(super) async fn get(
    State(state): State<Shared>,
    Path((mesh, name)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let stored = state.control.store.list("ServiceInsight", Some(&mesh)).await;
    let stored = stored.map_err(|error| ApiError::store(RETRIEVE, &error))?;
    stored
        .iter()
        .find_map(|insight| Some(show(insight, &name, services(insight).get(name.as_str())?)))
        .map(|body| respond::ok(&body))
        .ok_or_else(|| {
            ApiError::not_found(RETRIEVE, format_args!("ServiceInsight {name:?} in mesh {mesh:?}"))
        })
}

/// The services of a stored insight by name.
fn services(insight: &Resource) -> BTreeMap<&str, &Value> {
    let all = insight.spec.get("services").and_then(Value::as_object);
    all.into_iter().flatten().map(|(name, service)| (name.as_str(), service)).collect()
}

fn kind(service: &Value) -> &str {
    service.get("serviceType").and_then(Value::as_str).unwrap_or(INTERNAL)
}

/// One service as a resource; zeros are left out, and so is the usual type.
fn show(insight: &Resource, name: &str, service: &Value) -> Value {
    let mut body = insight.to_json();
    let Some(object) = body.as_object_mut() else { return body };
    if let Some(stored) = insight.spec.as_object() {
        object.retain(|field, _| !stored.contains_key(field));
    }
    // They are those of the whole, not of one service.
    object.remove("labels");
    object.insert("name".into(), name.into());
    for field in ["status", "issuedBackends", "zones"] {
        if let Some(value) = service.get(field).filter(|value| !value.is_null()) {
            object.insert(field.into(), value.clone());
        }
    }
    let count = |field: &str| service.pointer(&format!("/dataplanes/{field}")).and_then(Value::as_u64);
    let (online, offline) = (count("online").unwrap_or_default(), count("offline").unwrap_or_default());
    let counts: Map<String, Value> = [("total", online + offline), ("online", online), ("offline", offline)]
        .into_iter()
        .filter(|(_, count)| *count > 0)
        .map(|(field, count)| (field.to_owned(), json!(count)))
        .collect();
    object.insert("dataplanes".into(), Value::Object(counts));
    let kind = kind(service);
    if kind != INTERNAL {
        object.insert("serviceType".into(), kind.into());
    }
    if kind != GATEWAY {
        // Nobody sends requests to a gateway by name.
        object.insert("addressPort".into(), format!("{name}.mesh:80").into());
    }
    body
}
