//! One Envoy's delta stream as a state machine without IO.
//!
//! Per type at most one response is on its way; the next one is computed from what Envoy should have and what it
//! has acknowledged, so a slow Envoy skips intermediate versions. Envoy applies the good part of a response that
//! it rejects without saying which part that was: every resource of a rejected response is sent again on its own.

use std::collections::{BTreeMap, BTreeSet};

use super::cache::{Cache, Item, KindCache, State};
use super::{Kind, resource};

/// A response carries at most about this much, so that one change never holds a stream for long.
const RESPONSE_BYTES: usize = 2 * 1024 * 1024;

/// What Envoy sent, reduced to what matters here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// The type URL.
    pub type_url: String,
    /// Names to subscribe to; `*` subscribes to everything.
    pub subscribe: Vec<String>,
    /// Names to unsubscribe from.
    pub unsubscribe: Vec<String>,
    /// What Envoy already has (first request of a type on a stream).
    pub initial_versions: BTreeMap<String, String>,
    /// The nonce of the response that this request answers.
    pub nonce: String,
    /// Envoy's words, if it rejected that response.
    pub error: Option<String>,
}

/// What Envoy is to get next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// The type of all resources in it.
    pub kind: Kind,
    /// This response's nonce.
    pub nonce: String,
    /// Added and changed resources.
    pub items: Vec<(String, Item)>,
    /// Names of removed resources.
    pub removed: Vec<String>,
}

#[derive(Debug)]
struct InFlight {
    nonce: String,
    items: Vec<(String, Item)>,
    removed: Vec<String>,
}

#[derive(Debug, Default)]
struct Subscription {
    started: bool,
    wildcard: bool,
    names: BTreeSet<String>,
    /// What Envoy has acknowledged: name → version.
    acked: BTreeMap<String, String>,
    in_flight: Option<InFlight>,
    /// Part of a rejected response; to be sent singly.
    suspects: BTreeSet<String>,
    /// To be sent although Envoy has acknowledged that version.
    again: BTreeSet<String>,
    /// Envoy has had a response on this stream: an empty one tells it that there is nothing.
    answered: bool,
}

impl Subscription {
    fn wants(&self, name: &str) -> bool {
        self.wildcard || self.names.contains(name)
    }

    fn is_current(&self, name: &str, item: &Item) -> bool {
        !self.again.contains(name) && self.acked.get(name).is_some_and(|version| *version == item.version)
    }

    fn outstanding<'a>(&'a self, cache: &'a KindCache) -> impl Iterator<Item = (&'a String, &'a Item)> {
        cache.desired().filter(|(name, item)| self.wants(name) && !self.is_current(name, item))
    }
}

/// The state of one Envoy's stream.
#[derive(Debug, Default)]
pub struct Downstream {
    kinds: [Subscription; Kind::ENVOY.len()],
    counter: u64,
    /// The cache's number of this stream, once Envoy has said something on it.
    stream: Option<u64>,
}

impl Downstream {
    /// A stream that has just been opened.
    pub fn new() -> Self {
        Self::default()
    }

    const fn sub(&self, kind: Kind) -> &Subscription {
        &self.kinds[kind.index()]
    }

    const fn sub_mut(&mut self, kind: Kind) -> &mut Subscription {
        &mut self.kinds[kind.index()]
    }

    /// Takes in a request. Types that the relay doesn't carry are ignored: Envoy waits for them without harm.
    pub fn on_request(&mut self, request: &Request, cache: &Cache) {
        let Some(kind) = Kind::from_type_url(&request.type_url).filter(|kind| kind.is_for_envoy()) else {
            return;
        };
        cache.with(|state| {
            let stream = self.stream.unwrap_or_else(|| {
                if request.initial_versions.is_empty() {
                    state.retry_refused_without_good();
                }
                state.stream_opened()
            });
            self.stream = Some(stream);
            self.take_in(stream, kind, request, state);
        });
    }

    /// The stream has ended: what its Envoy runs is no longer known.
    pub fn close(&mut self, cache: &Cache) {
        if let Some(stream) = self.stream.take() {
            cache.with(|state| state.stream_closed(stream));
        }
    }

    fn take_in(&mut self, stream: u64, kind: Kind, request: &Request, state: &mut State) {
        let sub = self.sub_mut(kind);
        let first = !std::mem::replace(&mut sub.started, true);
        if first {
            // The legacy form of a wildcard: a first request that names nothing.
            sub.wildcard = request.subscribe.is_empty();
            for (name, version) in &request.initial_versions {
                sub.acked.insert(name.clone(), version.clone());
                let held = state.kind(kind).get(name).filter(|item| item.version == *version).cloned();
                if let Some(item) = held {
                    state.accepted(stream, kind, name, &item);
                }
            }
        }
        self.answer(stream, kind, request, state);
        let sub = self.sub_mut(kind);
        for name in &request.unsubscribe {
            if name == "*" {
                sub.wildcard = false;
            } else {
                sub.names.remove(name);
            }
            if !sub.wants(name) {
                sub.acked.remove(name);
                sub.again.remove(name);
            }
        }
        if !sub.wildcard && request.unsubscribe.iter().any(|name| name == "*") {
            let names = &sub.names;
            sub.acked.retain(|name, _| names.contains(name));
        }
        for name in &request.subscribe {
            if name == "*" {
                sub.wildcard = true;
                continue;
            }
            // The protocol requires an answer to every subscription, even to a name that Envoy had before.
            if !(first && request.initial_versions.contains_key(name)) {
                sub.acked.remove(name);
            }
            sub.names.insert(name.clone());
        }
    }

    /// Handles the ACK or NACK in a request.
    fn answer(&mut self, stream: u64, kind: Kind, request: &Request, state: &mut State) {
        let sub = self.sub_mut(kind);
        let Some(in_flight) = sub.in_flight.take_if(|in_flight| in_flight.nonce == request.nonce) else {
            return; // a plain subscription, or an answer to a response of a former stream
        };
        match &request.error {
            None => {
                for name in &in_flight.removed {
                    sub.acked.remove(name);
                }
                for (name, item) in &in_flight.items {
                    sub.acked.insert(name.clone(), item.version.clone());
                    state.accepted(stream, kind, name, item);
                }
            }
            Some(words) => {
                // Removals are never what Envoy rejects.
                for name in &in_flight.removed {
                    sub.acked.remove(name);
                }
                if let [(name, item)] = in_flight.items.as_slice() {
                    sub.suspects.remove(name);
                    state.refused(kind, name, item, words);
                    tracing::warn!(%kind, %name, version = %item.version, envoy = %words,
                        "Envoy refused a resource; it keeps its former version");
                } else {
                    sub.suspects.extend(in_flight.items.into_iter().map(|(name, _)| name));
                }
            }
        }
    }

    /// An updated cluster warms again and needs its endpoints again, but Envoy doesn't ask for what it is already
    /// subscribed to.
    fn send_endpoints_again(&mut self, clusters: &[(String, Item)]) {
        for (name, item) in clusters {
            let Some(endpoints) = resource::endpoints_of_cluster(name, &item.bytes) else { continue };
            let subscription = self.sub_mut(Kind::Endpoint);
            if subscription.names.contains(&endpoints) {
                subscription.again.insert(endpoints);
            }
        }
    }

    /// The next response, if there is something to send now. Call until it returns nothing.
    pub fn next(&mut self, cache: &Cache) -> Option<Response> {
        cache.with(|state| {
            Kind::ENVOY
                .into_iter()
                .find_map(|kind| self.additions(kind, state))
                .or_else(|| Kind::ENVOY.into_iter().rev().find_map(|kind| self.removals(kind, state)))
                .or_else(|| {
                    self.settle(state);
                    None
                })
        })
    }

    /// Says so when Envoy has everything that it asked for, clusters and listeners among it.
    fn settle(&self, state: &mut State) {
        let Some(stream) = self.stream else { return };
        let busy = |kind: Kind| {
            let sub = self.sub(kind);
            sub.in_flight.is_some()
                || !sub.suspects.is_empty()
                || sub.outstanding(state.kind(kind)).next().is_some()
        };
        let asked = [Kind::Cluster, Kind::Listener].into_iter().all(|kind| self.sub(kind).answered);
        if !asked || Kind::ENVOY.into_iter().any(busy) {
            return;
        }
        for kind in Kind::ENVOY {
            state.settled(stream, kind, |name| self.sub(kind).wants(name));
        }
    }

    /// Clusters before their endpoints before the listeners that use them. Envoy acknowledges clusters only once
    /// they are warm, so nothing refers to one that isn't. Filter configurations that Envoy already uses go before
    /// their listeners too: what a change of both closes must not be open in between.
    fn may_add(&self, kind: Kind, state: &State) -> bool {
        let idle = |kind: Kind| {
            let sub = self.sub(kind);
            sub.in_flight.is_none() && sub.outstanding(state.kind(kind)).next().is_none()
        };
        match kind {
            Kind::Route => idle(Kind::Cluster) && idle(Kind::Endpoint),
            Kind::Listener => idle(Kind::Cluster) && idle(Kind::Endpoint) && idle(Kind::Extension),
            _ => true,
        }
    }

    fn additions(&mut self, kind: Kind, state: &State) -> Option<Response> {
        let sub = self.sub(kind);
        if !sub.started || sub.in_flight.is_some() || !self.may_add(kind, state) {
            return None;
        }
        let cache = state.kind(kind);
        let mut items: Vec<(String, Item)> = Vec::new();
        let mut size = 0;
        let suspect = sub.outstanding(cache).find(|(name, _)| sub.suspects.contains(*name));
        if let Some((name, item)) = suspect {
            items.push((name.clone(), item.clone()));
        } else {
            for (name, item) in sub.outstanding(cache) {
                size += item.bytes.len();
                if size > RESPONSE_BYTES && !items.is_empty() {
                    break;
                }
                items.push((name.clone(), item.clone()));
            }
        }
        let must_answer = sub.wildcard && !sub.answered && cache.is_complete();
        if items.is_empty() && !must_answer {
            self.sub_mut(kind).suspects.clear();
            return None;
        }
        for (name, _) in &items {
            self.sub_mut(kind).suspects.remove(name);
        }
        Some(self.respond(kind, items, Vec::new()))
    }

    /// What depends on others goes first: a cluster stays until no listener is about to change.
    fn removals(&mut self, kind: Kind, state: &State) -> Option<Response> {
        let sub = self.sub(kind);
        if !sub.started || sub.in_flight.is_some() || !state.kind(kind).is_authoritative() {
            return None;
        }
        let listeners = self.sub(Kind::Listener);
        let listeners_settled = listeners.in_flight.is_none()
            && (!listeners.started || listeners.outstanding(state.kind(Kind::Listener)).next().is_none());
        if kind != Kind::Listener && !listeners_settled {
            return None;
        }
        let cache = state.kind(kind);
        let removed: Vec<String> =
            sub.acked.keys().filter(|name| sub.wants(name) && cache.get(name).is_none()).cloned().collect();
        if removed.is_empty() {
            return None;
        }
        Some(self.respond(kind, Vec::new(), removed))
    }

    fn respond(&mut self, kind: Kind, items: Vec<(String, Item)>, removed: Vec<String>) -> Response {
        self.counter += 1;
        let nonce = self.counter.to_string();
        if kind == Kind::Cluster {
            self.send_endpoints_again(&items);
        }
        let sub = self.sub_mut(kind);
        for (name, _) in &items {
            sub.again.remove(name);
        }
        sub.answered = true;
        sub.in_flight =
            Some(InFlight { nonce: nonce.clone(), items: items.clone(), removed: removed.clone() });
        Response { kind, nonce, items, removed }
    }
}

#[cfg(test)]
mod tests;
