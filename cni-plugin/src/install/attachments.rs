//! Who still needs the plugin.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use ursa_cni_protocol::Records;

use crate::agent;

use super::conflist::Conflist;

const PATIENCE: Duration = Duration::from_secs(2);

/// What is left of the plugin's pods.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Attachments {
    /// Containers whose configuration, as the runtime keeps it for DEL, names the plugin.
    pub(super) cached: Vec<String>,
    /// Containers whose sidecar the agent keeps.
    pub(super) sidecars: Vec<String>,
    /// Every container that the runtime keeps, ours or not.
    pub(super) alive: BTreeSet<String>,
}

impl Attachments {
    /// What the runtime's cache, the agent and the plugin's own notes know.
    pub(super) fn read(cache_dir: &Path, run_dir: &Path, own_type: &str) -> Self {
        let caches = caches(cache_dir);
        let ours =
            caches.iter().filter(|(_, list)| Conflist::parse(list).is_ok_and(|list| list.has(own_type)));
        Self {
            cached: ours
                .map(|(container, _)| container.clone())
                .collect::<BTreeSet<_>>()
                .into_iter()
                .collect(),
            sidecars: sidecars(run_dir),
            alive: caches.into_iter().map(|(container, _)| container).collect(),
        }
    }

    /// Whether nobody is left.
    pub(super) fn is_empty(&self) -> bool {
        self.cached.is_empty() && self.sidecars.is_empty()
    }
}

/// As libcni keeps them: a file for each attachment, with the whole list as it was at ADD.
fn caches(cache_dir: &Path) -> Vec<(String, String)> {
    let Ok(entries) = fs::read_dir(cache_dir.join("results")) else { return Vec::new() };
    let read = |path: &Path| {
        let cache: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        let config = STANDARD.decode(cache.get("config")?.as_str()?).ok()?;
        Some((cache.get("containerId")?.as_str()?.to_owned(), String::from_utf8(config).ok()?))
    };
    entries.flatten().filter_map(|entry| read(&entry.path())).collect()
}

/// Tells the agent which containers have gone: once its entry is out of the list, containerd no longer calls the
/// plugin for them. Those that nobody has seen alive may be about to start, and stay.
pub(super) fn tell_gone(run_dir: &Path, now: &Attachments, seen: &BTreeSet<String>) {
    let is_gone = |container: &&String| seen.contains(*container) && !now.alive.contains(*container);
    for container in now.sidecars.iter().filter(is_gone) {
        let request = json!({"cmd": "cni-del", "container_id": container});
        if let Err(error) = agent::ask(run_dir, &request, Duration::ZERO, PATIENCE) {
            eprintln!("ursa-cni: the agent can't be told that {container} has ended: {error}");
        }
        if let Err(error) = Records::below(run_dir).remove_all(container) {
            eprintln!("ursa-cni: the record of container {container} stays: {error}");
        }
    }
}

/// As the agent says, or, where none answers, as the plugin noted them.
fn sidecars(run_dir: &Path) -> Vec<String> {
    let Ok(answer) = agent::ask(run_dir, &json!({"cmd": "status"}), Duration::ZERO, PATIENCE) else {
        return Records::below(run_dir).containers();
    };
    let workloads = answer.pointer("/status/workloads").and_then(Value::as_array);
    workloads
        .into_iter()
        .flatten()
        .filter_map(|workload| workload.get("origin")?.as_str()?.strip_prefix("CNI container "))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_those_whose_cached_list_names_us() {
        let dir = tempfile::tempdir().unwrap();
        let results = dir.path().join("results");
        fs::create_dir(&results).unwrap();
        let write = |id: &str, list: &str| {
            let cache = json!({"kind": "cniCacheV1", "containerId": id, "config": STANDARD.encode(list)});
            fs::write(results.join(format!("pods-{id}-eth0")), cache.to_string()).unwrap();
        };
        write("b", r#"{"name":"pods","plugins":[{"type":"bridge"},{"type":"ursa-cni"}]}"#);
        write("a", r#"{"name":"pods","plugins":[{"type":"bridge"}]}"#);
        fs::write(results.join("torn"), "{").unwrap();
        fs::create_dir_all(dir.path().join("cni/meshed")).unwrap();
        fs::write(dir.path().join("cni/meshed/0:pods:eth0"), "{}").unwrap();
        let found = Attachments::read(dir.path(), dir.path(), "ursa-cni");
        assert_eq!((found.cached, found.sidecars), (vec!["b".to_owned()], vec!["meshed".to_owned()]));
        assert_eq!(found.alive, ["a".to_owned(), "b".to_owned()].into());
    }
}
