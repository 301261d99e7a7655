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

/// Who had a Dataplane before it was claimed.
#[derive(Debug)]
pub(super) struct Before(Option<Owner>);

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

    /// The token that vouched for a Dataplane with exactly this workload; its id.
    pub fn vouched_by_token(&self, mesh: &str, name: &str, workload: Option<&str>) -> Option<String> {
        let key = ProxyKey { mesh: mesh.to_owned(), name: name.to_owned() };
        let owners = self.lock();
        let vouched = owners.get(&key)?.vouched.as_ref()?;
        (vouched.workload.as_deref() == workload).then(|| vouched.token.clone())
    }

    /// Takes a Dataplane for a session; returns how it was before. Fails with the owner's node id if another live
    /// node has it.
    pub(super) fn claim(
        &self,
        proxy: &ProxyKey,
        node: &str,
        session: u64,
        vouched: Option<Vouched>,
    ) -> Result<Before, String> {
        let mut owners = self.lock();
        if let Some(owner) = owners.get(proxy)
            && owner.node != node
            && !owner.away
        {
            return Err(owner.node.clone());
        }
        let claimed = Owner { node: node.to_owned(), session, away: false, vouched };
        Ok(Before(owners.insert(proxy.clone(), claimed)))
    }

    /// Takes a session's claim back. What the node had before it keeps, as this session's: an earlier one may be
    /// over by now. Of anybody else nothing is left, and `withdraw` is called before it can be claimed again.
    pub(super) fn unclaim(&self, proxy: &ProxyKey, session: u64, before: Before, withdraw: impl FnOnce()) {
        let mut owners = self.lock();
        let Some(owner) = owners.get_mut(proxy).filter(|owner| owner.session == session) else { return };
        match before.0 {
            Some(before) if before.node == owner.node => owner.vouched = before.vouched,
            _ => {
                owners.remove(proxy);
                withdraw();
            }
        }
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

    /// The grace time of a session is over: forgets what is still away. `withdraw` is called for each before it
    /// can be claimed again, so that whoever claims it has the last word.
    pub(super) fn expire(&self, session: u64, withdraw: impl FnMut(&ProxyKey)) {
        self.forget(|owner| owner.session == session && owner.away, withdraw);
    }

    /// Forgets everything of a node, with `withdraw` as in [`expire`](Self::expire).
    pub(super) fn expel(&self, node: &str, withdraw: impl FnMut(&ProxyKey)) {
        self.forget(|owner| owner.node == node, withdraw);
    }

    fn forget(&self, gone: impl Fn(&Owner) -> bool, mut withdraw: impl FnMut(&ProxyKey)) {
        self.lock().retain(|proxy, owner| {
            let gone = gone(owner);
            if gone {
                withdraw(proxy);
            }
            !gone
        });
    }

    /// Calls `withdraw` if nobody has registered a Dataplane, before anybody can.
    pub(super) fn unless_registered(&self, proxy: &ProxyKey, withdraw: impl FnOnce()) {
        let owners = self.lock();
        if !owners.contains_key(proxy) {
            withdraw();
        }
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

    fn expire(registry: &Registry, session: u64) -> Vec<ProxyKey> {
        let mut expired = Vec::new();
        registry.expire(session, |proxy| expired.push(proxy.clone()));
        expired
    }

    #[test]
    fn a_failed_claim_leaves_a_node_what_it_had() {
        let registry = Registry::default();
        let vouched = || Some(Vouched { workload: None, token: "id".into() });
        registry.claim(&proxy(), "a", 1, vouched()).unwrap();
        let before = registry.claim(&proxy(), "a", 2, None).unwrap();
        assert_eq!(registry.leave(1), 0);
        registry.unclaim(&proxy(), 2, before, || panic!("withdrawn"));
        assert_eq!(registry.vouched_by_token("default", "web-1", None).as_deref(), Some("id"));
        assert_eq!(registry.leave(2), 1, "the later session has it");
        assert_eq!(expire(&registry, 2), [proxy()]);
    }

    #[test]
    fn a_failed_claim_of_anothers_leaves_nothing_and_says_so() {
        let registry = Registry::default();
        registry.claim(&proxy(), "a", 1, None).unwrap();
        registry.leave(1);
        let before = registry.claim(&proxy(), "b", 2, None).unwrap();
        let mut withdrawn = false;
        registry.unclaim(&proxy(), 2, before, || withdrawn = true);
        assert!(withdrawn);
        assert_eq!(registry.owner(&proxy()), None);
    }

    #[test]
    fn what_was_claimed_anew_is_not_withdrawn() {
        let registry = Registry::default();
        registry.claim(&proxy(), "a", 1, None).unwrap();
        registry.unless_registered(&proxy(), || panic!("withdrawn"));
        let before = registry.claim(&proxy(), "a", 2, None).unwrap();
        registry.claim(&proxy(), "a", 3, None).unwrap();
        registry.unclaim(&proxy(), 2, before, || panic!("withdrawn"));
        assert_eq!(registry.owner(&proxy()).as_deref(), Some("a"));
    }

    #[test]
    fn a_live_owner_keeps_its_dataplane() {
        let registry = Registry::default();
        registry.claim(&proxy(), "a", 1, None).unwrap();
        assert_eq!(registry.claim(&proxy(), "b", 2, None).unwrap_err(), "a");
        assert!(registry.owns("a", "default", "web-1"));
        assert!(!registry.owns("b", "default", "web-1"));
    }

    #[test]
    fn coming_back_within_the_grace_time_loses_nothing() {
        let registry = Registry::default();
        registry.claim(&proxy(), "a", 1, None).unwrap();
        assert_eq!(registry.leave(1), 1);
        assert!(registry.owns("a", "default", "web-1"));
        registry.claim(&proxy(), "a", 2, None).unwrap();
        assert!(expire(&registry, 1).is_empty());
        assert_eq!(registry.leave(2), 1);
        assert_eq!(expire(&registry, 2), [proxy()]);
        assert_eq!(registry.owner(&proxy()), None);
    }

    #[test]
    fn a_token_vouches_for_the_workload_that_it_saw() {
        let registry = Registry::default();
        let vouched = Vouched { workload: Some("web".into()), token: "id".into() };
        registry.claim(&proxy(), "a", 1, Some(vouched)).unwrap();
        assert_eq!(registry.vouched_by_token("default", "web-1", Some("web")).as_deref(), Some("id"));
        assert_eq!(registry.vouched_by_token("default", "web-1", Some("admin")), None);
        assert_eq!(registry.vouched_by_token("default", "web-1", None), None);
        registry.claim(&proxy(), "a", 2, None).unwrap();
        assert_eq!(registry.vouched_by_token("default", "web-1", Some("web")), None);
    }

    #[test]
    fn an_expelled_node_has_nothing_left() {
        let registry = Registry::default();
        registry.claim(&proxy(), "a", 1, None).unwrap();
        assert_eq!(registry.dataplanes_of("a"), [proxy()]);
        let mut expelled = Vec::new();
        registry.expel("b", |proxy| expelled.push(proxy.clone()));
        assert!(expelled.is_empty());
        registry.expel("a", |proxy| expelled.push(proxy.clone()));
        assert_eq!(expelled, [proxy()]);
        assert!(!registry.owns("a", "default", "web-1"));
    }

    #[test]
    fn a_reconnect_before_the_old_stream_broke_wins() {
        let registry = Registry::default();
        registry.claim(&proxy(), "a", 1, None).unwrap();
        registry.claim(&proxy(), "a", 2, None).unwrap();
        assert_eq!(registry.leave(1), 0);
        assert!(expire(&registry, 1).is_empty());
    }
}
