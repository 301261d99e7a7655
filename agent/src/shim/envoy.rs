//! Envoy's parent: starts it, knows when it serves, starts it again, drains and stops it.

mod admin;
mod logs;

use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getppid};
use sha2::{Digest, Sha256};
use tokio::process::{Child, Command as Program};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tracing::{error, info, warn};

use super::backoff::Backoff;
use super::directory;
use super::process::start_time;
use super::protocol::{EnvoyState, EnvoyStatus};
use logs::Logs;

/// How long Envoy may take to open its admin socket before it counts as hung.
const ADMIN_DEADLINE: Duration = Duration::from_secs(30);
/// How long Envoy may take to exit after SIGTERM before it is killed.
const EXIT_DEADLINE: Duration = Duration::from_secs(5);
/// How often the number of open connections is looked at while draining: Envoy has no event for it.
const DRAIN_LOOK: Duration = Duration::from_millis(100);

/// How Envoy is started.
#[derive(Debug, Clone)]
pub struct Launch {
    /// The binary.
    pub binary: PathBuf,
    /// Its bootstrap.
    pub bootstrap: PathBuf,
    /// Where the bootstrap puts its admin interface.
    pub admin: PathBuf,
    /// Tells Envoys on one host apart.
    pub base_id: u32,
    /// Worker threads.
    pub concurrency: u32,
    /// Seconds over which a graceful drain discourages connections.
    pub drain_time: Duration,
    /// Envoy's log level.
    pub log_level: String,
}

/// What the supervisor is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Stop and start again, without back-off.
    Restart,
    /// Close inbound listeners gracefully.
    Drain,
    /// Drain for at most this long, then stop for good.
    Stop(Duration),
    /// Envoy's log level, now and after a restart.
    LogLevel(String),
}

/// Why the supervisor stopped looking at a process.
enum Ended {
    /// It exited on its own.
    Exited { status: io::Result<ExitStatus>, live_for: Option<Duration> },
    /// It was stopped to be started again.
    Restart,
    /// It was stopped for good.
    Stopped,
}

/// Supervises one Envoy until told to stop.
#[derive(Debug)]
pub struct Supervisor {
    launch: Launch,
    status: watch::Sender<EnvoyStatus>,
    config_hash: watch::Sender<String>,
    commands: mpsc::Receiver<Command>,
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
    /// A supervisor that has not started anything, and its handle.
    pub fn new(launch: Launch) -> (Self, Handle) {
        let (status, status_seen) = watch::channel(EnvoyStatus::default());
        let (config_hash, hash_seen) = watch::channel(String::new());
        let (sender, commands) = mpsc::channel(8);
        let handle = Handle { status: status_seen, config_hash: hash_seen, commands: sender };
        (Self { launch, status, config_hash, commands }, handle)
    }

    /// Runs until [`Command::Stop`], or until every handle is gone.
    ///
    /// Must run on the thread that lives as long as the process: the kernel kills Envoy when the thread that
    /// started it ends.
    pub async fn run(mut self) {
        let mut backoff = Backoff::default();
        let mut epoch: u64 = 0;
        loop {
            let (reason, delay) = match self.spawn(epoch) {
                Ok((child, logs)) => match self.attend(child).await {
                    Ended::Stopped => break,
                    Ended::Restart => {
                        backoff = Backoff::default();
                        ("restarted on request".to_owned(), Duration::ZERO)
                    }
                    Ended::Exited { status, live_for } => {
                        (describe(status, logs.finish().await), backoff.next(live_for))
                    }
                },
                Err(reason) => (reason, backoff.next(None)),
            };
            epoch += 1;
            warn!(%reason, ?delay, "Envoy ended and will be started again");
            self.status.send_modify(|status| {
                status.state = EnvoyState::Backoff;
                status.pid = None;
                status.start_time = None;
                status.waiting = None;
                status.last_exit = Some(reason);
            });
            if self.pause(delay).await {
                break;
            }
            self.status.send_modify(|status| status.restarts += 1);
        }
        self.status.send_modify(|status| {
            status.state = EnvoyState::Dead;
            status.pid = None;
            status.start_time = None;
        });
        info!("Envoy is stopped");
    }

    /// Waits before a start; true when told to stop meanwhile.
    async fn pause(&mut self, delay: Duration) -> bool {
        let until = Instant::now() + delay;
        loop {
            tokio::select! {
                biased;
                command = self.commands.recv() => match command {
                    None | Some(Command::Stop(_)) => return true,
                    Some(Command::Restart) => return false,
                    Some(Command::LogLevel(level)) => self.launch.log_level = level,
                    Some(Command::Drain) => {}
                },
                () = sleep_until(until) => return false,
            }
        }
    }

    fn spawn(&mut self, epoch: u64) -> Result<(Child, Logs), String> {
        let launch = &self.launch;
        let bootstrap = std::fs::read(&launch.bootstrap).map_err(|error| {
            format!(
                "cannot read Envoy's bootstrap {}: {error}; the agent writes it",
                launch.bootstrap.display()
            )
        })?;
        self.config_hash.send_replace(hash(&bootstrap));
        directory::remove(&launch.admin)
            .map_err(|error| format!("cannot remove the old admin socket: {error}"))?;
        let mut child = command(launch).spawn().map_err(|error| {
            format!(
                "cannot start Envoy {}: {error}; check the agent's `envoy` setting",
                launch.binary.display()
            )
        })?;
        let logs = Logs::follow(child.stdout.take(), child.stderr.take());
        let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
        info!(pid, epoch, "started Envoy");
        self.status.send_modify(|status| {
            status.state = EnvoyState::Starting;
            status.pid = pid;
            status.start_time = pid.and_then(|pid| start_time(pid).ok());
            status.epoch = epoch;
            status.waiting = None;
        });
        Ok((child, logs))
    }

    /// Looks after a running Envoy until it ends.
    async fn attend(&mut self, mut child: Child) -> Ended {
        let mut live_since = None;
        let admin = self.launch.admin.clone();
        let status = self.status.clone();
        let live = async {
            admin::until_live(&admin, ADMIN_DEADLINE, |words| {
                status.send_if_modified(|status| {
                    let changed = status.waiting.as_deref() != Some(words);
                    status.waiting = Some(words.to_owned());
                    changed
                });
            })
            .await
        };
        tokio::pin!(live);
        loop {
            tokio::select! {
                ended = child.wait() => {
                    let live_for = live_since.map(|since: Instant| since.elapsed());
                    return Ended::Exited { status: ended, live_for };
                }
                reached = &mut live, if live_since.is_none() => match reached {
                    Ok(version) => {
                        live_since = Some(Instant::now());
                        info!(version, "Envoy is live");
                        self.status.send_modify(|status| {
                            if status.state == EnvoyState::Starting {
                                status.state = EnvoyState::Live;
                            }
                            status.waiting = None;
                            status.version = version.or(status.version.take());
                        });
                    }
                    Err(reason) => {
                        error!(%reason, "Envoy hangs and is killed");
                        let _ = child.start_kill();
                        let status = child.wait().await;
                        warn!(?status, "killed the hanging Envoy");
                        return Ended::Exited { status: Err(io::Error::other(reason)), live_for: None };
                    }
                },
                command = self.commands.recv() => match command {
                    Some(Command::Restart) => {
                        self.stop(&mut child, Duration::ZERO).await;
                        return Ended::Restart;
                    }
                    Some(Command::Drain) => self.drain().await,
                    Some(Command::LogLevel(level)) => {
                        if let Err(error) = admin::post(&self.launch.admin, &format!("/logging?level={level}")).await {
                            warn!(%error, "Envoy's log level could not be changed; it takes effect with its next start");
                        }
                        self.launch.log_level = level;
                    }
                    Some(Command::Stop(drain)) => {
                        self.stop(&mut child, drain).await;
                        return Ended::Stopped;
                    }
                    None => {
                        self.stop(&mut child, Duration::ZERO).await;
                        return Ended::Stopped;
                    }
                },
            }
        }
    }

    async fn drain(&mut self) {
        self.status.send_modify(|status| status.state = EnvoyState::Draining);
        for path in ["/healthcheck/fail", "/drain_listeners?inboundonly&graceful&skip_exit"] {
            if let Err(error) = admin::post(&self.launch.admin, path).await {
                warn!(%error, path, "Envoy could not be told to drain; its connections will be cut");
            }
        }
    }

    /// Drains for at most `drain`, ends Envoy, and reaps it.
    async fn stop(&mut self, child: &mut Child, drain: Duration) {
        if !drain.is_zero() {
            self.drain().await;
            let idle = async {
                loop {
                    // An Envoy that can't be asked has nothing left to wait for.
                    match admin::connections(&self.launch.admin).await {
                        Ok(Some(0)) | Err(_) => break,
                        Ok(_) => tokio::time::sleep(DRAIN_LOOK).await,
                    }
                }
            };
            tokio::select! {
                _ = timeout(drain, idle) => {}
                _ = child.wait() => return,
            }
        }
        if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
            // The child isn't reaped yet, so the pid is still its own.
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        if timeout_at(Instant::now() + EXIT_DEADLINE, child.wait()).await.is_err() {
            warn!("Envoy did not exit after SIGTERM and is killed");
            let _ = child.start_kill();
            let _ = child.wait().await;
        }
    }
}

#[expect(unsafe_code, reason = "only the child itself can ask to die with its parent")]
fn command(launch: &Launch) -> Program {
    let mut command = Program::new(&launch.binary);
    command
        .arg("-c")
        .arg(&launch.bootstrap)
        .args(["--base-id", &launch.base_id.to_string()])
        // Without hot restart Envoy makes no shared memory, which nobody would remove after a SIGKILL.
        .arg("--disable-hot-restart")
        .args(["--concurrency", &launch.concurrency.to_string()])
        // A changed policy replaces a listener's filter chain; connections of the old one, which still has the old
        // policy, are told to go at their next response rather than at random within the drain time.
        .args(["--drain-strategy", "immediate"])
        .args(["--drain-time-s", &launch.drain_time.as_secs().to_string()])
        .args(["--log-level", &launch.log_level])
        .args(["--log-format", logs::FORMAT])
        .env_clear()
        .current_dir(launch.bootstrap.parent().unwrap_or(Path::new("/")))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let parent = nix::unistd::getpid();
    // SAFETY: between fork and exec this only makes system calls, and allocates nothing.
    unsafe {
        command.pre_exec(move || {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            // The parent may have died before the line above.
            if getppid() != parent {
                return Err(io::Error::from(io::ErrorKind::BrokenPipe));
            }
            Ok(())
        });
    }
    command
}

fn describe(status: io::Result<ExitStatus>, last_words: Option<String>) -> String {
    let end = match status {
        Ok(status) => status.to_string(),
        Err(error) => error.to_string(),
    };
    match last_words {
        Some(words) => format!("{end}: {words}"),
        None => end,
    }
}

/// Enough of SHA-256 to tell two bootstraps apart.
fn hash(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    Sha256::digest(bytes).iter().take(8).fold(String::with_capacity(16), |mut text, byte| {
        // Writing to a string can't fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests;
