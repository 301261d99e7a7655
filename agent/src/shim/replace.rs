//! Replacing this program by the one that is installed now, in the same process.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::mpsc;
use tracing::info;

use super::envoy::{Handle, Snapshot};
use super::handover::{self, Handover};
use super::work::Work;

/// What it takes to be replaced.
pub(super) struct Replacement {
    /// Where packages put this program.
    pub(super) binary: PathBuf,
    pub(super) work: Arc<Work>,
    pub(super) envoy: Handle,
    pub(super) begin: mpsc::Sender<()>,
}

impl Replacement {
    /// Whether another file is installed than the one that runs.
    pub(super) fn is_outdated(&self) -> bool {
        let file = |path: &Path| fs::metadata(path).map(|data| (data.dev(), data.ino()));
        match (file(&self.binary), file(Path::new("/proc/self/exe"))) {
            (Ok(installed), Ok(running)) => installed != running,
            // Removed, or not to be seen: there is nothing to change to.
            _ => false,
        }
    }

    /// Whether the installed binary takes over from here. Nothing has changed when it doesn't.
    pub(super) async fn check(&self) -> Result<(), String> {
        let envoy = Snapshot::sample(self.envoy.status.borrow().clone());
        let sample = Handover::sample(self.work.present().clone(), envoy);
        let version = handover::check(&self.binary, &sample).await?;
        info!(binary = %self.binary.display(), version, "the installed binary takes over");
        Ok(())
    }

    /// Lets it begin. A second time changes nothing.
    pub(super) fn begin(&self) {
        let _ = self.begin.try_send(());
    }
}
