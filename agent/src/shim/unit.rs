//! What is different when systemd starts the shim: nobody gives it arguments, and it may come before any agent.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use nix::unistd::{Uid, User};
use tracing::{info, warn};

use super::protocol::{SETTINGS_FILE, Settings, UNITS_DIR};

/// The agent's user, as its package makes it.
pub const AGENT_USER: &str = "ursa-agent";
/// Where the agent keeps what belongs to workloads.
pub const STATE_DIR: &str = "/var/lib/ursa/agent";

/// Refuses to run where the unit's drop-in is missing.
pub(super) fn check_user(service: &str) -> anyhow::Result<()> {
    if Uid::effective().is_root() {
        bail!(
            "refusing to run Envoy as root; set User= in \
             /etc/systemd/system/ursa-sidecar@{service}.service.d/10-ursa.conf, as `ursa join` does"
        );
    }
    Ok(())
}

/// The directory that systemd made for this unit.
pub(super) fn directory(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(given) = given {
        return Ok(given.to_owned());
    }
    let made = std::env::var_os("RUNTIME_DIRECTORY").context(
        "RUNTIME_DIRECTORY is not set; with --service this program is started by systemd (ursa-sidecar@.service), or \
         wants --dir",
    )?;
    if made.as_encoded_bytes().contains(&b':') {
        bail!("RUNTIME_DIRECTORY={} names more than one directory; the unit must have one", made.display());
    }
    Ok(made.into())
}

/// Where an operator's command finds the shim of a service.
pub(super) fn directory_of(service: &str, given: Option<&Path>) -> PathBuf {
    given.map_or_else(|| Path::new(UNITS_DIR).join(service), Path::to_owned)
}

/// Who may give orders beside root: the agent's user by name or, where nobody has that name, whoever owns the agent's
/// state directory, which only root can have given away.
pub(super) fn agent_uid(name: &str, state_dir: &Path) -> Option<u32> {
    match User::from_name(name) {
        Ok(Some(user)) => return Some(user.uid.as_raw()),
        Ok(None) => {}
        Err(error) => warn!(%error, name, "the agent's user cannot be looked up"),
    }
    let owner = fs::metadata(state_dir).ok().map(|data| data.uid()).filter(|uid| *uid != 0);
    if owner.is_none() {
        info!(
            name,
            "no user of that name yet; only root may use control.sock until this sidecar starts again"
        );
    }
    owner
}

/// What the agent left on disk for this service; an error is what is wrong with it.
pub(super) fn settings(state_dir: &Path, service: &str) -> Result<Option<Settings>, String> {
    let path = state_dir.join("w").join(service).join(SETTINGS_FILE);
    let read = match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).map_err(|error| error.to_string()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => Err(error.to_string()),
    };
    let problem =
        |reason: String| format!("{} cannot be used: {reason}; the agent writes it again", path.display());
    let settings: Settings = read.map_err(problem)?;
    check(&settings).map_err(problem)?;
    Ok(Some(settings))
}

/// Whether settings make sense.
pub(super) fn check(settings: &Settings) -> Result<(), String> {
    let wrong = |what: &str| Err(what.to_owned());
    let (mesh, name) = settings.mesh_and_name();
    match () {
        () if mesh.is_empty() || name.is_empty() => {
            Err(format!("workload is {:?}, which is no <mesh>.<name>", settings.workload))
        }
        () if !settings.bootstrap.is_object() => wrong("bootstrap is no object"),
        () if settings.concurrency == 0 => wrong("concurrency is 0"),
        () if settings.dns_port == 0 => wrong("dns_port is 0"),
        () if !settings.envoy.is_absolute() => wrong("envoy is no absolute path"),
        () if !settings.last_good.is_absolute() => wrong("last_good is no absolute path"),
        () if !settings.dns_table.is_absolute() => wrong("dns_table is no absolute path"),
        () => super::log::check(&settings.log_level),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_agent_left_is_used_only_whole() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(settings(dir.path(), "web"), Ok(None));
        let w = dir.path().join("w/web");
        fs::create_dir_all(&w).unwrap();
        let good =
            r#"{"workload":"default.web","envoy":"/e","bootstrap":{},"last_good":"/l","dns_table":"/t"}"#;
        fs::write(w.join(SETTINGS_FILE), good).unwrap();
        assert_eq!(settings(dir.path(), "web").unwrap().unwrap().workload, "default.web");
        for (from, to, reason) in [
            ("\"/t\"}", "\"/t\"", "EOF"),
            ("default.web", "web", "no <mesh>.<name>"),
            ("\"bootstrap\":{}", "\"bootstrap\":1", "no object"),
            ("\"/e\"", "\"e\"", "envoy is no absolute"),
            ("{\"workload", "{\"log_level\":\"loud\",\"workload", "loud"),
            ("{\"workload", "{\"concurrency\":0,\"workload", "concurrency"),
        ] {
            fs::write(w.join(SETTINGS_FILE), good.replacen(from, to, 1)).unwrap();
            let error = settings(dir.path(), "web").unwrap_err();
            assert!(error.contains(reason) && error.contains("shim.json"), "{reason}: {error}");
        }
    }

    #[test]
    fn the_agent_is_known_by_name_or_by_what_it_owns() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(agent_uid("root", dir.path()), Some(0));
        std::os::unix::fs::chown(dir.path(), Some(64_777), None).ok();
        let owner = fs::metadata(dir.path()).unwrap().uid();
        assert_eq!(agent_uid("nobody-has-this-name", dir.path()), Some(owner).filter(|uid| *uid != 0));
        assert_eq!(agent_uid("nobody-has-this-name", Path::new("/")), None);
    }
}
