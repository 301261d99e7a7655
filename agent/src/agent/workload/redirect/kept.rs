//! A namespace whose redirect is kept in place: the kernel tells of every change of its rules and routes, and what
//! differs is put back. It costs two sockets and a task that sleeps.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::future::select_all;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Semaphore;
use ursa_init::watch::{Events, Keeper, Look};
use ursa_init::{Applied, Backend, Error, Plan};

use super::kernel::{Namespace, Say, pending};
use super::lock;
use crate::agent::status::RedirectReport;

/// How often is looked although nothing was told: nothing gets lost, but nobody should have to rely on that.
const INTERVAL: Duration = Duration::from_secs(60);
/// How often is asked whether somebody else still has the say, and whether what failed succeeds.
const AGAIN: Duration = Duration::from_secs(5);
/// Between two looks: who changes a thousand rules one by one doesn't keep the agent busy.
const CALM: Duration = Duration::from_millis(50);

/// A namespace and its redirect.
#[derive(Debug)]
pub(super) struct Kept {
    namespace: Namespace,
    events: Events,
    /// Held by whoever reads or writes the rules, on threads that may block.
    keeper: Mutex<Keeper>,
    /// Nothing is to be put back any more.
    released: AtomicBool,
    report: Mutex<RedirectReport>,
}

impl Kept {
    /// Puts a redirect in place and hears of changes from then on. Blocks.
    pub(super) fn start(namespace: Namespace, plan: Plan) -> Result<(Self, Applied), String> {
        // Subscribed first, so that no change falls between both.
        let subscribe = || {
            Events::open().map_err(|source| Error::kernel("subscribe to changes of rules and routes", source))
        };
        let events = namespace.run(subscribe)?;
        let kept = Self {
            keeper: Mutex::new(Keeper::new(plan.clone(), Backend::Auto)),
            namespace,
            events,
            released: AtomicBool::new(false),
            report: Mutex::default(),
        };
        let applied = kept.put(plan)?;
        Ok((kept, applied))
    }

    /// Puts another redirect in place, which is kept from then on. Blocks.
    pub(super) fn put(&self, plan: Plan) -> Result<Applied, String> {
        let mut guard = lock(&self.keeper);
        let keeper = &mut *guard;
        self.released.store(false, Ordering::Relaxed);
        let (applied, held) = match self.namespace.say() {
            Say::Ours => (self.namespace.run(|| keeper.put(plan, &self.events))?, None),
            Say::Watch(process) => {
                keeper.replace(plan);
                (Applied::default(), Some(process.to_string()))
            }
            Say::Pending(left) => return Err(pending(left)),
        };
        for slice in &keeper.status().missing_slices {
            tracing::warn!(namespace = %self.namespace.name(), "{slice}");
        }
        self.publish(keeper, held);
        Ok(applied)
    }

    /// Removes the redirect for good. Blocks.
    pub(super) fn remove(&self) -> Result<(), String> {
        let _keeper = lock(&self.keeper);
        self.namespace.remove()?;
        self.release();
        Ok(())
    }

    /// From now on somebody else removes it.
    pub(super) fn release(&self) {
        self.released.store(true, Ordering::Relaxed);
    }

    /// How it stands.
    pub(super) fn report(&self) -> RedirectReport {
        lock(&self.report).clone()
    }

    /// Takes what was told and repairs what differs; how long to wait until the next look, or `None` when nothing is kept
    /// any more. Blocks.
    fn look(&self, told: bool) -> Option<Duration> {
        let mut guard = lock(&self.keeper);
        let keeper = &mut *guard;
        if self.released.load(Ordering::Relaxed) {
            return None;
        }
        let change = self.events.take().unwrap_or_else(|error| {
            tracing::warn!(namespace = %self.namespace.name(), %error, "what the kernel tells of rules can't be read");
            None
        });
        let is_own = told && change.is_none();
        if let Some(change) = change {
            keeper.changed_by(change.by);
        }
        // In a fight there are pauses, whatever is told.
        if is_own || (told && keeper.pause().is_some()) {
            return Some(self.wait(keeper));
        }
        let held = match self.namespace.say() {
            Say::Ours => None,
            Say::Watch(process) => Some(process.to_string()),
            Say::Pending(_) => Some("a change that waits to be confirmed".to_owned()),
        };
        if held.is_none() {
            match self.namespace.run(|| Ok(keeper.look(&self.events))) {
                Ok(Look::Same | Look::Recovered) => {}
                Ok(Look::News(news)) => {
                    tracing::warn!(namespace = %self.namespace.name(), repairs = keeper.status().repairs, "{news}");
                }
                Err(error) => {
                    tracing::error!(namespace = %self.namespace.name(), %error, "a redirect can't be looked at");
                }
            }
        }
        self.publish(keeper, held);
        Some(self.wait(keeper))
    }

    fn publish(&self, keeper: &Keeper, held: Option<String>) {
        let mut report = lock(&self.report);
        if let Some(by) = &held
            && report.kept_by.as_ref() != Some(by)
        {
            tracing::info!(namespace = %self.namespace.name(), %by, "somebody else keeps the redirect here; it is left alone");
        }
        let status = keeper.status();
        *report = RedirectReport {
            state: status.state,
            kept_by: held,
            repairs: status.repairs,
            last_repair: status.last_repair.clone(),
            message: Some(status.message.clone()).filter(|message| !message.is_empty()),
        };
    }

    fn wait(&self, keeper: &Keeper) -> Duration {
        let report = lock(&self.report);
        keeper.wait(if report.kept_by.is_some() || report.message.is_some() { AGAIN } else { INTERVAL })
    }
}

/// One of the sockets of the subscription.
struct Told {
    kept: Arc<Kept>,
    number: usize,
}

impl AsRawFd for Told {
    fn as_raw_fd(&self) -> RawFd {
        self.kept.events.sockets().nth(self.number).map_or(-1, |socket| socket.as_raw_fd())
    }
}

/// Both, for the event loop.
#[expect(unsafe_code, reason = "tokio offers no other way to wait for a descriptor")]
fn listen(kept: &Arc<Kept>) -> io::Result<Vec<AsyncFd<Told>>> {
    (0..kept.events.sockets().count())
        .map(|number| {
            let told = Told { kept: Arc::clone(kept), number };
            // SAFETY: the socket is the subscription's, which nothing replaces and which `told` keeps open.
            unsafe { AsyncFd::register_with_interest(told, Interest::READABLE) }.map_err(io::Error::from)
        })
        .collect()
}

/// Keeps the redirect in place until it is released. `looks` bounds how many namespaces are looked at together: each
/// look takes a thread.
pub(super) async fn keep(kept: Arc<Kept>, looks: Arc<Semaphore>) {
    let mut sockets = listen(&kept).unwrap_or_else(|error| {
        tracing::error!(namespace = %kept.namespace.name(), %error,
            "changes of a redirect can't be heard of; it is looked at every {} s instead", AGAIN.as_secs());
        Vec::new()
    });
    let longest = if sockets.is_empty() { AGAIN } else { INTERVAL };
    let mut wait = kept.wait(&lock(&kept.keeper)).min(longest);
    loop {
        let told = tokio::select! {
            () = news(&sockets) => true,
            () = tokio::time::sleep(wait) => false,
        };
        let Ok(permit) = Arc::clone(&looks).acquire_owned().await else { return };
        let looking = Arc::clone(&kept);
        let look = move || {
            let _permit = permit;
            looking.look(told)
        };
        match tokio::task::spawn_blocking(look).await {
            Ok(Some(next)) => wait = next.min(longest),
            Ok(None) => return,
            Err(error) => {
                tracing::error!(namespace = %kept.namespace.name(), %error, "a look at a redirect failed");
                wait = AGAIN;
            }
        }
        // One more comes with the first redirect that names slices; until it is heard, they are looked at every second.
        if !sockets.is_empty() && kept.events.sockets().count() != sockets.len() {
            sockets.clear(); // the system lets none be heard twice
            sockets = listen(&kept).unwrap_or_default();
        }
        tokio::time::sleep(CALM).await;
    }
}

/// Waits until one of the sockets has something to say. What it is is read afterwards, so that nothing gets lost.
async fn news(sockets: &[AsyncFd<Told>]) {
    if sockets.is_empty() {
        return std::future::pending().await;
    }
    // An error is read from the socket as well.
    drop(select_all(sockets.iter().map(|socket| socket.readable().boxed())).await);
    for mut readable in sockets.iter().filter_map(|socket| socket.readable().now_or_never()).flatten() {
        readable.clear_ready();
    }
}
