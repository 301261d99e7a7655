//! Ursa's control plane: store, REST API, tokens and access, identity issuing, discovery, generators.
//!
//! [`run`] assembles the parts around one [`ControlPlane`] and serves until it is told to stop.

pub mod access;
pub mod api;
pub mod config;
pub mod diagnostics;
pub mod discovery;
pub mod generators;
pub mod identity;
pub mod process;
pub mod rooms;
pub mod session;
pub mod store;
pub mod sweep;
pub mod tokens;
pub mod world;

use std::sync::{Arc, OnceLock};

use anyhow::Context as _;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use ursa_model::labels;

use crate::{
    api::{ApiState, server::Servers},
    config::{Config, Mode},
    store::Store,
    tokens::{TokenKind, Tokens},
};

/// What the parts of a running control plane share.
#[derive(Debug)]
pub struct ControlPlane {
    /// The effective configuration.
    pub config: Arc<Config>,
    /// Where everything is kept.
    pub store: Store,
    /// Signing keys and tokens.
    pub tokens: Tokens,
    /// The id of this process; dataplanes are connected to instances.
    pub instance_id: String,
    /// When it was started.
    pub started: time::OffsetDateTime,
    /// Cancelled when the process shall end.
    pub shutdown: CancellationToken,
    /// The tasks that must end before the process does.
    pub tasks: TaskTracker,
    /// Why the process ends, if not because it was told to.
    pub failure: Arc<OnceLock<String>>,
}

/// How long the parts may take to end; each has a shorter deadline of its own.
const STOP: std::time::Duration = std::time::Duration::from_secs(15);

impl ControlPlane {
    /// Opens the store and puts the shared parts together.
    pub fn open(config: Config) -> anyhow::Result<Arc<Self>> {
        let store = Store::open(&config.store_options())?;
        Ok(Arc::new(Self::new(config, store)))
    }

    /// Around an open store.
    pub fn new(config: Config, store: Store) -> Self {
        let config = Arc::new(config);
        Self {
            tokens: Tokens::new(store.clone(), config.clone()),
            config,
            store,
            instance_id: uuid::Uuid::new_v4().to_string(),
            started: time::OffsetDateTime::now_utc(),
            shutdown: CancellationToken::new(),
            tasks: TaskTracker::new(),
            failure: Arc::default(),
        }
    }

    /// What labels are computed from.
    pub fn label_context(&self) -> labels::Context {
        labels::Context {
            mode: match self.config.mode {
                Mode::Zone => labels::Mode::Zone,
                Mode::Global => labels::Mode::Global,
            },
            zone: self.config.zone().to_owned(),
            kubernetes: false,
            system_namespace: String::new(),
            namespace: String::new(),
            federated: self.config.is_federated(),
            check_origin: !self.config.multizone.zone.disable_origin_label_validation,
            privileged: false,
        }
    }
}

/// Runs a control plane until `shutdown` is cancelled, then lets its parts finish.
pub async fn run(config: Config, shutdown: CancellationToken) -> anyhow::Result<()> {
    for (key, what) in config.without_effect() {
        tracing::warn!("the setting {key} is accepted, but nothing acts on it yet: {what}; leave it out");
    }
    // Before anything is written: what can't listen doesn't start.
    let servers = Servers::bind(&config).await.context("can't start the control plane")?;
    // Nodes belong to zones; a global control plane has none.
    let listeners = match config.mode {
        Mode::Zone => Some(rooms::Listeners::bind(&config).await.context("can't start the control plane")?),
        Mode::Global => None,
    };
    let store = Store::open(&config.store_options()).context("can't start the control plane")?;
    let control = Arc::new(ControlPlane { shutdown, ..ControlPlane::new(config, store) });
    prepare(&control).await.context("can't prepare the store")?;
    let mut state = ApiState::new(control.clone());
    if let Some(listeners) = listeners {
        let rooms = rooms::start(&control, listeners).await.context("can't serve nodes")?;
        state = state.with_rooms(Arc::new(rooms));
    }
    servers
        .serve(&control.config, &api::router(state), &control.tasks, &control.shutdown)
        .context("can't serve the API")?;
    tracing::info!(zone = control.config.zone(), instance = %control.instance_id, "the control plane serves");
    process::tell_systemd(sd_notify::NotifyState::Ready);
    control.shutdown.cancelled().await;
    process::tell_systemd(sd_notify::NotifyState::Stopping);
    control.tasks.close();
    if tokio::time::timeout(STOP, control.tasks.wait()).await.is_err() {
        tracing::warn!("some tasks haven't ended within {STOP:?}; stopping without them");
    }
    if let Some(reason) = control.failure.get() {
        anyhow::bail!("{reason}");
    }
    tracing::info!("the control plane has stopped");
    Ok(())
}

/// What must be in the store before anybody is served: keys, and the first admin's token. What a process
/// that was killed left half deleted goes.
async fn prepare(control: &ControlPlane) -> anyhow::Result<()> {
    sweep::all(&control.store).await?;
    control.tokens.ensure_signing_key(&TokenKind::User).await?;
    control.tokens.ensure_signing_key(&TokenKind::Zone).await?;
    if control.config.api_server.authn.tokens.bootstrap_admin_token {
        control.tokens.bootstrap_admin_token().await?;
    }
    Ok(())
}
