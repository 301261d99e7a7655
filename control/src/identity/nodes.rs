//! The nodes that joined, and what each was granted.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

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
    /// Since when, Unix seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked_at: Option<i64>,
}

/// All nodes; reads come from memory.
#[derive(Debug)]
pub struct Nodes {
    store: Store,
    cache: RwLock<HashMap<String, Arc<NodeRecord>>>,
    /// Held while a record is changed: a renewal must not undo a revocation that happens beside it.
    changing: tokio::sync::Mutex<()>,
    /// What ends a node's sessions and streams when it is revoked.
    ends: Mutex<HashMap<String, CancellationToken>>,
}

/// What a revoked node is told, whatever it asks.
pub const REVOKED: &str = "this node was revoked; join again with a new ticket, or ask the operator to restore it (`ursa node restore`)";

impl Nodes {
    pub(super) async fn load(store: Store) -> Result<Self, IdentityError> {
        let mut cache = HashMap::new();
        for record in store.privates(BUCKET).await? {
            // One that can't be read is nobody's: its node is not known here and has to join again. The others
            // must not suffer.
            match serde_json::from_slice::<NodeRecord>(&record.value) {
                Ok(node) => drop(cache.insert(node.id.clone(), Arc::new(node))),
                Err(error) => tracing::warn!(
                    node = record.key,
                    "the stored record of a node is damaged and left out, so the node has to join again with a new ticket: {error}"
                ),
            }
        }
        Ok(Self {
            store,
            cache: RwLock::new(cache),
            changing: tokio::sync::Mutex::default(),
            ends: Mutex::default(),
        })
    }

    /// One node.
    pub fn get(&self, id: &str) -> Option<Arc<NodeRecord>> {
        self.cache.read().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    /// All nodes, by name.
    pub fn list(&self) -> Vec<Arc<NodeRecord>> {
        let mut all: Vec<_> =
            self.cache.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        all.sort_by(|one, other| (&one.name, &one.id).cmp(&(&other.name, &other.id)));
        all
    }

    /// The node with a key: a revoked one if there is any, since then the key is worth nothing, else the one
    /// that was certified last.
    pub fn by_key(&self, key_hash: &str) -> Option<Arc<NodeRecord>> {
        self.cache
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .filter(|node| node.key_hash == key_hash)
            .max_by_key(|node| (node.revoked, node.not_after))
            .cloned()
    }

    /// Cancelled when the node is revoked. Take it first and look at the record afterwards.
    pub fn end_of(&self, id: &str) -> CancellationToken {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner).entry(id.to_owned()).or_default().clone()
    }

    /// Notes a node's new certificate, of a node that joins too; only then is it known. Nothing if it was revoked
    /// meanwhile. Not to be dropped before its end, see [`to_the_end`](super::to_the_end).
    pub async fn certified(&self, mut node: NodeRecord) -> Result<Option<Arc<NodeRecord>>, IdentityError> {
        let _changing = self.changing.lock().await;
        if let Some(known) = self.get(&node.id) {
            if known.revoked {
                return Ok(None);
            }
            node = NodeRecord { not_after: node.not_after, ..NodeRecord::clone(&known) };
        }
        self.put(node).await.map(Some)
    }

    /// Shuts a node out, or lets it in again. Returns its record, and whether that is news. Not to be dropped
    /// before its end, see [`to_the_end`](super::to_the_end).
    pub async fn set_revoked(
        &self,
        id: &str,
        revoked: bool,
    ) -> Result<Option<(Arc<NodeRecord>, bool)>, IdentityError> {
        let _changing = self.changing.lock().await;
        let Some(known) = self.get(id) else { return Ok(None) };
        if known.revoked == revoked {
            return Ok(Some((known, false)));
        }
        let revoked_at = revoked.then(|| time::OffsetDateTime::now_utc().unix_timestamp());
        let node = self.put(NodeRecord { revoked, revoked_at, ..NodeRecord::clone(&known) }).await?;
        let end = self.ends.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        if let Some(end) = end.filter(|_| revoked) {
            end.cancel();
        }
        Ok(Some((node, true)))
    }

    async fn put(&self, node: NodeRecord) -> Result<Arc<NodeRecord>, IdentityError> {
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
