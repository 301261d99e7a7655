//! The plugin's record of each meshed container: a file below the run directory, written before anything is done for
//! the container and removed when nothing is left. A container without one is gone, whoever was away when it went.

use std::path::{Path, PathBuf};

use crate::agent::config::AgentConfig;

/// Where they are.
pub(crate) fn dir(config: &AgentConfig) -> PathBuf {
    config.run_dir.join("cni")
}

/// Whether there is one.
pub(crate) fn exists(dir: &Path, container: &str) -> bool {
    is_name(container) && dir.join(container).exists()
}

/// Whether a container has surely gone: its record, or its network namespace. What can't be looked at is taken to
/// be there.
pub(crate) fn is_gone(dir: &Path, container: &str, netns: Option<&Path>) -> bool {
    let missing = |path: &Path| matches!(path.try_exists(), Ok(false));
    missing(&dir.join(container)) || netns.is_some_and(missing)
}

fn is_name(container: &str) -> bool {
    !container.is_empty() && !container.starts_with('.') && !container.contains('/')
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_container_is_gone_with_its_record_or_its_namespace() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path();
        let netns = dir.join("netns");
        fs::write(&netns, "").unwrap();
        assert!(is_gone(dir, "c1", Some(&netns)), "no record");
        fs::write(dir.join("c1"), "{}").unwrap();
        assert!(exists(dir, "c1") && !is_gone(dir, "c1", Some(&netns)));
        fs::remove_file(&netns).unwrap();
        assert!(is_gone(dir, "c1", Some(&netns)));
        assert!(!exists(dir, "../netns") && !exists(dir, ""));
    }
}
