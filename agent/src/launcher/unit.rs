//! Runs shims as systemd units, `ursa-sidecar@<id>.service`.
//!
//! systemd parents the shim, puts it into its namespace, its control group and under its own user, restarts it when it
//! fails, and stops it with its application. What is left to the agent: to start the unit where nobody else does, to
//! recognise the shim as that unit's main process, and to take it over. It needs no right of its own but the polkit
//! rule that lets it start and stop exactly these units.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use nix::sys::inotify::AddWatchFlags;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};

use super::own::with_cause;
use super::process::Process;
use super::{Found, Handover, LaunchError, Launcher, Origin, ShimSpec, ShimState, is_id};
use crate::inotify::Events;
use crate::relay::{Admit, is_of};
use crate::shim::client::ShimClient;
use crate::systemd::{ActiveState, Manager, ManagerError};

/// How long a unit that was started may take until its shim listens. It includes what the unit requires: the redirect.
const START_DEADLINE: Duration = Duration::from_secs(20);
/// Between two looks for the socket of a shim that starts.
const LOOK: Duration = Duration::from_millis(20);
/// How long a unit may take beyond its drain until it has stopped.
const STOP_DEADLINE: Duration = Duration::from_secs(75);

/// Runs shims as units.
#[derive(Debug)]
pub struct UnitLauncher {
    /// The units' runtime directories, one per sidecar.
    run_dir: PathBuf,
    manager: Arc<Manager>,
    /// Counts what appears in the run directory: systemd makes a sidecar's directory when it starts its unit.
    appearances: watch::Receiver<u64>,
}

/// The unit of a sidecar.
pub fn unit_name(id: &str) -> String {
    format!("ursa-sidecar@{id}.service")
}

impl UnitLauncher {
    /// A launcher whose sidecars' runtime directories are below `run_dir` (`/run/ursa-sidecar`), which must exist.
    pub fn new(run_dir: PathBuf, manager: Arc<Manager>) -> io::Result<Self> {
        let mut events = Events::of(&run_dir, AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO)?;
        let (count, appearances) = watch::channel(0);
        let dir = run_dir.clone();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    event = events.next() => match event {
                        Ok(()) => count.send_modify(|count| *count += 1),
                        Err(error) => {
                            warn!(dir = %dir.display(), %error, "sidecars that start by themselves are found later");
                            return;
                        }
                    },
                    () = count.closed() => return,
                }
            }
        });
        Ok(Self { run_dir, manager, appearances })
    }

    async fn adopt_or_start(&self, spec: &ShimSpec) -> Result<watch::Receiver<ShimState>, LaunchError> {
        is_id(&spec.id)?;
        if spec.transparent {
            return Err(LaunchError::Invalid {
                id: spec.id.clone(),
                reason: "its redirect is by TPROXY, for which Envoy needs CAP_NET_RAW, and ursa-sidecar@.service holds no \
                         capability; leave inbound.mode at redirect, or run the agent with `launcher: fork` and that \
                         capability"
                    .into(),
            });
        }
        let failed = |reason: String| LaunchError::Start { id: spec.id.clone(), reason };
        let dir = self.dir(&spec.id);
        match ShimClient::connect(&dir).await {
            Ok(client) => {
                let process = self.identify(&client, spec).await?;
                return Ok(follow(&spec.id, process, Origin::Adopted));
            }
            Err(error) if error.is_nobody() => {}
            // A stopped or dying shim may still hold a serving Envoy: it is never replaced for being slow.
            Err(error) => return Err(adopt(spec, with_cause(&error))),
        }
        let unit = unit_name(&spec.id);
        let sidecar = self.manager.unit(&unit).await.map_err(|error| failed(error.to_string()))?;
        if !sidecar.state.is_up() {
            if let Some(application) = &spec.unit {
                let state =
                    self.manager.unit(application).await.map_err(|error| failed(error.to_string()))?.state;
                if !state.is_up() {
                    return Err(LaunchError::NotWanted {
                        id: spec.id.clone(),
                        unit: application.clone(),
                        state,
                    });
                }
            }
            info!(unit, was = %sidecar.state, "starting the sidecar's unit");
            self.manager.start(&unit).await.map_err(|error| failed(error.to_string()))?;
        }
        let process = timeout(START_DEADLINE, self.wait_for(spec, &dir)).await.map_err(|_| {
            failed(format!(
                "nobody listens in {} after {} s; `systemctl status {unit}` tells what it waits for",
                dir.display(),
                START_DEADLINE.as_secs()
            ))
        })??;
        Ok(follow(&spec.id, process, if sidecar.state.is_up() { Origin::Adopted } else { Origin::Started }))
    }

    /// Waits for the shim of a unit that starts.
    async fn wait_for(&self, spec: &ShimSpec, dir: &Path) -> Result<Process, LaunchError> {
        let unit = unit_name(&spec.id);
        let mut asked = Instant::now();
        loop {
            match ShimClient::connect(dir).await {
                Ok(client) => return self.identify(&client, spec).await,
                Err(error) if error.is_nobody() => {}
                Err(error) => return Err(adopt(spec, with_cause(&error))),
            }
            // systemd knows first when it can't: a user or a namespace that isn't there, a redirect that failed.
            if asked.elapsed() > 10 * LOOK {
                asked = Instant::now();
                let failed = |reason: String| LaunchError::Start { id: spec.id.clone(), reason };
                let found = self.manager.unit(&unit).await.map_err(|error| failed(error.to_string()))?;
                if matches!(found.state, ActiveState::Failed | ActiveState::Inactive) {
                    return Err(failed(format!(
                        "{unit} is {} (result {}); `systemctl status {unit}` tells why",
                        found.state, found.result
                    )));
                }
            }
            sleep(LOOK).await;
        }
    }

    /// The process behind a control socket, if it is the main process of the sidecar's unit.
    async fn identify(&self, client: &ShimClient, spec: &ShimSpec) -> Result<Process, LaunchError> {
        let (peer, hello) = (client.peer(), client.hello());
        let refuse = |reason: String| Err(adopt(spec, reason));
        if peer.uid != spec.uid && peer.uid != 0 {
            return refuse(format!(
                "{} was bound by uid {}, and its sidecar runs as uid {}: stop pid {} and try again",
                client.path().display(),
                peer.uid,
                spec.uid,
                peer.pid
            ));
        }
        if hello.pid != peer.pid {
            return refuse(format!("the shim says it is pid {}, the kernel says {}", hello.pid, peer.pid));
        }
        if !hello.workload.is_empty() && hello.workload != spec.workload {
            return refuse(format!("the shim there belongs to {}, not to {}", hello.workload, spec.workload));
        }
        let process = Process::open(hello.pid, Some(hello.start_time)).map_err(|error| {
            adopt(spec, format!("the shim (pid {}) can't be watched: {error}", hello.pid))
        })?;
        let unit = unit_name(&spec.id);
        match self.manager.unit_of(process.pid(), process.pidfd()).await {
            Ok(Some(found)) if found == unit => {}
            Ok(Some(found)) => {
                return refuse(format!("pid {} is part of {found}, not of {unit}: stop it", process.pid()));
            }
            Ok(None) => return refuse(format!("pid {} is part of no unit: stop it", process.pid())),
            Err(error) => return refuse(error.to_string()),
        }
        if process.has_ended() {
            return refuse(format!("pid {} has ended", process.pid()));
        }
        Ok(process)
    }

    async fn end(&self, id: &str, drain: Duration) -> Result<(), LaunchError> {
        is_id(id)?;
        let unit = unit_name(id);
        let failed = |reason: String| LaunchError::Stop { id: id.to_owned(), reason };
        let asked = |error: ManagerError| failed(error.to_string());
        let found = self.manager.unit(&unit).await.map_err(asked)?;
        if matches!(found.state, ActiveState::Inactive | ActiveState::Failed) {
            return Ok(());
        }
        // Stopping what a running application needs would cut it off, or stop it.
        for application in &found.needed_by {
            if self.manager.unit(application).await.map_err(asked)?.state.is_up() {
                return Err(failed(format!(
                    "{application} runs and needs it, so it is left running with its last configuration; `ursa leave \
                     --unit {application}` takes the service out of the mesh, `systemctl stop {application}` stops both"
                )));
            }
        }
        match ShimClient::connect(&self.dir(id)).await {
            // The unit's own stop would wait as long; but it is the agent that knows for how long.
            Ok(client) => {
                if let Err(error) = client.stop(drain).await {
                    warn!(id, %error, "the shim can't be asked to drain");
                }
            }
            Err(error) if error.is_nobody() => {}
            Err(error) => warn!(id, error = %with_cause(&error), "the shim can't be asked to drain"),
        }
        self.manager.stop(&unit).await.map_err(asked)?;
        let stopped = async {
            loop {
                let found = self.manager.unit(&unit).await.map_err(asked)?;
                if matches!(found.state, ActiveState::Inactive | ActiveState::Failed) {
                    return Ok(());
                }
                sleep(LOOK).await;
            }
        };
        timeout(drain + STOP_DEADLINE, stopped).await.map_err(|_| {
            failed(format!("{unit} still stops after {} s", (drain + STOP_DEADLINE).as_secs()))
        })?
    }

    async fn found(&self) -> Result<Vec<Found>, LaunchError> {
        let failed = |error: io::Error| LaunchError::Invalid {
            id: "*".into(),
            reason: format!("{} can't be listed: {error}", self.run_dir.display()),
        };
        let entries = match fs::read_dir(&self.run_dir) {
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

impl Launcher for UnitLauncher {
    fn dir(&self, id: &str) -> PathBuf {
        self.run_dir.join(id)
    }

    fn handover(&self) -> Handover {
        Handover::Settings
    }

    fn ensure(&self, spec: ShimSpec) -> BoxFuture<'_, Result<watch::Receiver<ShimState>, LaunchError>> {
        Box::pin(async move { self.adopt_or_start(&spec).await })
    }

    fn stop<'a>(&'a self, id: &'a str, drain: Duration) -> BoxFuture<'a, Result<(), LaunchError>> {
        Box::pin(self.end(id, drain))
    }

    fn appeared(&self) -> BoxFuture<'_, ()> {
        let mut appearances = self.appearances.clone();
        Box::pin(async move {
            appearances.mark_unchanged();
            if appearances.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        })
    }

    fn admission(&self, spec: &ShimSpec, _shim: i32) -> Admit {
        let (manager, user, unit) = (Arc::clone(&self.manager), spec.uid, unit_name(&spec.id));
        Arc::new(move |peer| {
            let (manager, unit) = (Arc::clone(&manager), unit.clone());
            Box::pin(async move {
                is_of(&peer, user)?;
                let found = manager.unit_of(peer.pid(), peer.pidfd()).await;
                if peer.has_ended() {
                    return Err(format!("pid {} has ended", peer.pid()));
                }
                match found {
                    Ok(Some(found)) if found == unit => Ok(()),
                    Ok(Some(found)) => Err(format!("pid {} is part of {found}, not of {unit}", peer.pid())),
                    Ok(None) => Err(format!("pid {} is part of no unit", peer.pid())),
                    Err(error) => Err(error.to_string()),
                }
            })
        })
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<Found>, LaunchError>> {
        Box::pin(self.found())
    }
}

fn adopt(spec: &ShimSpec, reason: String) -> LaunchError {
    LaunchError::Adopt { id: spec.id.clone(), reason }
}

/// Tells when the shim has ended. systemd starts it again; the agent finds the new one.
fn follow(id: &str, process: Process, origin: Origin) -> watch::Receiver<ShimState> {
    let (pid, start_time) = (process.pid(), process.start_time());
    info!(id, pid, ?origin, "the shim runs");
    let (state, seen) = watch::channel(ShimState::Running { pid, start_time, origin });
    tokio::spawn(async move {
        tokio::select! {
            _ = process.ended() => {}
            () = state.closed() => return,
        }
        let reason = format!("the shim (pid {pid}) ended; systemd starts it again");
        state.send_replace(ShimState::Backoff { reason, failures: 1 });
    });
    seen
}
