//! Whether a dataplane token whose signature holds may speak for a Dataplane.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{form::null_as_absent, labels, meta::Meta};

/// What a dataplane token says; field names are those of the token.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct DataplaneClaims {
    /// The only Dataplane it speaks for; empty = any that the rest fits.
    #[serde(deserialize_with = "null_as_absent")]
    pub name: String,
    /// The mesh.
    #[serde(deserialize_with = "null_as_absent")]
    pub mesh: String,
    /// Labels that the Dataplane must have, each with one of these values.
    #[serde(deserialize_with = "null_as_absent")]
    pub tags: BTreeMap<String, Vec<String>>,
    /// `dataplane`.
    #[serde(rename = "Type", deserialize_with = "null_as_absent")]
    pub proxy_type: String,
    /// The only workload it speaks for.
    #[serde(deserialize_with = "null_as_absent")]
    pub workload: String,
}

/// Why a token may not speak for a Dataplane.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenRefused {
    /// Another Dataplane's.
    #[error("proxy name from requestor: {dataplane} is different than in token: {token}")]
    Name {
        /// The Dataplane's.
        dataplane: String,
        /// The token's.
        token: String,
    },
    /// Another mesh's.
    #[error("proxy mesh from requestor: {dataplane} is different than in token: {token}")]
    Mesh {
        /// The Dataplane's.
        dataplane: String,
        /// The token's.
        token: String,
    },
    /// A label has a value that the token doesn't allow.
    #[error(
        "dataplane contains tag {key:?} with value {value:?} which is not allowed with this token. Allowed values in token are {allowed:?}"
    )]
    Tag {
        /// The label.
        key: String,
        /// The Dataplane's value.
        value: String,
        /// The token's values.
        allowed: Vec<String>,
    },
    /// A label that the token wants isn't there.
    #[error("dataplane has no tag {0:?} required by the token")]
    MissingTag(String),
    /// Another workload's.
    #[error(
        "dataplane workload {dataplane:?} is not allowed with this token. Allowed workload in token is {token:?}"
    )]
    Workload {
        /// The Dataplane's.
        dataplane: String,
        /// The token's.
        token: String,
    },
    /// The Dataplane names no workload.
    #[error("dataplane has no workload label required by the token")]
    MissingWorkload,
    /// The identity is made from the workload, and the token would let the Dataplane choose it.
    #[error(
        "the SPIFFE id of workload {0:?} is made from its label, and the token isn't bound to a workload: issue a token with --workload {0}"
    )]
    Unbound(String),
}

/// Judges a token. `workload_is_identity`: the MeshIdentity that selects the Dataplane makes its SPIFFE id from the
/// workload label.
pub fn authorize(
    claims: &DataplaneClaims,
    dataplane: &Meta,
    workload_is_identity: bool,
) -> Result<(), TokenRefused> {
    if claims.mesh != dataplane.mesh {
        return Err(TokenRefused::Mesh { dataplane: dataplane.mesh.clone(), token: claims.mesh.clone() });
    }
    if !claims.name.is_empty() && claims.name != dataplane.name {
        return Err(TokenRefused::Name { dataplane: dataplane.name.clone(), token: claims.name.clone() });
    }
    for (key, allowed) in &claims.tags {
        let value = dataplane.label(key).ok_or_else(|| TokenRefused::MissingTag(key.clone()))?;
        if !allowed.iter().any(|allowed| allowed == value) {
            return Err(TokenRefused::Tag {
                key: key.clone(),
                value: value.to_owned(),
                allowed: allowed.clone(),
            });
        }
    }
    let workload = dataplane.label(labels::WORKLOAD).unwrap_or_default();
    if !claims.workload.is_empty() {
        if workload.is_empty() {
            return Err(TokenRefused::MissingWorkload);
        }
        if claims.workload != workload {
            return Err(TokenRefused::Workload {
                dataplane: workload.to_owned(),
                token: claims.workload.clone(),
            });
        }
    } else if workload_is_identity && !workload.is_empty() {
        return Err(TokenRefused::Unbound(workload.to_owned()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_without_a_workload_gives_no_identity() {
        let mut meta = Meta::new("default", "web-1");
        meta.labels.insert(labels::WORKLOAD.to_owned(), "web".to_owned());
        let mut claims = DataplaneClaims { mesh: "default".to_owned(), ..DataplaneClaims::default() };
        assert_eq!(authorize(&claims, &meta, true), Err(TokenRefused::Unbound("web".to_owned())));
        assert_eq!(authorize(&claims, &meta, false), Ok(()));
        claims.workload = "web".to_owned();
        assert_eq!(authorize(&claims, &meta, true), Ok(()));
        claims.workload = "backend".to_owned();
        assert!(authorize(&claims, &meta, true).is_err());
        claims.mesh = "other".to_owned();
        assert!(matches!(authorize(&claims, &meta, true), Err(TokenRefused::Mesh { .. })));
    }
}
