//! Envoy's parent: starts it, knows when it serves, starts it again, drains and stops it.

mod admin;
mod launch;
mod logs;
mod process;
mod snapshot;

use std::path::Path;
use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until};
use tracing::{error, info, warn};

use super::backoff::Backoff;
use super::directory;
use super::protocol::{EnvoyState, EnvoyStatus};
pub use launch::{Launch, base_id};
use logs::Logs;
use process::Process;
pub use snapshot::Snapshot;
use snapshot::{Left, milliseconds};

/// How long Envoy may take to open its admin socket before it counts as hung.
const ADMIN_DEADLINE: Duration = Duration::from_secs(30);
/// How long Envoy may take to exit after SIGTERM before it is killed.
const EXIT_DEADLINE: Duration = Duration::from_secs(5);
/// How often the number of open connections is looked at while draining: Envoy has no event for it.
const DRAIN_LOOK: Duration = Duration::from_millis(100);

/// What the supervisor is told.
#[derive(Debug)]
pub enum Command {
    /// Stop and start again, without back-off.
    Restart,
    /// Ask inbound connections to go, for at most this long (Envoy's drain time when absent).
    Drain(Option<Duration>),
    /// Start anew if it drains.
    Resume,
    /// Drain for at most this long, then stop for good.
    Stop(Duration),
    /// Envoy's log level from now on.
    LogLevel(String),
    /// What the agent waits for; nothing if it is empty.
    Awaited(String),
    /// Answered by a supervisor that can still act.
    Ping(oneshot::Sender<()>),
    /// Let go of everything, for another supervisor of this process's next program. No effect on one that stops.
    HandOver,
}

/// How a supervisor ended.
#[derive(Debug)]
pub enum Ended {
    /// Envoy is stopped for good.
    Stopped,
    /// Another supervisor goes on from here.
    HandedOver(Box<Snapshot>),
}

/// What the supervisor does next.
enum Step {
    Start,
    Attend(Running),
    /// Wait before a start.
    Pause(Instant),
    /// The process has ended, or could not be started.
    Exited {
        reason: String,
        live_for: Option<Duration>,
    },
    End(Ended),
}

/// A running Envoy.
#[derive(Debug)]
struct Running {
    process: Process,
    logs: Logs,
    live_since: Option<Instant>,
    drain: Option<Drain>,
}

/// A drain under way.
#[derive(Debug)]
struct Drain {
    deadline: Instant,
    /// Envoy is to be stopped afterwards, so outbound connections count as well.
    stop: bool,
    over: bool,
    next_look: Instant,
}

impl Drain {
    fn until(deadline: Instant) -> Self {
        Self { deadline, stop: false, over: false, next_look: Instant::now() }
    }

    /// Returns once no connection is left that matters, or the deadline has passed. Dropping the future loses nothing.
    async fn wait(&mut self, admin: &Path, mut left: impl FnMut(Option<u64>)) {
        while !self.over {
            sleep_until(self.next_look.min(self.deadline)).await;
            let now = Instant::now();
            self.next_look = now + DRAIN_LOOK;
            let open = if self.stop {
                admin::connections(admin).await
            } else {
                admin::inbound_connections(admin).await.map(Some)
            };
            // An Envoy that can't be asked has nothing left to wait for.
            self.over = now >= self.deadline || matches!(open, Ok(Some(0)) | Err(_));
            if !self.stop {
                left(open.ok().flatten());
            }
        }
    }
}

/// Supervises one Envoy until told to stop.
#[derive(Debug)]
pub struct Supervisor {
    launch: watch::Receiver<Option<Launch>>,
    status: watch::Sender<EnvoyStatus>,
    config_hash: watch::Sender<String>,
    commands: mpsc::Receiver<Command>,
    backoff: Backoff,
    /// Of the next Envoy.
    next_epoch: u64,
    awaited: Option<String>,
    left: Option<Box<Snapshot>>,
}

/// What others see and use of the supervisor.
#[derive(Debug, Clone)]
pub struct Handle {
    /// Envoy's state.
    pub status: watch::Receiver<EnvoyStatus>,
    /// Hash of the bootstrap that it was started with.
    pub config_hash: watch::Receiver<String>,
    /// Where to send commands. The channel is closed once Envoy is stopped for good.
    pub commands: mpsc::Sender<Command>,
}

impl Supervisor {
    /// A supervisor that has not started anything, and its handle. It waits while `launch` is nothing, and goes on
    /// from where another one handed over, if one did.
    pub fn new(launch: watch::Receiver<Option<Launch>>, left: Option<Box<Snapshot>>) -> (Self, Handle) {
        let (status, config_hash) =
            left.as_ref().map(|left| (left.status.clone(), left.config_hash.clone())).unwrap_or_default();
        let (status, status_seen) = watch::channel(status);
        let (config_hash, hash_seen) = watch::channel(config_hash);
        let (sender, commands) = mpsc::channel(8);
        let handle = Handle { status: status_seen, config_hash: hash_seen, commands: sender };
        let backoff = Backoff::after(left.as_ref().map_or(0, |left| left.failures));
        let awaited = left.as_ref().and_then(|left| left.awaited.clone());
        let next_epoch = left.as_ref().map_or(0, |left| left.next_epoch);
        (Self { launch, status, config_hash, commands, backoff, next_epoch, awaited, left }, handle)
    }

    /// Runs until [`Command::Stop`] or [`Command::HandOver`], or until every handle is gone.
    ///
    /// Must run on the thread that lives as long as the process: the kernel kills Envoy when the thread that
    /// started it ends.
    pub async fn run(mut self) -> Ended {
        let mut step = self.first();
        loop {
            step = match step {
                Step::Start => self.start().await,
                Step::Attend(running) => self.attend(running).await,
                Step::Pause(until) => self.pause(until).await,
                Step::Exited { reason, live_for } => {
                    let delay = self.backoff.next(live_for);
                    self.ended(reason, delay)
                }
                Step::End(ended) => {
                    if matches!(ended, Ended::Stopped) {
                        self.status.send_modify(|status| {
                            status.state = EnvoyState::Dead;
                            status.pid = None;
                            status.start_time = None;
                        });
                        info!("Envoy is stopped");
                    }
                    return ended;
                }
            };
        }
    }

    /// Goes on where another supervisor left off.
    fn first(&mut self) -> Step {
        let Some(left) = self.left.take() else { return Step::Start };
        if let Some(running) = left.running {
            let draining = left.status.state == EnvoyState::Draining;
            return match running.adopt(left.status.epoch, draining) {
                Ok(running) => {
                    tracing::Span::current().record("epoch", left.status.epoch);
                    info!(pid = running.process.pid(), epoch = left.status.epoch, "took over Envoy");
                    Step::Attend(running)
                }
                Err(error) => {
                    Step::Exited { reason: format!("Envoy cannot be taken over: {error}"), live_for: None }
                }
            };
        }
        match left.pause_ms {
            Some(left) => Step::Pause(Instant::now() + Duration::from_millis(left)),
            None => Step::Start,
        }
    }

    /// One Envoy after another: each is an epoch of its own.
    fn ended(&mut self, reason: String, delay: Duration) -> Step {
        warn!(%reason, ?delay, "Envoy ended and will be started again");
        self.next_epoch += 1;
        self.status.send_modify(|status| {
            status.state = EnvoyState::Backoff;
            status.pid = None;
            status.start_time = None;
            status.waiting = None;
            status.inbound = None;
            status.drained = false;
            status.last_exit = Some(reason);
        });
        Step::Pause(Instant::now() + delay)
    }

    fn snapshot(&self, running: Option<Left>, pause: Option<Duration>) -> Step {
        Step::End(Ended::HandedOver(Box::new(Snapshot {
            status: self.status.borrow().clone(),
            config_hash: self.config_hash.borrow().clone(),
            failures: self.backoff.failures(),
            next_epoch: self.next_epoch,
            awaited: self.awaited.clone(),
            running,
            pause_ms: pause.map(milliseconds),
        })))
    }

    /// Waits before a start.
    async fn pause(&mut self, until: Instant) -> Step {
        loop {
            tokio::select! {
                biased;
                command = self.commands.recv() => match command {
                    None | Some(Command::Stop(_)) => return Step::End(Ended::Stopped),
                    Some(Command::Restart) => break,
                    Some(Command::HandOver) => {
                        return self.snapshot(None, Some(until.saturating_duration_since(Instant::now())));
                    }
                    Some(other) => self.note(other),
                },
                () = sleep_until(until) => break,
            }
        }
        self.status.send_modify(|status| status.restarts += 1);
        Step::Start
    }

    /// What needs no Envoy.
    fn note(&mut self, command: Command) {
        match command {
            Command::Awaited(text) => self.awaited = Some(text).filter(|text| !text.is_empty()),
            Command::Ping(answer) => {
                // Whoever asked may have given up.
                let _ = answer.send(());
            }
            _ => {}
        }
    }

    /// Starts Envoy, once it is known how.
    async fn start(&mut self) -> Step {
        let launch = loop {
            if let Some(launch) = self.launch.borrow_and_update().clone() {
                break launch;
            }
            let awaited = self.awaited.as_deref().unwrap_or("its settings, which the agent has not sent yet");
            self.status.send_if_modified(|status| {
                let known = status.state == EnvoyState::Waiting && status.waiting.as_deref() == Some(awaited);
                status.state = EnvoyState::Waiting;
                status.waiting = Some(awaited.to_owned());
                !known
            });
            tokio::select! {
                changed = self.launch.changed() => if changed.is_err() {
                    return Step::End(Ended::Stopped);
                },
                command = self.commands.recv() => match command {
                    None | Some(Command::Stop(_)) => return Step::End(Ended::Stopped),
                    Some(Command::HandOver) => return self.snapshot(None, None),
                    Some(other) => self.note(other),
                },
            }
        };
        match self.spawn(&launch) {
            Ok(running) => Step::Attend(running),
            Err(reason) => Step::Exited { reason, live_for: None },
        }
    }

    fn spawn(&mut self, launch: &Launch) -> Result<Running, String> {
        let bootstrap = std::fs::read(&launch.bootstrap).map_err(|error| {
            format!(
                "cannot read Envoy's bootstrap {}: {error}; the agent writes it",
                launch.bootstrap.display()
            )
        })?;
        self.config_hash.send_replace(launch::hash(&bootstrap));
        directory::remove(&launch.admin)
            .map_err(|error| format!("cannot remove the old admin socket: {error}"))?;
        let epoch = self.next_epoch;
        let (process, stdout, stderr) = Process::spawn(&mut launch.command()).map_err(|error| {
            format!(
                "cannot start Envoy {}: {error}; check the agent's `envoy` setting",
                launch.binary.display()
            )
        })?;
        let logs = Logs::of(epoch, stdout, stderr);
        // From here on our own lines are about this one, too.
        tracing::Span::current().record("epoch", epoch);
        info!(pid = process.pid(), epoch, "started Envoy");
        self.status.send_modify(|status| {
            status.state = EnvoyState::Starting;
            status.pid = Some(process.pid());
            status.start_time = Some(process.start_time());
            status.epoch = epoch;
            status.waiting = None;
            status.inbound = None;
            status.drained = false;
        });
        Ok(Running { process, logs, live_since: None, drain: None })
    }

    /// Where the running Envoy's admin interface is.
    fn admin(&self) -> std::path::PathBuf {
        self.launch.borrow().as_ref().map(|launch| launch.admin.clone()).unwrap_or_default()
    }

    /// Looks after a running Envoy until it ends.
    async fn attend(&mut self, mut running: Running) -> Step {
        let admin = self.admin();
        let (said, mut says) = watch::channel(None);
        let live = admin::until_live(&admin, ADMIN_DEADLINE, |words| {
            said.send_replace(Some(words.to_owned()));
        });
        tokio::pin!(live);
        loop {
            let Running { process, drain, live_since, .. } = &mut running;
            let draining = drain.as_ref().is_some_and(|drain| !drain.over);
            let status = self.status.clone();
            let drained = async {
                if let Some(drain) = drain {
                    let told = |left| {
                        status
                            .send_if_modified(|status| std::mem::replace(&mut status.inbound, left) != left);
                    };
                    drain.wait(&admin, told).await;
                }
            };
            tokio::select! {
                end = process.ended() => {
                    let live_for = live_since.map(|since: Instant| since.elapsed());
                    if running.drain.as_ref().is_some_and(|drain| drain.stop) {
                        return Step::End(Ended::Stopped);
                    }
                    let reason = match running.logs.finish().await {
                        Some(words) => format!("{end}: {words}"),
                        None => end,
                    };
                    return Step::Exited { reason, live_for };
                }
                reached = &mut live, if live_since.is_none() => match reached {
                    Ok(version) => {
                        *live_since = Some(Instant::now());
                        self.is_live(version);
                    }
                    Err(reason) => {
                        error!(%reason, "Envoy hangs and is killed");
                        process.signal(Signal::SIGKILL);
                        let status = process.ended().await;
                        warn!(%status, "killed the hanging Envoy");
                        return Step::Exited { reason, live_for: None };
                    }
                },
                Ok(()) = says.changed(), if live_since.is_none() => self.is_waiting(says.borrow_and_update().as_ref()),
                () = drained, if draining => {
                    if running.drain.as_ref().is_some_and(|drain| drain.stop) {
                        terminate(&mut running.process).await;
                        return Step::End(Ended::Stopped);
                    }
                    info!(left = self.status.borrow().inbound, "drained");
                    self.status.send_modify(|status| status.drained = true);
                }
                command = self.commands.recv() => {
                    if let Some(step) = self.obey(command, &mut running, &admin).await {
                        return match step {
                            Obeyed::HandOver => self.snapshot(Some(Left::of(running).await), None),
                            Obeyed::Restart => {
                                self.backoff = Backoff::default();
                                self.ended("restarted on request".to_owned(), Duration::ZERO)
                            }
                            Obeyed::Stopped => Step::End(Ended::Stopped),
                        };
                    }
                    self.is_waiting(says.borrow().as_ref());
                },
            }
        }
    }

    fn is_live(&mut self, version: Option<String>) {
        info!(version, "Envoy is live");
        self.awaited = None;
        self.status.send_modify(|status| {
            if status.state == EnvoyState::Starting {
                status.state = EnvoyState::Live;
            }
            status.waiting = None;
            status.version = version.or(status.version.take());
        });
    }

    /// Tells what a starting Envoy waits for: in its own words, and in the agent's.
    fn is_waiting(&self, said: Option<&String>) {
        let words = match (said, &self.awaited) {
            (Some(said), Some(awaited)) => Some(format!("{said}; the agent waits for {awaited}")),
            (None, Some(awaited)) => Some(awaited.clone()),
            (said, None) => said.cloned(),
        };
        self.status.send_if_modified(|status| {
            let news = status.state == EnvoyState::Starting && status.waiting != words;
            if news {
                status.waiting = words;
            }
            news
        });
    }

    /// Does as told. What ends the attendance is returned.
    async fn obey(
        &mut self,
        command: Option<Command>,
        running: &mut Running,
        admin: &Path,
    ) -> Option<Obeyed> {
        let stopping = running.drain.as_ref().is_some_and(|drain| drain.stop);
        match command {
            Some(Command::Restart) if !stopping => {
                terminate(&mut running.process).await;
                return Some(Obeyed::Restart);
            }
            Some(Command::Resume) if running.drain.is_some() && !stopping => {
                // Envoy's drain can't be taken back: it would ask every new connection to go, too.
                terminate(&mut running.process).await;
                return Some(Obeyed::Restart);
            }
            Some(Command::Drain(limit)) => {
                let limit = limit.unwrap_or_else(|| self.drain_time());
                self.drain(running, admin, limit).await;
            }
            Some(Command::Stop(limit)) => {
                if limit.is_zero() || running.live_since.is_none() {
                    terminate(&mut running.process).await;
                    return Some(Obeyed::Stopped);
                }
                self.drain(running, admin, limit).await;
                if let Some(drain) = &mut running.drain {
                    // Once it is drained, only what the application has opened is left.
                    drain.over = false;
                    drain.stop = true;
                }
            }
            None => {
                terminate(&mut running.process).await;
                return Some(Obeyed::Stopped);
            }
            Some(Command::HandOver) if !stopping => return Some(Obeyed::HandOver),
            Some(Command::LogLevel(level)) => {
                if let Err(error) = admin::post(admin, &format!("/logging?level={level}")).await {
                    warn!(%error, "Envoy's log level could not be changed; it takes effect with its next start");
                }
            }
            Some(other) => self.note(other),
        }
        None
    }

    fn drain_time(&self) -> Duration {
        self.launch.borrow().as_ref().map_or(Duration::ZERO, |launch| launch.drain_time)
    }

    /// Begins to drain, or shortens the drain that is under way.
    async fn drain(&mut self, running: &mut Running, admin: &Path, limit: Duration) {
        let deadline = Instant::now() + limit;
        if let Some(drain) = &mut running.drain {
            drain.deadline = drain.deadline.min(deadline);
            return;
        }
        running.drain = Some(Drain::until(deadline));
        self.status.send_modify(|status| {
            status.state = EnvoyState::Draining;
            status.drained = false;
        });
        for path in ["/healthcheck/fail", "/drain_listeners?inboundonly&graceful&skip_exit"] {
            if let Err(error) = admin::post(admin, path).await {
                warn!(%error, path, "Envoy could not be told to drain; its connections will be cut");
            }
        }
    }
}

/// What ends the attendance of a running Envoy.
enum Obeyed {
    Restart,
    Stopped,
    HandOver,
}

/// Ends Envoy, and reaps it.
async fn terminate(process: &mut Process) {
    process.signal(Signal::SIGTERM);
    if !process.ends_within(EXIT_DEADLINE).await {
        warn!("Envoy did not exit after SIGTERM and is killed");
        process.signal(Signal::SIGKILL);
        process.ended().await;
    }
}

#[cfg(test)]
mod tests;
