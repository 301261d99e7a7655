//! Keeps a redirect in place: the kernel tells of every change of rules and routes, and what differs is put back.
//!
//! Nothing is polled; a slow interval only covers what could be lost. The exceptions are what the kernel tells nobody:
//! changes of iptables' old tables, and a slice that was removed and made again. Where there is one of either, it is
//! looked at every second. Who keeps undoing the repairs is named and met with growing pauses, so that two programs
//! that fight don't keep a machine busy.

mod events;
mod notify;
mod status;

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::backend::Backend;
use crate::error::Error;
use crate::iptables::Variant;
use crate::plan::Plan;
pub use events::Process;
use events::{Event, Events};
pub use notify::notify;
pub use status::{Repair, State, Status};

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

/// What to watch and how.
pub struct Watch<'a> {
    /// The redirect.
    pub plan: Plan,
    /// What puts it in place.
    pub backend: Backend,
    /// How often to look without being told of a change.
    pub interval: Duration,
    /// Where the state is written, for the agent.
    pub status: Option<PathBuf>,
    /// Reads the redirect again, on SIGHUP.
    pub reload: &'a (dyn Fn() -> Result<Plan, String> + Sync),
    /// Takes each message for the operator.
    pub tell: &'a (dyn Fn(&str) + Sync),
}

/// Why watching ended.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// The redirect could not be put in place at the beginning.
    #[error(transparent)]
    Redirect(#[from] Error),
    /// The kernel's messages can't be received.
    #[error("can't subscribe to the kernel's messages about rules and routes")]
    Subscribe(#[source] io::Error),
}

/// Blocks the signals that [`Watch::run`] waits for. Call it before any thread starts.
pub fn block_signals() -> io::Result<()> {
    events::signals().thread_block().map_err(io::Error::from)
}

impl Watch<'_> {
    /// Puts the redirect in place in the calling thread's namespace and keeps it so until SIGTERM or SIGINT. The
    /// rules stay then: whoever stops watching doesn't want traffic to leave past the proxy.
    pub fn run(mut self) -> Result<(), WatchError> {
        // Subscribed before the first look, so that no change falls between both.
        let mut events = Events::open().map_err(WatchError::Subscribe)?;
        crate::apply_with(&self.plan, self.backend)?;
        let mut status = Status::new();
        self.publish(&status);
        (self.tell)("the redirect is in place and watched");
        notify("READY=1\nSTATUS=the redirect is in place and watched");
        let mut fight = Fight::default();
        let silent_tables = crate::backend::left_over(Variant::Legacy).unwrap_or_default();
        loop {
            let pause = fight.pause(Instant::now());
            let silent = silent_tables || self.plan.names_slices();
            let interval = if silent { self.interval.min(SILENT) } else { self.interval };
            let wait = pause.unwrap_or(interval);
            match events.wait(wait).map_err(WatchError::Subscribe)? {
                Event::Stop => break,
                Event::Reload => self.take_new(&mut status),
                Event::Changed(by) => {
                    fight.changed_by(by);
                    if pause.is_none() {
                        self.look(&mut events, &mut status, &mut fight);
                    }
                }
                Event::Quiet => self.look(&mut events, &mut status, &mut fight),
            }
        }
        notify("STOPPING=1");
        status.state = State::Stopped;
        self.publish(&status);
        (self.tell)("stopped; the redirect stays in place");
        Ok(())
    }

    /// Compares, and puts back what differs.
    fn look(&self, events: &mut Events, status: &mut Status, fight: &mut Fight) {
        let start = Instant::now();
        let differences = match crate::diff_with(&self.plan, self.backend) {
            Ok(differences) if differences.is_empty() => {
                if fight.is_over(start) && status.state != State::InPlace {
                    status.state = State::InPlace;
                    status.message.clear();
                    self.publish(status);
                }
                return;
            }
            Ok(differences) => differences,
            // What can't be read may still be written: the attempt tells.
            Err(error) => vec![error.with_causes()],
        };
        // It only names somebody: an error here will come again in the next wait.
        let by = fight.by.take().or_else(|| events.author().unwrap_or_default());
        let whom = by.as_ref().map_or_else(|| "somebody".to_owned(), ToString::to_string);
        let applied = crate::apply_with(&self.plan, self.backend);
        let fighting = fight.repaired(start);
        let mut news = None;
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
                    news = Some(format!(
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
        self.publish(status);
        (self.tell)(&news.unwrap_or_else(|| status.message.clone()));
    }

    fn take_new(&mut self, status: &mut Status) {
        let done = (self.reload)().and_then(|plan| {
            crate::apply_with(&plan, self.backend).map_err(|error| error.with_causes())?;
            self.plan = plan;
            Ok(())
        });
        status.message = match &done {
            Ok(()) => String::new(),
            Err(why) => format!("the new redirect isn't taken, the old one stays: {why}"),
        };
        self.publish(status);
        (self.tell)(if done.is_ok() { "read again; the redirect is in place" } else { &status.message });
    }

    fn publish(&self, status: &Status) {
        if let Some(path) = &self.status
            && let Err(error) = status.write(path)
        {
            (self.tell)(&format!("can't write {}: {error}", path.display()));
        }
    }
}

/// How often what was repaired breaks again.
#[derive(Default)]
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
