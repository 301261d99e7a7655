//! Telling a shim that waits what the agent itself waits for, so that `systemctl status` can say it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::sleep;

use crate::agent::control::chain;
use crate::agent::status::{Phase, WorkloadStatus};
use crate::launcher::Launcher;
use crate::shim::client::ShimClient;

/// When a shim that couldn't be told is tried again.
const AGAIN: Duration = Duration::from_secs(1);

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
        let untold = words(&status.borrow()).is_some_and(|text| told.as_ref() != Some(&text));
        tokio::select! {
            // Its directory is there before it listens.
            () = sleep(AGAIN), if untold => {}
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
