//! What the control plane knows right now, and the one task that owns the engine.
//!
//! The task follows the store, keeps an [`Index`] of what it read, feeds the engine, and puts what the engine
//! calls dirty into the [`Inbox`] of each stream that serves the proxy. Everybody else asks [`World`], a cheap
//! handle. Nothing here waits for a stream: an inbox is a set in which a later change replaces an earlier one,
//! so a slow stream costs memory for names and nothing else.

mod inbox;
mod index;
mod task;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use tokio::sync::{Notify, mpsc, oneshot, watch};
use ursa_engine::{EngineConfig, ProxyKey};
use ursa_model::{Resource, ResourceKey};

pub use inbox::{Dirty, Inbox};
pub use index::Index;
pub use task::run;

use task::Command;

/// A handle on the world; clones share it.
#[derive(Clone, Debug)]
pub struct World {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    index: RwLock<Index>,
    followers: Mutex<Vec<std::sync::Weak<Queue>>>,
    commands: mpsc::UnboundedSender<Command>,
    /// How many times the task has taken something from the store.
    reads: watch::Receiver<u64>,
}

/// The part of the world that its task owns; hand it to [`run`].
#[derive(Debug)]
pub struct WorldTask {
    world: World,
    commands: mpsc::UnboundedReceiver<Command>,
    reads: watch::Sender<u64>,
    config: EngineConfig,
}

/// The world has ended: the control plane is shutting down.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the control plane is shutting down")]
pub struct Ended;

impl World {
    /// A world that knows nothing until its task runs.
    pub fn new(config: EngineConfig) -> (Self, WorldTask) {
        let (sender, commands) = mpsc::unbounded_channel();
        let (reads, seen) = watch::channel(0);
        let world = Self {
            shared: Arc::new(Shared {
                index: RwLock::default(),
                followers: Mutex::default(),
                commands: sender,
                reads: seen,
            }),
        };
        let task = WorldTask { world: world.clone(), commands, reads, config };
        (world, task)
    }

    /// One resource as the world knows it.
    pub fn get(&self, key: &ResourceKey) -> Option<Arc<Resource>> {
        self.read(|index| index.get(key).cloned())
    }

    /// Reads the index; keep it short, the world's task waits meanwhile.
    pub fn read<T>(&self, look: impl FnOnce(&Index) -> T) -> T {
        look(&self.shared.index.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Waits until the store was read once.
    pub async fn ready(&self) -> Result<(), Ended> {
        self.shared.reads.clone().wait_for(|reads| *reads > 0).await.map(|_| ()).map_err(|_| Ended)
    }

    /// Whether the store was read once.
    pub fn is_ready(&self) -> bool {
        *self.shared.reads.borrow() > 0
    }

    /// Waits until the world has seen a write: the resource in this version, or a later one.
    pub async fn seen(&self, resource: &Resource) -> Result<(), Ended> {
        let (key, version) = (resource.key(), resource.meta.version);
        let mut reads = self.shared.reads.clone();
        loop {
            reads.borrow_and_update();
            if self.read(|index| index.get(&key).is_some_and(|known| known.meta.version >= version)) {
                return Ok(());
            }
            reads.changed().await.map_err(|_| Ended)?;
        }
    }

    /// Learns of every key that changes from now on; what exists already is not reported.
    pub fn follow(&self) -> Follower {
        let queue = Arc::new(Queue::default());
        self.shared.followers.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(&queue));
        Follower { queue }
    }

    /// Says whether a proxy's node is there.
    pub fn set_liveness(&self, proxy: &ProxyKey, online: bool) {
        self.send(Command::Liveness { proxy: proxy.clone(), online });
    }

    /// Subscribes to a proxy's configuration. The subscription ends when the inbox is dropped.
    pub async fn subscribe(&self, proxy: &ProxyKey) -> Result<Subscription, Ended> {
        let (reply, subscription) = oneshot::channel();
        self.send(Command::Subscribe { proxy: proxy.clone(), reply });
        subscription.await.map_err(|_| Ended)
    }

    /// A proxy's configuration as canonical JSON.
    pub async fn config_dump(&self, proxy: &ProxyKey) -> Result<serde_json::Value, Ended> {
        let (reply, dump) = oneshot::channel();
        self.send(Command::Dump { proxy: proxy.clone(), reply });
        dump.await.map_err(|_| Ended)
    }

    fn send(&self, command: Command) {
        // Only fails while shutting down, when nobody needs the answer any more.
        let _ = self.shared.commands.send(command);
    }
}

/// A stream's share of the world.
#[derive(Debug)]
pub struct Subscription {
    inbox: Arc<Inbox>,
    proxy: ProxyKey,
    world: World,
}

impl Subscription {
    /// Where changes arrive.
    pub fn inbox(&self) -> &Arc<Inbox> {
        &self.inbox
    }

    /// Whom it is about.
    pub fn proxy(&self) -> &ProxyKey {
        &self.proxy
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.world.send(Command::Unsubscribe { proxy: self.proxy.clone(), inbox: Arc::clone(&self.inbox) });
    }
}

/// Keys that changed and were not yet looked at.
#[derive(Debug, Default)]
struct Queue {
    keys: Mutex<BTreeSet<ResourceKey>>,
    wake: Notify,
}

/// Learns which keys changed; several changes of one key between two looks are one.
#[derive(Debug)]
pub struct Follower {
    queue: Arc<Queue>,
}

impl Follower {
    /// Waits for changes. Safe to drop: nothing is lost by cancelling.
    pub async fn next(&self) -> BTreeSet<ResourceKey> {
        loop {
            let keys = std::mem::take(&mut *self.queue.keys.lock().unwrap_or_else(PoisonError::into_inner));
            if !keys.is_empty() {
                return keys;
            }
            self.queue.wake.notified().await;
        }
    }
}

impl Shared {
    /// Tells everybody who follows.
    fn publish(&self, keys: &[ResourceKey]) {
        let mut followers = self.followers.lock().unwrap_or_else(PoisonError::into_inner);
        followers.retain(|follower| {
            let Some(queue) = follower.upgrade() else { return false };
            queue.keys.lock().unwrap_or_else(PoisonError::into_inner).extend(keys.iter().cloned());
            queue.wake.notify_one();
            true
        });
    }
}
