//! The authority of a `MeshIdentity`: where its certificate and key lie, and how they come to be.
//!
//! The Secrets have the names and forms that Kuma gives them; the key is ECDSA P-256 where Kuma makes RSA, since
//! signing with it is several times cheaper and any peer of a mesh verifies it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use time::OffsetDateTime;
use ursa_model::types::mesh_identity::{Bundled, ProviderType};
use ursa_model::types::secret::Secret;
use ursa_model::{Meta, Resource, ResourceKey, ResourceSpec as _, labels};

use super::ca::Authority;
use super::naming::Selected;
use crate::store::Store;

/// The two Secrets of an authority.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    /// The root certificate.
    pub certificate: ResourceKey,
    /// Its key.
    pub key: ResourceKey,
}

/// Where the authority of an identity lies, or why there is none that this control plane can use.
pub fn places(identity: &Selected) -> Result<Places, String> {
    let bundled = bundled(identity)?;
    let meta = &identity.resource.meta;
    let secret = |name: String| ResourceKey { kind: Secret::DESCRIPTOR.name, mesh: meta.mesh.clone(), name };
    if autogenerates(bundled) {
        return Ok(Places {
            certificate: secret(format!("{}-root-ca", meta.name)),
            key: secret(format!("{}-private-key", meta.name)),
        });
    }
    let ca = bundled
        .ca
        .as_ref()
        .ok_or("the Bundled provider has neither `autogenerate` nor `ca`; enable one of them")?;
    let named = |source: Option<&ursa_model::policy::DataSource>, what: &str| {
        source
            .and_then(|source| source.secret_ref.as_ref())
            .map(|reference| secret(reference.name.clone()))
            .ok_or_else(|| format!("`ca.{what}` is not a Secret; other sources are not supported yet: put it into a Secret and refer to it by `secretRef`"))
    };
    Ok(Places {
        certificate: named(ca.certificate.as_ref(), "certificate")?,
        key: named(ca.private_key.as_ref(), "privateKey")?,
    })
}

fn bundled(identity: &Selected) -> Result<&Bundled, String> {
    let provider = identity.spec.provider.as_ref().ok_or("the identity has no provider")?;
    if provider.provider_type != ProviderType::Bundled {
        return Err(format!(
            "the provider {:?} is not supported yet; use Bundled",
            provider.provider_type.as_str()
        ));
    }
    provider.bundled.as_ref().ok_or_else(|| "the provider Bundled has no body `bundled`".to_owned())
}

/// Whether control makes the authority itself.
fn autogenerates(bundled: &Bundled) -> bool {
    bundled.autogenerate.as_ref().is_some_and(|auto| auto.enabled == Some(true))
}

/// Whether a `MeshTrust` is to be kept for the identity.
pub fn wants_trust(identity: &Selected) -> bool {
    use ursa_model::types::mesh_identity::MeshTrustCreation;
    bundled(identity).is_ok_and(|bundled| bundled.mesh_trust_creation != Some(MeshTrustCreation::Disabled))
}

/// The lifetime of the identity's leaves.
pub fn leaf_lifetime(identity: &Selected) -> time::Duration {
    bundled(identity)
        .ok()
        .and_then(|bundled| bundled.certificate_parameters.as_ref()?.expiry)
        .and_then(|expiry| time::Duration::try_from(expiry.to_std()).ok())
        .filter(|lifetime| lifetime.is_positive())
        .unwrap_or(super::workload::LEAF_LIFETIME)
}

/// Authorities that were loaded, by the versions of their Secrets.
#[derive(Debug)]
pub struct MeshAuthorities {
    store: Store,
    zone: String,
    loaded: Mutex<HashMap<ResourceKey, Loaded>>,
}

#[derive(Debug)]
struct Loaded {
    versions: (u64, u64),
    authority: Arc<Authority>,
}

impl MeshAuthorities {
    /// None loaded yet.
    pub fn new(store: Store, zone: &str) -> Self {
        Self { store, zone: zone.to_owned(), loaded: Mutex::default() }
    }

    /// The authority of an identity. The error says what is missing.
    pub async fn get(&self, identity: &Selected) -> Result<Arc<Authority>, String> {
        let places = places(identity)?;
        let certificate = self.secret(&places.certificate).await?;
        let key = self.secret(&places.key).await?;
        let (Some(certificate), Some(key)) = (certificate, key) else {
            return Err(format!("{} or {} does not exist; write both", places.certificate, places.key));
        };
        let versions = (certificate.meta.version, key.meta.version);
        {
            let loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(known) = loaded.get(&places.certificate)
                && known.versions == versions
            {
                return Ok(Arc::clone(&known.authority));
            }
        }
        let authority = Authority::from_pem(&text_of(&certificate)?, &text_of(&key)?)
            .map_err(|error| format!("{} with {}: {error}", places.certificate, places.key))?;
        let authority = Arc::new(authority);
        self.loaded
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(places.certificate, Loaded { versions, authority: Arc::clone(&authority) });
        Ok(authority)
    }

    /// Makes the authority of an identity that wants it made and has none. The key is written first: a
    /// control plane that ends in between finds no certificate, and makes both anew.
    pub async fn ensure(&self, identity: &Selected) -> Result<(), String> {
        if !autogenerates(bundled(identity)?) {
            return Ok(());
        }
        let places = places(identity)?;
        if self.secret(&places.certificate).await?.is_some() {
            return Ok(());
        }
        let domain = identity.trust_domain(&self.zone)?;
        let authority = Authority::generate("Mesh", domain.as_str(), &domain.id(), OffsetDateTime::now_utc())
            .map_err(|error| error.to_string())?;
        if let Some(orphan) = self.secret(&places.key).await? {
            self.store
                .delete(&places.key, Some(orphan.meta.version))
                .await
                .map_err(|error| error.to_string())?;
        }
        self.put(&places.key, authority.key_pem()).await?;
        self.put(&places.certificate, authority.certificate_pem()).await?;
        tracing::info!(
            identity = %identity.resource.key(),
            trust_domain = %domain,
            fingerprint = authority.fingerprint(),
            "made a mesh CA"
        );
        Ok(())
    }

    async fn secret(&self, key: &ResourceKey) -> Result<Option<Arc<Resource>>, String> {
        self.store.get(key).await.map_err(|error| error.to_string())
    }

    async fn put(&self, key: &ResourceKey, text: &str) -> Result<(), String> {
        let mut meta = Meta::new(&key.mesh, &key.name);
        meta.labels.insert(labels::MESH.into(), key.mesh.clone());
        meta.labels.insert(labels::DISPLAY_NAME.into(), key.name.clone());
        let secret = Secret { data: STANDARD.encode(text) };
        self.store.create(Resource::new(meta, &secret)).await.map(|_| ()).map_err(|error| error.to_string())
    }
}

fn text_of(resource: &Resource) -> Result<String, String> {
    let broken = |why: String| format!("{} holds no PEM text: {why}", resource.key());
    let secret: Secret = resource.spec_as().map_err(|error| broken(error.to_string()))?;
    let bytes = STANDARD.decode(secret.data.trim()).map_err(|error| broken(error.to_string()))?;
    String::from_utf8(bytes).map_err(|error| broken(error.to_string()))
}
