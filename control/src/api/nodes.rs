//! The nodes that joined: who they are, what they run, and shutting them out.

use std::sync::Arc;

use axum::{
    extract::{Extension, Path, State},
    response::Response,
};
use http::StatusCode;
use serde_json::{Value, json};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{Shared, error::ApiError, respond};
use crate::{
    access::{Right, User},
    identity::nodes::NodeRecord,
    rooms::Rooms,
};

const TITLE: &str = "Could not retrieve a node";

/// `GET /nodes`
pub(super) async fn list(
    State(state): State<Shared>,
    Extension(user): Extension<User>,
) -> Result<Response, ApiError> {
    let rooms = rooms(&state, &user)?;
    let items: Vec<Value> = rooms.identity.nodes().list().iter().map(|node| show(rooms, node)).collect();
    Ok(respond::ok(&json!({ "total": items.len(), "items": items, "next": null })))
}

/// `GET /nodes/{node}`, by name or id.
pub(super) async fn get(
    State(state): State<Shared>,
    Extension(user): Extension<User>,
    Path(node): Path<String>,
) -> Result<Response, ApiError> {
    let rooms = rooms(&state, &user)?;
    let node = find(rooms, &node)?;
    Ok(respond::ok(&show(rooms, &node)))
}

/// `POST /nodes/{node}/_revoke`
pub(super) async fn revoke(
    State(state): State<Shared>,
    Extension(user): Extension<User>,
    Path(node): Path<String>,
) -> Result<Response, ApiError> {
    set_revoked(&state, &user, &node, true).await
}

/// `POST /nodes/{node}/_restore`
pub(super) async fn restore(
    State(state): State<Shared>,
    Extension(user): Extension<User>,
    Path(node): Path<String>,
) -> Result<Response, ApiError> {
    set_revoked(&state, &user, &node, false).await
}

async fn set_revoked(state: &Shared, user: &User, node: &str, revoked: bool) -> Result<Response, ApiError> {
    let rooms = rooms(state, user)?;
    let id = find(rooms, node)?.id.clone();
    let title = if revoked { "Could not revoke the node" } else { "Could not restore the node" };
    let changed = rooms.set_revoked(&id, revoked, &user.to_string()).await.map_err(|error| {
        ApiError::new(StatusCode::SERVICE_UNAVAILABLE, title, format!("{error}; try again"))
    })?;
    let node = changed.ok_or_else(|| ApiError::not_found(title, format!("node {node:?}")))?;
    Ok(respond::ok(&show(rooms, &node)))
}

fn rooms<'a>(state: &'a Shared, user: &User) -> Result<&'a Arc<Rooms>, ApiError> {
    state.access.check(user, Right::AdminResources, "Node")?;
    state.rooms.as_ref().ok_or_else(|| {
        ApiError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "Service unavailable",
            "this control plane has no nodes; they belong to a zone's control plane",
        )
    })
}

/// A node by its id, or by its name where that is only one's.
fn find(rooms: &Rooms, wanted: &str) -> Result<Arc<NodeRecord>, ApiError> {
    if let Some(node) = rooms.identity.nodes().get(wanted) {
        return Ok(node);
    }
    let mut named = rooms.identity.nodes().list();
    named.retain(|node| node.name == wanted);
    match named.as_slice() {
        [node] => Ok(Arc::clone(node)),
        [] => Err(ApiError::not_found(TITLE, format!("node {wanted:?}"))),
        several => {
            let ids: Vec<&str> = several.iter().map(|node| node.id.as_str()).collect();
            let detail = format!(
                "{} nodes are called {wanted:?}; name one by its id: {}",
                several.len(),
                ids.join(", ")
            );
            Err(ApiError::new(StatusCode::CONFLICT, TITLE, detail))
        }
    }
}

fn show(rooms: &Rooms, node: &NodeRecord) -> Value {
    let time = |unix: i64| {
        OffsetDateTime::from_unix_timestamp(unix).ok().and_then(|time| time.format(&Rfc3339).ok())
    };
    let dataplanes: Vec<Value> = rooms
        .registry
        .dataplanes_of(&node.id)
        .iter()
        .map(|proxy| json!({ "mesh": proxy.mesh, "name": proxy.name }))
        .collect();
    let mut shown = json!({
        "type": "Node",
        "id": node.id,
        "name": node.name,
        "grant": { "mesh": node.grant.mesh, "workloads": node.grant.workloads },
        "certificateExpirationTime": time(node.not_after),
        "online": rooms.is_connected(&node.id),
        "revoked": node.revoked,
        "dataplanes": dataplanes,
    });
    if let Some(at) = node.revoked_at.and_then(time) {
        shown["revokedTime"] = at.into();
    }
    shown
}
