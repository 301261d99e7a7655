//! What tokens say. The names are those of Kuma's tokens, which differ in case on purpose.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The registered claims of every token.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registered {
    /// The token's id, by which it can be revoked.
    #[serde(default)]
    pub jti: String,
    /// When it was issued.
    #[serde(default)]
    pub iat: i64,
    /// From when it is valid.
    #[serde(default)]
    pub nbf: i64,
    /// Until when it is valid.
    pub exp: i64,
}

/// A user's token.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct UserClaims {
    /// The name.
    pub name: String,
    /// The groups.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub groups: Vec<String>,
    /// Times and id.
    #[serde(flatten)]
    pub registered: Registered,
}

/// A zone's token.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ZoneClaims {
    /// The zone.
    pub zone: String,
    /// What it may do.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub scope: Vec<String>,
    /// Times and id.
    #[serde(flatten)]
    pub registered: Registered,
}

/// A dataplane's token.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DataplaneClaims {
    /// Only for the dataplane of this name, if it is set.
    #[serde(default)]
    pub name: String,
    /// Only for this mesh.
    #[serde(default)]
    pub mesh: String,
    /// Only for dataplanes with these labels, one of the values each.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub tags: BTreeMap<String, Vec<String>>,
    /// The kind of proxy; `dataplane`.
    #[serde(default)]
    pub r#type: String,
    /// Only for this workload, if it is set.
    #[serde(default)]
    pub workload: String,
    /// Times and id.
    #[serde(flatten)]
    pub registered: Registered,
}

impl DataplaneClaims {
    /// Refuses a dataplane that this token isn't for. `path_from_workload`: the dataplane's identity
    /// is derived from its workload label, so that an unbound token would let it choose its identity.
    pub fn check(
        &self,
        mesh: &str,
        name: &str,
        labels: &BTreeMap<String, String>,
        path_from_workload: bool,
    ) -> Result<(), String> {
        if self.mesh != mesh {
            return Err(format!(
                "proxy mesh from requestor: {mesh} is different than in token: {}",
                self.mesh
            ));
        }
        if !self.name.is_empty() && self.name != name {
            return Err(format!(
                "proxy name from requestor: {name} is different than in token: {}",
                self.name
            ));
        }
        for (tag, allowed) in &self.tags {
            match labels.get(tag) {
                None => return Err(format!("dataplane has no tag {tag:?} required by the token")),
                Some(value) if !allowed.contains(value) => {
                    return Err(format!(
                        "dataplane contains tag {tag:?} with value {value:?} which is not allowed with this token. Allowed values in token are {allowed:?}"
                    ));
                }
                Some(_) => {}
            }
        }
        let workload = labels.get(ursa_model::labels::WORKLOAD).map(String::as_str);
        match workload {
            None if !self.workload.is_empty() => {
                return Err("dataplane has no workload label required by the token".into());
            }
            Some(workload) if !self.workload.is_empty() && workload != self.workload => {
                return Err(format!(
                    "dataplane workload {workload:?} is not allowed with this token. Allowed workload in token is {:?}",
                    self.workload
                ));
            }
            _ => {}
        }
        if self.workload.is_empty() && workload.is_some() && path_from_workload {
            return Err("the dataplane's identity is derived from its label kuma.io/workload, but the token isn't bound to a workload; generate it with --workload".into());
        }
        Ok(())
    }
}

fn null_is_empty<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}
