//! `DataplaneInsight`s: one task writes them, each only when it has changed.
//!
//! What is rare and matters (a connection, a refusal, a certificate) is written at once. How far a proxy has come
//! changes with each push, and is written once per [`CADENCE`] at most, and by a bounded number of writes for all
//! proxies together.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use ursa_engine::{ProxyKey, TypeUrl};
use ursa_model::types::dataplane::Dataplane;
use ursa_model::types::dataplane_insight::{
    DataplaneInsight, Mtls, Rejection, ResponseCounts, Subscription, SubscriptionStatus, TypeSync,
};
use ursa_model::{Meta, Resource, ResourceKey, ResourceSpec as _, labels};

use crate::discovery::{Counts, Taken, Tally};
use crate::store::{Store, StoreError};
use crate::world::{Index, World};

/// Subscriptions that an insight keeps.
const HISTORY: usize = 2;

/// Rejections that an insight keeps.
const REJECTIONS: usize = 64;

/// Writes that are under way together: the store commits them as one.
const TOGETHER: usize = 64;

/// How often progress is written.
const CADENCE: Duration = Duration::from_secs(1);

/// Insights that are written for their progress per [`CADENCE`]: with more proxies, each has its turn less often.
const TURNS: usize = 256;

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
    Progress(Arc<Tally>),
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

    /// Its stream has progressed. Called once until the tally is taken.
    pub fn progress(&self, proxy: &ProxyKey, tally: &Arc<Tally>) {
        self.send(proxy, Event::Progress(Arc::clone(tally)));
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
    let mut writer = Writer { store, world, instance_id, known: HashMap::new(), waiting: Waiting::default() };
    let mut batch = Vec::new();
    let mut turn = tokio::time::interval(CADENCE);
    turn.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        let count = tokio::select! {
            count = receiver.recv_many(&mut batch, 4096) => count,
            _ = turn.tick(), if !writer.waiting.order.is_empty() => {
                writer.turn().await;
                continue;
            }
            () = shutdown.cancelled() => {
                writer.turn().await;
                return;
            }
        };
        if count == 0 {
            return;
        }
        writer.take(&mut batch).await;
    }
}

/// Proxies whose progress is to be written, in the order of their turns.
#[derive(Default)]
struct Waiting {
    order: VecDeque<ProxyKey>,
    tallies: HashMap<ProxyKey, Arc<Tally>>,
}

struct Writer {
    store: Store,
    world: World,
    instance_id: String,
    known: HashMap<ProxyKey, DataplaneInsight>,
    waiting: Waiting,
}

impl Writer {
    async fn take(&mut self, batch: &mut Vec<(ProxyKey, Event)>) {
        let mut dirty = HashSet::new();
        let mut gone = HashSet::new();
        for (proxy, event) in batch.drain(..) {
            match event {
                Event::Gone => {
                    self.known.remove(&proxy);
                    self.waiting.tallies.remove(&proxy);
                    dirty.remove(&proxy);
                    gone.insert(proxy);
                }
                Event::Progress(tally) => self.wait(proxy, tally),
                event => {
                    gone.remove(&proxy);
                    // What was counted so far belongs to the connection that ends here, and goes along in any case.
                    self.count(&proxy);
                    let instance_id = self.instance_id.clone();
                    if change(self.insight(&proxy), event, &instance_id) {
                        dirty.insert(proxy);
                    }
                }
            }
        }
        self.write(&dirty).await;
        for proxy in gone {
            let key = ResourceKey::new(DataplaneInsight::DESCRIPTOR, &proxy.mesh, &proxy.name);
            if let Err(error) = self.store.delete(&key, None).await
                && !matches!(error, StoreError::NotFound(_))
            {
                tracing::error!("can't remove {key}: {error}");
            }
        }
        self.forget();
    }

    fn insight(&mut self, proxy: &ProxyKey) -> &mut DataplaneInsight {
        self.known.entry(proxy.clone()).or_insert_with(|| load(&self.world, proxy))
    }

    /// A later stream's tally takes the place of an earlier one's, whose last counts must not be lost.
    fn wait(&mut self, proxy: ProxyKey, tally: Arc<Tally>) {
        if self.waiting.tallies.contains_key(&proxy) {
            self.count(&proxy);
        } else {
            self.waiting.order.push_back(proxy.clone());
        }
        self.waiting.tallies.insert(proxy, tally);
    }

    /// Takes a proxy's counts into its insight, without a write. It keeps its turn, so that they are written.
    fn count(&mut self, proxy: &ProxyKey) {
        if let Some(tally) = self.waiting.tallies.get(proxy) {
            let taken = tally.take();
            progress(self.insight(proxy), taken);
        }
    }

    /// Writes the progress of those who have waited longest.
    async fn turn(&mut self) {
        let turns = self.waiting.order.len().min(TURNS);
        let mut dirty = HashSet::new();
        for proxy in self.waiting.order.drain(..turns).collect::<Vec<_>>() {
            self.count(&proxy);
            // Whoever was deregistered meanwhile has none, and nothing is written of a proxy that never connected.
            let was_connected = self.known.get(&proxy).is_some_and(|it| !it.subscriptions.is_empty());
            if self.waiting.tallies.remove(&proxy).is_some() && was_connected {
                dirty.insert(proxy);
            }
        }
        self.write(&dirty).await;
        self.forget();
    }

    async fn write(&self, dirty: &HashSet<ProxyKey>) {
        let writes = dirty.iter().filter_map(|proxy| {
            let insight = self.known.get(proxy)?.clone();
            Some(write(&self.store, proxy, insight))
        });
        futures_util::stream::iter(writes).for_each_concurrent(TOGETHER, |write| write).await;
    }

    /// What is offline and written need not be remembered.
    fn forget(&mut self) {
        let waiting = &self.waiting.tallies;
        self.known.retain(|proxy, insight| is_online(insight) || waiting.contains_key(proxy));
    }
}

/// Adds what a stream has done to the counts of the present connection, and replaces how far Envoy has come.
fn progress(insight: &mut DataplaneInsight, taken: Taken) {
    insight.envoy_disconnected = taken.no_envoy;
    insight.sync = taken
        .sync
        .into_iter()
        .map(|(kind, sync)| TypeSync { type_url: kind.as_str().to_owned(), ..sync })
        .collect();
    insight.sync.retain(|sync| sync.total > 0);
    let Some(last) = insight.subscriptions.last_mut() else { return };
    let status = last.status.get_or_insert_with(SubscriptionStatus::default);
    status.last_update_time =
        taken.last_update.and_then(|at| at.format(&Rfc3339).ok()).or(status.last_update_time.take());
    for (kind, counts) in taken.counts {
        let own = match kind {
            TypeUrl::Cluster => Some(&mut status.cds),
            TypeUrl::Endpoint => Some(&mut status.eds),
            TypeUrl::Listener => Some(&mut status.lds),
            TypeUrl::Route => Some(&mut status.rds),
            // These end at the agent: no Envoy answers them.
            TypeUrl::Name | TypeUrl::Identity => continue,
            _ => None,
        };
        add(&mut status.total, counts);
        if let Some(own) = own {
            add(own, counts);
        }
    }
}

fn add(sum: &mut Option<ResponseCounts>, counts: Counts) {
    let sum = sum.get_or_insert_with(ResponseCounts::default);
    sum.responses_sent.0 += counts.sent;
    sum.responses_acknowledged.0 += counts.acknowledged;
    sum.responses_rejected.0 += counts.rejected;
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
        Event::Progress(_) | Event::Gone => false,
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
