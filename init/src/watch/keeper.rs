//! One redirect that is kept in place: what differs is put back, and who keeps undoing that is met with pauses.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::events::{Events, Process};
use super::status::{State, Status};
use crate::Applied;
use crate::backend::Backend;
use crate::cgroup::Cgroups;
use crate::error::Error;
use crate::iptables::Variant;
use crate::plan::Plan;
use crate::slices;

/// So many repairs in [`FIGHT`] are a fight.
const REPAIRS: usize = 10;
/// See [`REPAIRS`].
const FIGHT: Duration = Duration::from_secs(10);
/// The longest pause between two repairs in a fight.
const LONGEST: Duration = Duration::from_secs(30);
/// How often is looked at what changes without a word.
const SILENT: Duration = Duration::from_secs(1);
/// How many differences are told.
const TOLD: usize = 5;

/// What a look showed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Look {
    /// All is as before.
    Same,
    /// What didn't fit does again, by itself.
    Recovered,
    /// Something differed and is put back, or can't be: the status has it, and these are words for the operator.
    News(String),
}

/// A redirect and how it stands. All that touches the kernel is to be called in the redirect's namespace.
#[derive(Debug)]
pub struct Keeper {
    plan: Plan,
    backend: Backend,
    status: Status,
    fight: Fight,
    /// Those for which the rules were made.
    cgroups: Cgroups,
    /// Whether the kernel tells nothing of some changes.
    silent: bool,
}

impl Keeper {
    /// One that has put nothing in place yet.
    pub fn new(plan: Plan, backend: Backend) -> Self {
        let (fight, cgroups) = (Fight::default(), Cgroups::default());
        Self { plan, backend, status: Status::new(), fight, cgroups, silent: false }
    }

    /// What is kept in place.
    pub const fn plan(&self) -> &Plan {
        &self.plan
    }

    /// How it stands.
    pub const fn status(&self) -> &Status {
        &self.status
    }

    pub(super) const fn status_mut(&mut self) -> &mut Status {
        &mut self.status
    }

    /// What there is to be said about it in general.
    pub(super) fn summary(&self) -> &'static str {
        if self.plan.is_none() {
            "nothing here is redirected yet"
        } else {
            "the redirect is in place and watched"
        }
    }

    /// Keeps another plan from now on, which the next look puts in place.
    pub fn replace(&mut self, plan: Plan) {
        self.plan = plan;
    }

    /// Puts a plan in place, which is kept from then on. After an error it is the former one that is.
    pub fn put(&mut self, plan: Plan, events: &Events) -> Result<Applied, Error> {
        events.own();
        follow(events, &plan);
        // Looked up before: what comes meanwhile is told and looked up again.
        let cgroups = Cgroups::resolve(&plan);
        let applied = crate::apply_with(&plan, self.backend)?;
        self.plan = plan;
        self.cgroups = cgroups;
        self.status.missing_slices = slices::missing(&self.plan);
        self.silent = crate::backend::left_over(Variant::Legacy).unwrap_or_default();
        if self.fight.is_over(Instant::now()) {
            self.status.recovered();
        }
        Ok(applied)
    }

    /// Somebody changed something.
    pub fn changed_by(&mut self, by: Option<Process>) {
        self.fight.changed_by(by);
    }

    /// How long the next repair still has to wait, whatever is told.
    pub fn pause(&self) -> Option<Duration> {
        self.fight.pause(Instant::now())
    }

    /// How long to wait for the next look if nothing is told; `interval` where nothing else is to be looked at.
    pub fn wait(&self, interval: Duration) -> Duration {
        let silent = self.silent || !self.plan.slices().is_empty();
        self.pause().unwrap_or(if silent { interval.min(SILENT) } else { interval })
    }

    /// Makes the rules for the slices that are there now, if these aren't the same any more. Nobody's fault, and no fight.
    fn renew(&mut self) -> Option<Look> {
        let now = Cgroups::resolve(&self.plan);
        let news = now.news(&self.cgroups);
        if news.is_empty() {
            self.cgroups = now;
            return None;
        }
        if let Err(error) = crate::apply_with(&self.plan, self.backend) {
            let failing = self.status.state == State::Failing;
            self.status.state = State::Failing;
            let error = error.with_causes();
            self.status.message = format!("slices came or went, and the redirect can't follow: {error}");
            return Some(if failing { Look::Same } else { Look::News(self.status.message.clone()) });
        }
        self.cgroups = now;
        self.status.missing_slices = slices::missing(&self.plan);
        if self.fight.is_over(Instant::now()) {
            self.status.recovered();
        }
        Some(Look::News(news))
    }

    /// Compares, and puts back what differs.
    pub fn look(&mut self, events: &Events) -> Look {
        events.own();
        follow(events, &self.plan);
        if let Some(look) = self.renew() {
            return look;
        }
        let start = Instant::now();
        let differences = match crate::diff_with(&self.plan, self.backend) {
            Ok(differences) if differences.is_empty() => {
                if self.fight.is_over(start) && self.status.state != State::InPlace {
                    self.status.recovered();
                    return Look::Recovered;
                }
                return Look::Same;
            }
            Ok(differences) => differences,
            // What can't be read may still be written: the attempt tells.
            Err(error) => vec![error.with_causes()],
        };
        // A slice that came after the first question is nobody's doing.
        if let Some(look) = self.renew() {
            return look;
        }
        // It only names somebody: an error here will come again in the next wait.
        let by = self.fight.by.take().or_else(|| events.author().unwrap_or_default());
        let whom = by.as_ref().map_or_else(|| "somebody".to_owned(), ToString::to_string);
        let applied = crate::apply_with(&self.plan, self.backend);
        let fighting = self.fight.repaired(start);
        let status = &mut self.status;
        match applied {
            Ok(_) => {
                let took = start.elapsed();
                status.repaired(took, by, differences.iter().take(TOLD).cloned().collect());
                status.state = if fighting { State::Fighting } else { State::InPlace };
                if fighting {
                    status.message = format!(
                        "{whom} keeps changing the redirect: repaired {} times, now with pauses of up to {} s. Stop \
                         it, or make it leave table inet ursa alone",
                        status.repairs,
                        LONGEST.as_secs()
                    );
                } else {
                    return Look::News(format!(
                        "{whom} changed {} lines of the redirect (first: {}); they are back after {} µs",
                        differences.len(),
                        differences[0],
                        took.as_micros()
                    ));
                }
            }
            Err(error) => {
                status.state = State::Failing;
                status.message =
                    format!("{whom} changed the redirect and it can't be put back: {}", error.with_causes());
            }
        }
        Look::News(status.message.clone())
    }
}

/// Without it they are looked at every second.
fn follow(events: &Events, plan: &Plan) {
    if let Err(error) = events.follow(plan) {
        tracing::warn!(%error, "slices can't be followed; they are looked at every second");
    }
}

/// How often what was repaired breaks again.
#[derive(Debug, Default)]
struct Fight {
    repairs: VecDeque<Instant>,
    /// How many repairs in a row were in a fight.
    rounds: u32,
    last: Option<Instant>,
    /// Who changed something last.
    by: Option<Process>,
}

impl Fight {
    fn changed_by(&mut self, by: Option<Process>) {
        if by.is_some() {
            self.by = by;
        }
    }

    /// Counts a repair; whether it is one of a fight.
    fn repaired(&mut self, now: Instant) -> bool {
        self.last = Some(now);
        self.repairs.push_back(now);
        self.forget(now);
        let fighting = self.repairs.len() > REPAIRS || self.rounds > 0;
        if fighting {
            self.rounds += 1;
        }
        fighting
    }

    fn forget(&mut self, now: Instant) {
        while self.repairs.front().is_some_and(|at| now.duration_since(*at) > FIGHT) {
            self.repairs.pop_front();
        }
    }

    /// How long the next repair still has to wait.
    fn pause(&self, now: Instant) -> Option<Duration> {
        let rounds = self.rounds.checked_sub(1)?;
        let pause = LONGEST.min(Duration::from_millis(500) * 2u32.saturating_pow(rounds.min(10)));
        let left = (self.last? + pause).checked_duration_since(now)?;
        (!left.is_zero()).then_some(left)
    }

    /// Whether nothing had to be repaired for so long that the next repair may be at once again.
    fn is_over(&mut self, now: Instant) -> bool {
        self.forget(now);
        if self.rounds > 0 && self.last.is_none_or(|last| now.duration_since(last) > 2 * FIGHT) {
            self.rounds = 0;
        }
        self.rounds == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fight_is_met_with_growing_pauses_and_forgotten() {
        let (mut fight, start) = (Fight::default(), Instant::now());
        for i in 0..REPAIRS {
            assert!(!fight.repaired(start + Duration::from_millis(i as u64)));
            assert_eq!(fight.pause(start), None, "the first repairs are at once");
        }
        let mut pauses = Vec::new();
        for _ in 0..8 {
            assert!(fight.repaired(start));
            pauses.push(fight.pause(start).unwrap());
        }
        assert!(
            pauses.is_sorted() && pauses[0] == Duration::from_millis(500) && pauses[7] == LONGEST,
            "{pauses:?}"
        );
        assert_eq!(fight.pause(start + LONGEST), None);
        assert!(!fight.is_over(start + FIGHT) && fight.is_over(start + 3 * FIGHT));
        assert!(!fight.repaired(start + 3 * FIGHT), "a later change is repaired at once");
    }

    #[test]
    fn changes_far_apart_are_no_fight() {
        let (mut fight, start) = (Fight::default(), Instant::now());
        for i in 0..50 {
            assert!(!fight.repaired(start + FIGHT * i));
        }
    }
}
