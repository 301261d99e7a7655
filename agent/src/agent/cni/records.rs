//! The plugin's record of each meshed container: a file below the run directory, written before anything is done for
//! the container and removed when nothing is left. A container without one is gone, whoever was away when it went.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::json;

use super::CniAdd;
use crate::agent::config::AgentConfig;
use crate::relay::write_atomic;

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

/// Writes the record of a container that the agent itself puts into the mesh.
pub(crate) fn write(dir: &Path, call: &CniAdd) -> io::Result<()> {
    if !is_name(&call.container_id) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the container's id is no name of a file"));
    }
    let args = |key: &str| call.args.get(key);
    let content = json!({
        "network": call.config.name,
        "netns": call.netns,
        "pod": args("K8S_POD_NAME"),
        "namespace": args("K8S_POD_NAMESPACE"),
        "uid": args("K8S_POD_UID"),
    });
    write_atomic(&dir.join(&call.container_id), content.to_string().as_bytes(), 0o600, None)
}

/// Removes the record of a container that is gone.
pub(crate) fn remove(dir: &Path, container: &str) {
    if !is_name(container) {
        return;
    }
    match fs::remove_file(dir.join(container)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(container, %error, "the record of a container stays");
        }
        _ => {}
    }
}

fn is_name(container: &str) -> bool {
    !container.is_empty() && !container.starts_with('.') && !container.contains('/')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_gone_with_its_record_or_its_namespace() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path();
        let netns = dir.join("netns");
        fs::write(&netns, "").unwrap();
        assert!(is_gone(dir, "c1", Some(&netns)), "no record");
        let call = CniAdd { container_id: "c1".to_owned(), ..CniAdd::default() };
        write(dir, &call).unwrap();
        assert!(exists(dir, "c1") && !is_gone(dir, "c1", Some(&netns)));
        fs::remove_file(&netns).unwrap();
        assert!(is_gone(dir, "c1", Some(&netns)));
        remove(dir, "c1");
        assert!(!exists(dir, "c1"));
        assert!(write(dir, &CniAdd { container_id: "../x".to_owned(), ..CniAdd::default() }).is_err());
    }
}
