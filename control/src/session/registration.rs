//! Checking and storing what a node registers.

use std::sync::Arc;

use ursa_engine::ProxyKey;
use ursa_model::types::dataplane::Dataplane;
use ursa_model::types::mesh::Mesh;
use ursa_model::{Resource, ResourceKey, ResourceSpec as _, labels};
use ursa_wire::session::{Refused, Register};

use super::{Open, Sessions, Vouched};
use crate::store::StoreError;

/// How long an answer waits for the world to see the Dataplane.
const WORLD: std::time::Duration = std::time::Duration::from_secs(5);

fn refuse(mesh: &str, name: &str, permanent: bool, reason: impl Into<String>) -> Refused {
    Refused { mesh: mesh.to_owned(), name: name.to_owned(), reason: reason.into(), permanent }
}

impl Open {
    /// Registers a Dataplane: all checks first, then the store, and only then is it said to be there.
    pub(super) async fn register(&self, register: &Register) -> Result<ProxyKey, Refused> {
        let value: serde_json::Value = serde_json::from_str(&register.dataplane_json)
            .map_err(|error| refuse("", "", true, format!("the Dataplane is not JSON: {error}")))?;
        let text = |field: &str| value.get(field).and_then(serde_json::Value::as_str).unwrap_or_default();
        let (mesh, name) = (text("mesh").to_owned(), text("name").to_owned());
        let mut resource = Resource::from_json(&value)
            .map_err(|error| refuse(&mesh, &name, true, format!("the Dataplane can't be read: {error}")))?;
        if resource.descriptor != Dataplane::DESCRIPTOR {
            return Err(refuse(
                &mesh,
                &name,
                true,
                format!("a node registers Dataplanes, not {}", resource.descriptor.name),
            ));
        }
        let invalid =
            |what: String| refuse(&mesh, &name, true, format!("the Dataplane is not valid: {what}"));
        resource.meta.labels = labels::compute(&resource, &self.shared.labels)
            .map_err(|violations| invalid(violations.to_string()))?;
        let violations = resource.validate();
        if !violations.is_empty() {
            return Err(invalid(violations.to_string()));
        }
        if self.shared.world.get(&ResourceKey::new(Mesh::DESCRIPTOR, "", &mesh)).is_none() {
            return Err(refuse(
                &mesh,
                &name,
                false,
                format!("there is no mesh {mesh:?}; create it with `ursa apply`"),
            ));
        }
        let vouched = self.authorise(&resource, &register.token).await?;
        let proxy = ProxyKey { mesh: mesh.clone(), name: name.clone() };
        let before = self
            .shared
            .registry
            .claim(&proxy, &self.node.id, self.number, vouched)
            .map_err(|owner| {
                refuse(
                    &mesh,
                    &name,
                    false,
                    format!("node {owner} has registered a Dataplane of this name and is connected; give this one another name"),
                )
            })?;
        let stored = match self.shared.store_dataplane(resource).await {
            Ok(stored) => stored,
            Err(error) => {
                let withdraw = || self.shared.withdraw(&proxy, "its registration failed");
                self.shared.registry.unclaim(&proxy, self.number, before, withdraw);
                return Err(refuse(
                    &mesh,
                    &name,
                    false,
                    format!("the Dataplane could not be stored: {error}"),
                ));
            }
        };
        // The node asks for identity and configuration as soon as it has its answer, so the world must know
        // by then; if somebody removed the Dataplane meanwhile, the node learns that from those answers.
        let _ = tokio::time::timeout(WORLD, self.shared.world.seen(&stored)).await;
        tracing::info!(node = self.node.id, mesh, dataplane = name, "registered");
        self.shared.world.set_liveness(&proxy, true);
        self.shared.insights.online(&proxy);
        Ok(proxy)
    }

    /// The node's grant, or a token, must cover the workload; a token that is shown must be right in any case, so
    /// that a wrong one is noticed while it does no harm. What stands in the way of a name that exists already must
    /// be covered too, or a node could push another's Dataplane aside.
    async fn authorise(&self, resource: &Resource, token: &str) -> Result<Option<Vouched>, Refused> {
        let (mesh, name) = (&resource.meta.mesh, &resource.meta.name);
        let workload = resource.meta.label(labels::WORKLOAD);
        let grant = &self.node.grant;
        let new_token = format!(
            "make one with `ursa generate dataplane-token --mesh {mesh} --workload {} --valid-for 720h` and put it into the workload's `dataplaneTokenFile`",
            workload.unwrap_or("…"),
        );
        let vouched = if token.is_empty() {
            if self.shared.token_required {
                return Err(refuse(
                    mesh,
                    name,
                    true,
                    format!(
                        "this control plane requires a dataplane token (dpServer.authn.dpProxy.type) and none was shown; {new_token}"
                    ),
                ));
            }
            if !grant.covers(mesh, workload) {
                return Err(refuse(
                    mesh,
                    name,
                    true,
                    format!(
                        "workload {:?} in mesh {mesh:?} is not granted to this node, which was granted {}; join with a ticket for it (`ursa ticket create --mesh {mesh} --workload …`), or show a dataplane token",
                        workload.unwrap_or("(label kuma.io/workload is missing)"),
                        crate::identity::describe_grant(grant),
                    ),
                ));
            }
            None
        } else {
            let id = self.shared.tokens.vouch_for(token, resource).await.map_err(|why| {
                refuse(mesh, name, true, format!("the dataplane token is refused: {why}; {new_token}"))
            })?;
            Some(Vouched { workload: workload.map(str::to_owned), token: id })
        };
        let key = ResourceKey::new(Dataplane::DESCRIPTOR, mesh, name);
        if let Some(existing) = self.shared.world.get(&key) {
            let theirs = existing.meta.label(labels::WORKLOAD);
            if theirs != workload && theirs.is_some() && !grant.covers(mesh, theirs) {
                return Err(refuse(
                    mesh,
                    name,
                    true,
                    format!(
                        "a Dataplane of this name exists and belongs to workload {:?}, which is not granted to this node; give this one another name",
                        theirs.unwrap_or_default()
                    ),
                ));
            }
        }
        Ok(vouched)
    }
}

impl Sessions {
    async fn store_dataplane(&self, resource: Resource) -> Result<Arc<Resource>, StoreError> {
        loop {
            let key = resource.key();
            let result = match self.store.get(&key).await? {
                Some(current)
                    if current.spec == resource.spec && current.meta.labels == resource.meta.labels =>
                {
                    return Ok(current);
                }
                Some(current) => {
                    let mut next = resource.clone();
                    next.meta.version = current.meta.version;
                    self.store.update(next).await
                }
                None => self.store.create(resource.clone()).await,
            };
            match result {
                Err(error) if error.is_conflict() || matches!(error, StoreError::NotFound(_)) => {}
                other => return other,
            }
        }
    }

    /// Removes a Dataplane for good.
    pub(super) async fn remove_dataplane(&self, proxy: &ProxyKey) -> Result<(), StoreError> {
        let key = ResourceKey::new(Dataplane::DESCRIPTOR, &proxy.mesh, &proxy.name);
        match self.store.delete(&key, None).await {
            Err(StoreError::NotFound(_)) => Ok(()),
            other => other,
        }
    }
}
