//! What a zone and a new mesh have from the start.

use serde_json::json;
use ursa_model::types::hostname_generator::{HostnameGenerator, Selector};
use ursa_model::types::mesh::Mesh;
use ursa_model::types::mesh_identity::{
    Autogenerate, Bundled, MeshIdentity, Provider, ProviderType, Selector as IdentitySelector,
};
use ursa_model::types::mesh_timeout::MeshTimeout;
use ursa_model::types::zone::Zone;
use ursa_model::{GoDuration, Meta, Resource, ResourceKey, ResourceSpec as _, labels, policy};

use super::{Generators, Outcome, RETRY};
use crate::store::{Store, StoreError};
use crate::sweep;
use crate::tokens::{TokenError, TokenKind, Tokens};

/// Meshes that have received their defaults: what somebody removes afterwards stays removed.
const BUCKET: &str = "mesh-defaults";
const ZONE_BUCKET: &str = "zone-defaults";
/// Meshes that have received their first signing key. One that an operator removes stays removed.
const KEYS_BUCKET: &str = "mesh-signing-keys";

impl Generators {
    /// The mesh `default`, the Zone, and HostnameGenerators: once in the life of a store, before anybody is served,
    /// who would look for them.
    pub(crate) async fn zone_defaults(&self) {
        if let Err(error) = self.try_zone_defaults().await {
            tracing::error!(
                "can't make the zone's defaults: {error}; they are tried again at the next start"
            );
        }
    }

    async fn try_zone_defaults(&self) -> Result<(), StoreError> {
        if self.store.private(ZONE_BUCKET, &self.zone).await?.is_some() {
            return Ok(());
        }
        self.create(Resource::new(Meta::new("", &self.zone), &Zone::default())).await?;
        if !self.skip_hostname_generators {
            let services = Selector { mesh_service: Some(local()), ..Selector::default() };
            let external = Selector { mesh_external_service: Some(local()), ..Selector::default() };
            for (name, selector, suffix) in [
                ("local-universal-mesh-service", services, "svc"),
                ("local-mesh-external-service", external, "extsvc"),
            ] {
                let template = format!("{{{{ .DisplayName }}}}.{suffix}.mesh.local");
                let spec = HostnameGenerator { selector, template, ..HostnameGenerator::default() };
                self.create(Resource::new(Meta::new("", name), &spec)).await?;
            }
        }
        if !self.skip_mesh {
            self.create(Resource::new(Meta::new("", "default"), &Mesh::default())).await?;
        }
        self.store.put_private(ZONE_BUCKET, &self.zone, Vec::new(), None).await?;
        Ok(())
    }

    /// A mesh that is new gets its defaults; of one that is gone everything goes.
    pub(super) async fn mesh(&self, name: &str) -> Outcome {
        let key = ResourceKey::new(Mesh::DESCRIPTOR, "", name);
        let Some(resource) = self.store.get(&key).await? else {
            return self.forget_mesh(name).await;
        };
        if self.store.private(KEYS_BUCKET, name).await?.is_none() {
            self.make_signing_key(name);
        }
        if self.store.private(BUCKET, name).await?.is_some() {
            return Ok(None);
        }
        let mesh: Mesh = resource.spec_as().unwrap_or_default();
        let skipped = |policy: &str| {
            mesh.skip_creating_initial_policies.iter().any(|skip| skip == "*" || skip == policy)
        };
        self.create(Resource::new(Meta::new(name, "identity"), &everybodys_identity())).await?;
        for (policy, spec) in [
            (format!("mesh-timeout-all-{name}"), inbound_timeouts()),
            (format!("mesh-timeout-to-all-{name}"), outbound_timeouts()),
        ] {
            if !skipped(&policy) {
                self.create(Resource::new(Meta::new(name, policy), &spec)).await?;
            }
        }
        self.store.put_private(BUCKET, name, Vec::new(), None).await?;
        Ok(None)
    }

    /// Generating an RSA key takes a while, and nobody waits for this one. It is tried until it is there: again
    /// after an error, and by the next process if this one dies meanwhile.
    fn make_signing_key(&self, mesh: &str) {
        let (store, tokens, mesh) = (self.store.clone(), self.tokens.clone(), mesh.to_owned());
        tokio::spawn(async move {
            loop {
                match ensure_signing_key(&store, &tokens, &mesh).await {
                    Ok(()) | Err(TokenError::Store(StoreError::Closed)) => return,
                    Err(error) => tracing::error!(
                        "can't make the dataplane token signing key of mesh {mesh:?}: {error}; trying again in {RETRY:?}"
                    ),
                }
                tokio::time::sleep(RETRY).await;
            }
        });
    }

    async fn forget_mesh(&self, name: &str) -> Outcome {
        sweep::mesh(&self.store, name).await?;
        self.store.delete_private(BUCKET, name).await?;
        self.store.delete_private(KEYS_BUCKET, name).await?;
        Ok(None)
    }
}

async fn ensure_signing_key(store: &Store, tokens: &Tokens, mesh: &str) -> Result<(), TokenError> {
    // The mesh may have gone since.
    if store.get(&ResourceKey::new(Mesh::DESCRIPTOR, "", mesh)).await?.is_none() {
        return Ok(());
    }
    tokens.ensure_signing_key(&TokenKind::Dataplane { mesh: mesh.to_owned() }).await?;
    match store.put_private(KEYS_BUCKET, mesh, Vec::new(), None).await {
        // Two of these may run for one mesh.
        Err(StoreError::Exists(_) | StoreError::Conflict(_)) => Ok(()),
        other => Ok(other.map(drop)?),
    }
}

fn local() -> policy::LabelSelector {
    policy::LabelSelector { match_labels: [(labels::ORIGIN.to_owned(), "zone".to_owned())].into() }
}

/// One identity for every Dataplane: a mesh is encrypted from its first moment.
fn everybodys_identity() -> MeshIdentity {
    let bundled = Bundled {
        insecure_allow_self_signed: Some(true),
        autogenerate: Some(Autogenerate { enabled: Some(true) }),
        ..Bundled::default()
    };
    MeshIdentity {
        selector: Some(IdentitySelector { dataplane: Some(policy::LabelSelector::default()) }),
        spiffe_id: None,
        provider: Some(Provider {
            provider_type: ProviderType::Bundled,
            bundled: Some(bundled),
            ..Provider::default()
        }),
    }
}

/// What goes out: a request has an end.
fn outbound_timeouts() -> MeshTimeout {
    timeouts(json!({
        "targetRef": {"kind": "Mesh"},
        "to": [{"targetRef": {"kind": "Mesh"}, "default": {
            "connectionTimeout": seconds(5),
            "idleTimeout": seconds(3600),
            "http": {"requestTimeout": seconds(15), "streamIdleTimeout": seconds(1800)},
        }}],
    }))
}

/// What comes in: longer than what goes out, so that the client's side decides.
fn inbound_timeouts() -> MeshTimeout {
    timeouts(json!({
        "targetRef": {"kind": "Mesh"},
        "rules": [{"default": {
            "connectionTimeout": seconds(10),
            "idleTimeout": seconds(7200),
            "http": {
                "requestTimeout": seconds(0),
                "streamIdleTimeout": seconds(3600),
                "maxStreamDuration": seconds(0),
            },
        }}],
    }))
}

fn seconds(count: i64) -> GoDuration {
    GoDuration::from_secs(count)
}

fn timeouts(spec: serde_json::Value) -> MeshTimeout {
    serde_json::from_value(spec).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid() {
        for resource in [
            Resource::new(Meta::new("default", "identity"), &everybodys_identity()),
            Resource::new(Meta::new("default", "in"), &inbound_timeouts()),
            Resource::new(Meta::new("default", "out"), &outbound_timeouts()),
        ] {
            let violations = resource.validate();
            assert!(violations.is_empty(), "{}: {violations}", resource.key());
            assert_ne!(resource.spec, json!({}), "{}", resource.key());
        }
    }
}
