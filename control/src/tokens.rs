//! Signing keys, and dataplane, zone and user tokens: RS256 JWTs whose keys lie in secrets.
//!
//! The secret `<prefix>-<n>` holds the key with serial `n`, which is the `kid` of the tokens it signs;
//! the highest serial signs, each that exists verifies. Rotation is creating `n+1`, and later deleting
//! `n`. A token is revoked by its `jti` in a revocation secret.

mod claims;
mod keys;
mod registration;

#[cfg(test)]
mod tests;

use std::{collections::BTreeSet, fmt, sync::Arc};

use base64::{
    Engine as _,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use jsonwebtoken::{Algorithm, Header, Validation};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use time::{Duration, OffsetDateTime};
use ursa_model::{Meta, Resource, ResourceKey};

pub use claims::{DataplaneClaims, Registered, UserClaims, ZoneClaims};

use crate::{
    config::{self, Config},
    store::{Store, StoreError},
};

/// How long a token without `validFor` is valid.
pub const DEFAULT_VALIDITY: Duration = Duration::days(3650);
/// Tokens are valid a little earlier than they were issued, for clocks that are behind.
const SKEW: Duration = Duration::seconds(5);

/// What a token is for, which says where its keys are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenKind {
    /// Registers a Dataplane of a mesh.
    Dataplane {
        /// The mesh.
        mesh: String,
    },
    /// Connects a zone.
    Zone,
    /// Calls the API.
    User,
}

impl TokenKind {
    fn prefix(&self) -> String {
        match self {
            Self::Dataplane { mesh } => format!("dataplane-token-signing-key-{mesh}"),
            Self::Zone => "zone-token-signing-key".into(),
            Self::User => "user-token-signing-key".into(),
        }
    }

    fn secret_kind(&self) -> &'static str {
        if matches!(self, Self::Dataplane { .. }) { "Secret" } else { "GlobalSecret" }
    }

    fn mesh(&self) -> &str {
        if let Self::Dataplane { mesh } = self { mesh } else { "" }
    }

    /// The secret with the key of a serial number; 0 has no suffix.
    fn key(&self, serial: u32) -> ResourceKey {
        let prefix = self.prefix();
        let name = if serial == 0 { prefix } else { format!("{prefix}-{serial}") };
        ResourceKey { kind: self.secret_kind(), mesh: self.mesh().to_owned(), name }
    }

    /// The secrets that may list revoked tokens. For dataplane tokens Kuma documents the mesh's own
    /// secret and reads a global one: both count.
    fn revocations(&self) -> Vec<ResourceKey> {
        let global = |name: String| ResourceKey { kind: "GlobalSecret", mesh: String::new(), name };
        match self {
            Self::Dataplane { mesh } => {
                let name = format!("dataplane-token-revocations-{mesh}");
                vec![
                    ResourceKey { kind: "Secret", mesh: mesh.clone(), name: name.clone() },
                    global(name),
                    global("dataplane-token-revocations-".into()),
                ]
            }
            Self::Zone => vec![global("zone-token-revocations".into())],
            Self::User => vec![global("user-token-revocations".into())],
        }
    }
}

/// Why there is no token, or why one isn't accepted.
#[derive(Debug, Clone, thiserror::Error)]
pub enum TokenError {
    /// No key to sign with.
    #[error(
        "there is no signing key in {kind} {name:?}; one is made with `ursa generate signing-key` and applied as the data of that secret"
    )]
    NoSigningKey {
        /// Secret or GlobalSecret.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// What is in the secret is no key.
    #[error("the signing key in {0} can't be used: {1}")]
    BadKey(String, String),
    /// The token is refused.
    #[error("{0}")]
    Refused(String),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Tells the time; tests move it.
pub type Clock = Arc<dyn Fn() -> OffsetDateTime + Send + Sync>;

/// Issues and checks tokens.
#[derive(Clone)]
pub struct Tokens {
    store: Store,
    config: Arc<Config>,
    clock: Clock,
}

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tokens").finish_non_exhaustive()
    }
}

impl Tokens {
    /// Tokens by the machine's clock.
    pub fn new(store: Store, config: Arc<Config>) -> Self {
        Self { store, config, clock: Arc::new(OffsetDateTime::now_utc) }
    }

    /// Tokens by another clock.
    #[must_use]
    pub fn with_clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// Makes the first signing key if there is none at all.
    pub async fn ensure_signing_key(&self, kind: &TokenKind) -> Result<(), TokenError> {
        if self.serials(kind).await?.is_empty() { self.create_signing_key(kind, 1).await } else { Ok(()) }
    }

    /// Makes a signing key with this serial number; nothing happens if it exists.
    pub async fn create_signing_key(&self, kind: &TokenKind, serial: u32) -> Result<(), TokenError> {
        let pem = keys::generate().await.map_err(|reason| TokenError::BadKey("memory".into(), reason))?;
        self.create_secret(&kind.key(serial), pem.as_bytes()).await
    }

    /// Removes a signing key; its tokens are refused from now on.
    pub async fn delete_signing_key(&self, kind: &TokenKind, serial: u32) -> Result<(), TokenError> {
        Ok(self.store.delete(&kind.key(serial), None).await?)
    }

    /// The public half of the newest signing key, in PEM, for validators elsewhere.
    pub async fn public_key(&self, kind: &TokenKind) -> Result<String, TokenError> {
        let missing = || TokenError::NoSigningKey { kind: kind.secret_kind(), name: kind.key(1).name };
        let serial = self.serials(kind).await?.pop_last().ok_or_else(missing)?;
        let secret = self.secret(&kind.key(serial)).await?.ok_or_else(missing)?;
        keys::public_pem(&secret).map_err(|reason| bad_key(kind, serial, reason))
    }

    /// Makes the GlobalSecret `admin-user-token` if it is absent.
    pub async fn bootstrap_admin_token(&self) -> Result<(), TokenError> {
        let key = ResourceKey { kind: "GlobalSecret", mesh: String::new(), name: "admin-user-token".into() };
        if self.store.get(&key).await?.is_some() {
            return Ok(());
        }
        let admin = crate::access::ADMIN;
        let token = self.user_token(admin, &[admin.to_owned()], DEFAULT_VALIDITY).await?;
        self.create_secret(&key, token.as_bytes()).await
    }

    /// A token for a user.
    pub async fn user_token(
        &self,
        name: &str,
        groups: &[String],
        valid_for: Duration,
    ) -> Result<String, TokenError> {
        let registered = self.registered(valid_for);
        self.sign(&TokenKind::User, &UserClaims { name: name.into(), groups: groups.to_vec(), registered })
            .await
    }

    /// A token for a zone.
    pub async fn zone_token(
        &self,
        zone: &str,
        scope: &[String],
        valid_for: Duration,
    ) -> Result<String, TokenError> {
        let registered = self.registered(valid_for);
        self.sign(&TokenKind::Zone, &ZoneClaims { zone: zone.into(), scope: scope.to_vec(), registered })
            .await
    }

    /// A token for dataplanes; its times and id are set here.
    pub async fn dataplane_token(
        &self,
        mut claims: DataplaneClaims,
        valid_for: Duration,
    ) -> Result<String, TokenError> {
        claims.registered = self.registered(valid_for);
        let kind = TokenKind::Dataplane { mesh: claims.mesh.clone() };
        self.sign(&kind, &claims).await
    }

    /// Checks a user's token.
    pub async fn verify_user(&self, token: &str) -> Result<UserClaims, TokenError> {
        let config = self.config.clone();
        self.verify(&TokenKind::User, token, &config.api_server.authn.tokens.validator).await
    }

    /// Checks a zone's token.
    pub async fn verify_zone(&self, token: &str) -> Result<ZoneClaims, TokenError> {
        self.verify(&TokenKind::Zone, token, &config::Validator::default()).await
    }

    /// Checks the token of a dataplane in a mesh. Whether its claims fit the dataplane is
    /// [`DataplaneClaims::check`].
    pub async fn verify_dataplane(&self, mesh: &str, token: &str) -> Result<DataplaneClaims, TokenError> {
        let config = self.config.clone();
        let kind = TokenKind::Dataplane { mesh: mesh.to_owned() };
        self.verify(&kind, token, &config.dp_server.authn.dp_proxy.dp_token.validator).await
    }

    fn registered(&self, valid_for: Duration) -> Registered {
        let now = (self.clock)();
        let early = (now - SKEW).unix_timestamp();
        Registered {
            jti: uuid::Uuid::new_v4().to_string(),
            iat: early,
            nbf: early,
            exp: (now + valid_for).unix_timestamp(),
        }
    }

    async fn sign(&self, kind: &TokenKind, claims: &(impl Serialize + Sync)) -> Result<String, TokenError> {
        let missing = || TokenError::NoSigningKey { kind: kind.secret_kind(), name: kind.key(1).name };
        let serial = self.serials(kind).await?.pop_last().ok_or_else(missing)?;
        let secret = self.secret(&kind.key(serial)).await?.ok_or_else(missing)?;
        let key = keys::signing(&secret).map_err(|reason| bad_key(kind, serial, reason))?;
        let header = Header { kid: Some(serial.to_string()), ..Header::new(Algorithm::RS256) };
        jsonwebtoken::encode(&header, claims, &key).map_err(|error| bad_key(kind, serial, error.to_string()))
    }

    async fn verify<C: DeserializeOwned>(
        &self,
        kind: &TokenKind,
        token: &str,
        validator: &config::Validator,
    ) -> Result<C, TokenError> {
        let refused = |reason: String| TokenError::Refused(reason);
        let kid = kid(token).map_err(refused)?;
        let key = match Self::static_key(kind, &kid, validator)? {
            Some(key) => key,
            None => self.stored_key(kind, &kid, validator).await?,
        };
        let mut validation = Validation::new(Algorithm::RS256);
        // Times are judged below, by our clock and in our words.
        validation.validate_exp = false;
        validation.validate_nbf = false;
        validation.validate_aud = false;
        validation.required_spec_claims.clear();
        let data = jsonwebtoken::decode::<Value>(token, &key, &validation)
            .map_err(|error| refused(format!("could not parse token: {error}")))?;
        let registered: Registered = serde_json::from_value(data.claims.clone())
            .map_err(|error| refused(format!("could not parse token: {error}")))?;
        let now = (self.clock)().unix_timestamp();
        if registered.nbf > now {
            return Err(refused("token is not yet valid: 'valid_from' date is in the future".into()));
        }
        if registered.exp <= now {
            return Err(refused("token is expired; ask for a new one".into()));
        }
        if self.is_revoked(kind, &registered.jti).await? {
            return Err(refused("token is revoked".into()));
        }
        serde_json::from_value(data.claims)
            .map_err(|error| refused(format!("could not parse token: {error}")))
    }

    fn static_key(
        kind: &TokenKind,
        kid: &str,
        validator: &config::Validator,
    ) -> Result<Option<jsonwebtoken::DecodingKey>, TokenError> {
        let fits =
            |key: &&config::PublicKey| key.kid == kid && (key.mesh.is_empty() || key.mesh == kind.mesh());
        let Some(found) = validator.public_keys.iter().find(fits) else { return Ok(None) };
        let bad = |reason: String| TokenError::BadKey(format!("the validator's public key {kid:?}"), reason);
        let pem = if found.key.is_empty() {
            std::fs::read(&found.key_file).map_err(|error| bad(format!("{}: {error}", found.key_file)))?
        } else {
            found.key.clone().into_bytes()
        };
        jsonwebtoken::DecodingKey::from_rsa_pem(&pem).map(Some).map_err(|error| bad(error.to_string()))
    }

    async fn stored_key(
        &self,
        kind: &TokenKind,
        kid: &str,
        validator: &config::Validator,
    ) -> Result<jsonwebtoken::DecodingKey, TokenError> {
        let unknown = || {
            TokenError::Refused(format!(
                "could not parse token: there is no signing key with id {kid:?} in {:?}; it was removed, or the token comes from another control plane",
                kind.prefix()
            ))
        };
        if !validator.use_secrets {
            return Err(unknown());
        }
        let serial: u32 = kid.parse().map_err(|_| unknown())?;
        let secret = self.secret(&kind.key(serial)).await?.ok_or_else(unknown)?;
        keys::verifying(&secret).map_err(|reason| bad_key(kind, serial, reason))
    }

    async fn is_revoked(&self, kind: &TokenKind, jti: &str) -> Result<bool, TokenError> {
        for key in kind.revocations() {
            if let Some(list) = self.secret(&key).await? {
                let list = String::from_utf8_lossy(&list);
                if list.split(',').any(|revoked| revoked.trim() == jti) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// The serial numbers of the keys that exist.
    async fn serials(&self, kind: &TokenKind) -> Result<BTreeSet<u32>, TokenError> {
        let prefix = kind.prefix();
        let mesh = Some(kind.mesh()).filter(|mesh| !mesh.is_empty());
        let secrets = self.store.list(kind.secret_kind(), mesh).await?;
        let serial = |name: &str| match name.strip_prefix(&prefix)? {
            "" => Some(0),
            rest => rest.strip_prefix('-')?.parse().ok(),
        };
        Ok(secrets.iter().filter_map(|secret| serial(&secret.meta.name)).collect())
    }

    async fn secret(&self, key: &ResourceKey) -> Result<Option<Vec<u8>>, TokenError> {
        let Some(secret) = self.store.get(key).await? else { return Ok(None) };
        let data = secret.spec.get("data").and_then(Value::as_str).unwrap_or_default();
        let decoded = STANDARD
            .decode(data)
            .map_err(|error| TokenError::BadKey(format!("{} {:?}", key.kind, key.name), error.to_string()))?;
        Ok(Some(decoded))
    }

    async fn create_secret(&self, key: &ResourceKey, data: &[u8]) -> Result<(), TokenError> {
        let Some(descriptor) = ursa_model::by_name(key.kind) else { return Ok(()) };
        let resource = Resource {
            descriptor,
            meta: Meta::new(key.mesh.clone(), key.name.clone()),
            spec: json!({ "data": STANDARD.encode(data) }),
            status: None,
            ignored: Vec::new(),
        };
        match self.store.create(resource).await {
            Ok(_) | Err(StoreError::Exists(_)) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

fn bad_key(kind: &TokenKind, serial: u32, reason: String) -> TokenError {
    TokenError::BadKey(format!("{} {:?}", kind.secret_kind(), kind.key(serial).name), reason)
}

/// The id of the key that signed a token.
fn kid(token: &str) -> Result<String, String> {
    let header = token.split('.').next().unwrap_or_default();
    let header = URL_SAFE_NO_PAD.decode(header).map_err(|error| format!("could not parse token: {error}"))?;
    let header: Value =
        serde_json::from_slice(&header).map_err(|error| format!("could not parse token: {error}"))?;
    match header.get("kid") {
        Some(Value::String(kid)) => Ok(kid.clone()),
        None => Ok("0".into()),
        Some(_) => Err("could not parse token: JWT token kid header must be a string".into()),
    }
}
