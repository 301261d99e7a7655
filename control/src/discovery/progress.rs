//! What a client has made of the responses of one type.
//!
//! A plain client acknowledges what it applies. An agent acknowledges what it has stored, and says beside how far
//! its Envoy has come ([`Applied`]); a response counts as acknowledged when none of its resources is pending any
//! more, be it that Envoy took it or something newer in its place.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use ursa_wire::discovery::{Applied, Rejection};

/// Name → version of what a client holds.
pub(super) type Held = HashMap<Arc<str>, Arc<str>>;

/// Responses of one type since the stream opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Sent.
    pub sent: u64,
    /// Acknowledged, in the sense above.
    pub acknowledged: u64,
    /// Refused, at least in part.
    pub rejected: u64,
}

/// The state of one type.
#[derive(Debug, Default)]
pub struct Progress {
    counts: Counts,
    /// The client tells apart what it stored and what Envoy runs.
    reports: bool,
    /// No Envoy is connected to the agent.
    no_envoy: bool,
    /// Responses that have not come to their end, oldest first.
    open: Vec<Open>,
    pending: HashSet<Arc<str>>,
    refused: HashMap<Arc<str>, Rejection>,
}

#[derive(Debug)]
struct Open {
    nonce: u64,
    /// This response, and older ones that it has replaced entirely.
    responses: u64,
    rejected: bool,
    /// It brought nothing for Envoy to take, so it ends with its acknowledgement.
    empty: bool,
    names: Vec<Arc<str>>,
}

impl Progress {
    /// A response went out.
    pub(super) fn sent(&mut self, nonce: u64, names: &[Arc<str>], removed: &[Arc<str>]) {
        self.counts.sent += 1;
        let mut responses = 1;
        let newer: HashSet<&Arc<str>> = names.iter().chain(removed).collect();
        for name in &newer {
            self.refused.remove(*name);
            self.pending.remove(*name);
        }
        // Whether pending or not: without an Envoy, older responses wait for names that are not. So each name is
        // in one open response at most, and there are never more of those than names.
        for open in &mut self.open {
            open.names.retain(|name| !newer.contains(name));
        }
        // One whose names are all newer by now ends with those.
        self.open.retain(|open| {
            let replaced = open.names.is_empty() && !open.empty;
            responses += if replaced { open.responses } else { 0 };
            !replaced
        });
        self.pending.extend(names.iter().cloned());
        let empty = names.is_empty() && responses == 1;
        self.open.push(Open { nonce, responses, rejected: false, empty, names: names.to_vec() });
    }

    /// The client acknowledged a response, or refused it.
    pub(super) fn answered(&mut self, nonce: u64, refused: bool) {
        let Some(at) = self.open.iter().position(|open| open.nonce == nonce) else { return };
        if self.reports && !refused && !self.open[at].empty {
            return; // it is stored; what Envoy says comes in a report
        }
        let open = self.open.remove(at);
        for name in &open.names {
            self.pending.remove(name);
        }
        self.finish(open.responses, refused);
    }

    /// An agent says how far its Envoy has come.
    pub(super) fn report(&mut self, report: Applied, held: &Held) {
        self.reports = true;
        self.no_envoy = report.no_envoy;
        let through = report.through.parse().unwrap_or(0);
        let known = |name: &str| held.get_key_value(name);
        self.refused = report
            .refused
            .into_iter()
            .filter_map(|rejection| {
                let (name, version) = known(&rejection.name)?;
                (**version == *rejection.version).then(|| (Arc::clone(name), rejection))
            })
            .collect();
        self.pending = report.pending.iter().filter_map(|name| Some(Arc::clone(known(name)?.0))).collect();
        for open in self.open.iter().filter(|open| open.nonce > through) {
            self.pending.extend(open.names.iter().cloned());
        }
        let mut done = Vec::new();
        let (no_envoy, pending, refused) = (self.no_envoy, &self.pending, &self.refused);
        self.open.retain_mut(|open| {
            if open.nonce > through || open.empty {
                return true;
            }
            open.rejected |= open.names.iter().any(|name| refused.contains_key(name));
            open.names.retain(|name| !refused.contains_key(name) && (no_envoy || pending.contains(name)));
            if open.names.is_empty() {
                done.push((open.responses, open.rejected));
            }
            !open.names.is_empty()
        });
        for (responses, rejected) in done {
            self.finish(responses, rejected);
        }
    }

    const fn finish(&mut self, responses: u64, rejected: bool) {
        if rejected {
            // Those before it were replaced, not refused.
            self.counts.rejected += 1;
            self.counts.acknowledged += responses - 1;
        } else {
            self.counts.acknowledged += responses;
        }
    }

    /// The counts.
    pub const fn counts(&self) -> Counts {
        self.counts
    }

    /// Whether an agent says that it has no Envoy.
    pub const fn no_envoy(&self) -> bool {
        self.no_envoy
    }

    /// Whether the client has not applied the newest version of a resource.
    pub fn is_pending(&self, name: &str) -> bool {
        self.pending.contains(name) || (self.no_envoy && !self.is_refused(name))
    }

    /// Whether Envoy refuses the newest version of a resource.
    pub fn is_refused(&self, name: &str) -> bool {
        self.refused.contains_key(name)
    }

    /// Resources that are pending, of all that are held.
    pub(super) fn pending_count(&self, held: &Held) -> usize {
        if self.no_envoy { held.len().saturating_sub(self.refused.len()) } else { self.pending.len() }
    }

    /// Resources that are pending by name; none of them if all are.
    pub(super) fn pending(&self) -> impl Iterator<Item = &Arc<str>> {
        self.pending.iter()
    }

    /// What Envoy refuses at present.
    pub fn refused(&self) -> impl ExactSizeIterator<Item = &Rejection> {
        self.refused.values()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(all: &[&str]) -> Vec<Arc<str>> {
        all.iter().map(|name| Arc::from(*name)).collect()
    }

    fn held(all: &[(&str, &str)]) -> Held {
        all.iter().map(|(name, version)| (Arc::from(*name), Arc::from(*version))).collect()
    }

    fn report(through: &str, pending: &[&str]) -> Applied {
        Applied {
            through: through.into(),
            pending: pending.iter().map(|name| (*name).to_owned()).collect(),
            ..Applied::default()
        }
    }

    fn counts(progress: &Progress) -> (u64, u64, u64) {
        let Counts { sent, acknowledged, rejected } = progress.counts();
        (sent, acknowledged, rejected)
    }

    #[test]
    fn a_plain_clients_word_is_final() {
        let mut progress = Progress::default();
        progress.sent(1, &names(&["a"]), &[]);
        assert!(progress.is_pending("a"));
        progress.answered(1, false);
        progress.sent(2, &names(&["a"]), &[]);
        progress.answered(2, true);
        assert_eq!(counts(&progress), (2, 1, 1));
        assert!(!progress.is_pending("a"));
    }

    #[test]
    fn what_an_agent_stored_is_pending_until_envoy_has_it() {
        let mut progress = Progress::default();
        let held = held(&[("a", "1"), ("b", "1")]);
        progress.report(report("", &[]), &held);
        progress.sent(1, &names(&["a", "b"]), &[]);
        progress.answered(1, false);
        progress.report(report("1", &["a", "b"]), &held);
        assert_eq!(counts(&progress), (1, 0, 0));
        progress.report(report("1", &["b"]), &held);
        assert!(!progress.is_pending("a") && progress.is_pending("b"));
        assert_eq!(counts(&progress), (1, 0, 0));
        progress.report(report("1", &[]), &held);
        assert_eq!(counts(&progress), (1, 1, 0));
    }

    #[test]
    fn a_report_says_nothing_about_what_was_sent_after_it() {
        let mut progress = Progress::default();
        let held = held(&[("a", "2")]);
        progress.report(report("", &[]), &held);
        progress.sent(1, &names(&["a"]), &[]);
        progress.sent(2, &names(&["a"]), &[]);
        progress.report(report("1", &[]), &held);
        assert!(progress.is_pending("a"), "version 2 is under way");
        progress.report(report("2", &[]), &held);
        assert_eq!(counts(&progress), (2, 2, 0), "the newer one ends the older one too");
    }

    #[test]
    fn without_an_envoy_everything_waits() {
        let mut progress = Progress::default();
        let held = held(&[("a", "1"), ("b", "1")]);
        progress.report(Applied { no_envoy: true, ..Applied::default() }, &held);
        progress.sent(1, &names(&["a"]), &[]);
        progress.answered(1, false);
        progress.report(Applied { through: "1".into(), no_envoy: true, ..Applied::default() }, &held);
        assert_eq!((counts(&progress), progress.pending_count(&held)), ((1, 0, 0), 2));
        assert!(progress.is_pending("b"));
        progress.report(report("1", &[]), &held);
        assert_eq!((counts(&progress), progress.pending_count(&held)), ((1, 1, 0), 0));
    }

    #[test]
    fn an_agent_without_an_envoy_costs_no_more_with_each_push() {
        let mut progress = Progress::default();
        progress.report(Applied { no_envoy: true, ..Applied::default() }, &Held::new());
        for nonce in 1..=50 {
            progress.sent(nonce, &names(&["a"]), &[]);
            progress.answered(nonce, false);
            let waiting = Applied { through: nonce.to_string(), no_envoy: true, ..Applied::default() };
            progress.report(waiting, &held(&[("a", "1")]));
            assert_eq!(progress.open.len(), 1, "after push {nonce}");
        }
        progress.report(report("50", &[]), &held(&[("a", "1")]));
        assert_eq!(counts(&progress), (50, 50, 0), "the newest ends all that it replaced");
    }

    #[test]
    fn a_refusal_ends_with_the_next_version() {
        let mut progress = Progress::default();
        progress.report(report("", &[]), &Held::new());
        progress.sent(1, &names(&["a"]), &[]);
        let mut refusing = report("1", &[]);
        refusing.refused =
            vec![Rejection { name: "a".into(), version: "1".into(), message: "no such filter".into() }];
        progress.report(refusing.clone(), &held(&[("a", "1")]));
        assert_eq!((counts(&progress), progress.refused().len()), ((1, 0, 1), 1));
        progress.sent(2, &names(&["a"]), &[]);
        assert!(progress.is_pending("a") && progress.refused().len() == 0);
        progress.report(refusing, &held(&[("a", "2")]));
        assert_eq!(progress.refused().len(), 0, "that was about version 1");
        progress.report(report("2", &[]), &held(&[("a", "2")]));
        assert_eq!(counts(&progress), (2, 1, 1));
    }

    #[test]
    fn what_is_removed_waits_for_nobody() {
        let mut progress = Progress::default();
        let nothing = Applied { no_envoy: true, ..Applied::default() };
        progress.report(nothing, &Held::new());
        progress.sent(1, &names(&["a"]), &[]);
        progress.answered(1, false);
        progress.sent(2, &[], &names(&["a"]));
        progress.answered(2, false);
        progress.report(report("2", &[]), &Held::new());
        assert_eq!((counts(&progress), progress.open.len()), ((2, 2, 0), 0));
    }

    #[test]
    fn a_removal_ends_with_its_acknowledgement() {
        let mut progress = Progress::default();
        progress.report(report("", &[]), &Held::new());
        progress.sent(1, &[], &names(&["a"]));
        progress.report(report("1", &[]), &Held::new());
        progress.answered(1, false);
        assert_eq!(counts(&progress), (1, 1, 0));
    }
}
