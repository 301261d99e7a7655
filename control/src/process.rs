//! What belongs to the process: logging, signals, the runtime.

use std::io::IsTerminal as _;

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use crate::config::Config;

/// Logs to stderr: text for people, JSON lines for machines.
pub fn set_up_logging(filter: &str) -> anyhow::Result<()> {
    let parsed = EnvFilter::try_new(filter)
        .with_context(|| format!("{filter:?} is no log filter; try info, or ursa_control=debug,info"))?;
    let builder = tracing_subscriber::fmt().with_env_filter(parsed).with_writer(std::io::stderr);
    if std::io::stderr().is_terminal() {
        builder.init();
    } else {
        builder.json().flatten_event(true).init();
    }
    Ok(())
}

/// Says how it goes, where systemd asks for it (`Type=notify`).
pub fn tell_systemd(state: sd_notify::NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "systemd can't be told how it goes");
    }
}

/// Runs a control plane until SIGTERM or SIGINT.
pub fn run(config: Config) -> anyhow::Result<()> {
    // One provider for everybody; a second attempt finds the first one's and is no error.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("ursa-control")
        .build()
        .context("can't start the runtime")?;
    runtime.block_on(async {
        let shutdown = CancellationToken::new();
        let mut terminate = signal(SignalKind::terminate()).context("can't listen for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("can't listen for SIGINT")?;
        let mut hangup = signal(SignalKind::hangup()).context("can't listen for SIGHUP")?;
        let stop = shutdown.clone();
        tokio::spawn(async move {
            let name = loop {
                tokio::select! {
                    _ = terminate.recv() => break "SIGTERM",
                    _ = interrupt.recv() => break "SIGINT",
                    // Of a terminal that goes away; a service gets it from who expects a reload.
                    _ = hangup.recv() => {
                        if std::io::stderr().is_terminal() {
                            break "SIGHUP";
                        }
                        tracing::warn!("SIGHUP changes nothing: the configuration is read at the start only");
                    }
                }
            };
            tracing::info!(signal = name, "stopping; what is under way may finish");
            stop.cancel();
        });
        crate::run(config, shutdown).await
    })
}
