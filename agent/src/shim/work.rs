//! What a shim works by, and changing that while it works.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tracing::{info, warn};

use super::dns::{Dns, NameServer};
use super::envoy::{Command, Launch};
use super::log::SetLogLevel;
use super::protocol::{ADMIN_SOCKET, BOOTSTRAP_FILE, Settings};
use super::unit;

/// How long the supervisor may take: less than a client waits.
const PATIENCE: Duration = Duration::from_secs(4);

/// What it takes to apply settings.
pub(super) struct Work {
    /// Where bootstrap and admin socket are.
    pub(super) private: PathBuf,
    pub(super) base_id: u32,
    pub(super) launch: watch::Sender<Option<Launch>>,
    pub(super) last_good: watch::Sender<Option<PathBuf>>,
    pub(super) workload: watch::Sender<String>,
    pub(super) dns: Arc<Dns>,
    pub(super) names: Arc<NameServer>,
    pub(super) set_log_level: SetLogLevel,
    pub(super) commands: mpsc::Sender<Command>,
    /// What our log lines are about.
    pub(super) span: tracing::Span,
    pub(super) present: Mutex<Present>,
}

/// What is in force.
#[derive(Debug, Clone, Default)]
pub(super) struct Present {
    /// As configured; nothing for a shim that works by its arguments.
    pub(super) settings: Option<Settings>,
    /// When it isn't that of the settings or arguments.
    pub(super) log_level: Option<String>,
}

impl Work {
    pub(super) fn present(&self) -> MutexGuard<'_, Present> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How Envoy is started by `settings`.
    fn launch(&self, settings: &Settings) -> Launch {
        Launch {
            binary: settings.envoy.clone(),
            bootstrap: self.private.join(BOOTSTRAP_FILE),
            admin: self.private.join(ADMIN_SOCKET),
            base_id: self.base_id,
            concurrency: settings.concurrency,
            drain_time: Duration::from_secs(settings.drain_time_s),
            log_level: envoy_level(&settings.log_level).to_owned(),
        }
    }

    /// Works by these from now on, or changes nothing and says why.
    pub(super) fn configure(&self, settings: Settings) -> Result<(), String> {
        if self.present().settings.as_ref() == Some(&settings) && self.launch.borrow().is_some() {
            return Ok(());
        }
        unit::check(&settings)?;
        let bootstrap = self.private.join(BOOTSTRAP_FILE);
        let new = bootstrap.with_extension("new");
        let unwritten = |error: io::Error| {
            format!("Envoy's bootstrap {} cannot be written: {error}", bootstrap.display())
        };
        // What can fail comes first, and the port, which may be somebody else's, before what replaces.
        write(&new, settings.bootstrap.to_string().as_bytes()).map_err(unwritten)?;
        self.names.listen(settings.dns_port).map_err(|error| error.to_string())?;
        fs::rename(&new, &bootstrap).map_err(unwritten)?;
        self.set_log_level(&settings.log_level)?;
        self.dns.configure(&settings.dns_table, &settings.resolv_conf);
        self.name(&settings.workload);
        self.last_good.send_replace(Some(settings.last_good.clone()));
        self.launch.send_replace(Some(self.launch(&settings)));
        info!(envoy = %settings.envoy.display(), dns_port = settings.dns_port, "configured");
        *self.present() = Present { settings: Some(settings), log_level: None };
        Ok(())
    }

    /// Works by what an earlier program of this process was configured with. Its sockets and files are in place.
    pub(super) fn resume(&self, settings: Settings) {
        self.dns.configure(&settings.dns_table, &settings.resolv_conf);
        self.name(&settings.workload);
        if let Err(reason) = self.set_log_level(&settings.log_level) {
            warn!(%reason, "the log level cannot be set");
        }
        self.last_good.send_replace(Some(settings.last_good.clone()));
        self.launch.send_replace(Some(self.launch(&settings)));
        self.present().settings = Some(settings);
    }

    /// Why the workload's traffic isn't redirected yet, if it should be.
    pub(super) fn lacks_redirect(&self) -> Option<String> {
        let redirect = self.present().settings.as_ref().and_then(|settings| settings.redirect.clone());
        redirect.and_then(|file| file.in_place().err())
    }

    /// Whose sidecar this is.
    pub(super) fn name(&self, workload: &str) {
        let (mesh, name) = workload.split_once('.').unwrap_or(("", workload));
        self.span.record("mesh", mesh);
        self.span.record("workload", name);
        self.workload.send_replace(workload.to_owned());
    }

    /// Logs from this level on, and lets Envoy do so, too.
    pub(super) fn set_log_level(&self, level: &str) -> Result<(), String> {
        (self.set_log_level)(level)?;
        let envoy = envoy_level(level);
        let changed = self.launch.send_if_modified(|launch| {
            launch.as_mut().is_some_and(|launch| {
                let changed = launch.log_level != envoy;
                envoy.clone_into(&mut launch.log_level);
                changed
            })
        });
        if changed {
            self.command(Command::LogLevel(envoy.to_owned()))?;
        }
        self.present().log_level = Some(level.to_owned());
        Ok(())
    }

    /// Waits until the supervisor has done what it was told before.
    pub(super) async fn obeyed(&self) -> Result<(), String> {
        let (answer, answered) = oneshot::channel();
        self.command(Command::Ping(answer))?;
        match timeout(PATIENCE, answered).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err("this shim is being stopped or replaced; try again".into()),
            Err(_) => Err("Envoy's supervisor is still busy; the status tells when it is done".into()),
        }
    }

    /// Tells the supervisor.
    pub(super) fn command(&self, command: Command) -> Result<(), String> {
        self.commands.try_send(command).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => {
                "Envoy's supervisor is busy with earlier commands; try again".into()
            }
            mpsc::error::TrySendError::Closed(_) => "Envoy is being stopped for good".into(),
        })
    }
}

/// One step quieter than the shim: at `info` each start of Envoy lists all it was built with.
pub(super) fn envoy_level(level: &str) -> &str {
    match level {
        "info" | "warn" => "warning",
        "debug" => "info",
        "trace" => "debug",
        other => other,
    }
}

fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?.write_all(content)
}
