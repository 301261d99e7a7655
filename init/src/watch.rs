//! Keeps a redirect in place: the kernel tells of every change of rules and routes, and what differs is put back.
//!
//! Nothing is polled; a slow interval only covers what could be lost. The exceptions are what the kernel tells nobody:
//! changes of iptables' old tables. Where there are any, they are looked at every second; so are slices, beside being
//! told of. Who keeps undoing the repairs is named and met with growing pauses, so that two programs that fight don't
//! keep a machine busy.

mod events;
mod keeper;
mod notify;
pub mod owner;
mod status;

use std::io;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::backend::Backend;
use crate::error::Error;
use crate::plan::Plan;
pub use events::{Change, Events, Process};
pub use keeper::{Keeper, Look};
pub use notify::notify;
pub use status::{Repair, State, Status};

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
    /// Asked at every look: the redirect if what it depends on besides its document has changed, and what that was.
    pub follow: &'a (dyn Fn() -> Option<(Plan, String)> + Sync),
    /// Who is redirected; asked whenever the state is written.
    pub who: &'a (dyn Fn() -> Who + Sync),
    /// Told whether what was read last, at the start or on SIGHUP, is in place.
    pub settle: &'a (dyn Fn(bool) + Sync),
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

/// Whose traffic a redirect is about.
#[derive(Debug, Clone, Default)]
pub struct Who {
    /// The names of its workloads; empty where a namespace belongs to one alone.
    pub workloads: Vec<String>,
    /// Those that are left out, and why.
    pub left_out: Vec<String>,
}

/// What happened.
enum Event {
    /// Rules or routes changed.
    Changed(Change),
    /// Nothing for the whole wait.
    Quiet,
    /// SIGHUP.
    Reload,
    /// SIGTERM or SIGINT.
    Stop,
}

fn signals() -> SigSet {
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect()
}

/// Blocks the signals that [`Watch::run`] waits for. Call it before any thread starts.
pub fn block_signals() -> io::Result<()> {
    signals().thread_block().map_err(io::Error::from)
}

impl Watch<'_> {
    /// Puts the redirect in place in the calling thread's namespace and keeps it so until SIGTERM or SIGINT. The
    /// rules stay then: whoever stops watching doesn't want traffic to leave past the proxy.
    pub fn run(self) -> Result<(), WatchError> {
        // Subscribed before the first look, so that no change falls between both.
        let events = Events::open().map_err(WatchError::Subscribe)?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let signals = SignalFd::with_flags(&signals(), flags).map_err(|e| WatchError::Subscribe(e.into()))?;
        // What an earlier one told is no longer so until this one has succeeded.
        if let Some(path) = &self.status {
            let _ = std::fs::remove_file(path);
        }
        let mut keeper = Keeper::new(self.plan.clone(), self.backend);
        keeper.put(self.plan.clone(), &events)?;
        (self.settle)(true);
        self.publish(&mut keeper);
        self.tell_missing(&keeper);
        for why in &keeper.status().left_out {
            (self.tell)(why);
        }
        (self.tell)(keeper.summary());
        notify(&format!("READY=1\nSTATUS={}", keeper.summary()));
        loop {
            let paused = keeper.pause().is_some();
            match wait(&events, &signals, keeper.wait(self.interval)).map_err(WatchError::Subscribe)? {
                Event::Stop => break,
                Event::Reload => self.take_new(&mut keeper, &events),
                Event::Changed(change) => {
                    keeper.changed_by(change.by);
                    if !paused {
                        self.look(&mut keeper, &events);
                    }
                }
                Event::Quiet => self.look(&mut keeper, &events),
            }
        }
        notify("STOPPING=1");
        keeper.status_mut().state = State::Stopped;
        self.publish(&mut keeper);
        (self.tell)("stopped; the redirect stays in place");
        Ok(())
    }

    /// Follows what has changed on this machine, and puts back what differs.
    fn look(&self, keeper: &mut Keeper, events: &Events) {
        if let Some((plan, why)) = (self.follow)() {
            let put = keeper.put(plan.clone(), events);
            (self.tell)(&match put {
                Ok(_) => why,
                Err(error) => {
                    // The looks from now on try again.
                    keeper.replace(plan);
                    format!("{why}, but the redirect can't follow: {}", error.with_causes())
                }
            });
            self.publish(keeper);
        }
        let look = keeper.look(events);
        if look != Look::Same {
            self.publish(keeper);
        }
        if let Look::News(news) = look {
            (self.tell)(&news);
        }
    }

    fn take_new(&self, keeper: &mut Keeper, events: &Events) {
        let done = (self.reload)()
            .and_then(|plan| keeper.put(plan, events).map(drop).map_err(|error| error.with_causes()));
        (self.settle)(done.is_ok());
        match done {
            Ok(()) => {
                self.publish(keeper);
                (self.tell)(&format!("read again; {}", keeper.summary()));
                self.tell_missing(keeper);
                for why in &keeper.status().left_out {
                    (self.tell)(why);
                }
                notify(&format!("STATUS={}", keeper.summary()));
            }
            Err(why) => {
                let message = format!("the new redirect isn't taken, the old one stays: {why}");
                (self.tell)(&message);
                notify(&format!("STATUS={message}"));
                keeper.status_mut().message = message;
                self.publish(keeper);
            }
        }
    }

    fn tell_missing(&self, keeper: &Keeper) {
        for slice in &keeper.status().missing_slices {
            (self.tell)(&slice.to_string());
        }
    }

    fn publish(&self, keeper: &mut Keeper) {
        let Who { workloads, left_out } = (self.who)();
        let status = keeper.status_mut();
        (status.workloads, status.left_out) = (workloads, left_out);
        if let Some(path) = &self.status
            && let Err(error) = keeper.status().write(path)
        {
            (self.tell)(&format!("can't write {}: {error}", path.display()));
        }
    }
}

/// Waits for the next event that isn't our own doing.
fn wait(events: &Events, signals: &SignalFd, at_most: Duration) -> io::Result<Event> {
    let deadline = Instant::now() + at_most;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up: a wait of less than a millisecond must not spin.
        let timeout = PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        let fds = events.sockets().chain([signals.as_fd()]);
        let mut fds: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        match poll(&mut fds, timeout) {
            Ok(0) => return Ok(Event::Quiet),
            // To be looked at again; the deadline holds.
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        if let Some(signal) = signals.read_signal()? {
            let hangup = signal.ssi_signo == Signal::SIGHUP as u32;
            return Ok(if hangup { Event::Reload } else { Event::Stop });
        }
        if let Some(change) = events.take()? {
            return Ok(Event::Changed(change));
        }
    }
}
