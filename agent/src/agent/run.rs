//! The agent's main function: puts the parts together, and leaves everything running when it ends.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::cni::Decisions;
use super::config::{AgentConfig, LauncherKind};
use super::control::Control;
use super::cri::Repair;
use super::session::{Inspector, Session};
use super::socket::{AgentSocket, Parts};
use super::supervisor::Supervisor;
use super::workload::{Redirects, Shared, WorkloadFiles, inspect};
use crate::launcher::Launcher;
use crate::launcher::fork::{ForkConfig, ForkLauncher};
use crate::shim::protocol::ADMIN_SOCKET;

/// Runs the agent until SIGTERM or SIGINT. Shims, Envoys and rules stay.
pub async fn run(config: AgentConfig) -> anyhow::Result<()> {
    // One provider for every TLS connection; an error means that it is installed already.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    prepare(&config)?;

    let stop = CancellationToken::new();
    let control = Arc::new(
        Control::open(config.node_dir(), config.control_plane.clone())
            .context("can't use this node's identity")?,
    );
    let launcher: Arc<dyn Launcher> = match config.launcher {
        LauncherKind::Fork => Arc::new(ForkLauncher::new(ForkConfig {
            run_dir: config.run_dir.clone(),
            shim: config.shim_binary(),
            log_dir: Some(config.run_dir.join("log")),
        })),
    };
    let inspector = Arc::new(AdminSockets { launcher: Arc::clone(&launcher) });
    let (session, session_task) = Session::start(control.watch(), inspector, stop.clone());
    let files = WorkloadFiles::watch(&config.workloads_dir)
        .with_context(|| format!("can't watch {}", config.workloads_dir.display()))?;
    let shared = Arc::new(Shared {
        config: config.clone(),
        launcher,
        session: session.clone(),
        redirects: Redirects::default(),
        links: control.watch(),
    });
    let (supervisor, supervisor_task) = Supervisor::start(shared, files, stop.clone());
    let path = config.socket();
    // Before the socket: from then on the plugin finds it.
    let decisions = Arc::new(Decisions::open(&config));
    let (pods, repair_task) =
        Repair::start(&config, Arc::clone(&decisions), supervisor.clone(), stop.clone());
    let parts = Parts { config, control: Arc::clone(&control), session, supervisor, decisions, pods };
    let socket = AgentSocket::bind(&path, parts)
        .await
        .with_context(|| format!("can't listen on {}", path.display()))?;
    let socket_task = tokio::spawn(socket.serve(stop.clone()));
    let renewal_task = tokio::spawn({
        let stop = stop.clone();
        async move { control.renew(stop).await }
    });
    tracing::info!(socket = %path.display(), "the agent runs");

    let mut terminate = signal(SignalKind::terminate()).context("can't listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("can't listen for SIGINT")?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("the agent stops; shims and Envoys go on");
    stop.cancel();
    for task in [session_task, supervisor_task, socket_task, renewal_task].into_iter().chain(repair_task) {
        task.await.context("a part of the agent failed")?;
    }
    Ok(())
}

/// Makes the directories. The state directory can be passed, but not listed: a shim reads its own files in it.
fn prepare(config: &AgentConfig) -> anyhow::Result<()> {
    for (dir, mode) in [
        (config.run_dir.as_path(), 0o755),
        (&config.run_dir.join("w"), 0o755),
        (&config.run_dir.join("log"), 0o700),
        (&config.run_dir.join("cni"), 0o700),
        (&config.state_dir, 0o711),
        (&config.state_dir.join("w"), 0o711),
    ] {
        create(dir, mode)
            .with_context(|| format!("can't create {}; run the agent as root", dir.display()))?;
    }
    Ok(())
}

/// Also corrects a directory that exists: one that a shim can't pass would cost it the last-good configuration.
fn create(dir: &Path, mode: u32) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(mode))
}

#[derive(Debug)]
struct AdminSockets {
    launcher: Arc<dyn Launcher>,
}

impl Inspector for AdminSockets {
    fn inspect(&self, kind: &str, parameters: Value) -> BoxFuture<'static, Result<Value, String>> {
        let text = |key: &str| parameters.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let id = super::workload::id_of(&text("mesh"), &text("name"));
        let socket = self.launcher.dir(&id).join(ADMIN_SOCKET);
        let kind = kind.to_owned();
        async move { inspect(&socket, &kind, &parameters).await }.boxed()
    }
}
