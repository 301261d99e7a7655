//! What a stream tells the insight of its proxy, without a write or a wake-up for each push.
//!
//! The stream puts numbers into a [`Tally`]; whoever writes insights takes them out when it is time.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use time::OffsetDateTime;
use ursa_engine::TypeUrl;
use ursa_model::types::dataplane_insight::TypeSync;

use super::DeltaStream;
use super::progress::Counts;

/// Names of pending resources that an insight shows, of each type.
const NAMES: usize = 8;

/// Numbers of one stream.
#[derive(Debug, Default)]
pub struct Tally {
    state: Mutex<Taken>,
}

/// What a stream has done since it was asked last, and how it stands.
#[derive(Debug, Default, Clone)]
pub struct Taken {
    /// Responses since the last time, by type.
    pub counts: BTreeMap<TypeUrl, Counts>,
    /// When the last response was sent.
    pub last_update: Option<OffsetDateTime>,
    /// How far Envoy has come, by type.
    pub sync: BTreeMap<TypeUrl, TypeSync>,
    /// The agent has no Envoy.
    pub no_envoy: bool,
    told: BTreeMap<TypeUrl, Counts>,
    marked: bool,
}

impl Tally {
    /// Notes how a type stands. True if whoever takes is to be told, which it is once until it does.
    pub fn note(&self, kind: TypeUrl, stream: &DeltaStream, sent_at: Option<OffsetDateTime>) -> bool {
        let (progress, held) = (stream.progress(kind), stream.held(kind));
        let now = progress.counts();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let state = &mut *state;
        let told = state.told.entry(kind).or_default();
        let counts = state.counts.entry(kind).or_default();
        counts.sent += now.sent - told.sent;
        counts.acknowledged += now.acknowledged - told.acknowledged;
        counts.rejected += now.rejected - told.rejected;
        *told = now;
        state.last_update = sent_at.or(state.last_update);
        state.no_envoy = progress.no_envoy();
        let sync = state.sync.entry(kind).or_default();
        sync.total = number(held.len());
        sync.pending = number(progress.pending_count(held));
        sync.refused = number(progress.refused().len());
        // Between a response and its acknowledgement is no time to name names.
        if sent_at.is_none() {
            sync.pending_names =
                progress.pending().take(NAMES).map(|name| name.as_ref().to_owned()).collect();
            sync.pending_names.sort_unstable();
        }
        if kind == TypeUrl::Secret && sent_at.is_none() {
            sync.acknowledged = held
                .iter()
                .filter(|(name, _)| !progress.is_pending(name) && !progress.is_refused(name))
                .map(|(name, version)| (name.as_ref().to_owned(), version.as_ref().to_owned()))
                .collect();
        }
        !std::mem::replace(&mut state.marked, true)
    }

    /// Takes what was noted since the last time.
    pub fn take(&self) -> Taken {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = state.clone();
        state.counts.clear();
        state.marked = false;
        taken
    }
}

fn number(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
