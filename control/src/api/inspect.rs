//! What a proxy's Envoy says of itself, asked through its agent: `xds`, `stats` and `clusters` of a Dataplane.

use axum::{
    extract::{Extension, Path, State},
    response::{IntoResponse, Response},
};
use http::{StatusCode, Uri, header};
use serde_json::{Value, json};
use ursa_model::ResourceKey;

use super::{Shared, error::ApiError, query::Params, respond};
use crate::{
    access::{Right, User},
    session::AskError,
};

/// `GET /meshes/{mesh}/dataplanes/{name}/xds`
pub(super) async fn xds(
    State(state): State<Shared>,
    Extension(user): Extension<User>,
    Path((mesh, name)): Path<(String, String)>,
    uri: Uri,
) -> Result<Response, ApiError> {
    state.access.check(&user, Right::ViewConfigDump, "config dump")?;
    ask(&state, &mesh, &name, "config-dump", &uri).await
}

/// `GET /meshes/{mesh}/dataplanes/{name}/stats`
pub(super) async fn stats(
    State(state): State<Shared>,
    Extension(user): Extension<User>,
    Path((mesh, name)): Path<(String, String)>,
    uri: Uri,
) -> Result<Response, ApiError> {
    state.access.check(&user, Right::ViewStats, "stats")?;
    ask(&state, &mesh, &name, "stats", &uri).await
}

/// `GET /meshes/{mesh}/dataplanes/{name}/clusters`
pub(super) async fn clusters(
    State(state): State<Shared>,
    Extension(user): Extension<User>,
    Path((mesh, name)): Path<(String, String)>,
    uri: Uri,
) -> Result<Response, ApiError> {
    state.access.check(&user, Right::ViewClusters, "clusters")?;
    ask(&state, &mesh, &name, "clusters", &uri).await
}

async fn ask(state: &Shared, mesh: &str, name: &str, kind: &str, uri: &Uri) -> Result<Response, ApiError> {
    let title = format!("Could not get {kind} of the proxy");
    let params = Params::of(uri)?;
    let key = ResourceKey { kind: "Dataplane", mesh: mesh.to_owned(), name: name.to_owned() };
    let found =
        state.control.store.get(&key).await.map_err(|error| ApiError::store(title.clone(), &error))?;
    found.ok_or_else(|| ApiError::not_found(title.clone(), &key))?;
    let parameters = json!({
        "mesh": mesh,
        "name": name,
        "includeEds": params.first("include_eds") == "true",
        "format": params.first("format"),
        // The peer's default: what was never counted is left out.
        "usedOnly": params.first("usedonly") != "false",
    });
    let rooms = state.rooms.as_ref().ok_or(AskError::NotConnected);
    let answer = match rooms {
        Ok(rooms) => rooms.ask(mesh, name, kind, &parameters).await,
        Err(error) => Err(error),
    };
    match answer {
        Ok(Value::String(text)) => Ok(([(header::CONTENT_TYPE, "text/plain")], text).into_response()),
        Ok(value) => Ok(respond::ok(&value)),
        Err(error) => {
            let status = match error {
                AskError::Timeout => StatusCode::GATEWAY_TIMEOUT,
                AskError::Agent(_) => StatusCode::BAD_GATEWAY,
                // The peer's answer where there is no stream to ask over.
                AskError::NotConnected => StatusCode::BAD_REQUEST,
                AskError::Busy => StatusCode::SERVICE_UNAVAILABLE,
            };
            Err(ApiError::new(status, title, format!("Dataplane {name:?} in mesh {mesh:?}: {error}")))
        }
    }
}
