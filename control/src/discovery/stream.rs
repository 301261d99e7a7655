//! The delta protocol of one stream, as a state machine without IO.
//!
//! The order across types is what keeps Envoy whole: additions go out from what is referred to towards what
//! refers (identity, secrets, clusters, endpoints, filter configurations, listeners, routes, names), removals in
//! reverse and only when every addition was acknowledged. Each type has at most one unacknowledged response; what
//! changes meanwhile waits in a set.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use ursa_engine::{Snapshot, TypeUrl};
use ursa_wire::discovery::{
    CONTROL_PLANE, ControlPlane, DeltaDiscoveryRequest, DeltaDiscoveryResponse, SYNCED,
};

use super::progress::Progress;
use crate::world::Dirty;

/// A response is closed when its resources exceed this, and the rest follows after its acknowledgement.
const RESPONSE_BYTES: usize = 1 << 20;

/// The order of additions.
const ORDER: [TypeUrl; 8] = [
    TypeUrl::Identity,
    TypeUrl::Secret,
    TypeUrl::Cluster,
    TypeUrl::Endpoint,
    TypeUrl::Extension,
    TypeUrl::Listener,
    TypeUrl::Route,
    TypeUrl::Name,
];

/// What a client said about a response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answered {
    /// It took these.
    Accepted {
        /// Their type.
        kind: TypeUrl,
        /// Their names.
        names: Vec<Arc<str>>,
    },
    /// Its Envoy has come further, or not as far any more.
    Reported {
        /// The type that the report is about.
        kind: TypeUrl,
    },
    /// It refused the response, at least in part.
    Rejected {
        /// The response's type.
        kind: TypeUrl,
        /// In its words.
        message: String,
    },
}

/// One stream.
#[derive(Debug, Default)]
pub struct DeltaStream {
    types: [TypeState; ORDER.len()],
    snapshot: Option<Arc<Snapshot>>,
    /// There was a snapshot once: from then on, none means that everything is gone.
    began: bool,
    nonce: u64,
}

#[derive(Debug, Default)]
struct TypeState {
    /// The client has asked for this type.
    asked: bool,
    wildcard: bool,
    names: HashSet<Arc<str>>,
    /// Names whose absence the client waits to hear of.
    awaited: HashSet<Arc<str>>,
    /// What the client holds: name → version.
    held: HashMap<Arc<str>, Arc<str>>,
    /// Names to compare with the snapshot.
    dirty: BTreeSet<Arc<str>>,
    /// Names that are to be sent.
    adds: BTreeSet<Arc<str>>,
    /// Names that are to be removed.
    removals: BTreeSet<Arc<str>>,
    /// The initial state was sent.
    synced: bool,
    unacknowledged: Option<Unacknowledged>,
    progress: Progress,
}

#[derive(Debug)]
struct Unacknowledged {
    nonce: String,
    number: u64,
    names: Vec<Arc<str>>,
}

impl DeltaStream {
    /// Takes a request. Returns what it says about earlier responses, if it does.
    pub fn on_request(&mut self, mut request: DeltaDiscoveryRequest) -> Option<Answered> {
        // A type that this control plane doesn't have stays silent, as a newer client would expect.
        let kind = TypeUrl::parse(&request.type_url)?;
        let snapshot = self.snapshot.clone();
        let state = self.state(kind);
        let answered = state.acknowledge(kind, &request);
        let report = request.applied.take();
        if state.asked {
            state.change_subscription(&request);
        } else {
            state.begin(request, snapshot.as_deref(), kind);
        }
        let Some(report) = report else { return answered };
        state.progress.report(report, &state.held);
        match answered {
            Some(Answered::Rejected { .. }) => answered,
            _ => Some(Answered::Reported { kind }),
        }
    }

    /// What the client has made of a type.
    pub const fn progress(&self, kind: TypeUrl) -> &Progress {
        &self.types[kind as usize].progress
    }

    /// Whether the client was to have exactly this version of a resource, and has not said that it applied it.
    pub fn awaits(&self, kind: TypeUrl, name: &str, version: &str) -> bool {
        if !self.began {
            return true; // nobody knows yet what it is to have
        }
        let (progress, held) = (self.progress(kind), self.held(kind));
        let wanted = self.snapshot.as_ref().and_then(|snapshot| snapshot.get(kind, name));
        let is_held = held.get(name).is_some_and(|held| **held == *version);
        wanted.is_some_and(|wanted| *wanted.version == *version) && (!is_held || progress.is_pending(name))
    }

    /// Name → version of what was sent of a type and not removed.
    pub const fn held(&self, kind: TypeUrl) -> &HashMap<Arc<str>, Arc<str>> {
        &self.types[kind as usize].held
    }

    /// Takes a change of the world.
    pub fn on_change(&mut self, dirty: Dirty) {
        let first = !self.began && dirty.snapshot.is_some();
        self.began |= first;
        let vanished = self.snapshot.is_some() && dirty.snapshot.is_none();
        self.snapshot = dirty.snapshot;
        let snapshot = self.snapshot.clone();
        for kind in ORDER {
            let state = self.state(kind);
            if !state.asked {
                continue;
            }
            if first || vanished {
                state.look_at_everything(snapshot.as_deref(), kind);
            }
        }
        for (kind, names) in dirty.names {
            let state = self.state(kind);
            if state.asked {
                for name in names {
                    if state.covers(&name) {
                        state.dirty.insert(name);
                    }
                }
            }
        }
    }

    /// What is to be sent now. None: nothing, or acknowledgements must come first.
    pub fn next_response(&mut self) -> Option<DeltaDiscoveryResponse> {
        if !self.began {
            return None;
        }
        let snapshot = self.snapshot.clone();
        for kind in ORDER {
            let state = self.state(kind);
            if !state.asked {
                continue;
            }
            state.compare(snapshot.as_deref(), kind);
            if state.adds.is_empty() && state.synced {
                continue;
            }
            if state.unacknowledged.is_some() {
                // What comes later in the order may refer to what waits here.
                return None;
            }
            return Some(self.send_adds(kind, snapshot.as_deref()));
        }
        if self.types.iter().any(|state| state.unacknowledged.is_some()) {
            return None;
        }
        let kind = ORDER.into_iter().rev().find(|kind| !self.state(*kind).removals.is_empty())?;
        Some(self.send_removals(kind))
    }

    fn send_adds(&mut self, kind: TypeUrl, snapshot: Option<&Snapshot>) -> DeltaDiscoveryResponse {
        let (number, nonce) = self.next_nonce();
        let state = self.state(kind);
        let mut resources = Vec::with_capacity(state.adds.len());
        let mut names = Vec::with_capacity(state.adds.len());
        let mut size = 0;
        while size < RESPONSE_BYTES
            && let Some(name) = state.adds.pop_first()
        {
            // Compared with this snapshot a moment ago.
            let Some(resource) = snapshot.and_then(|snapshot| snapshot.get(kind, &name)) else { continue };
            size += resource.bytes.len();
            resources.push(resource.bytes.clone());
            state.awaited.remove(&name);
            state.held.insert(Arc::clone(&resource.name), Arc::clone(&resource.version));
            names.push(Arc::clone(&resource.name));
        }
        state.synced |= state.adds.is_empty();
        let synced = state.synced;
        state.progress.sent(number, &names, &[]);
        state.unacknowledged = Some(Unacknowledged { nonce: nonce.clone(), number, names });
        response(kind, nonce, synced, resources, Vec::new())
    }

    fn send_removals(&mut self, kind: TypeUrl) -> DeltaDiscoveryResponse {
        let (number, nonce) = self.next_nonce();
        let state = self.state(kind);
        let names: Vec<_> = std::mem::take(&mut state.removals).into_iter().collect();
        for name in &names {
            state.held.remove(name);
            state.awaited.remove(name);
        }
        let removed = names.iter().map(|name| name.as_ref().to_owned()).collect();
        state.progress.sent(number, &[], &names);
        state.unacknowledged = Some(Unacknowledged { nonce: nonce.clone(), number, names });
        response(kind, nonce, true, Vec::new(), removed)
    }

    fn next_nonce(&mut self) -> (u64, String) {
        self.nonce += 1;
        (self.nonce, self.nonce.to_string())
    }

    fn state(&mut self, kind: TypeUrl) -> &mut TypeState {
        &mut self.types[kind as usize]
    }
}

impl TypeState {
    fn acknowledge(&mut self, kind: TypeUrl, request: &DeltaDiscoveryRequest) -> Option<Answered> {
        self.unacknowledged.as_ref().filter(|sent| sent.nonce == request.response_nonce)?;
        let sent = self.unacknowledged.take()?;
        self.progress.answered(sent.number, request.error_detail.is_some());
        Some(match &request.error_detail {
            // What was refused stays recorded as held in that version: sending it again would change nothing.
            Some(error) => Answered::Rejected { kind, message: error.message.clone() },
            None => Answered::Accepted { kind, names: sent.names },
        })
    }

    /// The first request of the type: what is wanted, and what the client still has from an earlier stream.
    fn begin(&mut self, request: DeltaDiscoveryRequest, snapshot: Option<&Snapshot>, kind: TypeUrl) {
        self.asked = true;
        self.wildcard = request.resource_names_subscribe.is_empty()
            || request.resource_names_subscribe.iter().any(|name| name == "*");
        self.names =
            request.resource_names_subscribe.into_iter().filter(|name| name != "*").map(Arc::from).collect();
        self.awaited.clone_from(&self.names);
        self.held = request
            .initial_resource_versions
            .into_iter()
            .map(|(name, version)| (Arc::from(name), Arc::from(version)))
            .collect();
        self.look_at_everything(snapshot, kind);
    }

    fn change_subscription(&mut self, request: &DeltaDiscoveryRequest) {
        for name in &request.resource_names_unsubscribe {
            if name == "*" {
                self.wildcard = false;
                let names = &self.names;
                self.held.retain(|name, _| names.contains(name));
            } else {
                let name: Arc<str> = Arc::from(name.as_str());
                self.names.remove(&name);
                self.awaited.remove(&name);
                if !self.wildcard {
                    self.held.remove(&name);
                }
            }
        }
        let mut widened = false;
        for name in &request.resource_names_subscribe {
            if name == "*" {
                widened |= !self.wildcard;
                self.wildcard = true;
            } else {
                // To subscribe again is to say that one has it no more.
                let name: Arc<str> = Arc::from(name.as_str());
                self.held.remove(&name);
                self.awaited.insert(Arc::clone(&name));
                self.dirty.insert(Arc::clone(&name));
                self.names.insert(name);
            }
        }
        if widened {
            self.synced = false;
        }
        let covered = |name: &Arc<str>, state: &Self| state.covers(name);
        let (dirty, adds, removals) = (
            std::mem::take(&mut self.dirty),
            std::mem::take(&mut self.adds),
            std::mem::take(&mut self.removals),
        );
        self.dirty = dirty.into_iter().filter(|name| covered(name, self)).collect();
        self.adds = adds.into_iter().filter(|name| covered(name, self)).collect();
        self.removals = removals.into_iter().filter(|name| covered(name, self)).collect();
    }

    fn look_at_everything(&mut self, snapshot: Option<&Snapshot>, kind: TypeUrl) {
        self.dirty.extend(self.held.keys().cloned());
        self.dirty.extend(self.names.iter().cloned());
        if self.wildcard
            && let Some(snapshot) = snapshot
        {
            self.dirty.extend(snapshot.iter(kind).map(|resource| Arc::clone(&resource.name)));
        }
    }

    fn covers(&self, name: &Arc<str>) -> bool {
        self.wildcard || self.names.contains(name) || self.held.contains_key(name)
    }

    /// Sorts dirty names into what is to be sent, what is to be removed, and what is as it was.
    fn compare(&mut self, snapshot: Option<&Snapshot>, kind: TypeUrl) {
        // What waits may have changed again.
        if !self.dirty.is_empty() || !self.adds.is_empty() || !self.removals.is_empty() {
            self.dirty.append(&mut self.adds);
            self.dirty.append(&mut self.removals);
        }
        while let Some(name) = self.dirty.pop_first() {
            match snapshot.and_then(|snapshot| snapshot.get(kind, &name)) {
                Some(resource) if self.held.get(&name) == Some(&resource.version) => {
                    // Share the engine's strings rather than keep the client's copies.
                    self.held.remove(&name);
                    self.held.insert(Arc::clone(&resource.name), Arc::clone(&resource.version));
                    self.awaited.remove(&name);
                }
                Some(_) => {
                    self.adds.insert(name);
                }
                None if self.held.contains_key(&name) || self.awaited.contains(&name) => {
                    self.removals.insert(name);
                }
                None => {}
            }
        }
    }
}

fn response(
    kind: TypeUrl,
    nonce: String,
    synced: bool,
    resources: Vec<bytes::Bytes>,
    removed_resources: Vec<String>,
) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        system_version_info: if synced { SYNCED.to_owned() } else { String::new() },
        resources,
        type_url: kind.as_str().to_owned(),
        nonce,
        removed_resources,
        control_plane: Some(ControlPlane { identifier: CONTROL_PLANE.to_owned() }),
    }
}
