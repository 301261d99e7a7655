//! The nodes that joined, and what each was granted.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use serde::{Deserialize, Serialize};

use super::IdentityError;
use crate::store::Store;

const BUCKET: &str = "nodes";

/// What a node may have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Grant {
    /// In this mesh only.
    pub mesh: String,
    /// These workloads only; `*` is all of the mesh.
    pub workloads: Vec<String>,
}

impl Grant {
    /// Whether the grant covers a workload. No workload is covered only by `*`.
    pub fn covers(&self, mesh: &str, workload: Option<&str>) -> bool {
        self.mesh == mesh
            && self.workloads.iter().any(|granted| granted == "*" || Some(granted.as_str()) == workload)
    }
}

/// A node that joined.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeRecord {
    /// Its id, in its certificate's URI SAN.
    pub id: String,
    /// What its operator called it.
    pub name: String,
    /// SHA-256 of its public key: the node's identity proper.
    pub key_hash: String,
    /// What it may have.
    pub grant: Grant,
    /// End of its newest certificate, Unix seconds.
    pub not_after: i64,
    /// Whether it was shut out.
    #[serde(default)]
    pub revoked: bool,
}

/// All nodes; reads come from memory.
#[derive(Debug)]
pub struct Nodes {
    store: Store,
    cache: RwLock<HashMap<String, Arc<NodeRecord>>>,
}

impl Nodes {
    pub(super) async fn load(store: Store) -> Result<Self, IdentityError> {
        let mut cache = HashMap::new();
        for record in store.privates(BUCKET).await? {
            let node: NodeRecord = serde_json::from_slice(&record.value)
                .map_err(|error| IdentityError::Damaged("node", error.to_string()))?;
            cache.insert(node.id.clone(), Arc::new(node));
        }
        Ok(Self { store, cache: RwLock::new(cache) })
    }

    /// One node.
    pub fn get(&self, id: &str) -> Option<Arc<NodeRecord>> {
        self.cache.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// The node with a key.
    pub fn by_key(&self, key_hash: &str) -> Option<Arc<NodeRecord>> {
        self.cache
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .find(|node| node.key_hash == key_hash)
            .cloned()
    }

    /// Stores a node; only then is it known.
    pub async fn put(&self, node: NodeRecord) -> Result<Arc<NodeRecord>, IdentityError> {
        let value =
            serde_json::to_vec(&node).map_err(|error| IdentityError::Damaged("node", error.to_string()))?;
        self.store.put_private(BUCKET, &node.id, value, None).await?;
        let node = Arc::new(node);
        self.cache.write().unwrap_or_else(PoisonError::into_inner).insert(node.id.clone(), Arc::clone(&node));
        Ok(node)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grant_covers_what_it_names_and_no_more() {
        let grant = Grant { mesh: "default".into(), workloads: vec!["web".into()] };
        assert!(grant.covers("default", Some("web")));
        assert!(!grant.covers("default", Some("backend")));
        assert!(!grant.covers("other", Some("web")));
        assert!(!grant.covers("default", None));
        let all = Grant { mesh: "default".into(), workloads: vec!["*".into()] };
        assert!(all.covers("default", None));
        assert!(!all.covers("other", Some("web")));
    }
}
