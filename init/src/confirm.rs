//! Rules on probation: what was in place before comes back unless somebody confirms in time.
//!
//! What was there before is on disk before anything changes. Two processes of their own session, `guard` and its
//! twin, wait for the deadline; a closed terminal doesn't reach them. Each sees at once when the other one dies, and
//! then rolls back without waiting: one `kill -9`, whomever it hits, never leaves unconfirmed rules behind. A polite
//! signal rolls back at once too. Whoever kills both in the same instant leaves the file, and the next `apply`,
//! `confirm`, `remove` or `watch` rolls back before it does anything else. A reboot takes rules and file along.

mod guard;

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

pub use guard::{Guard, Outcome, guard};

use crate::backend;
use crate::error::Error;
use crate::netns::Netns;
use crate::plan::{Plan, PolicyRoute};
use crate::random::token;
use crate::routes;

/// After so many seconds nobody waits any more for a change in a namespace that is probably gone.
const FORGOTTEN: f64 = 3600.0;

/// What becomes of a change that nobody confirms.
const LATE: &str = "wasn't confirmed in time and is rolled back";

/// Why a probation can't begin or end.
#[derive(Debug, thiserror::Error)]
pub enum ConfirmError {
    /// The kernel refused.
    #[error(transparent)]
    Redirect(#[from] Error),
    /// A file can't be used.
    #[error("can't {what} {}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Another probation runs.
    #[error(
        "another change still waits to be confirmed for {0} s: run `ursa-init confirm`, or wait until it is rolled back"
    )]
    Pending(u64),
    /// Nothing waits.
    #[error("nothing waits to be confirmed{0}")]
    Nothing(String),
    /// What is overdue can only be undone where it was made.
    #[error(
        "a change in another network namespace was never confirmed, and its guards are gone: run `ursa-init confirm \
         --netns PATH` with that namespace, which rolls it back"
    )]
    Elsewhere,
    /// The deadline has passed.
    #[error(
        "too late: the rules from before are in place again. Apply once more and confirm within the time"
    )]
    TooLate,
    /// A change failed, and what was there before could not be put back.
    #[error(
        "the rules from before could NOT be put back ({0}); it is tried again in {1} s, and then by every `ursa-init apply`, \
         `confirm` or `remove` here"
    )]
    NotPutBack(String, u64),
    /// The guards didn't start.
    #[error("the guards that would roll back didn't start: {0}; nothing was changed")]
    Guards(String),
}

/// What was in place before.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Before {
    #[serde(flatten)]
    rules: backend::Saved,
    routes: Vec<IpNet>,
    addresses: Vec<IpAddr>,
    policy: Option<PolicyRoute>,
}

impl Before {
    /// Reads it in the calling thread's namespace.
    fn read() -> Result<Self, ConfirmError> {
        let routes = routes::read_back()?.plan();
        Ok(Self {
            rules: backend::save()?,
            routes: routes.local_routes,
            addresses: routes.loopback_addresses,
            policy: routes.policy_route,
        })
    }

    /// Puts it back in the calling thread's namespace.
    fn restore(&self) -> Result<(), Error> {
        let plan = Plan {
            chains: Vec::new(),
            local_routes: self.routes.clone(),
            loopback_addresses: self.addresses.clone(),
            policy_route: self.policy,
        };
        // Should a later step fail, what is left only closes.
        let routes = routes::ensure(&plan)?;
        backend::restore(&self.rules)?;
        routes.finish()?;
        Ok(())
    }
}

/// A change that waits.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Pending {
    id: String,
    /// In seconds since the machine started, suspended or not: no change of the clock moves it.
    deadline: f64,
    /// Device and number of the namespace.
    netns: (u64, u64),
    before: Before,
}

impl Pending {
    fn left(&self) -> Duration {
        Duration::try_from_secs_f64(self.deadline - uptime()).unwrap_or_default()
    }
}

/// Where probations are kept.
#[derive(Debug, Clone)]
pub struct Probation {
    folder: PathBuf,
}

/// Held while the state is looked at and changed.
struct Locked<'a> {
    probation: &'a Probation,
    _lock: Flock<File>,
}

impl Probation {
    /// Kept in this folder, such as `/run/ursa`.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    fn state(&self) -> PathBuf {
        self.folder.join("confirm.json")
    }

    fn lock(&self) -> Result<Locked<'_>, ConfirmError> {
        let path = self.folder.join("confirm.lock");
        let fail = |source| ConfirmError::File { what: "lock", path: path.clone(), source };
        std::fs::create_dir_all(&self.folder).map_err(fail)?;
        let file = File::create(&path).map_err(fail)?;
        let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| fail(errno.into()))?;
        Ok(Locked { probation: self, _lock: lock })
    }

    /// Rolls back what is overdue because its guards were killed. Call it before changing anything; without a
    /// folder there is nothing to do.
    pub fn settle(&self, netns: &Netns) -> Result<bool, ConfirmError> {
        if !self.state().exists() {
            return Ok(false);
        }
        let locked = self.lock()?;
        match locked.read()? {
            Some(pending) if pending.deadline <= uptime() && pending.netns == netns.id()? => {
                locked.roll_back(netns, &pending, LATE).map(|()| true)
            }
            _ => Ok(false),
        }
    }

    /// How long a change of this namespace still waits to be confirmed. What is changed meanwhile would be undone with it.
    pub fn pending(&self, netns: &Netns) -> Result<Option<Duration>, ConfirmError> {
        if !self.state().exists() {
            return Ok(None);
        }
        let pending = self.lock()?.read()?;
        let here = netns.id()?;
        Ok(pending.filter(|pending| pending.netns == here).map(|pending| pending.left()))
    }

    /// Saves what is in place. The change may be made when its guards run; see [`Guard::spawn`].
    pub fn begin(&self, netns: &Netns, time: Duration) -> Result<String, ConfirmError> {
        self.settle(netns)?;
        let locked = self.lock()?;
        if let Some(pending) = locked.read()?.filter(|pending| pending.deadline + FORGOTTEN > uptime()) {
            if pending.deadline <= uptime() {
                return Err(ConfirmError::Elsewhere);
            }
            return Err(ConfirmError::Pending(pending.left().as_secs() + 1));
        }
        let before = netns.run(Before::read)??;
        let id = token().map_err(|source| ConfirmError::File {
            what: "read",
            path: "/dev/urandom".into(),
            source,
        })?;
        let deadline = uptime() + time.as_secs_f64();
        let _ = std::fs::remove_file(self.last());
        locked.write(&Pending { id: id.clone(), deadline, netns: netns.id()?, before })?;
        Ok(id)
    }

    /// Ends the probation: the rules stay.
    pub fn confirm(&self, netns: &Netns) -> Result<(), ConfirmError> {
        if !self.state().exists() {
            return Err(self.nothing());
        }
        let locked = self.lock()?;
        match locked.read()? {
            None => Err(self.nothing()),
            Some(pending) if pending.deadline <= uptime() => {
                locked.roll_back(netns, &pending, LATE)?;
                Err(ConfirmError::TooLate)
            }
            Some(_) => locked.forget(),
        }
    }

    fn nothing(&self) -> ConfirmError {
        let last = std::fs::read_to_string(self.last()).unwrap_or_default();
        let text = if last.is_empty() {
            format!(" in {}", self.folder.display())
        } else {
            format!(": {}", last.trim_end())
        };
        ConfirmError::Nothing(text)
    }

    /// What became of the last one that nobody confirmed.
    fn last(&self) -> PathBuf {
        self.folder.join("confirm.last")
    }

    /// Rolls back the change of this id, unless it was confirmed.
    fn expire(&self, netns: &Netns, id: &str) -> Result<bool, ConfirmError> {
        let locked = self.lock()?;
        match locked.read()? {
            Some(pending) if pending.id == id => locked.roll_back(netns, &pending, LATE).map(|()| true),
            _ => Ok(false),
        }
    }

    /// Forgets the change of this id: nothing was changed.
    pub fn cancel(&self, id: &str) -> Result<(), ConfirmError> {
        let locked = self.lock()?;
        if locked.read()?.is_some_and(|pending| pending.id == id) { locked.forget() } else { Ok(()) }
    }

    /// The change of this id failed, perhaps half-way: what was there before is put back. What can't be is kept, and
    /// the guards try again.
    pub fn abandon(&self, netns: &Netns, id: &str) -> Result<(), ConfirmError> {
        let locked = self.lock()?;
        let Some(pending) = locked.read()?.filter(|pending| pending.id == id) else { return Ok(()) };
        let text = "failed, and what was there before is in place";
        locked.roll_back(netns, &pending, text).map_err(|error| {
            let why = match error {
                ConfirmError::Redirect(error) => error.with_causes(),
                error => error.to_string(),
            };
            ConfirmError::NotPutBack(why, pending.left().as_secs() + 1)
        })
    }

    fn remaining(&self, id: &str) -> Result<Option<Duration>, ConfirmError> {
        let pending = self.lock()?.read()?.filter(|pending| pending.id == id);
        Ok(pending.map(|pending| pending.left()))
    }
}

impl Locked<'_> {
    fn fail(&self, what: &'static str) -> impl Fn(io::Error) -> ConfirmError {
        let path = self.probation.state();
        move |source| ConfirmError::File { what, path: path.clone(), source }
    }

    fn read(&self) -> Result<Option<Pending>, ConfirmError> {
        let text = match std::fs::read(self.probation.state()) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.fail("read")(error)),
        };
        serde_json::from_slice(&text).map(Some).map_err(|error| self.fail("understand")(error.into()))
    }

    fn write(&self, pending: &Pending) -> Result<(), ConfirmError> {
        let path = self.probation.state();
        let new = path.with_extension("new");
        let bytes = serde_json::to_vec(pending).map_err(io::Error::from).map_err(self.fail("write"))?;
        std::fs::write(&new, bytes).and_then(|()| std::fs::rename(&new, &path)).map_err(self.fail("write"))
    }

    fn forget(&self) -> Result<(), ConfirmError> {
        std::fs::remove_file(self.probation.state()).map_err(self.fail("remove"))
    }

    /// The file goes last: whoever dies in between leaves it to the next one.
    fn roll_back(&self, netns: &Netns, pending: &Pending, end: &str) -> Result<(), ConfirmError> {
        if netns.id()? != pending.netns {
            return Err(ConfirmError::Elsewhere);
        }
        netns.run(|| pending.before.restore())??;
        let text = format!("the change {} {end}\n", pending.id);
        // Only tells; the rules are what counts.
        let _ = std::fs::write(self.probation.last(), text);
        self.forget()
    }
}

/// Seconds since the machine started, including those that it slept.
fn uptime() -> f64 {
    let text = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    text.split(' ').next().and_then(|seconds| seconds.parse().ok()).unwrap_or_default()
}
