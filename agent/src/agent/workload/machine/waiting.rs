//! Telling a shim that waits what the agent itself waits for, so that `systemctl status` can say it.

use std::sync::Arc;

use tokio::sync::watch;

use crate::agent::control::chain;
use crate::agent::status::{Phase, WorkloadStatus};
use crate::launcher::Launcher;
use crate::shim::client::ShimClient;

/// Tells the shim of `id`, whenever that changes, until Envoy is live. Never returns.
pub(super) async fn tell(
    launcher: Arc<dyn Launcher>,
    id: String,
    mut status: watch::Receiver<WorkloadStatus>,
) {
    let mut told = None;
    loop {
        let text = words(&status.borrow_and_update());
        if text.is_some() && text != told {
            let said = async {
                let client = ShimClient::connect(&launcher.dir(&id)).await?;
                client.waiting(text.as_deref().unwrap_or_default()).await
            };
            match said.await {
                Ok(()) => told = text,
                // Nobody to tell, or nobody who could pass it on; whoever appears is told anew.
                Err(error) => {
                    tracing::debug!(workload = %id, error = %chain(&error), "the shim isn't told what is awaited");
                }
            }
        }
        tokio::select! {
            changed = status.changed() => if changed.is_err() { return std::future::pending().await },
            () = launcher.appeared() => told = None,
        }
    }
}

fn words(status: &WorkloadStatus) -> Option<String> {
    let step = match status.state {
        Phase::Appeared => "the service's network namespace",
        Phase::Attested => "the redirect",
        Phase::Redirected => "a certificate",
        Phase::Identified => "the configuration from the control plane",
        _ => return None,
    };
    Some(match &status.error {
        Some(error) => format!("{step}: {error}"),
        None => step.to_owned(),
    })
}
