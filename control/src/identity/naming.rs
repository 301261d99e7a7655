//! Which `MeshIdentity` a Dataplane has in the world as it is, and which SPIFFE id follows from it.

use std::sync::Arc;

use ursa_model::types::mesh_identity::MeshIdentity;
use ursa_model::{Resource, ResourceSpec as _, identity, spiffe};

use crate::world::Index;

/// A `MeshIdentity` with its spec.
#[derive(Debug, Clone)]
pub struct Selected {
    /// The resource.
    pub resource: Arc<Resource>,
    /// Its spec.
    pub spec: MeshIdentity,
}

/// The identity that selects a Dataplane.
pub fn select(index: &Index, dataplane: &Resource) -> Option<Selected> {
    let identities: Vec<Selected> = index
        .list(MeshIdentity::DESCRIPTOR.name, &dataplane.meta.mesh)
        .filter_map(|resource| {
            Some(Selected { resource: Arc::clone(resource), spec: resource.spec_as().ok()? })
        })
        .collect();
    let candidates = identities.iter().map(|identity| (&identity.resource.meta, &identity.spec));
    let name = identity::select(candidates, &dataplane.meta.labels)?.0.name.clone();
    identities.into_iter().find(|identity| identity.resource.meta.name == name)
}

impl Selected {
    /// The name under which proxies ask for the certificate.
    pub fn secret_name(&self) -> String {
        self.resource.kri(None).to_string()
    }

    /// The trust domain that the identity vouches for in this zone.
    pub fn trust_domain(&self, zone: &str) -> Result<spiffe::TrustDomain, String> {
        identity::trust_domain(&self.spec, &self.resource.meta.mesh, zone).map_err(|error| error.to_string())
    }

    /// The SPIFFE id of a Dataplane.
    pub fn spiffe_id(&self, dataplane: &Resource, zone: &str) -> Result<spiffe::SpiffeId, String> {
        let meta = &dataplane.meta;
        identity::spiffe_id(&self.spec, &meta.mesh, &meta.labels, zone).map_err(|error| error.to_string())
    }

    /// Whether control has said that it is ready to issue.
    pub fn is_ready(&self) -> bool {
        self.resource.status_as::<MeshIdentity>().is_ok_and(|status| identity::is_ready(&status))
    }
}
