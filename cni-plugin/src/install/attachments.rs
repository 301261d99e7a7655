//! Who still needs the plugin.

use std::fs;
use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

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
}

impl Attachments {
    /// What the runtime's cache and the agent know. No agent means no sidecars: it would have kept them.
    pub(super) fn read(cache_dir: &Path, run_dir: &Path, own_type: &str) -> Self {
        Self { cached: cached(cache_dir, own_type), sidecars: sidecars(run_dir) }
    }

    /// Whether nobody is left.
    pub(super) fn is_empty(&self) -> bool {
        self.cached.is_empty() && self.sidecars.is_empty()
    }
}

/// As libcni keeps them: a file for each attachment, with the whole list as it was at ADD.
fn cached(cache_dir: &Path, own_type: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(cache_dir.join("results")) else { return Vec::new() };
    let mut found: Vec<_> = entries
        .flatten()
        .filter_map(|entry| {
            let cache: Value = serde_json::from_slice(&fs::read(entry.path()).ok()?).ok()?;
            let config = STANDARD.decode(cache.get("config")?.as_str()?).ok()?;
            let list = String::from_utf8(config).ok()?;
            let container = cache.get("containerId").and_then(Value::as_str).unwrap_or("?");
            Conflist::parse(&list).ok()?.has(own_type).then(|| container.to_owned())
        })
        .collect();
    found.sort();
    found.dedup();
    found
}

fn sidecars(run_dir: &Path) -> Vec<String> {
    let Ok(answer) = agent::ask(run_dir, &json!({"cmd": "status"}), Duration::ZERO, PATIENCE) else {
        return Vec::new();
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
        let found = Attachments::read(dir.path(), dir.path(), "ursa-cni");
        assert_eq!(found, Attachments { cached: vec!["b".to_owned()], sidecars: Vec::new() });
    }
}
