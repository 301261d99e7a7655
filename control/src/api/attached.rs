//! Which dataplanes a policy is attached to.

use std::sync::Arc;

use axum::{
    extract::{Path, Request, State},
    response::Response,
    routing::{MethodRouter, get},
};
use serde_json::{Value, json};
use ursa_model::{Descriptor, ResourceKey, policy};

use super::{
    OverTls, Shared,
    error::ApiError,
    query::{PageAsked, Params},
    respond, system,
};

/// `GET /meshes/{mesh}/{policies}/{name}/_resources/dataplanes` of one type of policy.
pub(super) fn dataplanes_route(descriptor: &'static Descriptor) -> MethodRouter<Shared> {
    get(
        move |State(state): State<Shared>, Path((mesh, name)): Path<(String, String)>, request: Request| async move {
            let key = ResourceKey { kind: descriptor.name, mesh, name };
            dataplanes(&state, &key, &request.into_parts().0).await
        },
    )
}

async fn dataplanes(
    state: &Shared,
    key: &ResourceKey,
    request: &http::request::Parts,
) -> Result<Response, ApiError> {
    let params = Params::of(&request.uri)?;
    let asked = PageAsked::of(&params)?;
    state.mesh_exists(&key.mesh).await?;
    let store = &state.control.store;
    let found = store.get(key).await.map_err(|error| ApiError::store("Could not retrieve policy", &error))?;
    let found = found.ok_or_else(|| ApiError::not_found("Could not retrieve policy", key))?;
    let all = store.list("Dataplane", Some(&key.mesh)).await;
    let mut all = all.map_err(|error| ApiError::store("Could not retrieve dataplanes", &error))?;
    all.retain(|dataplane| {
        dataplane.meta.name.contains(params.first("name")) && policy::selects(&found, dataplane)
    });
    let (items, total) = asked.cut(all);
    let items: Vec<Value> = items.iter().map(Arc::as_ref).map(system::meta).collect();
    let mut body = json!({ "total": total, "items": items });
    let base = state.base_url(&request.uri, &request.headers, request.extensions.get::<OverTls>().is_some());
    if let Some(next) = asked.next(&base, request.uri.path(), &params, total) {
        body["next"] = next.into();
    }
    Ok(respond::ok(&body))
}
