//! Which node has which Dataplane, right now.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ursa_engine::ProxyKey;

/// Owners by Dataplane.
#[derive(Debug, Default)]
pub struct Registry {
    owners: Mutex<HashMap<ProxyKey, Owner>>,
}

#[derive(Debug)]
struct Owner {
    node: String,
    session: u64,
    /// The session has ended, and the grace time runs.
    away: bool,
    /// What a token vouched for.
    vouched: Option<Vouched>,
}

/// A dataplane token's word for a Dataplane.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Vouched {
    /// The workload that the Dataplane had then; one that was relabelled since is another.
    pub workload: Option<String>,
    /// The token's id, by which it may have been revoked since.
    pub token: String,
}

impl Registry {
    /// Whether a node has registered a Dataplane, the grace time included.
    pub fn owns(&self, node: &str, mesh: &str, name: &str) -> bool {
        let key = ProxyKey { mesh: mesh.to_owned(), name: name.to_owned() };
        self.lock().get(&key).is_some_and(|owner| owner.node == node)
    }

    /// Whether anybody has registered it.
    pub fn is_registered(&self, proxy: &ProxyKey) -> bool {
        self.lock().contains_key(proxy)
    }

    /// The token that vouched for a Dataplane with exactly this workload; its id.
    pub fn vouched_by_token(&self, mesh: &str, name: &str, workload: Option<&str>) -> Option<String> {
        let key = ProxyKey { mesh: mesh.to_owned(), name: name.to_owned() };
        let owners = self.lock();
        let vouched = owners.get(&key)?.vouched.as_ref()?;
        (vouched.workload.as_deref() == workload).then(|| vouched.token.clone())
    }

    /// Takes a Dataplane for a session. Fails with the owner's node id if another live node has it.
    pub(super) fn claim(
        &self,
        proxy: &ProxyKey,
        node: &str,
        session: u64,
        vouched: Option<Vouched>,
    ) -> Result<(), String> {
        let mut owners = self.lock();
        if let Some(owner) = owners.get(proxy)
            && owner.node != node
            && !owner.away
        {
            return Err(owner.node.clone());
        }
        owners.insert(proxy.clone(), Owner { node: node.to_owned(), session, away: false, vouched });
        Ok(())
    }

    /// Gives a Dataplane up. False if the node doesn't have it.
    pub(super) fn release(&self, node: &str, proxy: &ProxyKey) -> bool {
        let mut owners = self.lock();
        if owners.get(proxy).is_some_and(|owner| owner.node == node) {
            owners.remove(proxy);
            return true;
        }
        false
    }

    /// A session ended: its Dataplanes that no later session has claimed are away. Returns how many.
    pub(super) fn leave(&self, session: u64) -> usize {
        let mut left = 0;
        for owner in self.lock().values_mut().filter(|owner| owner.session == session) {
            owner.away = true;
            left += 1;
        }
        left
    }

    /// The grace time of a session is over: forgets and returns what is still away.
    pub(super) fn expire(&self, session: u64) -> Vec<ProxyKey> {
        let mut expired = Vec::new();
        self.lock().retain(|proxy, owner| {
            let gone = owner.session == session && owner.away;
            if gone {
                expired.push(proxy.clone());
            }
            !gone
        });
        expired
    }

    /// Forgets and returns everything of a node.
    pub(super) fn expel(&self, node: &str) -> Vec<ProxyKey> {
        let mut expelled = Vec::new();
        self.lock().retain(|proxy, owner| {
            let gone = owner.node == node;
            if gone {
                expelled.push(proxy.clone());
            }
            !gone
        });
        expelled
    }

    /// The Dataplanes of a node, in order.
    pub fn dataplanes_of(&self, node: &str) -> Vec<ProxyKey> {
        let mut all: Vec<_> = self
            .lock()
            .iter()
            .filter(|(_, owner)| owner.node == node)
            .map(|(proxy, _)| proxy.clone())
            .collect();
        all.sort_unstable();
        all
    }

    /// The node that has a Dataplane.
    pub fn owner(&self, proxy: &ProxyKey) -> Option<String> {
        self.lock().get(proxy).map(|owner| owner.node.clone())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ProxyKey, Owner>> {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxy() -> ProxyKey {
        ProxyKey { mesh: "default".into(), name: "web-1".into() }
    }

    #[test]
    fn a_live_owner_keeps_its_dataplane() {
        let registry = Registry::default();
        assert_eq!(registry.claim(&proxy(), "a", 1, None), Ok(()));
        assert_eq!(registry.claim(&proxy(), "b", 2, None), Err("a".into()));
        assert!(registry.owns("a", "default", "web-1"));
        assert!(!registry.owns("b", "default", "web-1"));
    }

    #[test]
    fn coming_back_within_the_grace_time_loses_nothing() {
        let registry = Registry::default();
        assert_eq!(registry.claim(&proxy(), "a", 1, None), Ok(()));
        assert_eq!(registry.leave(1), 1);
        assert!(registry.owns("a", "default", "web-1"));
        assert_eq!(registry.claim(&proxy(), "a", 2, None), Ok(()));
        assert!(registry.expire(1).is_empty());
        assert_eq!(registry.leave(2), 1);
        assert_eq!(registry.expire(2), [proxy()]);
        assert!(!registry.is_registered(&proxy()));
    }

    #[test]
    fn a_token_vouches_for_the_workload_that_it_saw() {
        let registry = Registry::default();
        let vouched = Vouched { workload: Some("web".into()), token: "id".into() };
        assert_eq!(registry.claim(&proxy(), "a", 1, Some(vouched)), Ok(()));
        assert_eq!(registry.vouched_by_token("default", "web-1", Some("web")).as_deref(), Some("id"));
        assert_eq!(registry.vouched_by_token("default", "web-1", Some("admin")), None);
        assert_eq!(registry.vouched_by_token("default", "web-1", None), None);
        assert_eq!(registry.claim(&proxy(), "a", 2, None), Ok(()));
        assert_eq!(registry.vouched_by_token("default", "web-1", Some("web")), None);
    }

    #[test]
    fn an_expelled_node_has_nothing_left() {
        let registry = Registry::default();
        assert_eq!(registry.claim(&proxy(), "a", 1, None), Ok(()));
        assert_eq!(registry.dataplanes_of("a"), [proxy()]);
        assert!(registry.expel("b").is_empty());
        assert_eq!(registry.expel("a"), [proxy()]);
        assert!(!registry.owns("a", "default", "web-1"));
    }

    #[test]
    fn a_reconnect_before_the_old_stream_broke_wins() {
        let registry = Registry::default();
        assert_eq!(registry.claim(&proxy(), "a", 1, None), Ok(()));
        assert_eq!(registry.claim(&proxy(), "a", 2, None), Ok(()));
        assert_eq!(registry.leave(1), 0);
        assert!(registry.expire(1).is_empty());
    }
}
