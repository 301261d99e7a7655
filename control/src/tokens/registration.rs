//! Dataplane tokens at registration: whether a token vouches for a Dataplane.

use serde_json::Value;
use ursa_model::Resource;

use super::{TokenError, TokenKind, Tokens};

impl Tokens {
    /// Whether a token vouches for a Dataplane; its id. The error says what is wrong with it.
    pub async fn vouch_for(&self, token: &str, dataplane: &Resource) -> Result<String, String> {
        let meta = &dataplane.meta;
        let claims = self.verify_dataplane(&meta.mesh, token).await.map_err(|error| error.to_string())?;
        let identities =
            self.store.list("MeshIdentity", Some(&meta.mesh)).await.map_err(|error| error.to_string())?;
        let by_workload = identities.iter().any(|identity| path_from_workload(identity));
        claims.check(&meta.mesh, &meta.name, &meta.labels, by_workload)?;
        Ok(claims.registered.jti)
    }

    /// Whether a dataplane token that vouched once was revoked since.
    pub async fn was_revoked(&self, mesh: &str, id: &str) -> Result<bool, TokenError> {
        self.is_revoked(&TokenKind::Dataplane { mesh: mesh.to_owned() }, id).await
    }
}

/// Whether an identity's path names the workload, as the default path does.
fn path_from_workload(identity: &Resource) -> bool {
    match identity.spec.pointer("/spiffeID/path").and_then(Value::as_str) {
        None | Some("") => true,
        Some(template) => template.contains(".Workload") || template.contains("kuma.io/workload"),
    }
}
