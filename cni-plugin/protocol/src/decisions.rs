//! The file by which the plugin decides while the agent is dead, and its counterpart.

use std::path::{Path, PathBuf};

/// The file: in the state directory and not in the run directory, because it must outlive a reboot.
pub fn file(state_dir: &Path) -> PathBuf {
    state_dir.join("decisions.json")
}

/// While it is there, the file is older than the agent's configuration, which couldn't be written (its disk is full, say):
/// the plugin asks the agent instead. It is empty. A reboot takes it away, and the agent that starts then puts it back
/// if it has to.
pub fn stale(run_dir: &Path) -> PathBuf {
    run_dir.join("decisions.stale")
}
