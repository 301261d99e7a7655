//! MeshIdentities: their authority, their MeshTrust, their status.

use std::sync::Arc;

use ursa_model::types::mesh_identity::{Condition, MeshIdentity, MeshIdentityStatus};
use ursa_model::types::mesh_trust::{CaBundle, CaBundleType, MeshTrust, MeshTrustStatus, Origin, Pem};
use ursa_model::{Meta, Resource, ResourceKey, ResourceSpec as _};

use super::{Failure, Generators, Outcome};
use crate::identity::mesh_ca;
use crate::identity::naming::Selected;

const PROVIDER: &str = "ProviderAvailable";
const TRUST: &str = "MeshTrustCreated";

impl Generators {
    /// Makes what the identity needs, and says in its status how that went.
    pub(super) async fn identity(&self, key: &ResourceKey) -> Outcome {
        let Some(resource) = self.store.get(key).await? else { return Ok(None) };
        let Ok(spec) = resource.spec_as::<MeshIdentity>() else { return Ok(None) };
        let identity = Selected { resource: Arc::clone(&resource), spec };
        let mut conditions = Vec::new();
        match self.provide(&identity).await {
            Ok(certificate) => {
                let done = "Provider successfully initialized";
                conditions.push(condition(PROVIDER, true, "ProviderInitialized", done));
                if mesh_ca::wants_trust(&identity) {
                    conditions.push(match self.trust(&identity, &certificate).await? {
                        Ok(()) => condition(TRUST, true, TRUST, "MeshTrust has been successfully created"),
                        Err(why) => condition(TRUST, false, "MeshTrustCreationError", &why),
                    });
                }
            }
            Err(why) => {
                tracing::warn!("{key} is not ready: {why}");
                conditions.push(condition(PROVIDER, false, "ProviderInitializationError", &why));
            }
        }
        conditions.push(if conditions.iter().all(|condition| condition.status == "True") {
            condition("Ready", true, "Ready", "Successfully initialized")
        } else {
            condition("Ready", false, "Failure", "One of initialization steps failed")
        });
        let next = Resource::clone(&resource).with_status(&MeshIdentityStatus { conditions });
        if next.status != resource.status {
            self.store.update(next).await?;
        }
        Ok(None)
    }

    /// The authority's certificate.
    async fn provide(&self, identity: &Selected) -> Result<String, String> {
        identity.trust_domain(&self.zone)?;
        self.authorities.ensure(identity).await?;
        Ok(self.authorities.get(identity).await?.certificate_pem().to_owned())
    }

    /// Adds the authority to the identity's `MeshTrust`. A bundle is never taken away here: proxies may still
    /// hold leaves of the old authority.
    async fn trust(&self, identity: &Selected, certificate: &str) -> Result<Result<(), String>, Failure> {
        let meta = &identity.resource.meta;
        let domain = match identity.trust_domain(&self.zone) {
            Ok(domain) => domain.to_string(),
            Err(why) => return Ok(Err(why)),
        };
        let pem = Some(Pem { value: certificate.to_owned() });
        let bundle = CaBundle { bundle_type: CaBundleType::Pem, pem };
        let key = ResourceKey::new(MeshTrust::DESCRIPTOR, &meta.mesh, &meta.name);
        let Some(existing) = self.store.get(&key).await? else {
            let spec = MeshTrust { trust_domain: domain, ca_bundles: vec![bundle] };
            let status = MeshTrustStatus { origin: Some(Origin { kri: Some(identity.secret_name()) }) };
            let trust = Resource::new(Meta::new(&meta.mesh, &meta.name), &spec).with_status(&status);
            return if self.create(trust).await? { Ok(Ok(())) } else { Err(Failure::Conflict) };
        };
        let mut spec: MeshTrust = existing.spec_as().unwrap_or_default();
        if spec.trust_domain != domain {
            return Ok(Err(format!(
                "{key} is for the trust domain {:?}, not {domain:?}; rename it, or write the authority into it yourself and set `meshTrustCreation: Disabled`",
                spec.trust_domain
            )));
        }
        let mut known = spec.ca_bundles.iter().filter_map(|bundle| bundle.pem.as_ref());
        if !known.any(|pem| pem.value.trim() == certificate.trim()) {
            spec.ca_bundles.push(bundle);
            let spec = serde_json::to_value(&spec).unwrap_or_default();
            self.store.update(Resource { spec, ..Resource::clone(&existing) }).await?;
        }
        Ok(Ok(()))
    }
}

fn condition(kind: &str, holds: bool, reason: &str, message: &str) -> Condition {
    Condition {
        condition_type: kind.to_owned(),
        status: if holds { "True" } else { "False" }.to_owned(),
        reason: reason.to_owned(),
        message: message.to_owned(),
    }
}
