//! Reading, listing, writing and deleting resources of any type.

use std::{collections::HashMap, sync::Arc};

use axum::{body::Body, response::Response};
use http::{HeaderMap, HeaderValue, StatusCode, Uri, header};
use serde_json::{Value, json};
use ursa_model::{
    Descriptor, Form, Resource, ResourceKey, Scope, Violation, Violations, labels, structure, validate,
};

use super::{
    Shared, computed,
    error::ApiError,
    kubernetes, overview,
    query::{Filter, PageAsked, Params},
    respond,
};
use crate::{
    access::{Right, User},
    store::{ListQuery, StoreError},
};

const RETRIEVE: &str = "Could not retrieve a resource";
const RETRIEVE_ALL: &str = "Could not retrieve resources";
const PROCESS: &str = "Could not process a resource";
const DELETE: &str = "Could not delete a resource";

/// Somebody else may be faster so often before a write is given up.
const ATTEMPTS: usize = 8;

/// One request on one type.
pub(super) struct Call {
    pub(super) state: Shared,
    pub(super) descriptor: &'static Descriptor,
    /// Whether overviews are asked for.
    pub(super) with_insight: bool,
    /// Empty in lists over all meshes, and in global scope.
    pub(super) mesh: String,
    /// Empty in lists.
    pub(super) name: String,
    pub(super) user: User,
    pub(super) uri: Uri,
    pub(super) headers: HeaderMap,
    pub(super) over_tls: bool,
}

impl Call {
    fn key(&self) -> ResourceKey {
        ResourceKey { kind: self.descriptor.name, mesh: self.mesh.clone(), name: self.name.clone() }
    }

    fn allowed(&self) -> Result<(), ApiError> {
        if self.descriptor.admin_only {
            self.state.access.check(&self.user, Right::AdminResources, self.descriptor.name)?;
        }
        Ok(())
    }

    /// The type in the store from which this one's resources come.
    fn stored_kind(&self) -> &'static str {
        if computed::is_computed(self.descriptor.name) { "Mesh" } else { self.descriptor.name }
    }

    /// What comes from a stored resource, of [`stored_kind`](Self::stored_kind).
    async fn seen(&self, stored: Arc<Resource>) -> Result<Arc<Resource>, ApiError> {
        if !computed::is_computed(self.descriptor.name) {
            return Ok(stored);
        }
        let insight = computed::of_mesh(&self.state, &stored).await;
        insight.map(Arc::new).map_err(|error| ApiError::store("Could not retrieve insights", &error))
    }

    async fn mesh_exists(&self) -> Result<(), ApiError> {
        if self.mesh.is_empty() { Ok(()) } else { self.state.mesh_exists(&self.mesh).await }
    }

    pub(super) async fn get(self) -> Result<Response, ApiError> {
        self.mesh_exists().await?;
        self.allowed()?;
        let key = ResourceKey { kind: self.stored_kind(), ..self.key() };
        let found = self.state.control.store.get(&key).await;
        let found = found.map_err(|error| ApiError::store(RETRIEVE, &error))?;
        let resource = found.ok_or_else(|| ApiError::not_found(RETRIEVE, self.key()))?;
        self.show(&*self.seen(resource).await?).await
    }

    /// The answer with one resource, in the form that is asked for.
    pub(super) async fn show(&self, resource: &Resource) -> Result<Response, ApiError> {
        let params = Params::of(&self.uri)?;
        let body = match params.first("format") {
            "k8s" | "kubernetes" => kubernetes::manifest(resource, params.first("namespace")),
            "" | "universal" if self.with_insight => {
                let insight = self.insight(resource).await?;
                overview::of(resource, insight.as_deref())
            }
            "" | "universal" => overview::plain(resource),
            _ => {
                let reason = validate::must_be_one_of("format", &["k8s", "kubernetes", "universal"]);
                return Err(ApiError::invalid(RETRIEVE, Violations::one("", reason)));
            }
        };
        Ok(respond::ok(&body))
    }

    async fn insight(&self, resource: &Resource) -> Result<Option<Arc<Resource>>, ApiError> {
        let Some((kind, ..)) = overview::insight_of(self.descriptor.name) else { return Ok(None) };
        let key = ResourceKey { kind, mesh: resource.meta.mesh.clone(), name: resource.meta.name.clone() };
        let found = self.state.control.store.get(&key).await;
        let found = found.map_err(|error| ApiError::store("Could not retrieve insights", &error))?;
        Ok(match self.descriptor.name {
            "Zone" => found.or_else(|| computed::of_own_zone(&self.state, resource).map(Arc::new)),
            _ => found,
        })
    }

    /// `route` is the pattern at which the list is served.
    pub(super) async fn list(self, route: &str) -> Result<Response, ApiError> {
        let params = Params::of(&self.uri)?;
        let asked = PageAsked::of(&params)?;
        let filter = Filter::of(&params, route, self.descriptor.name == "Dataplane")?;
        self.mesh_exists().await?;
        self.allowed()?;
        let failed = |error| ApiError::store(RETRIEVE_ALL, &error);
        let store = &self.state.control.store;
        let mut query = ListQuery {
            mesh: Some(self.mesh.clone()).filter(|mesh| !mesh.is_empty()),
            name_contains: Some(params.first("name").to_owned()).filter(|name| !name.is_empty()),
            ..ListQuery::default()
        };
        let (items, total) = if filter.is_empty() {
            query.offset = asked.offset;
            query.limit = Some(asked.size);
            let page = store.page(self.stored_kind(), query).await.map_err(failed)?;
            (page.items, page.total)
        } else {
            let mut all = store.page(self.stored_kind(), query).await.map_err(failed)?.items;
            all.retain(|resource| filter.accepts(resource));
            asked.cut(all)
        };
        let mut bodies = Vec::with_capacity(items.len());
        for item in items {
            let item = self.seen(item).await?;
            bodies.push(if self.with_insight {
                overview::of(&item, self.insight(&item).await?.as_deref())
            } else {
                overview::plain(&item)
            });
        }
        let base = self.state.base_url(&self.uri, &self.headers, self.over_tls);
        let next = asked.next(&base, self.uri.path(), &params, total);
        Ok(respond::ok(&json!({ "total": total, "items": bodies, "next": next })))
    }

    pub(super) async fn put(self, body: Body) -> Result<Response, ApiError> {
        self.writable()?;
        self.mesh_exists().await?;
        self.allowed()?;
        let limit = self.state.control.config.api_server.max_body_bytes;
        let body = respond::body(&self.headers, body, limit).await?;
        let resource = self.read(&body)?;
        let labels = self.check(&resource)?;
        let key = self.key();
        let store = &self.state.control.store;
        for _ in 0..ATTEMPTS {
            let current = store.get(&key).await;
            let current = current.map_err(|error| ApiError::store("Failed to find a resource", &error))?;
            let mut next = Resource { ignored: Vec::new(), ..resource.clone() };
            next.meta.labels.clone_from(&labels);
            let title =
                if current.is_some() { "Failed to update a resource" } else { "Failed to create a resource" };
            keep_state(&mut next, current.as_deref());
            self.check_before_store(&resource, current.as_deref(), &labels, title)?;
            let (status, written) = if let Some(current) = current {
                next.meta.version = current.meta.version;
                next.status.clone_from(&current.status);
                (StatusCode::OK, store.update(next).await)
            } else {
                next.status = initial_status(self.descriptor);
                (StatusCode::CREATED, store.create(next).await)
            };
            match written {
                Ok(_) => return Ok(accepted(status, resource)),
                // Somebody was faster; what they wrote is the new ground to write on.
                Err(StoreError::Conflict(_) | StoreError::Exists(_) | StoreError::NotFound(_)) => {}
                Err(error) => return Err(ApiError::store(title, &error)),
            }
        }
        let reason = "it was changed by others again and again; repeat the request";
        Err(ApiError::new(StatusCode::CONFLICT, "Conflict", format!("{key}: {reason}")))
    }

    fn writable(&self) -> Result<(), ApiError> {
        self.state
            .read_only(self.descriptor)
            .map_or(Ok(()), |reason| Err(ApiError::method_not_allowed(reason)))
    }

    /// Parses the body and judges its spec.
    fn read(&self, body: &[u8]) -> Result<Resource, ApiError> {
        let kind = self.descriptor.name;
        let mut value: Value = serde_json::from_slice(body).map_err(|error| {
            ApiError::new(
                StatusCode::BAD_REQUEST,
                "Bad Request",
                format!("invalid {kind} object: {:?}", error.to_string()),
            )
        })?;
        if let Some(object) = value.as_object_mut()
            && self.descriptor.scope == Scope::Mesh
            && object.get("mesh").is_none_or(|mesh| mesh.is_null() || mesh == "")
        {
            object.insert("mesh".into(), json!(self.mesh));
        }
        let given = value.get("type").and_then(Value::as_str).unwrap_or_default();
        if given != kind && self.descriptor.form == Form::Spec {
            let reason = format!("type in body should be one of [{kind}]");
            return Err(ApiError::invalid(PROCESS, Violations::one("", reason)));
        }
        if given != kind {
            let reason = "type from the URL has to be the same as in body";
            return Err(ApiError::invalid(PROCESS, Violations::one("type", reason)));
        }
        let resource = Resource::from_json_as(self.descriptor, &value)
            .map_err(|error| ApiError::parse(PROCESS, kind, error))?;
        if self.descriptor.is_policy() {
            refuse(PROCESS, structure::attachment(&resource.spec))?;
        }
        let mut violations = Violations::new();
        (self.descriptor.codec.validate)(&resource.meta, &resource.spec, &mut violations);
        // A name that isn't a label is the store's objection, below: judged last, with another title.
        violations.0.retain(|violation| violation.field != "name");
        refuse(PROCESS, violations)?;
        Ok(resource)
    }

    /// Judges name, mesh and labels, and computes the labels to be stored.
    fn check(&self, resource: &Resource) -> Result<labels::Labels, ApiError> {
        let meta = &resource.meta;
        let mut violations = Violations::new();
        if meta.name != self.name {
            violations.add("name", "name from the URL has to be the same as in body");
        }
        let context = self.state.control.label_context();
        if context.federated && context.zone.len() + 1 + meta.name.len() >= 253 {
            violations.add("name", "the length of the name must be shorter");
        }
        if self.descriptor.scope == Scope::Mesh && meta.mesh != self.mesh {
            violations.add("mesh", "mesh from the URL has to be the same as in body");
        }
        // A wrong workload is objected to only once all else is right, and in other words.
        let field = format!("labels[\"{}\"]", labels::WORKLOAD);
        let is_workload =
            |violation: &Violation| self.descriptor.name == "Dataplane" && violation.field == field;
        let (workload, others): (Vec<_>, Vec<_>) =
            labels::validate(resource, &context).into_iter().partition(is_workload);
        violations.0.extend(others);
        violations.extend(labels::validate_meta(self.descriptor.scope, meta));
        refuse(PROCESS, violations)?;
        if let Some(violation) = workload.first() {
            return Err(ApiError::bad_request(format_args!("{}: {}", violation.field, violation.message)));
        }
        labels::compute(resource, &context)
            .map_err(|violations| ApiError::invalid("Could not compute labels for a resource", violations))
    }

    /// What depends on what is stored already.
    fn check_before_store(
        &self,
        resource: &Resource,
        current: Option<&Resource>,
        computed: &labels::Labels,
        title: &str,
    ) -> Result<(), ApiError> {
        let Some(current) = current else {
            let mut violations = Violations::new();
            (self.descriptor.codec.validate)(&resource.meta, &resource.spec, &mut violations);
            violations.0.retain(|violation| violation.field == "name");
            return refuse(title, violations);
        };
        let title = "Could not update a resource";
        refuse(title, resource.validate_update(current))?;
        refuse(title, labels::validate_immutable(&current.meta.labels, computed))
    }

    pub(super) async fn delete(self) -> Result<Response, ApiError> {
        self.writable()?;
        self.mesh_exists().await?;
        self.allowed()?;
        let failed = |error| ApiError::store(DELETE, &error);
        let key = self.key();
        let store = &self.state.control.store;
        let found = store.get(&key).await.map_err(failed)?;
        let found = found.ok_or_else(|| ApiError::not_found(DELETE, &key))?;
        let mut violations = Violations::new();
        labels::validate_origin(&found, &self.state.control.label_context(), &mut violations);
        for violation in &mut violations.0 {
            // Peers name the label alone here; clients know it so.
            violation.field = violation.field.trim_start_matches("labels").to_owned();
        }
        refuse(DELETE, violations)?;
        match self.descriptor.name {
            "Mesh" => self.mesh_is_unused().await?,
            "Zone" => self.zone_is_offline(&found).await?,
            _ => {}
        }
        store.delete(&key, None).await.map_err(failed)?;
        if self.descriptor.name == "Mesh" {
            crate::sweep::mesh(store, &self.name).await.map_err(failed)?;
        }
        if let Some((kind, ..)) = overview::insight_of(self.descriptor.name) {
            match store.delete(&ResourceKey { kind, ..key }, None).await {
                Ok(()) | Err(StoreError::NotFound(_)) => {}
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(respond::ok(&json!({})))
    }

    async fn mesh_is_unused(&self) -> Result<(), ApiError> {
        if self.state.control.config.store.unsafe_delete {
            return Ok(());
        }
        let attached = self.state.control.store.count("Dataplane", Some(&self.name)).await;
        if attached.map_err(|error| ApiError::store(DELETE, &error))? == 0 {
            return Ok(());
        }
        let reason = "unable to delete mesh, there are still some dataplanes attached";
        Err(ApiError::invalid(DELETE, Violations::one("mesh", reason)))
    }

    async fn zone_is_offline(&self, zone: &Resource) -> Result<(), ApiError> {
        let insight = self.insight(zone).await?;
        if !insight.is_some_and(|insight| overview::is_online(&insight)) {
            return Ok(());
        }
        let reason = "unable to delete Zone, Zone CP is still connected, please shut it down first";
        Err(ApiError::invalid(DELETE, Violations::one("zone", reason)))
    }
}

fn refuse(title: &str, violations: Violations) -> Result<(), ApiError> {
    if violations.is_empty() { Ok(()) } else { Err(ApiError::invalid(title, violations)) }
}

/// The status of a new resource. A workload's counts are there from the start, as zeros.
fn initial_status(descriptor: &Descriptor) -> Option<Value> {
    if descriptor.name == "Workload" {
        return Some(json!({ "dataplaneProxies": { "connected": 0, "healthy": 0, "total": 0 } }));
    }
    (descriptor.codec.initial_status)()
}

/// A service's state is found out by the control plane, although it lies in the spec: a write that
/// doesn't name it leaves it, and a new service has nobody behind it yet.
fn keep_state(next: &mut Resource, current: Option<&Resource>) {
    if next.descriptor.name != "MeshService" || next.spec.get("state").is_some_and(|state| !state.is_null()) {
        return;
    }
    let known = current.and_then(|current| current.spec.get("state").cloned());
    if let Some(spec) = next.spec.as_object_mut() {
        spec.insert("state".into(), known.unwrap_or_else(|| json!("Unavailable")));
    }
}

/// The answer to a write. What is unwise is in its body; what the peer never says (fields that don't
/// exist and were ignored, types that have no effect yet) is in headers, so that the body stays the
/// peer's.
fn accepted(status: StatusCode, mut resource: Resource) -> Response {
    let ignored = std::mem::take(&mut resource.ignored);
    let (pending, warnings): (Vec<_>, Vec<_>) =
        resource.warnings().into_iter().partition(|warning| warning.ends_with("does not act on it yet"));
    let body = if warnings.is_empty() { json!({}) } else { json!({ "warnings": warnings }) };
    let mut response = respond::json(status, &body);
    let kind = resource.descriptor.name;
    let ignored = ignored.into_iter().map(|field| format!("{field} is no field of {kind} and was ignored"));
    for warning in pending.into_iter().chain(ignored) {
        let text = format!("299 ursa \"{warning}\"");
        // A field's name may hold what no header can; then nothing can be said of it here.
        if let Ok(value) = HeaderValue::from_str(&text) {
            response.headers_mut().append(header::WARNING, value);
        }
    }
    response
}

/// The path parameters of a request, by name.
pub(super) type Parameters = HashMap<String, String>;
