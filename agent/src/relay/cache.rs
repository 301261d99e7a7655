//! What one workload's Envoy is to have, what it has accepted, and what it has refused.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::Kind;

/// One resource: its version and the encoded discovery `Resource` message, shared and never re-encoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// The version that control (or the agent, for its own secrets) gave it.
    pub version: String,
    /// The encoded `envoy.service.discovery.v3.Resource`.
    pub bytes: Bytes,
}

/// A resource that Envoy refused, in Envoy's words.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Rejection {
    /// The resource's type URL.
    pub type_url: String,
    /// The resource's name.
    pub name: String,
    /// The refused version.
    pub version: String,
    /// What Envoy said.
    pub message: String,
}

/// Where the configuration that is being served came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// Nothing yet.
    None,
    /// The last-good directory; control hasn't completed a sync since.
    Disk,
    /// Control.
    Live,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Entry {
    current: Option<Item>,
    good: Option<Item>,
    refused: Option<(String, String)>,
    /// The version that the connected Envoy has acknowledged.
    running: Option<String>,
}

impl Entry {
    /// What Envoy should have now: the current version unless it refused exactly that one.
    fn desired(&self) -> Option<&Item> {
        let current = self.current.as_ref()?;
        match &self.refused {
            Some((version, _)) if *version == current.version => {
                self.good.as_ref().filter(|good| good.version != *version)
            }
            _ => Some(current),
        }
    }

    /// What Envoy has made of the current version.
    fn outcome(&self) -> Outcome<'_> {
        let Some(current) = &self.current else { return Outcome::Applied };
        match &self.refused {
            Some((version, message)) if *version == current.version => Outcome::Refused(version, message),
            _ if self.running.as_ref() == Some(&current.version) => Outcome::Applied,
            _ => Outcome::Pending,
        }
    }
}

enum Outcome<'a> {
    Applied,
    Pending,
    Refused(&'a str, &'a str),
}

/// What the connected Envoy has made of the current resources of one type: all is applied except these.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unapplied {
    /// No Envoy is connected: whatever isn't refused is pending, and not listed.
    pub no_envoy: bool,
    /// Names whose current version Envoy has not answered.
    pub pending: Vec<String>,
    /// What it refused.
    pub refused: Vec<Rejection>,
}

#[derive(Debug, Default)]
pub(super) struct KindCache {
    entries: BTreeMap<String, Entry>,
    /// Names that the agent itself put; control neither replaces nor removes them.
    local: BTreeSet<String>,
    /// Control has marked the end of its initial state since the last (re)connect.
    synced: bool,
    /// There has been a complete picture at some time: from control, or from disk.
    complete: bool,
    /// That picture was control's own, so what is missing in it may be taken away from Envoy. A file that is
    /// missing or damaged on disk must not.
    authoritative: bool,
    /// Removals that arrived before the initial state was complete.
    held_removals: BTreeSet<String>,
}

impl KindCache {
    pub(super) fn desired(&self) -> impl Iterator<Item = (&String, &Item)> {
        self.entries.iter().filter_map(|(name, entry)| entry.desired().map(|item| (name, item)))
    }

    pub(super) fn get(&self, name: &str) -> Option<&Item> {
        self.entries.get(name).and_then(Entry::desired)
    }

    pub(super) const fn is_complete(&self) -> bool {
        self.complete
    }

    pub(super) const fn is_authoritative(&self) -> bool {
        self.authoritative
    }
}

#[derive(Debug)]
pub(super) struct State {
    kinds: [KindCache; Kind::ALL.len()],
    source: Source,
    revision: u64,
    reports: u64,
    /// The newest stream of an Envoy, and whether it is still open.
    stream: u64,
    open: bool,
}

impl State {
    pub(super) const fn kind(&self, kind: Kind) -> &KindCache {
        &self.kinds[kind.index()]
    }

    const fn kind_mut(&mut self, kind: Kind) -> &mut KindCache {
        &mut self.kinds[kind.index()]
    }

    /// An Envoy opened a stream: what it runs is what it says on that one, whatever an older one said.
    pub(super) fn stream_opened(&mut self) -> u64 {
        self.stream += 1;
        self.open = true;
        self.forget_running();
        self.stream
    }

    /// A stream ended. If it was the newest, no Envoy runs anything that we know of.
    pub(super) fn stream_closed(&mut self, stream: u64) {
        if stream == self.stream && std::mem::take(&mut self.open) {
            self.forget_running();
        }
    }

    fn forget_running(&mut self) {
        for entry in self.kinds.iter_mut().flat_map(|kind| kind.entries.values_mut()) {
            entry.running = None;
        }
        self.reports += 1;
    }

    /// Envoy has everything that it asked for: what it doesn't ask for waits for nobody. Should it ask later, it
    /// gets the current version.
    pub(super) fn settled(&mut self, stream: u64, kind: Kind, wants: impl Fn(&str) -> bool) {
        if stream != self.stream {
            return;
        }
        let mut changed = false;
        for (name, entry) in &mut self.kind_mut(kind).entries {
            if wants(name) {
                continue;
            }
            let current = entry.current.as_ref().map(|item| &item.version);
            if entry.running.as_ref() != current {
                entry.running = current.cloned();
                changed = true;
            }
        }
        self.reports += u64::from(changed);
    }

    /// Envoy accepted `item` under `name`, on this stream.
    pub(super) fn accepted(&mut self, stream: u64, kind: Kind, name: &str, item: &Item) {
        let newest = stream == self.stream;
        let Some(entry) = self.kind_mut(kind).entries.get_mut(name) else { return };
        let runs = newest && entry.running.as_ref() != Some(&item.version);
        if runs {
            entry.running = Some(item.version.clone());
        }
        let news = entry.good.as_ref() != Some(item);
        if news {
            entry.good = Some(item.clone());
        }
        let healed = entry.refused.take_if(|(version, _)| *version == item.version).is_some();
        self.revision += u64::from(news);
        self.reports += u64::from(healed || runs);
    }

    /// Envoy refused `item` under `name` when it was alone in a response: pin the version, keep the old one serving.
    pub(super) fn refused(&mut self, kind: Kind, name: &str, item: &Item, message: &str) {
        let Some(entry) = self.kind_mut(kind).entries.get_mut(name) else { return };
        let refusal = (item.version.clone(), message.to_owned());
        if entry.refused.as_ref() != Some(&refusal) {
            entry.refused = Some(refusal);
            self.reports += 1;
        }
        self.revision += 1;
    }

    /// A new Envoy process has nothing to lose: what was refused without a version to fall back on is tried again.
    pub(super) fn retry_refused_without_good(&mut self) {
        for kind in &mut self.kinds {
            for entry in kind.entries.values_mut() {
                if entry.good.is_none() && entry.refused.take().is_some() {
                    self.revision += 1;
                    self.reports += 1;
                }
            }
        }
    }

    fn put(&mut self, kind: Kind, name: String, item: Item) {
        let cache = self.kind_mut(kind);
        let entry = cache.entries.entry(name).or_default();
        if entry.current.as_ref() == Some(&item) {
            return;
        }
        if !kind.is_for_envoy() {
            entry.good = Some(item.clone());
        }
        let had_refusal = entry.refused.as_ref().is_some_and(|(version, _)| *version != item.version);
        if had_refusal {
            entry.refused = None;
        }
        entry.current = Some(item);
        self.revision += 1;
        self.reports += u64::from(had_refusal);
    }

    fn remove(&mut self, kind: Kind, name: &str) {
        if let Some(entry) = self.kind_mut(kind).entries.remove(name) {
            self.revision += 1;
            self.reports += u64::from(entry.refused.is_some());
        }
    }
}

/// The configuration of one workload, shared by its upstream stream, its Envoys, the disk and the DNS table.
#[derive(Debug)]
pub struct Cache {
    state: Mutex<State>,
    changed: watch::Sender<u64>,
    reports: watch::Sender<u64>,
}

impl Default for Cache {
    fn default() -> Self {
        Self {
            state: Mutex::new(State {
                kinds: Default::default(),
                source: Source::None,
                revision: 0,
                reports: 0,
                stream: 0,
                open: false,
            }),
            changed: watch::Sender::new(0),
            reports: watch::Sender::new(0),
        }
    }
}

impl Cache {
    /// An empty cache.
    pub fn new() -> Self {
        Self::default()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is consistent between statements, so a panic elsewhere doesn't make it unusable.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `f` on the state and tells the watchers if it changed something.
    pub(super) fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        let mut state = self.lock();
        let (revision, reports) = (state.revision, state.reports);
        let result = f(&mut state);
        let (new_revision, new_reports) = (state.revision, state.reports);
        drop(state);
        if new_revision != revision {
            self.changed.send_replace(new_revision);
        }
        if new_reports != reports {
            self.reports.send_replace(new_reports);
        }
        result
    }

    /// Wakes on every change of what is to be served or has been accepted.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Wakes when what Envoy has acknowledged or refused changes.
    pub fn rejection_changes(&self) -> watch::Receiver<u64> {
        self.reports.subscribe()
    }

    /// Puts a resource that the agent itself owns; control can neither replace nor remove it.
    pub fn put_local(&self, kind: Kind, name: &str, item: Item) {
        self.with(|state| {
            state.kind_mut(kind).local.insert(name.to_owned());
            state.put(kind, name.to_owned(), item);
        });
    }

    /// Removes a resource that the agent itself owns.
    pub fn remove_local(&self, kind: Kind, name: &str) {
        self.with(|state| {
            if state.kind_mut(kind).local.remove(name) {
                state.remove(kind, name);
            }
        });
    }

    /// Fills the cache from disk: everything in it has been accepted once, and the picture is complete.
    pub fn load(&self, items: Vec<(Kind, String, Item)>) {
        if items.is_empty() {
            return;
        }
        self.with(|state| {
            for (kind, name, item) in items {
                let entry = state.kind_mut(kind).entries.entry(name).or_default();
                entry.good = Some(item.clone());
                entry.current = Some(item);
            }
            for kind in &mut state.kinds {
                kind.complete = true;
            }
            state.source = Source::Disk;
            state.revision += 1;
        });
    }

    /// Control's stream has (re)started: until it marks the initial state as complete, nothing is removed.
    pub fn begin_sync(&self) {
        self.with(|state| {
            for kind in &mut state.kinds {
                kind.synced = false;
                kind.held_removals.clear();
            }
        });
    }

    /// Takes in what control sent for one type.
    pub fn update(&self, kind: Kind, added: Vec<(String, Item)>, removed: Vec<String>) {
        self.with(|state| {
            for (name, item) in added {
                let cache = state.kind_mut(kind);
                if cache.local.contains(&name) {
                    continue;
                }
                cache.held_removals.remove(&name);
                state.put(kind, name, item);
            }
            for name in removed {
                let cache = state.kind_mut(kind);
                if cache.local.contains(&name) {
                    continue;
                }
                if cache.synced {
                    state.remove(kind, &name);
                } else {
                    cache.held_removals.insert(name);
                }
            }
        });
    }

    /// Control has marked its initial state of `kind` as complete: removals that were held take effect.
    pub fn synced(&self, kind: Kind) {
        self.with(|state| {
            let cache = state.kind_mut(kind);
            if cache.synced {
                return;
            }
            cache.synced = true;
            cache.complete = true;
            cache.authoritative = true;
            let held = std::mem::take(&mut cache.held_removals);
            for name in held {
                state.remove(kind, &name);
            }
            if Kind::ALL.iter().all(|kind| state.kind(*kind).synced) {
                state.source = Source::Live;
            }
            state.revision += 1;
        });
    }

    /// Control's stream is gone; what it sent goes on being served.
    pub fn disconnected(&self) {
        self.with(|state| {
            for kind in &mut state.kinds {
                kind.synced = false;
            }
        });
    }

    /// Names and versions that control needn't send again on a new stream.
    pub fn held_versions(&self, kind: Kind) -> Vec<(String, String)> {
        let state = self.lock();
        let cache = state.kind(kind);
        cache
            .entries
            .iter()
            .filter(|(name, _)| !cache.local.contains(*name))
            .filter_map(|(name, entry)| {
                entry.current.as_ref().map(|item| (name.clone(), item.version.clone()))
            })
            .collect()
    }

    /// Where the configuration came from.
    pub fn source(&self) -> Source {
        self.lock().source
    }

    /// Whether there is a complete configuration to start an Envoy with.
    pub fn is_complete(&self) -> bool {
        let state = self.lock();
        [Kind::Cluster, Kind::Listener].iter().all(|kind| state.kind(*kind).complete)
    }

    /// What was refused and not yet replaced.
    pub fn rejections(&self) -> Vec<Rejection> {
        let state = self.lock();
        Kind::ALL
            .into_iter()
            .flat_map(|kind| {
                state.kind(kind).entries.iter().filter_map(move |(name, entry)| {
                    let (version, message) = entry.refused.as_ref()?;
                    Some(Rejection {
                        type_url: kind.type_url().to_owned(),
                        name: name.clone(),
                        version: version.clone(),
                        message: message.clone(),
                    })
                })
            })
            .collect()
    }

    /// What Envoy has made of control's resources of one type. Our own types are applied once they are here.
    pub fn unapplied(&self, kind: Kind) -> Unapplied {
        let state = self.lock();
        let cache = state.kind(kind);
        let mut unapplied = Unapplied::default();
        if !kind.is_for_envoy() {
            return unapplied;
        }
        unapplied.no_envoy = !state.open;
        for (name, entry) in cache.entries.iter().filter(|(name, _)| !cache.local.contains(*name)) {
            match entry.outcome() {
                Outcome::Applied => {}
                Outcome::Pending if unapplied.no_envoy => {}
                Outcome::Pending => unapplied.pending.push(name.clone()),
                Outcome::Refused(version, message) => unapplied.refused.push(Rejection {
                    type_url: kind.type_url().to_owned(),
                    name: name.clone(),
                    version: version.to_owned(),
                    message: message.to_owned(),
                }),
            }
        }
        unapplied
    }

    /// What Envoy has accepted (for our own types: what control sent), without the agent's own secrets.
    pub fn good(&self) -> Vec<(Kind, String, Item)> {
        let state = self.lock();
        Kind::ALL
            .into_iter()
            .flat_map(|kind| {
                let cache = state.kind(kind);
                cache
                    .entries
                    .iter()
                    .filter(|(name, _)| !cache.local.contains(*name))
                    .filter_map(move |(name, entry)| Some((kind, name.clone(), entry.good.clone()?)))
            })
            .collect()
    }

    /// Names of the resources of one type that Envoy has accepted, with the accepted version.
    pub fn accepted(&self, kind: Kind) -> BTreeMap<String, String> {
        let state = self.lock();
        state
            .kind(kind)
            .entries
            .iter()
            .filter_map(|(name, entry)| Some((name.clone(), entry.good.as_ref()?.version.clone())))
            .collect()
    }

    /// The current resources of one type, as control sent them.
    pub fn current(&self, kind: Kind) -> Vec<(String, Item)> {
        let state = self.lock();
        state
            .kind(kind)
            .entries
            .iter()
            .filter_map(|(name, entry)| Some((name.clone(), entry.current.clone()?)))
            .collect()
    }

    /// Whether everything that Envoy should have has been accepted.
    pub fn is_settled(&self, kind: Kind) -> bool {
        let state = self.lock();
        state.kind(kind).complete
            && state.kind(kind).entries.values().all(|entry| {
                entry.refused.is_some()
                    || entry.current.as_ref().map(|i| &i.version) == entry.good.as_ref().map(|i| &i.version)
            })
    }
}
