//! Tokens and join tickets.

use std::{collections::BTreeMap, pin::Pin, sync::Arc};

use axum::{
    body::Body,
    extract::{Extension, State},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::json;
use time::{Duration, OffsetDateTime, format_description::well_known::Rfc3339};
use ursa_model::{GoDuration, ResourceKey, Violations};

use super::{Shared, error::ApiError, respond};
use crate::{
    access::{Right, User},
    tokens::{DEFAULT_VALIDITY, DataplaneClaims, TokenError},
};

/// What a join ticket shall grant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TicketRequest {
    /// In this mesh.
    pub mesh: String,
    /// These workloads; `*` for all.
    pub workloads: Vec<String>,
    /// How long the ticket can be used.
    pub valid_for: Duration,
    /// By how many nodes it can be used.
    pub uses: u32,
}

/// A join ticket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ticket {
    /// The text that is given to `ursa join`.
    pub ticket: String,
    /// Until when.
    pub expires: OffsetDateTime,
}

/// The future of a ticket.
pub type TicketFuture<'a> = Pin<Box<dyn Future<Output = Result<Ticket, String>> + Send + 'a>>;

/// Makes join tickets; the identity service is one.
pub trait TicketStore: Send + Sync {
    /// Makes a ticket, or says why not.
    fn create(&self, request: TicketRequest) -> TicketFuture<'_>;
}

impl std::fmt::Debug for dyn TicketStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TicketStore")
    }
}

const INVALID: &str = "Invalid request";
/// A ticket is for a join that happens soon.
const TICKET_VALIDITY: Duration = Duration::hours(1);

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", default)]
#[derive(Default)]
struct DataplaneTokenRequest {
    name: Option<String>,
    mesh: Option<String>,
    tags: Option<BTreeMap<String, Vec<String>>>,
    r#type: Option<String>,
    workload: Option<String>,
    valid_for: Option<String>,
}

/// `POST /tokens/dataplane`
pub(super) async fn dataplane_token(
    State(state): State<Shared>,
    Extension(user): Extension<User>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    state.access.check(&user, Right::GenerateDpToken, "dataplane tokens")?;
    enabled(state.control.config.dp_server.authn.dp_proxy.dp_token.enable_issuer)?;
    let body = respond::body(&headers, body, state.control.config.api_server.max_body_bytes).await?;
    let Some(request) = read::<DataplaneTokenRequest>(&body) else { return Ok(unreadable()) };
    let mut violations = Violations::new();
    let mesh = request.mesh.unwrap_or_default();
    if mesh.is_empty() {
        violations.add("mesh", "cannot be empty");
    }
    let kind = request.r#type.unwrap_or_default();
    if !matches!(kind.as_str(), "" | "dataplane") {
        violations.add("type", "must be dataplane");
    }
    let valid_for = optional_validity(request.valid_for.as_deref(), DEFAULT_VALIDITY, &mut violations);
    refuse(violations)?;
    let claims = DataplaneClaims {
        name: request.name.unwrap_or_default(),
        mesh,
        tags: request.tags.unwrap_or_default(),
        r#type: kind,
        workload: request.workload.unwrap_or_default(),
        ..DataplaneClaims::default()
    };
    let mesh = claims.mesh.clone();
    match state.tokens.dataplane_token(claims, valid_for).await {
        Ok(token) => Ok(text(token)),
        // The reason may lie deeper.
        Err(error @ TokenError::NoSigningKey { .. }) => {
            let mut error = ApiError::from(error);
            if let Err(missing) = state.mesh_exists(&mesh).await {
                error.detail = missing.detail;
            }
            Err(error)
        }
        Err(error) => Err(error.into()),
    }
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct ZoneTokenRequest {
    zone: Option<String>,
    scope: Option<Vec<String>>,
    valid_for: Option<String>,
}

/// `POST /tokens/zone`
pub(super) async fn zone_token(
    State(state): State<Shared>,
    Extension(user): Extension<User>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    state.access.check(&user, Right::GenerateZoneToken, "zone tokens")?;
    enabled(state.control.config.dp_server.authn.dp_proxy.dp_token.enable_issuer)?;
    let body = respond::body(&headers, body, state.control.config.api_server.max_body_bytes).await?;
    let Some(request) = read::<ZoneTokenRequest>(&body) else { return Ok(unreadable()) };
    let mut violations = Violations::new();
    let zone = request.zone.unwrap_or_default();
    if zone.is_empty() {
        violations.add("zone", "cannot be empty");
    }
    for (i, scope) in request.scope.iter().flatten().enumerate() {
        violations.add(format!("scope[{i}]"), format!("unknown scope {scope:?}; there is none to be given"));
    }
    let valid_for = optional_validity(request.valid_for.as_deref(), DEFAULT_VALIDITY, &mut violations);
    refuse(violations)?;
    Ok(text(state.tokens.zone_token(&zone, &[], valid_for).await?))
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "camelCase", default)]
struct UserTokenRequest {
    name: Option<String>,
    groups: Option<Vec<String>>,
    valid_for: Option<String>,
}

/// `POST /tokens/user`
pub(super) async fn user_token(
    State(state): State<Shared>,
    Extension(user): Extension<User>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    state.access.check(&user, Right::GenerateUserToken, "user tokens")?;
    enabled(state.control.config.api_server.authn.tokens.enable_issuer)?;
    let body = respond::body(&headers, body, state.control.config.api_server.max_body_bytes).await?;
    let Some(request) = read::<UserTokenRequest>(&body) else { return Ok(unreadable()) };
    let mut violations = Violations::new();
    let name = request.name.unwrap_or_default();
    if name.is_empty() {
        violations.add("name", "cannot be empty");
    }
    let valid_for = match request.valid_for.as_deref() {
        None | Some("") => {
            violations.add("validFor", "cannot be empty");
            Duration::ZERO
        }
        given => optional_validity(given, Duration::ZERO, &mut violations),
    };
    refuse(violations)?;
    Ok(text(state.tokens.user_token(&name, &request.groups.unwrap_or_default(), valid_for).await?))
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct TicketBody {
    mesh: Option<String>,
    workloads: Option<Vec<String>>,
    valid_for: Option<String>,
    uses: Option<u32>,
}

/// `POST /tickets`
pub(super) async fn ticket(
    State(state): State<Shared>,
    Extension(user): Extension<User>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    state.access.check(&user, Right::GenerateDpToken, "join tickets")?;
    let body = respond::body(&headers, body, state.control.config.api_server.max_body_bytes).await?;
    let request: TicketBody = serde_json::from_slice(&body).map_err(|error| {
        ApiError::bad_request(format_args!(
            "a ticket is asked for with {{\"mesh\", \"workloads\", \"validFor\", \"uses\"}}: {error}"
        ))
    })?;
    let mesh = request.mesh.filter(|mesh| !mesh.is_empty()).unwrap_or_else(|| "default".into());
    let mut violations = Violations::new();
    let workloads = request.workloads.unwrap_or_default();
    if workloads.is_empty() {
        violations.add("workloads", "cannot be empty; name the workloads that the node may run, or \"*\"");
    }
    for (i, workload) in workloads.iter().enumerate().filter(|(_, workload)| workload.is_empty()) {
        violations.add(format!("workloads[{i}]"), format!("{workload:?} is no workload's name"));
    }
    if request.uses == Some(0) {
        violations.add("uses", "must be greater than 0");
    }
    let valid_for = optional_validity(request.valid_for.as_deref(), TICKET_VALIDITY, &mut violations);
    refuse(violations)?;
    state.mesh_exists(&mesh).await.map_err(|_| {
        ApiError::parameter(INVALID, "Mesh is not found", "mesh", format!("mesh of name {mesh} is not found"))
    })?;
    let tickets = state.tickets.as_ref().ok_or_else(|| {
        ApiError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "Service unavailable",
            "this control plane has no identity service; tickets come from a zone's control plane",
        )
    })?;
    let request = TicketRequest { mesh, workloads, valid_for, uses: request.uses.unwrap_or(1) };
    let made = tickets.create(request).await.map_err(|reason| {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "Could not make a ticket", reason)
    })?;
    let expires = made.expires.format(&Rfc3339).unwrap_or_default();
    Ok(respond::ok(&json!({ "ticket": made.ticket, "expires": expires })))
}

impl super::ApiState {
    /// An error unless the mesh exists.
    pub(super) async fn mesh_exists(&self, mesh: &str) -> Result<(), ApiError> {
        const TITLE: &str = "Failed to retrieve Mesh";
        let key = ResourceKey { kind: "Mesh", mesh: String::new(), name: mesh.to_owned() };
        match self.control.store.get(&key).await {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err(ApiError::not_found(TITLE, &key)),
            Err(error) => Err(ApiError::store(TITLE, &error)),
        }
    }

    /// Makes join tickets from now on.
    #[must_use]
    pub fn with_tickets(mut self, tickets: Arc<dyn TicketStore>) -> Self {
        self.tickets = Some(tickets);
        self
    }
}

fn enabled(issuer: bool) -> Result<(), ApiError> {
    if issuer {
        return Ok(());
    }
    let detail = "issuing tokens using the control plane is disabled.";
    Err(ApiError::new(StatusCode::BAD_REQUEST, "Could not issue a token", detail))
}

fn read<T: DeserializeOwned>(body: &Bytes) -> Option<T> {
    serde_json::from_slice(body)
        .inspect_err(|error| tracing::warn!(%error, "a token request isn't valid JSON"))
        .ok()
}

/// Clients of the peer get no body when theirs can't be read.
fn unreadable() -> Response {
    StatusCode::BAD_REQUEST.into_response()
}

fn text(token: String) -> Response {
    ([(header::CONTENT_TYPE, "text/plain")], token).into_response()
}

fn refuse(violations: Violations) -> Result<(), ApiError> {
    if violations.is_empty() { Ok(()) } else { Err(ApiError::invalid(INVALID, violations)) }
}

/// A Go duration, or the default if it isn't given.
fn optional_validity(text: Option<&str>, default: Duration, violations: &mut Violations) -> Duration {
    let Some(text) = text.filter(|text| !text.is_empty()) else { return default };
    let parsed = text.parse::<GoDuration>().map(|found| Duration::nanoseconds(found.nanos()));
    match parsed {
        Ok(duration) if duration.is_zero() => violations.add("validFor", "cannot be empty or nil"),
        Ok(duration) if duration.is_negative() => violations.add("validFor", "must be positive"),
        Ok(duration) => return duration,
        Err(_) => {
            violations.add("validFor", format!("{text:?} is no duration; write it as 24h, 30m or 1h30m"));
        }
    }
    Duration::ZERO
}
