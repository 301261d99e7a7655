//! Taking over a shim: it is started or found, told what it works by, and its Envoy is served.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::Life;
use crate::agent::control::chain;
use crate::agent::workload::{bootstrap, names};
use crate::launcher::{Handover, ShimSpec, ShimState};
use crate::relay::{self, Reader, write_atomic};
use crate::shim::client::{ClientError, ShimClient};
use crate::shim::protocol::{BOOTSTRAP_FILE, DNS_FILE, EnvoyStatus, PRIVATE_DIR, SETTINGS_FILE, Settings};

/// How long a shim that has agreed may take to replace itself: it may be stopping an Envoy.
const REPLACED: Duration = Duration::from_secs(10);

/// A shim that this agent serves. Dropping it hands Envoy back to the shim.
pub(super) struct Attachment {
    pub(super) client: ShimClient,
    pub(super) envoy: watch::Receiver<EnvoyStatus>,
    pub(super) serving: JoinSet<Result<(), relay::ServeError>>,
    _stop: tokio_util::sync::DropGuard,
}

/// Connects to a shim. One whose binary was replaced on disk since it started takes over from itself first: so it is after
/// an upgrade, which starts the agent again and no sidecar.
async fn renewed(dir: &Path) -> Result<ShimClient, ClientError> {
    let client = ShimClient::connect(dir).await?;
    if !client.hello().outdated {
        return Ok(client);
    }
    let (pid, version) = (client.hello().pid, &client.hello().version);
    match client.re_exec().await {
        Ok(()) => {
            tracing::info!(pid, from = version, "the shim replaces itself by the installed version");
            if timeout(REPLACED, client.closed()).await.is_err() {
                tracing::warn!(pid, "the shim has not replaced itself in time; it goes on as it is");
                return Ok(client);
            }
            ShimClient::connect(dir).await
        }
        Err(error) => {
            tracing::warn!(pid, error = %chain(&error), "the shim goes on with its former version");
            Ok(client)
        }
    }
}

impl Life {
    /// Starts the shim or adopts it, and takes over Envoy's configuration.
    pub(super) async fn attach(&mut self) -> Result<Attachment, String> {
        let launcher = Arc::clone(&self.shared.launcher);
        let dir = launcher.dir(&self.id);
        let handover = launcher.handover();
        if handover == Handover::Files {
            let bootstrap = bootstrap::bootstrap(&self.spec, &dir).to_string();
            let file = dir.join(BOOTSTRAP_FILE);
            // Never read back: the directory is the proxy's, who might put a pipe there that nobody writes to.
            fs::create_dir_all(&dir)
                .and_then(|()| write_atomic(&file, bootstrap.as_bytes(), 0o644, None))
                .map_err(|error| format!("can't write {}: {error}", file.display()))?;
        }
        self.write_names(None).await;
        let config = self.shared.config.load_full();
        let spec = ShimSpec {
            id: self.id.clone(),
            workload: self.spec.node_id(),
            envoy: config.envoy_binary()?,
            unit: self.spec.unit.clone(),
            uid: self.spec.uid,
            gid: self.spec.gid,
            netns: self.spec.netns.clone(),
            dns_port: self.spec.dns_port,
            transparent: self.spec.is_transparent(),
            concurrency: self.spec.concurrency,
            last_good: self.shared.state_dir(&self.id),
            resolv_conf: self.spec.resolv_conf.clone(),
            log_level: config.log_level.clone(),
        };
        self.shim = Some(launcher.ensure(spec.clone()).await.map_err(|error| chain(&error))?);
        let client = renewed(&dir).await.map_err(|error| chain(&error))?;
        // The one that was judged, and not another that took its place since.
        let judged = self.shim.as_ref().map(|shim| shim.borrow().clone());
        if !matches!(judged, Some(ShimState::Running { pid, .. }) if pid == client.peer().pid) {
            return Err(format!(
                "the shim in {} has been replaced by pid {}",
                dir.display(),
                client.peer().pid
            ));
        }
        if handover == Handover::Settings {
            self.configure(&client).await?;
        } else if client.hello().workload != self.spec.node_id() {
            return Err(format!(
                "the shim in {} belongs to {}, not to {}; stop it and remove that directory",
                dir.display(),
                client.hello().workload,
                self.spec.node_id()
            ));
        }
        let listener = client.take_xds().await.map_err(|error| chain(&error))?;
        let listener = listener
            .set_nonblocking(true)
            .and_then(|()| UnixListener::from_std(listener))
            .map_err(|error| format!("can't use the xDS socket: {error}"))?;
        let stop = CancellationToken::new();
        let mut serving = JoinSet::new();
        let admit = launcher.admission(&spec, client.peer().pid);
        serving.spawn(relay::serve(listener, Arc::clone(&self.cache), admit, stop.clone()));
        Ok(Attachment { envoy: client.envoy(), client, serving, _stop: stop.drop_guard() })
    }

    /// Tells a shim that takes settings while it runs what has changed of them.
    pub(super) async fn hand_over_settings(&self, client: &ShimClient) -> Result<(), String> {
        match self.shared.launcher.handover() {
            Handover::Settings => self.configure(client).await,
            Handover::Files => Ok(()),
        }
    }

    /// Tells the shim what it works by, and keeps that for its next start without an agent.
    async fn configure(&self, client: &ShimClient) -> Result<(), String> {
        let (config, dir) = (self.shared.config.load_full(), self.shared.state_dir(&self.id));
        let sockets = self.shared.launcher.dir(&self.id).join(PRIVATE_DIR);
        let settings = Settings {
            workload: self.spec.node_id(),
            envoy: config.envoy_binary()?,
            bootstrap: bootstrap::bootstrap(&self.spec, &sockets),
            last_good: dir.clone(),
            dns_table: self.names_file(),
            redirect: self.shared.redirects.told_in(&self.spec),
            dns_port: self.spec.dns_port,
            resolv_conf: self.spec.resolv_conf.clone(),
            concurrency: self.spec.concurrency,
            drain_time_s: config.drain_seconds.into(),
            log_level: config.log_level.clone(),
        };
        let file = dir.join(SETTINGS_FILE);
        let kept = serde_json::to_vec(&settings)
            .map_err(std::io::Error::other)
            .and_then(|text| write_atomic(&file, &text, 0o600, Some(self.reader())));
        if let Err(error) = kept {
            // A full disk is no reason to serve nobody: the shim gets them from us as well.
            let text = format!(
                "can't write {}: {error}; without an agent the sidecar would start with older settings, or wait",
                file.display()
            );
            tracing::warn!(workload = %self.id, error = %text, "the sidecar's settings aren't kept");
            self.disk_error.send_replace(Some(text));
        }
        client.configure(settings).await.map_err(|error| chain(&error))
    }

    /// Whom the files are for that a shim reads in the agent's state directory.
    fn reader(&self) -> Reader {
        Reader { uid: self.spec.uid, gid: self.spec.gid }
    }

    fn names_file(&self) -> PathBuf {
        let dir = match self.shared.launcher.handover() {
            Handover::Files => self.shared.launcher.dir(&self.id),
            Handover::Settings => self.shared.state_dir(&self.id),
        };
        dir.join(DNS_FILE)
    }

    /// Replaces the table of names, if there is news and the picture is complete.
    pub(super) async fn write_names(&mut self, client: Option<&ShimClient>) {
        if !self.cache.is_complete() {
            return; // the shim's present table, or a retry, is better than an answer from half a picture
        }
        let table = names::table(&self.cache, &self.shared.config.load().dns_domains);
        if self.facts.names.as_ref() == Some(&table) {
            return;
        }
        let path = self.names_file();
        let (mode, reader) = match self.shared.launcher.handover() {
            Handover::Files => (0o644, None),
            Handover::Settings => (0o600, Some(self.reader())),
        };
        let written = serde_json::to_vec(&table)
            .map_err(std::io::Error::other)
            .and_then(|text| write_atomic(&path, &text, mode, reader));
        if let Err(error) = written {
            tracing::warn!(path = %path.display(), %error, "the table of names can't be written; the former one is served");
            return;
        }
        let Some(client) = client else { return };
        match client.reload_dns().await {
            Ok(()) => self.facts.names = Some(table),
            Err(error) => {
                tracing::warn!(workload = %self.id, error = %chain(&error), "the shim didn't take the table of names");
            }
        }
    }
}
