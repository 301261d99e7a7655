//! What keeps the installer from its work.

use std::io;
use std::path::{Path, PathBuf};

/// What was tried, what was found, and what to do next.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// The system refused.
    #[error("can't {tried} {}: {source}{}", .path.display(), hint(.source))]
    Io {
        /// The verb: `read`, `write`.
        tried: &'static str,
        /// Of what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// There is no network to chain into.
    #[error(
        "no network configuration in {} to chain ursa-cni into{found}; install a base CNI first (Calico, Cilium, flannel, \
         bridge …), or wait for it with `--watch`", .dir.display()
    )]
    Absent {
        /// Where.
        dir: PathBuf,
        /// What is there instead.
        found: String,
    },
    /// The file can't be edited.
    #[error("{} can't be used: {why}; nothing was changed. {next}", .path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
        /// What to do.
        next: &'static str,
    },
    /// Not every plugin of the list speaks its version.
    #[error(
        "{}: {why}; a runtime would skip the whole list, and pods would start outside the mesh. Nothing was changed. \
         Update that plugin or lower the list's cniVersion (1.0.0 suits most); `--skip-version-check` installs anyway",
        .path.display()
    )]
    Versions {
        /// The file.
        path: PathBuf,
        /// Which plugin, which version.
        why: String,
    },
    /// The plugin's own configuration is wrong.
    #[error("the configuration of ursa-cni ({origin}) is invalid: {why}; nothing was changed")]
    Plugin {
        /// Where it comes from.
        origin: String,
        /// What is wrong.
        why: String,
    },
    /// The new binary doesn't work here.
    #[error("{} doesn't work on this machine: {why}; the installed plugin was left as it is", .path.display())]
    Binary {
        /// The binary.
        path: PathBuf,
        /// What happened.
        why: String,
    },
    /// Another installer holds the lock.
    #[error(
        "{} has been locked for {seconds} s{}; no installer takes so long. Look what that one waits for, or end it, and run \
         this again; nothing was changed", .path.display(), .by.as_ref().map(|pid| format!(" by process {pid}")).unwrap_or_default()
    )]
    Busy {
        /// The lock's file.
        path: PathBuf,
        /// The holder's process id, where it can be told.
        by: Option<String>,
        /// How long it was waited.
        seconds: u64,
    },
    /// What was removed would come back.
    #[error(
        "`ursa-cni install --watch` runs on this node ({} is locked) and would put back what is removed; end it first: on \
         Kubernetes `kubectl delete daemonset -n ursa-system ursa-node`", .0.display()
    )]
    Watched(PathBuf),
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "; run it as root",
        io::ErrorKind::StorageFull => "; free some space and run it again: what was there is untouched",
        io::ErrorKind::ReadOnlyFilesystem => "; mount it writable, or name another directory",
        io::ErrorKind::NotFound => "; name the right directory (`ursa-cni install --help`)",
        _ => "",
    }
}

/// Puts a path and a verb to an error of the system.
pub(super) fn io<'a>(tried: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> InstallError + 'a {
    move |source| InstallError::Io { tried, path: path.to_owned(), source }
}
