//! The agent on a Kubernetes node: a unit of the node's own systemd, brought there by a container.
//!
//! An agent within the container would take every sidecar with it when the container goes.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::attachments::Attachments;
use super::error::{InstallError, io};
use super::{Layout, file, plugin};

/// The programs of a node.
const PROGRAMS: [&str; 4] = ["ursa-agent", "ursa-shim", "ursa-init", "envoy"];
/// Where the image has programs and units.
const BIN: &str = "usr/bin";
const UNITS: &str = "usr/lib/systemd/system";
/// Where a node's own units are.
const NODE_UNITS: &str = "etc/systemd/system";
/// Where the agent's configuration is.
const CONFIG: &str = "etc/ursa/agent.yaml";
const AGENT: &str = "ursa-agent.service";

/// What to bring to the node, and where.
#[derive(Debug, Clone)]
pub struct Node {
    /// The node's file system.
    pub root: PathBuf,
    /// The file system that holds the programs and units.
    pub from: PathBuf,
    /// Directory of the programs on the node, such as `/opt/ursa`; below `root`.
    pub prefix: PathBuf,
    /// The agent's configuration.
    pub config: Option<PathBuf>,
}

impl Node {
    fn bin(&self) -> PathBuf {
        self.root.join(self.prefix.strip_prefix("/").unwrap_or(&self.prefix)).join("bin")
    }

    fn units(&self) -> PathBuf {
        self.root.join(NODE_UNITS)
    }

    /// Copies programs, units and configuration. Says which were changed.
    pub fn install(&self) -> Result<Vec<PathBuf>, InstallError> {
        let mut changed = Vec::new();
        let bin = self.bin();
        for dir in [bin.clone(), self.units(), self.root.join("etc/ursa/workloads.d")] {
            fs::create_dir_all(&dir).map_err(io("create", &dir))?;
            file::clean(&dir)?;
        }
        for program in PROGRAMS {
            let (from, to) = (self.from.join(BIN).join(program), bin.join(program));
            if !file::same(&from, &to) {
                file::replace_program(&to, &from, |_| Ok(()))?;
                changed.push(to);
            }
        }
        if let Some(config) = &self.config {
            let to = self.root.join(CONFIG);
            let text = fs::read_to_string(config).map_err(io("read", config))?;
            put(&to, &text, &mut changed)?;
        }
        for (name, text) in self.units_to_install()? {
            put(&self.units().join(name), &text, &mut changed)?;
        }
        Ok(changed)
    }

    /// The image's units, with the programs' place on this node.
    fn units_to_install(&self) -> Result<Vec<(String, String)>, InstallError> {
        let dir = self.from.join(UNITS);
        let mut units = Vec::new();
        for entry in fs::read_dir(&dir).map_err(io("read", &dir))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if !name.starts_with("ursa-") || name.starts_with("ursa-control") || entry.path().is_dir() {
                continue;
            }
            let text = fs::read_to_string(entry.path()).map_err(io("read", &entry.path()))?;
            units.push((name, self.placed(&text)));
        }
        units.sort();
        Ok(units)
    }

    /// A unit's text with the programs' place on this node.
    fn placed(&self, unit: &str) -> String {
        PROGRAMS.iter().fold(unit.to_owned(), |text, program| {
            text.replace(&format!("/{BIN}/{program}"), &format!("{}/bin/{program}", self.prefix.display()))
        })
    }

    /// Removes what [`install`](Self::install) brought; what is gone already doesn't matter. The agent's configuration
    /// and its state stay, as with a package.
    ///
    /// # Errors
    /// Sidecars still run, unless forced.
    pub fn remove(&self, layout: &Layout, force: bool) -> Result<Vec<PathBuf>, InstallError> {
        let sidecars = Attachments::read(&layout.cache_dir, &layout.run_dir, plugin::TYPE).sidecars;
        if !force && !sidecars.is_empty() {
            return Err(InstallError::Unusable {
                path: self.bin(),
                why: format!(
                    "the agent keeps the sidecars of {} pods ({})",
                    sidecars.len(),
                    sidecars.join(", ")
                ),
                next: "Restart these pods after `ursa-cni uninstall`, or use --force: they stay cut off until they are restarted.",
            });
        }
        self.systemctl(&["disable", "--now", AGENT]);
        let mut removed = Vec::new();
        let mut remove = |path: PathBuf| {
            if file::remove(&path)? {
                removed.push(path);
            }
            Ok::<_, InstallError>(())
        };
        for entry in fs::read_dir(self.units()).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("ursa-") && !name.starts_with("ursa-control") && !entry.path().is_dir() {
                remove(entry.path())?;
            }
        }
        for program in PROGRAMS {
            remove(self.bin().join(program))?;
        }
        // Only when they are empty.
        for dir in [Some(self.bin()), self.bin().parent().map(Path::to_owned)].into_iter().flatten() {
            let _ = fs::remove_dir(dir);
        }
        self.systemctl(&["daemon-reload"]);
        Ok(removed)
    }

    /// Starts the agent, or again when it was changed: Envoys stay. False where no systemd runs.
    pub fn start(&self, changed: bool) -> bool {
        let runs = self.systemctl(&["daemon-reload"]) && self.systemctl(&["enable", "--now", AGENT]);
        if runs && changed { self.systemctl(&["restart", AGENT]) } else { runs }
    }

    /// Asks the node's systemd, by the node's own `systemctl`.
    fn systemctl(&self, arguments: &[&str]) -> bool {
        if !self.root.join("run/systemd/system").is_dir() {
            return false;
        }
        // This very program again, which steps into the node's file system first.
        let Ok(own) = env::current_exe() else { return false };
        let done =
            Command::new(own).args(["node", "systemctl", "--root"]).arg(&self.root).args(arguments).status();
        match done {
            Ok(status) if status.success() => true,
            Ok(status) => {
                eprintln!("ursa-cni: `systemctl {}` on the node failed: {status}", arguments.join(" "));
                false
            }
            Err(error) => {
                eprintln!("ursa-cni: systemctl can't be started: {error}");
                false
            }
        }
    }
}

fn put(path: &Path, text: &str, changed: &mut Vec<PathBuf>) -> Result<(), InstallError> {
    if fs::read_to_string(path).ok().as_deref() != Some(text) {
        file::replace(path, text.as_bytes())?;
        changed.push(path.to_owned());
    }
    Ok(())
}

/// Becomes the node's `systemctl`. Comes back only when that fails.
pub(super) fn become_systemctl(root: &Path, arguments: &[String]) -> std::io::Error {
    use std::os::unix::process::CommandExt as _;
    if let Err(error) = std::os::unix::fs::chroot(root).and_then(|()| env::set_current_dir("/")) {
        return error;
    }
    let path = "/usr/sbin:/usr/bin:/sbin:/bin";
    Command::new("systemctl").args(arguments).env("PATH", path).env("SYSTEMD_IGNORE_CHROOT", "1").exec()
}
