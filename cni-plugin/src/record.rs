//! A file per meshed container below the run directory: written before anything is done for it, removed when
//! nothing is left. DEL and CHECK go by it and not by what a pod's annotations say by then; an agent that was away
//! sees by it who has gone.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde_json::json as object;

use crate::config::{Attachment, NetConf};
use crate::json;
use crate::spec::Environment;

/// The directory of these files, in the run directory. The agent reads it.
const DIR: &str = "cni";

fn path(run_dir: &Path, container: &str) -> PathBuf {
    run_dir.join(DIR).join(container)
}

/// Whether something was done for the container.
pub(crate) fn exists(conf: &NetConf, environment: &Environment) -> bool {
    path(&conf.run_dir, &environment.container_id).exists()
}

/// Every container for which something was done.
pub(crate) fn containers(run_dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(run_dir.join(DIR)) else { return Vec::new() };
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<_> = names.filter(|name| !name.starts_with('.')).collect();
    names.sort();
    names
}

/// Notes that something is done for the container.
pub(crate) fn write(conf: &NetConf, environment: &Environment) -> io::Result<()> {
    let path = path(&conf.run_dir, &environment.container_id);
    if let Some(dir) = path.parent() {
        fs::create_dir_all(&conf.run_dir)?;
        match fs::DirBuilder::new().mode(0o700).create(dir) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
    }
    let content = object!({
        "network": conf.name,
        "ifname": environment.ifname,
        "netns": environment.netns,
        "pod": environment.argument("K8S_POD_NAME"),
        "namespace": environment.argument("K8S_POD_NAMESPACE"),
        "uid": environment.argument("K8S_POD_UID"),
    });
    let temporary = path.with_file_name(format!(".{}.{}", environment.container_id, std::process::id()));
    let mut file =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(content.to_string().as_bytes())?;
    fs::rename(&temporary, &path)
}

/// Nothing is left of the container.
pub(crate) fn remove(conf: &NetConf, environment: &Environment) {
    match fs::remove_file(path(&conf.run_dir, &environment.container_id)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            eprintln!("ursa-cni: the record of container {} stays: {e}", environment.container_id);
        }
        _ => {}
    }
}

/// Removes the records of this network's containers that aren't among the attachments.
pub(crate) fn retain(conf: &NetConf, valid: &[Attachment]) {
    let Ok(entries) = fs::read_dir(conf.run_dir.join(DIR)) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let Some(container) = name.to_str().filter(|name| !name.starts_with('.')) else { continue };
        if valid.iter().any(|attachment| attachment.container_id == container) {
            continue;
        }
        let network = fs::read_to_string(entry.path()).ok();
        let network = network.as_deref().and_then(|text| json::member(text, "network"));
        let is_ours =
            network.and_then(|raw| serde_json::from_str::<String>(raw).ok()) == Some(conf.name.clone());
        if is_ours && let Err(error) = fs::remove_file(entry.path()) {
            eprintln!("ursa-cni: the record of container {container} stays: {error}");
        }
    }
}
