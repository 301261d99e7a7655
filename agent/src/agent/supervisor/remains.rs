//! What an agent left that was killed while it removed a workload's files: its key, without a description.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::SPEC_FILE;

/// Removes the folders in `dir` that describe nothing and belong to no workload that lives here.
pub(super) fn remove(dir: &Path, known: &BTreeSet<String>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let (id, dir) = (entry.file_name(), entry.path());
        let is_known = id.to_str().is_none_or(|id| known.contains(id));
        let described = !matches!(dir.join(SPEC_FILE).try_exists(), Ok(false));
        if is_known || described || !dir.is_dir() {
            continue;
        }
        match fs::remove_dir_all(&dir) {
            Ok(()) => tracing::info!(dir = %dir.display(), "removed what a former agent was removing"),
            Err(error) => tracing::error!(dir = %dir.display(), %error, "files are left behind"),
        }
    }
}
