//! The task that owns the engine.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, PoisonError};

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use ursa_engine::{Change, Engine, Outcome, ProxyKey};
use ursa_model::{Resource, ResourceKey};

use super::{Inbox, Subscription, WorldTask};
use crate::store::{Store, StoreError, WatchEvent};

/// What others ask of the task.
#[derive(Debug)]
pub(super) enum Command {
    Subscribe { proxy: ProxyKey, reply: oneshot::Sender<Subscription> },
    Unsubscribe { proxy: ProxyKey, inbox: Arc<Inbox> },
    Liveness { proxy: ProxyKey, online: bool },
    Dump { proxy: ProxyKey, reply: oneshot::Sender<serde_json::Value> },
}

/// Runs the world until `shutdown`.
pub async fn run(task: WorldTask, store: Store, shutdown: CancellationToken) -> Result<(), StoreError> {
    let WorldTask { world, mut commands, reads, config } = task;
    let mut owner = Owner { world, engine: Engine::new(config), streams: HashMap::new() };
    let mut watcher = store.watch(None);
    // Commands wait until the store was read once: a stream must not be told of an empty world.
    let first = watcher.next().await?;
    owner.take(first);
    reads.send_modify(|reads| *reads += 1);
    loop {
        tokio::select! {
            event = watcher.next() => {
                owner.take(event?);
                reads.send_modify(|reads| *reads += 1);
            }
            command = commands.recv() => match command {
                Some(command) => owner.obey(command),
                None => return Ok(()),
            },
            () = shutdown.cancelled() => return Ok(()),
        }
    }
}

struct Owner {
    world: super::World,
    engine: Engine,
    streams: HashMap<ProxyKey, Vec<Arc<Inbox>>>,
}

impl Owner {
    fn take(&mut self, event: WatchEvent) {
        let mut keys = Vec::new();
        let mut changes = Vec::new();
        {
            let mut index = self.world.shared.index.write().unwrap_or_else(PoisonError::into_inner);
            match event {
                WatchEvent::Relist(resources) => {
                    let present: BTreeSet<ResourceKey> =
                        resources.iter().map(|resource| resource.key()).collect();
                    let gone: Vec<_> = index.keys().filter(|key| !present.contains(*key)).cloned().collect();
                    for key in gone {
                        index.remove(&key);
                        changes.push(Change::Delete(key.clone()));
                        keys.push(key);
                    }
                    for resource in resources {
                        let key = resource.key();
                        if index.get(&key).is_some_and(|old| old.meta.version == resource.meta.version) {
                            continue;
                        }
                        put(&mut changes, &resource);
                        keys.push(key);
                        index.put(resource);
                    }
                }
                WatchEvent::Changes(events) => {
                    for event in events {
                        if let Some(resource) = event.resource {
                            put(&mut changes, &resource);
                            index.put(resource);
                        } else {
                            index.remove(&event.key);
                            changes.push(Change::Delete(event.key.clone()));
                        }
                        keys.push(event.key);
                    }
                }
            }
        }
        self.apply(changes);
        self.world.shared.publish(&keys);
    }

    fn apply(&mut self, changes: Vec<Change>) {
        if changes.is_empty() {
            return;
        }
        let Outcome { dirty, warnings } = self.engine.apply(changes);
        for (key, warning) in warnings {
            warn!(resource = %key, "left out of the configuration: {warning}");
        }
        for (proxy, names) in dirty {
            let Some(inboxes) = self.streams.get(&proxy) else { continue };
            let snapshot = self.engine.snapshot(&proxy);
            for inbox in inboxes {
                inbox.put(&names, snapshot.clone());
            }
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Subscribe { proxy, reply } => {
                let streams = self.streams.entry(proxy.clone()).or_default();
                if streams.is_empty() {
                    self.engine.connect(&proxy);
                }
                let inbox = Arc::new(Inbox::new(self.engine.snapshot(&proxy)));
                streams.push(Arc::clone(&inbox));
                // If nobody waits for it any more, the subscription is dropped here and ends itself.
                let _ = reply.send(Subscription { inbox, proxy, world: self.world.clone() });
            }
            Command::Unsubscribe { proxy, inbox } => {
                if let Some(streams) = self.streams.get_mut(&proxy) {
                    streams.retain(|other| !Arc::ptr_eq(other, &inbox));
                    if streams.is_empty() {
                        self.streams.remove(&proxy);
                        self.engine.disconnect(&proxy);
                    }
                }
            }
            Command::Liveness { proxy, online } => {
                debug!(mesh = proxy.mesh, dataplane = proxy.name, online, "liveness");
                self.apply(vec![Change::Liveness { proxy, online }]);
            }
            Command::Dump { proxy, reply } => {
                let _ = reply.send(self.engine.config_dump(&proxy));
            }
        }
    }
}

/// Kinds that no configuration depends on don't reach the engine: it would only hash and forget them, and
/// secrets are nothing for it to know.
fn put(changes: &mut Vec<Change>, resource: &Arc<Resource>) {
    if !matches!(
        resource.descriptor.name,
        "DataplaneInsight" | "ZoneInsight" | "Secret" | "GlobalSecret" | "Workload"
    ) {
        changes.push(Change::Put(Arc::clone(resource)));
    }
}
