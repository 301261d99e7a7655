//! Starts shims as detached processes: for tests and for hosts without systemd.
//!
//! What runs is found through the shim's control socket alone: the kernel tells which process bound it, and only
//! root could have bound it as root. No record of ours can be stale.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex as StdMutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use nix::sys::signal::Signal;
use tokio::sync::{Mutex, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::own::{end, end_known, identify, with_cause};
use super::process::Process;
use super::{Found, LaunchError, Launcher, Origin, ShimSpec, ShimState, is_id};
use crate::relay::{Admit, children_of};
use crate::shim::backoff::Backoff;
use crate::shim::client::ShimClient;
use crate::shim::envoy::base_id;

/// How long a shim may take until its control socket answers.
const START_DEADLINE: Duration = Duration::from_secs(10);
/// Between two looks for the socket of a shim that was just started; it appears within milliseconds.
const LOOK: Duration = Duration::from_millis(2);
/// A log that is longer when its shim starts is put aside, replacing the one before. A running shim bounds its own.
const MAX_LOG: u64 = 4 * 1024 * 1024;

/// Where a [`ForkLauncher`] finds and puts things.
#[derive(Debug, Clone)]
pub struct ForkConfig {
    /// Run directory; shims live in `<run>/w/<id>`.
    pub run_dir: PathBuf,
    /// The `ursa-shim` binary.
    pub shim: PathBuf,
    /// Directory for the shims' logs, `<id>.log` each; the agent's own stderr when absent.
    pub log_dir: Option<PathBuf>,
}

/// Starts shims as detached processes that outlive the agent.
#[derive(Debug)]
pub struct ForkLauncher {
    config: Arc<ForkConfig>,
    slots: StdMutex<HashMap<String, Slot>>,
}

/// What is locked to start or stop one shim, so that the drain of one holds up no other.
type Slot = Arc<Mutex<Option<Kept>>>;

/// A shim that is kept running by a task of its own.
#[derive(Debug)]
struct Kept {
    spec: watch::Sender<ShimSpec>,
    state: watch::Receiver<ShimState>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Drop for Kept {
    /// Nobody is left who could stop the shim through its keeper. The shim itself lives on.
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl ForkLauncher {
    /// A launcher that keeps nothing yet.
    pub fn new(config: ForkConfig) -> Self {
        Self { config: Arc::new(config), slots: StdMutex::default() }
    }

    /// Its configuration.
    pub fn config(&self) -> &ForkConfig {
        &self.config
    }

    async fn keep(&self, spec: ShimSpec) -> Result<watch::Receiver<ShimState>, LaunchError> {
        let id = spec.id.clone();
        self.check(&spec)?;
        let slot = self.slot(&id);
        let mut state = {
            let mut kept = slot.lock().await;
            if let Some(known) = kept.as_ref() {
                known.spec.send_replace(spec);
                known.state.clone()
            } else {
                let first = ShimState::Backoff { reason: "not started yet".into(), failures: 0 };
                let (state, seen) = watch::channel(first);
                let (spec, wanted) = watch::channel(spec);
                let stop = CancellationToken::new();
                let keeper = Keeper { config: Arc::clone(&self.config), wanted, state, stop: stop.clone() };
                let task = tokio::spawn(keeper.run());
                *kept = Some(Kept { spec, state: seen.clone(), stop, task });
                seen
            }
        };
        // The first failure is told to whoever asked; the keeper goes on trying.
        let settled = state
            .wait_for(|state| !matches!(state, ShimState::Backoff { failures: 0, .. }))
            .await
            .map(|state| state.clone());
        match settled {
            Ok(ShimState::Backoff { reason, .. }) => Err(LaunchError::Start { id, reason }),
            Ok(ShimState::Running { .. }) => Ok(state),
            Ok(ShimState::Stopped) | Err(_) => {
                Err(LaunchError::Start { id, reason: "it was stopped meanwhile".into() })
            }
        }
    }

    fn check(&self, spec: &ShimSpec) -> Result<(), LaunchError> {
        let invalid = |reason: String| Err(LaunchError::Invalid { id: spec.id.clone(), reason });
        is_id(&spec.id)?;
        if spec.uid == 0 || spec.gid == 0 {
            return invalid("it would run as root; give the sidecar a user and a group of its own".into());
        }
        for (what, path) in [("the shim", &self.config.shim), ("Envoy", &spec.envoy)] {
            if let Err(error) = fs::metadata(path) {
                return invalid(format!(
                    "{what} is not at {}: {error}; check the agent's settings",
                    path.display()
                ));
            }
        }
        let dir = self.dir(&spec.id);
        if !dir.is_dir() {
            return invalid(format!("{} is no directory; the agent makes it first", dir.display()));
        }
        Ok(())
    }

    fn slot(&self, id: &str) -> Slot {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that nobody holds or waits for are only memory.
        slots.retain(|_, slot| {
            Arc::strong_count(slot) > 1 || slot.try_lock().is_ok_and(|kept| kept.is_some())
        });
        Arc::clone(slots.entry(id.to_owned()).or_default())
    }

    async fn remove(&self, id: &str, drain: Duration) -> Result<(), LaunchError> {
        is_id(id)?;
        let slot = self.slot(id);
        // Held until the end, so that nobody starts it again in the middle.
        let mut kept = slot.lock().await;
        let (mut workload, mut running) = (None, None);
        if let Some(mut known) = kept.take() {
            workload = Some(known.spec.borrow().workload.clone());
            if let ShimState::Running { pid, start_time, .. } = *known.state.borrow() {
                running = Some((pid, start_time));
            }
            known.stop.cancel();
            if let Err(error) = (&mut known.task).await {
                warn!(id, %error, "the shim's keeper failed");
            }
        }
        let dir = self.dir(id);
        let mut ended = end(&dir, workload.as_deref(), drain).await;
        if let Some((pid, start_time)) = running {
            // Who took its socket away doesn't keep it alive.
            ended = end_known(pid, start_time).await;
        }
        // What lives keeps its directory: it is found there.
        ended.map_err(|reason| LaunchError::Stop { id: id.to_owned(), reason })?;
        let mut problems = Vec::new();
        let memory =
            Path::new("/dev/shm").join(format!("envoy_shared_memory_{}", u64::from(base_id(&dir)) * 10));
        for (path, removed) in [(&dir, fs::remove_dir_all(&dir)), (&memory, fs::remove_file(&memory))] {
            match removed {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    problems.push(format!("{} cannot be removed: {error}", path.display()));
                }
                _ => {}
            }
        }
        if problems.is_empty() {
            info!(id, "stopped the shim");
            return Ok(());
        }
        Err(LaunchError::Stop { id: id.to_owned(), reason: problems.join("; ") })
    }

    async fn found(&self) -> Result<Vec<Found>, LaunchError> {
        let all = self.config.run_dir.join("w");
        let failed = |error: io::Error| LaunchError::Invalid {
            id: "*".into(),
            reason: format!("{} cannot be listed: {error}", all.display()),
        };
        let entries = match fs::read_dir(&all) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        let mut found = Vec::new();
        for entry in entries {
            let dir = entry.map_err(failed)?.path();
            let Some(id) = dir.file_name().and_then(|name| name.to_str()).map(str::to_owned) else {
                continue;
            };
            if !dir.is_dir() {
                continue;
            }
            let pid = ShimClient::listener(&dir).await.ok().flatten().map(|peer| peer.pid);
            found.push(Found { id, dir, pid });
        }
        found.sort_by(|one, other| one.id.cmp(&other.id));
        Ok(found)
    }
}

impl Launcher for ForkLauncher {
    fn dir(&self, id: &str) -> PathBuf {
        self.config.run_dir.join("w").join(id)
    }

    fn ensure(&self, spec: ShimSpec) -> BoxFuture<'_, Result<watch::Receiver<ShimState>, LaunchError>> {
        Box::pin(self.keep(spec))
    }

    fn stop<'a>(&'a self, id: &'a str, drain: Duration) -> BoxFuture<'a, Result<(), LaunchError>> {
        Box::pin(self.remove(id, drain))
    }

    fn admission(&self, spec: &ShimSpec, shim: i32) -> Admit {
        children_of(shim, spec.uid)
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<Found>, LaunchError>> {
        Box::pin(self.found())
    }
}

/// Keeps one shim running.
struct Keeper {
    config: Arc<ForkConfig>,
    wanted: watch::Receiver<ShimSpec>,
    state: watch::Sender<ShimState>,
    stop: CancellationToken,
}

impl Keeper {
    async fn run(self) {
        let mut backoff = Backoff::default();
        loop {
            let spec = self.wanted.borrow().clone();
            // Not to be cancelled in the middle: a shim that is only starting can't be found by anybody yet.
            let (reason, ran_for) = match self.adopt_or_start(&spec).await {
                Ok((process, origin)) => {
                    let since = Instant::now();
                    let (pid, start_time) = (process.pid(), process.start_time());
                    info!(id = spec.id, pid, ?origin, "the shim runs");
                    self.state.send_replace(ShimState::Running { pid, start_time, origin });
                    tokio::select! {
                        ended = process.ended() => if let Err(error) = ended {
                            error!(id = spec.id, %error, "the shim cannot be watched");
                        },
                        () = self.stop.cancelled() => break,
                    }
                    (
                        format!("the shim (pid {pid}) ended; {}", self.last_words(&spec.id)),
                        Some(since.elapsed()),
                    )
                }
                Err(reason) => (reason, None),
            };
            let delay = backoff.next(ran_for);
            warn!(id = spec.id, %reason, ?delay, "the shim will be started again");
            self.state.send_replace(ShimState::Backoff { reason, failures: backoff.failures() });
            tokio::select! {
                () = sleep(delay) => {}
                () = self.stop.cancelled() => break,
            }
        }
        self.state.send_replace(ShimState::Stopped);
    }

    async fn adopt_or_start(&self, spec: &ShimSpec) -> Result<(Process, Origin), String> {
        let dir = self.config.run_dir.join("w").join(&spec.id);
        match ShimClient::connect(&dir).await {
            Ok(client) => {
                let process = identify(&client, &dir, &spec.workload)?;
                let moved =
                    spec.netns.as_ref().is_some_and(|netns| matches!(process.is_in(netns), Ok(false)));
                if !moved {
                    return Ok((process, Origin::Adopted));
                }
                warn!(
                    id = spec.id,
                    pid = process.pid(),
                    "the shim is in a former network namespace and is replaced"
                );
                drop(client);
                end(&dir, Some(&spec.workload), Duration::ZERO).await?;
                self.start(spec, &dir).await.map(|process| (process, Origin::Started))
            }
            Err(error) if error.is_nobody() => {
                self.start(spec, &dir).await.map(|process| (process, Origin::Started))
            }
            // A stopped or dying shim may still hold a serving Envoy: it is never killed for being slow.
            Err(error) => Err(format!("{}; it is neither adopted nor replaced", with_cause(&error))),
        }
    }

    async fn start(&self, spec: &ShimSpec, dir: &Path) -> Result<Process, String> {
        let mut command = Command::new(&self.config.shim);
        command
            .args(["--workload", &spec.workload])
            .arg("--dir")
            .arg(dir)
            .arg("--envoy")
            .arg(&spec.envoy)
            .args(["--uid", &spec.uid.to_string()])
            .args(["--gid", &spec.gid.to_string()])
            .args(["--dns-port", &spec.dns_port.to_string()])
            .args(["--concurrency", &spec.concurrency.to_string()])
            .args(["--base-id", &base_id(dir).to_string()])
            .arg("--last-good")
            .arg(&spec.last_good)
            .arg("--resolv-conf")
            .arg(&spec.resolv_conf)
            .args(["--log-level", &spec.log_level])
            .env_clear()
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(self.log(&spec.id).map_err(|error| format!("its log cannot be opened: {error}"))?);
        if let Some(netns) = &spec.netns {
            command.arg("--netns").arg(netns);
        }
        if spec.transparent {
            command.arg("--transparent");
        }
        let failed = |error: io::Error| format!("{} cannot be started: {error}", self.config.shim.display());
        // The child is left behind on purpose: it is watched and reaped by its pidfd, and makes itself the leader
        // of a session of its own.
        let child = command.spawn().map_err(failed)?;
        let pid = i32::try_from(child.id()).map_err(|error| error.to_string())?;
        let process = Process::open(pid, None).map_err(failed)?;
        info!(id = spec.id, pid, "the shim is started");
        let answers = async {
            loop {
                match ShimClient::connect(dir).await {
                    Ok(client) => return identify(&client, dir, &spec.workload),
                    Err(error) if error.is_nobody() => sleep(LOOK).await,
                    Err(error) => return Err(with_cause(&error)),
                }
            }
        };
        let started = tokio::select! {
            answered = timeout(START_DEADLINE, answers) => match answered {
                Ok(Ok(other)) if other.pid() == pid => return Ok(process),
                Ok(Ok(other)) => Err(format!("another process (pid {}) listens in {}", other.pid(), dir.display())),
                Ok(Err(reason)) => Err(reason),
                Err(_) => Err(format!("its control socket did not answer within {START_DEADLINE:?}")),
            },
            _ = process.ended() => return Err(self.last_words(&spec.id)),
        };
        // Half started is not started.
        if let Err(error) = process.signal(Signal::SIGKILL) {
            warn!(id = spec.id, %error, "a shim that did not start cannot be killed");
        }
        let _ = process.ended().await;
        started
    }

    fn log(&self, id: &str) -> io::Result<Stdio> {
        let Some(dir) = &self.config.log_dir else { return Ok(Stdio::inherit()) };
        fs::DirBuilder::new().recursive(true).mode(0o750).create(dir)?;
        let path = dir.join(format!("{id}.log"));
        if fs::metadata(&path).is_ok_and(|data| data.len() > MAX_LOG) {
            fs::rename(&path, dir.join(format!("{id}.log.1")))?;
        }
        Ok(File::options().create(true).append(true).open(path)?.into())
    }

    /// The last line of its log: why it ended, as far as it knew.
    fn last_words(&self, id: &str) -> String {
        let Some(dir) = &self.config.log_dir else { return "its last words are in the agent's log".into() };
        let path = dir.join(format!("{id}.log"));
        let tail = || -> io::Result<String> {
            let mut file = File::open(&path)?;
            let length = file.seek(SeekFrom::End(0))?;
            file.seek(SeekFrom::Start(length.saturating_sub(4096)))?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let Ok(text) = tail() else { return format!("it has no log at {}", path.display()) };
        let last = text.lines().next_back().unwrap_or_default();
        let message = serde_json::from_str::<serde_json::Value>(last)
            .ok()
            .and_then(|line| line.pointer("/fields/message")?.as_str().map(str::to_owned));
        format!("its last words in {}: {}", path.display(), message.as_deref().unwrap_or(last))
    }
}
