//! Where a stream finds what changed for its proxy since it last looked.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Notify;
use ursa_engine::{Snapshot, TypeUrl};

/// A latest-wins set of changes.
#[derive(Debug, Default)]
pub struct Inbox {
    state: Mutex<State>,
    wake: Notify,
}

#[derive(Debug, Default)]
struct State {
    names: BTreeMap<TypeUrl, BTreeSet<Arc<str>>>,
    snapshot: Option<Arc<Snapshot>>,
    changed: bool,
}

/// What changed, with the state after the change.
#[derive(Debug)]
pub struct Dirty {
    /// Names that were added, changed or removed.
    pub names: BTreeMap<TypeUrl, BTreeSet<Arc<str>>>,
    /// The proxy's state; none while its Dataplane doesn't exist.
    pub snapshot: Option<Arc<Snapshot>>,
}

impl Inbox {
    pub(super) fn new(snapshot: Option<Arc<Snapshot>>) -> Self {
        let changed = snapshot.is_some();
        Self { state: Mutex::new(State { names: BTreeMap::new(), snapshot, changed }), wake: Notify::new() }
    }

    /// Adds changes and wakes the stream.
    pub(super) fn put(&self, names: &[(TypeUrl, Arc<str>)], snapshot: Option<Arc<Snapshot>>) {
        {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            for (kind, name) in names {
                state.names.entry(*kind).or_default().insert(Arc::clone(name));
            }
            state.snapshot = snapshot;
            state.changed = true;
        }
        self.wake.notify_one();
    }

    /// Waits for changes and takes them all. Safe to drop: nothing is lost by cancelling.
    pub async fn next(&self) -> Dirty {
        loop {
            {
                let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                if state.changed {
                    state.changed = false;
                    return Dirty {
                        names: std::mem::take(&mut state.names),
                        snapshot: state.snapshot.clone(),
                    };
                }
            }
            self.wake.notified().await;
        }
    }
}
