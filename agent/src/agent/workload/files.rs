//! The directory of workload files, and noticing when it changes.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::sys::inotify::AddWatchFlags;

use super::{Origin, WorkloadSpec};
use crate::agent::config::AgentConfig;
use crate::agent::status::BrokenFile;
use crate::inotify::Events;

/// The workload files.
#[derive(Debug)]
pub struct WorkloadFiles {
    dir: PathBuf,
    events: Option<Events>,
}

/// What the directory holds.
#[derive(Debug, Default)]
pub struct Scan {
    /// File → workload.
    pub specs: BTreeMap<PathBuf, WorkloadSpec>,
    /// Files that describe none.
    pub broken: Vec<BrokenFile>,
    /// The directory couldn't be listed: nothing is known of the files, least of all that they are gone.
    pub unlisted: bool,
}

impl WorkloadFiles {
    /// Watches `dir`, which is created if it doesn't exist.
    pub fn watch(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        // Only what ends a change: a half-written file is of no interest.
        let changes = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_MOVED_FROM
            | AddWatchFlags::IN_DELETE;
        let events = Events::of(dir, changes)?;
        Ok(Self { dir: dir.to_owned(), events: Some(events) })
    }

    /// Returns when something in the directory has changed.
    pub async fn changed(&mut self) {
        let Some(events) = &mut self.events else { return std::future::pending().await };
        if let Err(error) = events.next().await {
            tracing::error!(dir = %self.dir.display(), %error,
                "workload files are no longer watched; restart the agent after a change");
            self.events = None;
        }
    }

    /// Reads the whole directory.
    pub fn scan(&self, config: &AgentConfig) -> Scan {
        let mut scan = Scan::default();
        let listed = fs::read_dir(&self.dir)
            .and_then(|entries| entries.map(|entry| entry.map(|entry| entry.path())).collect());
        let mut paths: Vec<PathBuf> = match listed {
            Ok(paths) => paths,
            Err(error) => {
                scan.unlisted = true;
                scan.broken.push(BrokenFile {
                    path: self.dir.display().to_string(),
                    error: format!(
                        "can't list the directory: {error}; its workloads stay as they are, and it is tried again"
                    ),
                    running: false,
                });
                return scan;
            }
        };
        paths.sort();
        let mut owners: BTreeMap<String, PathBuf> = BTreeMap::new();
        for path in paths {
            let is_yaml = path.extension().is_some_and(|extension| extension == "yaml" || extension == "yml");
            let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
            if !is_yaml || hidden {
                continue;
            }
            let origin = Origin::File(path.display().to_string());
            let spec = fs::read_to_string(&path).map_err(|error| format!("can't be read: {error}")).and_then(
                |text| WorkloadSpec::from_yaml(&text, origin, config).map_err(|error| error.to_string()),
            );
            let spec = spec.and_then(|spec| match owners.get(&spec.id()) {
                Some(other) => Err(format!(
                    "{}.{} is already described by {}; rename or remove one of them",
                    spec.mesh,
                    spec.name,
                    other.display()
                )),
                None => Ok(spec),
            });
            match spec {
                Ok(spec) => {
                    owners.insert(spec.id(), path.clone());
                    scan.specs.insert(path, spec);
                }
                Err(error) => {
                    scan.broken.push(BrokenFile { path: path.display().to_string(), error, running: false });
                }
            }
        }
        scan
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WEB: &str = "type: Dataplane\nmesh: default\nname: web-1\n\
                       networking: {address: 10.0.0.1, inbound: [{port: 8080}]}\n";

    #[tokio::test]
    async fn a_change_wakes_and_a_broken_file_is_reported() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = WorkloadFiles::watch(dir.path()).unwrap();
        fs::write(dir.path().join("web.yaml"), WEB).unwrap();
        files.changed().await;
        fs::write(dir.path().join("broken.yaml"), "type: [").unwrap();
        fs::write(dir.path().join("again.yml"), WEB).unwrap();
        let scan = files.scan(&AgentConfig::default());
        assert_eq!(scan.specs.len(), 1);
        let broken: Vec<_> = scan.broken.iter().map(|file| file.error.as_str()).collect();
        assert_eq!(broken.len(), 2, "{broken:?}");
        assert!(broken.iter().any(|error| error.contains("already described")), "{broken:?}");
        assert!(!scan.unlisted);
        fs::remove_dir_all(dir.path()).unwrap();
        let scan = files.scan(&AgentConfig::default());
        assert!(scan.unlisted && scan.broken[0].error.contains("stay as they are"), "{:?}", scan.broken);
    }
}
