//! A workload's end: drain, stop, rules gone.

use std::fs;
use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Life;
use crate::agent::control::chain;
use crate::agent::retry::Backoff;
use crate::agent::status::Phase;
use crate::agent::workload::Origin;

/// How often it is tried: an agent that is stopped meanwhile waits for it.
const ATTEMPTS: u32 = 4;

impl Life {
    /// Returns whether everything is gone. What couldn't be stopped keeps its rules, or its traffic would be open,
    /// and its description, so that a later agent removes both.
    pub(super) async fn tear_down(mut self) -> bool {
        self.set_phase(Phase::Draining);
        self.shared.session.deregister(&self.spec.mesh, &self.spec.name).await;
        let mut drain = Duration::from_secs(self.shared.config.load().drain_seconds.into());
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(4));
        for attempt in 1..=ATTEMPTS {
            let Err(error) = self.end(drain).await else {
                self.forget();
                self.set_phase(Phase::Stopped);
                tracing::info!(workload = %self.id, "the workload is gone");
                return true;
            };
            drain = Duration::ZERO;
            let next = if attempt < ATTEMPTS { "trying again" } else { "restart the agent to try again" };
            let error = format!("it can't be removed: {error}; its rules stay until it is stopped; {next}");
            tracing::error!(workload = %self.id, %error, attempt, "a workload isn't gone");
            self.status.send_modify(|status| status.error = Some(error));
            if attempt < ATTEMPTS {
                backoff.wait().await;
            }
        }
        false
    }

    async fn end(&self, drain: Duration) -> Result<(), String> {
        self.shared.launcher.stop(&self.id, drain).await.map_err(|error| chain(&error))?;
        if self.keep_redirect.load(Ordering::Relaxed) {
            return Ok(()); // for the successor, whose traffic it keeps closed until then
        }
        if matches!(self.spec.origin, Origin::Cni(_)) {
            // The pod may live on, whatever became of its record: the plugin takes its rules away when the runtime says
            // that it ends, or they go with its namespace. Until then it stays closed.
            self.shared.redirects.release(&self.id);
            return Ok(());
        }
        // Last: until here the rules keep the traffic closed.
        self.shared.redirects.remove(&self.spec).await
    }

    /// Identity, last-good configuration and description.
    fn forget(&self) {
        let dir = self.shared.state_dir(&self.id);
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::error!(dir = %dir.display(), %error, "files are left behind");
            }
            _ => {}
        }
    }
}
