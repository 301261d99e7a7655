//! The agent's main function: puts the parts together, and leaves everything running when it ends.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use anyhow::Context;
use arc_swap::ArcSwap;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use nix::sys::stat::{Mode, umask};
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::cni::Decisions;
use super::config::{AgentConfig, LauncherKind};
use super::control::Control;
use super::cri::Repair;
use super::service::{self, Reload, Service};
use super::session::{Inspector, Session};
use super::socket::{AgentSocket, Parts};
use super::supervisor::Supervisor;
use super::workload::{Redirects, Shared, WorkloadFiles, inspect};
use crate::launcher::Launcher;
use crate::launcher::fork::{ForkConfig, ForkLauncher};
use crate::launcher::unit::UnitLauncher;
use crate::notify::Notifier;
use crate::systemd::{self, Manager};

/// Where systemd makes the sidecars' directories (`RuntimeDirectory=` of `ursa-sidecar@.service`).
const SIDECARS: &str = "/run/ursa-sidecar";

/// Runs the agent until SIGTERM or SIGINT. Shims, Envoys and rules stay. SIGHUP reads the configuration again.
pub async fn run(config: AgentConfig, reload: Reload) -> anyhow::Result<()> {
    // One provider for every TLS connection; an error means that it is installed already.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    // What only its own shim may read has an access list; every folder must let it pass.
    umask(Mode::from_bits_truncate(0o022));
    prepare(&config)?;

    let stop = CancellationToken::new();
    let control = Arc::new(
        Control::open(config.node_dir(), config.control_plane.clone())
            .context("can't use this node's identity")?,
    );
    let manager = Arc::new(Manager::default());
    let launcher: Arc<dyn Launcher> = match config.launcher() {
        LauncherKind::Unit => Arc::new(
            UnitLauncher::new(SIDECARS.into(), manager)
                .with_context(|| format!("can't watch {SIDECARS}; is the package's tmpfiles.d in place?"))?,
        ),
        LauncherKind::Fork | LauncherKind::Auto => Arc::new(ForkLauncher::new(ForkConfig {
            run_dir: config.run_dir.clone(),
            shim: config.shim_binary(),
            log_dir: Some(config.run_dir.join("log")),
        })),
    };
    let known = Arc::new(OnceLock::new());
    let inspector =
        Arc::new(AdminSockets { launcher: Arc::clone(&launcher), supervisor: Arc::clone(&known) });
    let (session, session_task) = Session::start(control.watch(), inspector, stop.clone());
    let files = WorkloadFiles::watch(&config.workloads_dir)
        .with_context(|| format!("can't watch {}", config.workloads_dir.display()))?;
    let shared = Arc::new(Shared {
        config: ArcSwap::from_pointee(config.clone()),
        state_dir: config.state_dir.clone(),
        launcher: Arc::clone(&launcher),
        session: session.clone(),
        redirects: match config.launcher() {
            LauncherKind::Unit => Redirects::by_units(config.run_dir.clone())
                .with_context(|| format!("can't watch {}", config.run_dir.display()))?,
            LauncherKind::Fork | LauncherKind::Auto => Redirects::new(config.run_dir.clone()),
        },
        links: control.watch(),
    });
    let running: Vec<String> = match launcher.list().await {
        Ok(found) => found.into_iter().filter(|shim| shim.pid.is_some()).map(|shim| shim.id).collect(),
        Err(error) => {
            tracing::warn!(%error, "what runs can't be listed");
            Vec::new()
        }
    };
    let (supervisor, supervisor_task) = Supervisor::start(shared, files, stop.clone());
    let _ = known.set(supervisor.clone()); // nobody else sets it
    let given = systemd::listeners().context("systemd's sockets can't be used")?;
    let path = config.socket();
    // Before the socket: from then on the plugin finds it.
    let decisions = Arc::new(Decisions::open(&config));
    let (pods, repair_task) =
        Repair::start(&config, Arc::clone(&decisions), supervisor.clone(), stop.clone());
    let parts = Parts {
        config: config.clone(),
        control: Arc::clone(&control),
        session,
        supervisor: supervisor.clone(),
        decisions,
        pods,
    };
    let socket = match given.into_iter().next() {
        Some(listener) => AgentSocket::given(listener, parts),
        None => AgentSocket::bind(&path, parts).await,
    };
    let socket = socket.with_context(|| format!("can't listen on {}", path.display()))?;
    let socket_task = tokio::spawn(socket.serve(stop.clone()));
    let renewal_task = tokio::spawn({
        let (control, stop) = (Arc::clone(&control), stop.clone());
        async move { control.renew(stop).await }
    });
    tracing::info!(socket = %path.display(), "the agent runs");

    let mut terminate = signal(SignalKind::terminate()).context("can't listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("can't listen for SIGINT")?;
    let mut hangup = signal(SignalKind::hangup()).context("can't listen for SIGHUP")?;
    let notifier = Notifier::from_env().context("can't talk to the service manager")?;
    let mut service = Service { config, reload, supervisor, control, notifier };
    service.adopted(running).await;
    service.tell("READY=1").await;
    let mut watchdog = tokio::time::interval(service::look(&service.notifier));
    watchdog.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = hangup.recv() => service.reload().await,
            _ = watchdog.tick() => service.tell("WATCHDOG=1").await,
        }
    }
    service.notifier.tell(&["STOPPING=1"]);
    tracing::info!("the agent stops; shims and Envoys go on");
    stop.cancel();
    for task in [session_task, supervisor_task, socket_task, renewal_task].into_iter().chain(repair_task) {
        task.await.context("a part of the agent failed")?;
    }
    Ok(())
}

/// Makes the directories; as an agent that isn't root only those of its own. The state directory can be passed, but not listed: a shim reads its own files in it.
fn prepare(config: &AgentConfig) -> anyhow::Result<()> {
    let (run, state) = (&config.run_dir, &config.state_dir);
    let of_fork =
        [(run.clone(), 0o755), (run.join("w"), 0o755), (run.join("log"), 0o700), (run.join("cni"), 0o700)];
    let of_all = [(state.clone(), 0o711), (state.join("w"), 0o711)];
    let of_fork = of_fork.into_iter().filter(|_| config.launcher() == LauncherKind::Fork);
    for (dir, mode) in of_fork.chain(of_all) {
        create(&dir, mode).with_context(|| {
            format!("can't create {}; run the agent as root, or as its package's unit does", dir.display())
        })?;
    }
    Ok(())
}

/// Also corrects a directory that exists: one that a shim can't pass would cost it the last-good configuration.
fn create(dir: &Path, mode: u32) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(mode))
}

/// Answers questions of control about Envoys.
#[derive(Debug)]
struct AdminSockets {
    launcher: Arc<dyn Launcher>,
    /// Knows which sidecar is whose; there is none yet while the agent starts.
    supervisor: Arc<OnceLock<Supervisor>>,
}

impl Inspector for AdminSockets {
    fn inspect(&self, kind: &str, parameters: Value) -> BoxFuture<'static, Result<Value, String>> {
        let text = |key: &str| parameters.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let (mesh, name, kind) = (text("mesh"), text("name"), kind.to_owned());
        let (launcher, supervisor) = (Arc::clone(&self.launcher), Arc::clone(&self.supervisor));
        async move {
            let supervisor = supervisor.get().ok_or("the agent is only starting; try again")?;
            let (workloads, _) = supervisor.status().await;
            let found = workloads.iter().find(|workload| workload.mesh == mesh && workload.name == name);
            let found = found.ok_or_else(|| format!("no workload {mesh}.{name} lives on this node"))?;
            inspect(&launcher.dir(&found.id), &kind, &parameters).await
        }
        .boxed()
    }
}
