//! `DataplaneInsight`s: one task writes them, each only when it has changed.

use std::collections::{HashMap, HashSet};

use futures_util::StreamExt as _;
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use ursa_engine::ProxyKey;
use ursa_model::types::dataplane::Dataplane;
use ursa_model::types::dataplane_insight::{DataplaneInsight, Mtls, Rejection, Subscription};
use ursa_model::{Meta, Resource, ResourceKey, ResourceSpec as _, labels};

use crate::store::{Store, StoreError};
use crate::world::{Index, World};

/// Subscriptions that an insight keeps.
const HISTORY: usize = 2;

/// Rejections that an insight keeps.
const REJECTIONS: usize = 64;

/// Writes that are under way together: the store commits them as one.
const TOGETHER: usize = 64;

/// A handle on the insights.
#[derive(Debug, Clone)]
pub struct Insights {
    sender: mpsc::UnboundedSender<(ProxyKey, Event)>,
}

#[derive(Debug)]
enum Event {
    Online,
    Offline,
    Version(Value),
    Rejected { type_url: &'static str, rejections: Vec<ursa_wire::discovery::Rejection> },
    Accepted { type_url: &'static str, names: Vec<std::sync::Arc<str>> },
    Certified { secret_name: String, until: OffsetDateTime },
    Gone,
}

impl Insights {
    /// A handle and the end that [`run`] reads from.
    pub fn new() -> (Self, InsightTask) {
        let (sender, receiver) = mpsc::unbounded_channel();
        (Self { sender }, InsightTask { receiver })
    }

    /// Its node is connected.
    pub fn online(&self, proxy: &ProxyKey) {
        self.send(proxy, Event::Online);
    }

    /// Its node is away for good.
    pub fn offline(&self, proxy: &ProxyKey) {
        self.send(proxy, Event::Offline);
    }

    /// It was deregistered.
    pub fn gone(&self, proxy: &ProxyKey) {
        self.send(proxy, Event::Gone);
    }

    /// What runs there, as Kuma's `version` object.
    pub fn version(&self, proxy: &ProxyKey, version: Value) {
        self.send(proxy, Event::Version(version));
    }

    /// Envoy refused something, in its own words.
    pub fn rejected(
        &self,
        proxy: &ProxyKey,
        type_url: &'static str,
        rejections: Vec<ursa_wire::discovery::Rejection>,
    ) {
        self.send(proxy, Event::Rejected { type_url, rejections });
    }

    /// Envoy took these.
    pub fn accepted(&self, proxy: &ProxyKey, type_url: &'static str, names: Vec<std::sync::Arc<str>>) {
        self.send(proxy, Event::Accepted { type_url, names });
    }

    /// It received a certificate.
    pub fn certified(&self, proxy: &ProxyKey, secret_name: String, until: OffsetDateTime) {
        self.send(proxy, Event::Certified { secret_name, until });
    }

    fn send(&self, proxy: &ProxyKey, event: Event) {
        // Fails only while shutting down.
        let _ = self.sender.send((proxy.clone(), event));
    }
}

/// The receiving end; hand it to [`run`].
#[derive(Debug)]
pub struct InsightTask {
    receiver: mpsc::UnboundedReceiver<(ProxyKey, Event)>,
}

/// Writes insights until `shutdown`.
pub async fn run(
    task: InsightTask,
    store: Store,
    world: World,
    instance_id: String,
    shutdown: CancellationToken,
) {
    let mut receiver = task.receiver;
    let mut known: HashMap<ProxyKey, DataplaneInsight> = HashMap::new();
    let mut batch = Vec::new();
    loop {
        let count = tokio::select! {
            count = receiver.recv_many(&mut batch, 4096) => count,
            () = shutdown.cancelled() => return,
        };
        if count == 0 {
            return;
        }
        let mut dirty = HashSet::new();
        let mut gone = HashSet::new();
        for (proxy, event) in batch.drain(..) {
            if matches!(event, Event::Gone) {
                known.remove(&proxy);
                dirty.remove(&proxy);
                gone.insert(proxy);
                continue;
            }
            gone.remove(&proxy);
            let insight = known.entry(proxy.clone()).or_insert_with(|| load(&world, &proxy));
            if change(insight, event, &instance_id) {
                dirty.insert(proxy);
            }
        }
        let writes = dirty.iter().filter_map(|proxy| {
            let insight = known.get(proxy)?.clone();
            Some(write(&store, proxy, insight))
        });
        futures_util::stream::iter(writes).for_each_concurrent(TOGETHER, |write| write).await;
        for proxy in gone {
            let key = ResourceKey::new(DataplaneInsight::DESCRIPTOR, &proxy.mesh, &proxy.name);
            if let Err(error) = store.delete(&key, None).await
                && !matches!(error, StoreError::NotFound(_))
            {
                tracing::error!("can't remove {key}: {error}");
            }
        }
        // What is offline and written need not be remembered.
        known.retain(|_, insight| is_online(insight));
    }
}

fn load(world: &World, proxy: &ProxyKey) -> DataplaneInsight {
    let key = ResourceKey::new(DataplaneInsight::DESCRIPTOR, &proxy.mesh, &proxy.name);
    world.get(&key).and_then(|resource| resource.spec_as().ok()).unwrap_or_default()
}

/// Applies an event; whether anything changed.
fn change(insight: &mut DataplaneInsight, event: Event, instance_id: &str) -> bool {
    let now = || OffsetDateTime::now_utc().format(&Rfc3339).ok();
    match event {
        Event::Online => {
            if let Some(last) = insight.subscriptions.last()
                && last.disconnect_time.is_none()
                && last.control_plane_instance_id == instance_id
            {
                return false;
            }
            // One that another process left open ended at the latest now.
            for open in insight.subscriptions.iter_mut().filter(|open| open.disconnect_time.is_none()) {
                open.disconnect_time = now();
            }
            let version = insight.subscriptions.last().and_then(|last| last.version.clone());
            let generation = insight.subscriptions.last().map_or(0, |last| last.generation + 1);
            insight.subscriptions.push(Subscription {
                id: uuid::Uuid::new_v4().to_string(),
                control_plane_instance_id: instance_id.to_owned(),
                connect_time: now(),
                version,
                generation,
                ..Subscription::default()
            });
            let excess = insight.subscriptions.len().saturating_sub(HISTORY);
            insight.subscriptions.drain(..excess);
            true
        }
        Event::Offline => {
            let Some(last) = insight.subscriptions.last_mut().filter(|last| last.disconnect_time.is_none())
            else {
                return false;
            };
            last.disconnect_time = now();
            true
        }
        Event::Version(version) => {
            let Some(last) = insight.subscriptions.last_mut() else { return false };
            if last.version.as_ref() == Some(&version) {
                return false;
            }
            last.version = Some(version);
            true
        }
        Event::Rejected { type_url, rejections } => {
            let mut changed = false;
            for rejection in rejections {
                let same = insight.rejections.iter().any(|known| {
                    known.type_url == type_url
                        && known.name == rejection.name
                        && known.version == rejection.version
                        && known.message == rejection.message
                });
                if same {
                    continue;
                }
                insight.rejections.retain(|known| known.type_url != type_url || known.name != rejection.name);
                insight.rejections.push(Rejection {
                    type_url: type_url.to_owned(),
                    name: rejection.name,
                    version: rejection.version,
                    message: rejection.message,
                    time: now(),
                });
                changed = true;
            }
            let excess = insight.rejections.len().saturating_sub(REJECTIONS);
            insight.rejections.drain(..excess);
            changed
        }
        Event::Accepted { type_url, names } => {
            let before = insight.rejections.len();
            insight.rejections.retain(|known| {
                known.type_url != type_url || !names.iter().any(|name| **name == *known.name)
            });
            insight.rejections.len() != before
        }
        Event::Certified { secret_name, until } => {
            let mtls = insight.mtls.get_or_insert_with(Mtls::default);
            mtls.certificate_expiration_time = until.format(&Rfc3339).ok();
            mtls.last_certificate_regeneration = now();
            mtls.certificate_regenerations += 1;
            mtls.issued_backend = secret_name;
            true
        }
        Event::Gone => false,
    }
}

async fn write(store: &Store, proxy: &ProxyKey, insight: DataplaneInsight) {
    let key = ResourceKey::new(DataplaneInsight::DESCRIPTOR, &proxy.mesh, &proxy.name);
    let result = async {
        loop {
            let mut meta = Meta::new(&proxy.mesh, &proxy.name);
            meta.labels.insert(labels::MESH.into(), proxy.mesh.clone());
            meta.labels.insert(labels::DISPLAY_NAME.into(), proxy.name.clone());
            let mut resource = Resource::new(meta, &insight);
            let result = match store.get(&key).await? {
                Some(current) => {
                    resource.meta = current.meta.clone();
                    store.update(resource).await
                }
                None => store.create(resource).await,
            };
            match result {
                Err(error) if error.is_conflict() || matches!(error, StoreError::NotFound(_)) => {}
                other => return other.map(|_| ()),
            }
        }
    };
    if let Err(error) = result.await {
        tracing::error!("can't write {key}: {error}");
    }
}

/// Whether the last subscription is open.
fn is_online(insight: &DataplaneInsight) -> bool {
    insight.subscriptions.last().is_some_and(|last| last.disconnect_time.is_none())
}

/// Dataplanes that were online, and those that were not, when the control plane ended. A Dataplane without an
/// insight was never any node's, and belongs to neither.
pub(super) fn split_by_state(index: &Index) -> (Vec<ProxyKey>, Vec<ProxyKey>) {
    index
        .list_all(DataplaneInsight::DESCRIPTOR.name)
        .filter(|insight| {
            let key = ResourceKey::new(Dataplane::DESCRIPTOR, &insight.meta.mesh, &insight.meta.name);
            index.get(&key).is_some()
        })
        .map(|insight| {
            let proxy = ProxyKey { mesh: insight.meta.mesh.clone(), name: insight.meta.name.clone() };
            (proxy, insight.spec_as::<DataplaneInsight>().is_ok_and(|insight| is_online(&insight)))
        })
        .fold((Vec::new(), Vec::new()), |(mut online, mut offline), (proxy, is_online)| {
            let state = if is_online { &mut online } else { &mut offline };
            state.push(proxy);
            (online, offline)
        })
}
