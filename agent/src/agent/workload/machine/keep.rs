//! What goes on beside a workload's steps: its stream to control, and its last-good configuration on disk.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::agent::control::Link;
use crate::agent::node::reason;
use crate::agent::retry::Backoff;
use crate::agent::session::Registration;
use crate::relay::{Cache, LastGood, Upstream, UpstreamState};

/// Keeps one discovery stream to control open.
pub(super) async fn keep_upstream(
    upstream: Upstream,
    cache: Arc<Cache>,
    mut links: watch::Receiver<Option<Link>>,
    mut registration: watch::Receiver<Registration>,
    error: watch::Sender<Option<String>>,
) {
    let mut backoff = Backoff::connection();
    loop {
        let Ok(link) = links.wait_for(Option::is_some).await.map(|link| link.clone()) else { return };
        if registration.wait_for(|state| *state == Registration::Registered).await.is_err() {
            return;
        }
        let Some(link) = link else { continue };
        let ended = upstream
            .run(link.channel, &cache, |state| {
                if state == UpstreamState::Synced {
                    backoff.reset();
                    error.send_replace(None);
                }
            })
            .await;
        let why = match ended {
            Ok(()) => "control ended the stream".to_owned(),
            Err(status) => reason(&status),
        };
        tracing::debug!(node = %upstream.node_id, reason = %why, "the discovery stream to control ended");
        error.send_replace(Some(format!("the discovery stream to control ended: {why}")));
        backoff.wait().await;
    }
}

/// Writes what Envoy has accepted to disk, the latest picture whenever the former is written.
pub(super) async fn keep_last_good(
    last_good: LastGood,
    cache: Arc<Cache>,
    error: watch::Sender<Option<String>>,
) {
    let mut changes = cache.changes();
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));
    let mut held = Some(last_good);
    while let Some(mut last_good) = held.take() {
        changes.mark_unchanged();
        let items = cache.good();
        let stored = tokio::task::spawn_blocking(move || {
            let result = last_good.store(&items);
            (last_good, result)
        })
        .await;
        let Ok((last_good, result)) = stored else { return };
        held = Some(last_good);
        match result {
            Ok(()) => {
                backoff.reset();
                error.send_replace(None);
                if changes.changed().await.is_err() {
                    return;
                }
            }
            Err(failure) => {
                let text = format!(
                    "{failure}; serving goes on, but a restart would get an older configuration until this works"
                );
                tracing::warn!(error = %text, "the last-good configuration isn't kept");
                error.send_replace(Some(text));
                backoff.wait().await;
            }
        }
    }
}
