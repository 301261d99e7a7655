//! The REST API in Kuma v3's shapes.
//!
//! [`router`] makes one set of routes for each type of the registry, and adds what the control plane
//! says about itself, tokens and tickets. [`server`] puts it on the wire.

mod attached;
mod auth;
mod computed;
mod cors;
mod crud;
mod error;
mod inspect;
mod issue;
mod kri;
mod kubernetes;
mod nodes;
mod overview;
mod query;
mod respond;
pub mod server;
mod service_insights;
mod services;
mod system;

#[cfg(test)]
mod tests;

use std::{convert::Infallible, sync::Arc};

use axum::{
    extract::{Path, Request, State},
    middleware,
    response::{IntoResponse, Response},
    routing::{MethodRouter, get, post},
};
use http::{HeaderMap, StatusCode, Uri, header};
use ursa_model::{Descriptor, Scope, registry};

pub use axum::{Router, body::Body};
pub use cors::Origins;
pub use error::ApiError;
pub use issue::{Ticket, TicketFuture, TicketRequest, TicketStore};
pub use kri::{core_name, parse as parse_kri};

use crate::{
    ControlPlane,
    access::{Access, User},
    config::Mode,
    rooms::Rooms,
    tokens::Tokens,
};
use crud::{Call, Parameters};

/// What the handlers share.
#[derive(Debug, Clone)]
pub struct ApiState {
    control: Arc<ControlPlane>,
    access: Access,
    tokens: Tokens,
    tickets: Option<Arc<dyn TicketStore>>,
    rooms: Option<Arc<Rooms>>,
    hostname: String,
}

type Shared = Arc<ApiState>;

/// Marks requests that came over TLS; the servers put it into their extensions.
#[derive(Debug, Clone, Copy)]
pub struct OverTls;

impl ApiState {
    /// The API of a control plane, without tickets.
    pub fn new(control: Arc<ControlPlane>) -> Self {
        let access = Access::new(control.config.clone());
        let tokens = control.tokens.clone();
        let hostname =
            nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Self { control, access, tokens, tickets: None, rooms: None, hostname }
    }

    /// Shows and shuts out the nodes of these rooms from now on.
    #[must_use]
    pub fn with_rooms(mut self, rooms: Arc<Rooms>) -> Self {
        self.tickets = Some(Arc::clone(&rooms) as Arc<dyn TicketStore>);
        self.rooms = Some(rooms);
        self
    }

    /// The API's address as the client sees it.
    fn base_url(&self, uri: &Uri, headers: &HeaderMap, over_tls: bool) -> String {
        let root = &self.control.config.api_server.root_url;
        if !root.is_empty() {
            return root.trim_end_matches('/').to_owned();
        }
        let host = headers
            .get(header::HOST)
            .and_then(|host| host.to_str().ok())
            .or_else(|| uri.authority().map(http::uri::Authority::as_str))
            .unwrap_or("localhost");
        let scheme = if over_tls { "https" } else { "http" };
        format!("{scheme}://{host}")
    }

    /// Why resources of a type can't be written here; none if they can.
    fn read_only(&self, descriptor: &Descriptor) -> Option<&'static str> {
        let config = &self.control.config;
        if config.api_server.read_only {
            return Some(
                "This control plane doesn't accept writes over the API (apiServer.readOnly is true).",
            );
        }
        if descriptor.read_only {
            return Some("Resources of this type are written by the control plane only; they can be read.");
        }
        if config.mode == Mode::Global && !descriptor.provided_by_global() {
            return Some(
                "On global control plane you can not modify dataplane resources with 'kumactl apply' or via the HTTP API. \
                 You can still use 'kumactl' or the HTTP API to modify them on the zone control plane.\n",
            );
        }
        if config.is_federated() && !descriptor.provided_by_zone() {
            return Some(
                "On zone control plane you can only modify zone resources with 'kumactl apply' or via the HTTP API. \
                 You can still use 'kumactl' or the HTTP API to modify the rest of the resource on the global control plane.\n",
            );
        }
        None
    }
}

/// The whole API.
pub fn router(state: ApiState) -> Router {
    let origins = Origins::parse(&state.control.config.api_server.cors_allowed_domains).unwrap_or_default();
    let state: Shared = Arc::new(state);
    let mut router = Router::new()
        .route("/", get(system::index))
        .route("/who-am-i", get(system::who_am_i))
        .route("/config", get(system::config))
        .route("/policies", get(system::policies))
        .route("/_resources", get(system::resources))
        .route("/global-insight", get(system::global_insight))
        .route("/global-insights", get(system::global_insights))
        .route("/_kri/{kri}", get(by_kri))
        .route("/tokens/dataplane", post(issue::dataplane_token))
        .route("/tokens/zone", post(issue::zone_token))
        .route("/tokens/user", post(issue::user_token))
        .route("/tickets", post(issue::ticket))
        .route("/meshes/{mesh}/dataplanes/{name}/xds", get(inspect::xds))
        .route("/meshes/{mesh}/dataplanes/{name}/stats", get(inspect::stats))
        .route("/meshes/{mesh}/dataplanes/{name}/clusters", get(inspect::clusters))
        .route("/nodes", get(nodes::list))
        .route("/nodes/{node}", get(nodes::get))
        .route("/nodes/{node}/_revoke", post(nodes::revoke))
        .route("/nodes/{node}/_restore", post(nodes::restore))
        .route("/meshes/{mesh}/{service}/{name}/_hostnames", get(services::hostnames))
        .route("/meshes/{mesh}/meshservices/{name}/_dataplanes", get(services::dataplanes))
        .route("/service-insights", get(service_insights::list))
        .route("/meshes/{mesh}/service-insights", get(service_insights::list))
        .route("/meshes/{mesh}/service-insights/{name}", get(service_insights::get));
    // Service insights have routes of their own, above.
    for descriptor in registry().iter().copied().filter(|found| found.path != "service-insights") {
        for collection in std::iter::once(descriptor.path).chain(descriptor.aliases.iter().copied()) {
            router = resource_routes(router, descriptor, collection);
        }
    }
    router
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(middleware::from_fn_with_state(state.clone(), auth::authenticate))
        .layer(middleware::from_fn_with_state(origins, cors::allow))
        .with_state(state)
}

/// The routes of one type under one name of its collection.
fn resource_routes(
    mut router: Router<Shared>,
    descriptor: &'static Descriptor,
    collection: &str,
) -> Router<Shared> {
    let mut bases = vec![format!("/{collection}")];
    if descriptor.scope == Scope::Mesh {
        bases.push(format!("/meshes/{{mesh}}/{collection}"));
    }
    if descriptor.is_policy() {
        let path = format!("/meshes/{{mesh}}/{collection}/{{name}}/_resources/dataplanes");
        router = router.route(&path, attached::dataplanes_route(descriptor));
    }
    let overviews = overview::insight_of(descriptor.name).is_some();
    for base in bases {
        // In mesh scope, single resources are below their mesh only.
        let single = descriptor.scope == Scope::Global || base.contains("{mesh}");
        router = router.route(&base, list_route(descriptor, false, &base));
        if single {
            router = router.route(&format!("{base}/{{name}}"), item_route(descriptor));
        }
        if overviews {
            router = router.route(&format!("{base}/_overview"), list_route(descriptor, true, &base));
            if single {
                router = router.route(&format!("{base}/{{name}}/_overview"), overview_route(descriptor));
            }
        }
        if let Some(legacy) = overview::legacy_path(descriptor.name).filter(|_| collection == descriptor.path)
        {
            let legacy = base.replace(collection, legacy);
            router = router.route(&legacy, list_route(descriptor, true, &legacy));
            if single {
                router = router.route(&format!("{legacy}/{{name}}"), overview_route(descriptor));
            }
        }
    }
    router
}

fn list_route(
    descriptor: &'static Descriptor,
    with_insight: bool,
    route: &str,
) -> MethodRouter<Shared, Infallible> {
    let route: Arc<str> = route.into();
    get(move |State(state): State<Shared>, parameters: Path<Parameters>, request: Request| async move {
        let (call, _) = call(state, descriptor, with_insight, parameters, request);
        call.list(&route).await
    })
}

fn item_route(descriptor: &'static Descriptor) -> MethodRouter<Shared, Infallible> {
    get(move |State(state): State<Shared>, parameters: Path<Parameters>, request: Request| async move {
        call(state, descriptor, false, parameters, request).0.get().await
    })
    .put(move |State(state): State<Shared>, parameters: Path<Parameters>, request: Request| async move {
        let (call, body) = call(state, descriptor, false, parameters, request);
        call.put(body).await
    })
    .delete(
        move |State(state): State<Shared>, parameters: Path<Parameters>, request: Request| async move {
            call(state, descriptor, false, parameters, request).0.delete().await
        },
    )
}

fn overview_route(descriptor: &'static Descriptor) -> MethodRouter<Shared, Infallible> {
    get(move |State(state): State<Shared>, parameters: Path<Parameters>, request: Request| async move {
        call(state, descriptor, true, parameters, request).0.get().await
    })
}

fn call(
    state: Shared,
    descriptor: &'static Descriptor,
    with_insight: bool,
    Path(mut parameters): Path<Parameters>,
    request: Request,
) -> (Call, Body) {
    let (parts, body) = request.into_parts();
    let user = parts.extensions.get::<User>().cloned().unwrap_or_else(User::anonymous);
    let call = Call {
        state,
        descriptor,
        with_insight,
        mesh: parameters.remove("mesh").unwrap_or_default(),
        name: parameters.remove("name").unwrap_or_default(),
        user,
        uri: parts.uri,
        headers: parts.headers,
        over_tls: parts.extensions.get::<OverTls>().is_some(),
    };
    (call, body)
}

/// `GET /_kri/{kri}`
async fn by_kri(
    State(state): State<Shared>,
    Path(text): Path<String>,
    request: Request,
) -> Result<Response, ApiError> {
    let (parsed, descriptor) = kri::parse(&text)?;
    let (call, _) = call(state, descriptor, false, Path(Parameters::new()), request);
    if descriptor.admin_only {
        call.state.access.check(&call.user, crate::access::Right::AdminResources, descriptor.name)?;
    }
    let found = kri::find(&call.state, &parsed, descriptor).await?;
    let found = found.ok_or_else(|| ApiError::not_found("Could not retrieve a resource", &text))?;
    call.show(&found).await
}

async fn no_route(uri: Uri) -> ApiError {
    ApiError::new(
        StatusCode::NOT_FOUND,
        "Not found",
        format!("there is nothing at {}; GET /_resources lists the collections that exist", uri.path()),
    )
}

async fn no_method(method: http::Method, uri: Uri) -> Response {
    ApiError::method_not_allowed(format!("{method} isn't possible on {}", uri.path())).into_response()
}
